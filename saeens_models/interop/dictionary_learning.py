"""Folders of dictionary_learning: ``ae.pt``, a dict of tensors as torch pickles it, and ``config.json``.

The pickle is read with ``weights_only=True``: anything but plain tensors is refused.
"""

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeens_models.architectures import SAE
from saeens_models.architectures.weight_files import as_float32, read_json
from saeens_models.interop.foreign import Format, assemble, refuse_input_scale
from saeens_models.interop.rewriting import with_input_bias

_WEIGHTS = "ae.pt"
_CONFIG = "config.json"
_OWN = "saeens_metadata"
"""Field of ``config.json`` with the metadata; its loader reads ``trainer`` alone."""
_BUFFERS = ("k", "threshold", "group_sizes")
_UNIT = 1e-5, 1e-8
"""Relative and absolute tolerance within which its loader takes decoder rows for unit ones."""


class _Class(NamedTuple):
    """A dictionary class: our architecture, and our names of its tensors. Matrices of ``nn.Linear`` are transposed."""

    architecture: str
    subtracts_b_dec: bool
    names: Mapping[str, str]
    prepare: Callable[[dict[str, Tensor]], None] = lambda weights: None


def _with_unit_decoder(weights: dict[str, Tensor]) -> None:
    """Give decoder rows norm 1, and the encoder their norms, as its loader does."""
    norms = weights["W_dec"].norm(dim=1)
    if not norms.all():
        raise RuntimeError(f"decoder row {int((norms == 0).nonzero()[0])} is zero, and its loader divides rows by their norms")
    if not _are_unit(norms):
        weights |= {"W_dec": weights["W_dec"] / norms[:, None], "W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms}


def _are_unit(norms: Tensor) -> bool:
    return torch.allclose(norms, torch.ones_like(norms), *_UNIT)


def _with_threshold_of_each(weights: dict[str, Tensor]) -> None:
    """Give every feature the scalar threshold. Its ReLU comes first: a negative threshold, of a short training, is 0."""
    if weights["threshold"].numel() != 1:
        raise RuntimeError(f"threshold is {list(weights['threshold'].shape)}, expected one number")
    threshold = weights.pop("threshold").clamp(min=0)
    weights["threshold"] = threshold.expand(len(weights["W_dec"])).contiguous()


def _with_threshold_of_relu(weights: dict[str, Tensor]) -> None:
    weights["threshold"] = weights["threshold"].clamp(min=0)


_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_THRESHOLD = {"threshold": "threshold"}
_GATED = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec",
    "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag",
}  # fmt: skip
CLASSES = {
    "AutoEncoder": _Class("standard", True, {**_LINEAR, "bias": "b_dec"}, _with_unit_decoder),
    "AutoEncoderNew": _Class("standard", False, {**_LINEAR, "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": _Class("gated", True, _GATED),
    "JumpReluAutoEncoder": _Class("jumprelu", False, {**_PLAIN, **_THRESHOLD}, _with_threshold_of_relu),
    "AutoEncoderTopK": _Class("topk", True, {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": _Class("jumprelu", True, {**_LINEAR, "b_dec": "b_dec", **_THRESHOLD}, _with_threshold_of_each),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", True, {**_PLAIN, **_THRESHOLD}, _with_threshold_of_each),
}
"""The dictionary classes that can be read, by the name in ``dict_class``."""
_WRITTEN_AS = {"standard": "AutoEncoderNew", "gated": "GatedAutoEncoder", "jumprelu": "JumpReluAutoEncoder", "topk": "AutoEncoderTopK"}


def read(file: Path, input_scale: float | None) -> SAE:
    """Read a dictionary of one of the :data:`CLASSES`, as ``load_dictionary`` of dictionary_learning does.

    A dictionary of `BatchTopKSAE` and `MatryoshkaBatchTopKSAE` is a JumpReLU SAE with its threshold, with which it encodes.
    """
    refuse_input_scale(input_scale, file)
    config_file = file.parent / _CONFIG
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} is missing: a folder of dictionary_learning has {_WEIGHTS} and {_CONFIG}")
    config = read_json(config_file)
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise ValueError(f"{config_file}: trainer and buffer must be objects")
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{config_file}: dict_class {name!r} is not supported; one of {', '.join(CLASSES)}")
    kind = CLASSES[name]
    found = _tensors(file)
    buffers = {each: found.pop(each) for each in _BUFFERS if each in found and each not in kind.names}
    fields = {"k": _k(trainer, buffers, config_file)} if kind.architecture == "topk" else {}
    unknown, missing = sorted(found.keys() - kind.names.keys()), sorted(kind.names.keys() - found.keys())
    if unknown or missing:
        raise ValueError(f"{file}: not the tensors of {name}: unknown {unknown or 'none'}, missing {missing or 'none'}")
    weights = as_float32({kind.names[each]: weight for each, weight in found.items()}, file)
    for each in ("encoder.weight", "decoder.weight"):
        if each in found:
            weights[kind.names[each]] = weights[kind.names[each]].t().contiguous()
    try:
        kind.prepare(weights)
    except RuntimeError as error:
        raise ValueError(f"{file}: tensors do not fit the class or each other: {error}") from error
    return assemble(
        kind.architecture, weights, file=file, config=config_file, apply_b_dec_to_input=kind.subtracts_b_dec,
        stated={"d_in": trainer.get("activation_dim"), "d_sae": trainer.get("dict_size")},
        metadata=config[_OWN] if isinstance(config.get(_OWN), dict) else _metadata(name, trainer, buffer), **fields,
    )  # fmt: skip


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict. Raises ``ValueError`` for anything else, and for views of smaller storage."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, AttributeError, OSError, MemoryError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} is not a whole file of plain tensors, and nothing else is unpickled: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and isinstance(each, Tensor) for name, each in found.items()):
        raise ValueError(f"{file}: expected a dict of tensors by name, as state_dict() returns it")
    for name, each in found.items():
        if each.is_sparse or each.is_meta or each.numel() * each.element_size() > each.untyped_storage().nbytes():
            raise ValueError(f"{file}: {name} is not a plain tensor")
    return dict(found)


def _k(trainer: Mapping[str, Any], buffers: Mapping[str, Tensor], config_file: Path) -> object:
    stated = trainer.get("k")
    if "k" in buffers and buffers["k"].numel() == 1:
        stored = buffers["k"].item()
        if not math.isfinite(stored) or stored != round(stored):
            raise ValueError(f"{config_file.parent / _WEIGHTS}: k = {stored}, expected a whole number")
        stored = int(stored)
        if stated is not None and stated != stored:
            raise ValueError(f"{config_file}: k = {stated!r}, and {_WEIGHTS} says {stored}")
        return stored
    return stated


def _metadata(name: str, trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> dict[str, Any]:
    hook = trainer.get("submodule_name")
    block = re.fullmatch(r"resid_post_layer_(\d+)", hook) if isinstance(hook, str) else None
    return {
        "model_name": trainer.get("lm_name"),
        "hook_layer": trainer.get("layer"),
        "hook_name": f"blocks.{block[1]}.hook_resid_post" if block else hook,
        "context_size": buffer.get("ctx_len"),
        "converted_from": f"dictionary_learning {name}",
    }


def write(sae: SAE, folder: Path) -> None:
    """Write the dictionary class with the same codes and reconstructions.

    A standard SAE is `AutoEncoderNew`, since the loader of `AutoEncoder` gives the decoder unit rows and so changes codes; it is
    `AutoEncoder` where rows are unit ones and b_dec is subtracted. Refused: matching pursuit, for which there is no class.
    """
    sae = sae.inference_form()
    architecture, metadata = sae.config.architecture, sae.metadata
    name = _WRITTEN_AS.get(architecture)
    if name is None:
        raise ValueError(f"dictionary_learning has no class for a {architecture} SAE")
    if architecture == "standard" and sae.config.apply_b_dec_to_input and _are_unit(sae.W_dec.detach().norm(dim=1)):
        name = "AutoEncoder"
    sae = with_input_bias(sae, CLASSES[name].subtracts_b_dec)
    weights = sae.state_dict()
    tensors: dict[str, Tensor] = {}
    for theirs, ours in CLASSES[name].names.items():
        weight = weights[ours].detach().cpu()
        tensors[theirs] = (weight.t() if theirs in ("encoder.weight", "decoder.weight") else weight).contiguous()
    config: dict[str, Any] = {"dict_class": name, "activation_dim": sae.config.d_in, "dict_size": sae.config.d_sae}
    if architecture == "topk":
        config["k"] = sae.config.model_dump()["k"]
        tensors |= {"k": torch.tensor(config["k"], dtype=torch.int), "threshold": torch.tensor(-1.0)}
    config |= {"lm_name": metadata.get("model_name"), "layer": metadata.get("hook_layer"), "submodule_name": metadata.get("hook_name")}
    torch.save(tensors, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(
        json.dumps({"trainer": config, "buffer": {"ctx_len": metadata.get("context_size")}, _OWN: metadata}, indent=2) + "\n",
        encoding="utf-8",
    )


FORMAT = Format("dictionary_learning", f"{_WEIGHTS} and {_CONFIG}", (_WEIGHTS, "ae_*.pt"), read, write)
