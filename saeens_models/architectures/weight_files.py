"""Files of weights: what is read is checked before it becomes an SAE."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeens_models.architectures.base import SAE

_LARGEST = 2**30
"""Largest width. A larger one cannot be meant, and sizes in bytes stay below 2^63."""


def write_safetensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that other new files have: safetensors lets only the owner read its files."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    file.chmod(mode)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ``ValueError`` for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object, found {type(found).__name__}")
    return found


def in_words(error: ValidationError, whole: str = "configuration") -> str:
    """Return what pydantic complains of: field and message. ``whole`` stands for the object where no field is named."""
    found = (f" (found: {repr(each['input'])[:40]})" if not isinstance(each["input"], dict) else "" for each in error.errors())
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or whole}: {each['msg']}{value}" for each, value in zip(error.errors(), found, strict=True)
    )


def without_escapes(message: object) -> str:
    """Return a message on one line, without the escape sequences of a terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(message)).split())


def check_width(file: Path, name: str, value: object) -> int:
    """Return a width. Raises ``ValueError`` unless it is an integer of a possible size."""
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{file}: {name} must be a positive integer, found {repr(value)[:80]} (largest: {_LARGEST})")
    return value


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in float32. Raises ``ValueError`` for a file that cannot be read and other number types."""
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    except (KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file} holds tensors that torch cannot read: {error!r}") from error
    return as_float32(weights, file)


def as_float32(weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the weights in float32. Raises ``ValueError`` for weights that are not floating-point numbers."""
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{file}: {name} is {weight.dtype}, expected floating point; quantised weights need their scale")
    return {name: weight.float() for name, weight in weights.items()}


def check_shapes(weights: Mapping[str, Tensor], cls: type[SAE], d_in: int, d_sae: int, stated_in: str) -> None:
    """Raise ``ValueError`` unless these are the weights of an SAE of these widths, which the file ``stated_in`` gives."""
    with torch.device("meta"):
        sae = cls(cls.config_class.model_construct(d_in=d_in, d_sae=d_sae))
    expected = {name: list(weight.shape) for name, weight in sae.state_dict().items()}
    found = {name: list(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = [
            f"{name} {found.get(name, 'missing')} (expected {expected.get(name, 'none')})"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        raise ValueError(f"weights do not fit {stated_in}: {', '.join(wrong)}")


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ``ValueError`` for weights that are not finite."""
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{where}: {name} holds values that are not finite")
