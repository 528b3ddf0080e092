"""Files of Gemma Scope: ``params.npz`` with a JumpReLU SAE, in SAELens' shapes (Lieberum et al. 2024, arXiv 2408.05147)."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeens_models.architectures import SAE
from saeens_models.interop.foreign import Format, assemble, refuse_input_scale

_WEIGHTS = "params.npz"
_HOOKS = {"res": "blocks.{}.hook_resid_post", "mlp": "blocks.{}.hook_mlp_out", "att": "blocks.{}.attn.hook_z"}
"""Hooks in TransformerLens' names, by the part of the repository's name."""


def read(file: Path, input_scale: float | None) -> SAE:
    """``z = relu(pre) * (pre > threshold)`` with ``pre = x @ W_enc + b_enc``; ``x_hat = z @ W_dec + b_dec``.

    Language model, layer and hook are those that the names of the folders say, if they say them. Transcoders are refused by the
    repository's name, the only place that tells them apart.
    """
    refuse_input_scale(input_scale, file)
    if re.search(r"gemma-scope[^/]*-transcoders", file.parent.as_posix()):
        raise ValueError(f"{file}: transcoders map to other activations, and no SAE here does")
    weights = _arrays(file)
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp(min=0)  # of a negative one ReLU leaves 0
    return assemble("jumprelu", weights, file=file, apply_b_dec_to_input=False, metadata=_metadata(file.parent))


def _arrays(file: Path) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a whole npz file of plain arrays: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{file}: {name} is {array.dtype}, expected floating point")
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}


def _metadata(folder: Path) -> dict[str, Any]:
    model = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b", str(folder))
    layer = re.search(r"\blayer_(\d+)\b", str(folder))
    found: dict[str, Any] = {"converted_from": "gemma_scope"}
    if layer:
        found["hook_layer"] = int(layer[1])
    if model:
        found["model_name"] = f"google/gemma-2-{model[1]}{'-it' if model[2] == 'it' else ''}"
        if layer:
            found["hook_name"] = _HOOKS[model[3]].format(layer[1])
    return found


FORMAT = Format("gemma_scope", _WEIGHTS, (_WEIGHTS,), read, None)
