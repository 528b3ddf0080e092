"""One SAE in a folder, in the format of SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeens_models.architectures.base import SAE
from saeens_models.architectures.registry import sae_class

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""SAELens version of the format. SAELens treats a file without a version as older than ``metadata``, and drops the metadata."""
_OWN_CONFIG = "saeens_config"
_TRAINED_AS = "saeens_trained_as"
_OLD_METADATA = (
    "model_name",
    "hook_name",
    "hook_layer",
    "hook_head_index",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "neuronpedia_id",
)
"""Metadata that SAELens 3 to 5 write among the other fields."""
_LARGEST = 2**30
"""Largest width. A larger one cannot be meant, and sizes in bytes stay below 2^63."""
_UNSUPPORTED = {"normalize_activations": "none", "reshape_activations": "none"}


def save_sae(sae: SAE, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write ``sae`` into the folder ``path``, which is created if it is missing. ``sae_lens.SAE.load_from_disk`` reads the folder.

    ``sae.inference_form()`` is written: batch_topk, which SAELens has for training only, as jumprelu. ``metadata`` (JSON values:
    model_name, hook_name, ...) are added to ``sae.metadata``, and both are written under ``metadata`` with the full configuration.
    Existing files are overwritten in place. The umask decides who may read new ones.

    Raises ``ValueError`` for weights that are not finite.
    """
    metadata = {**sae.metadata, **(metadata or {})}
    trained_as, sae = sae.config, sae.inference_form()
    weights = {name: weight.detach().cpu().contiguous() for name, weight in sae.state_dict().items()}
    _check_finite(weights, f"the {sae.config.architecture} SAE to save")
    cfg = {
        "architecture": sae.config.architecture,
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "dtype": str(weights["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        **_UNSUPPORTED,
        **sae.saelens_fields(),
        "metadata": {
            "sae_lens_training_version": None,
            **metadata,
            "sae_lens_version": SAELENS_VERSION,
            _OWN_CONFIG: sae.config.model_dump(mode="json"),
            **({} if trained_as is sae.config else {_TRAINED_AS: trained_as.model_dump(mode="json")}),
        },
    }
    text = json.dumps(cfg, indent=2, sort_keys=True) + "\n"
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def write_safetensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that other new files have: safetensors lets only the owner read its files."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    file.chmod(mode)


def load_sae(path: str | Path) -> SAE:
    """Load the SAE in the folder ``path``, written by :func:`save_sae` or by SAELens 3 to 6, on the CPU in float32.

    SAELens 3 to 5 name an activation function, too: TopK SAEs are standard ones with ``activation_fn_str: topk``.
    The SAE's ``metadata`` are those of the folder.

    Raises ``FileNotFoundError`` if the folder or one of its files is missing. Raises ``ValueError`` for a file that cannot be read, an
    unknown architecture, a variant that is not supported, missing, superfluous or misshapen weights, and weights that are not finite.
    """
    folder = Path(path)
    for file in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: an SAE is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    cfg = _read_cfg(folder / CONFIG_FILE)
    metadata = cfg["metadata"]
    weights = _read_weights(folder / WEIGHTS_FILE)
    try:
        cls = sae_class(cfg["architecture"])
        _check_shapes(weights, cls, cfg)
        _check_finite(weights, str(folder / WEIGHTS_FILE))
        own_fields, weights = cls.from_saelens(cfg, weights)
        written_by_us = metadata.get(_OWN_CONFIG, {})
        shared = {name: cfg[name] for name in ("architecture", "d_in", "d_sae", "apply_b_dec_to_input") if name in cfg}
        sae = cls(cls.config_class.model_validate({**written_by_us, **own_fields, **shared}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{folder / CONFIG_FILE}: {problems}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    sae.load_state_dict(weights)
    sae.metadata = {name: value for name, value in metadata.items() if name not in (_OWN_CONFIG, "sae_lens_version")}
    return sae


def _read_cfg(file: Path) -> dict[str, Any]:
    try:
        cfg = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{file}: expected an object, found {type(cfg).__name__}")
    cfg = _as_saelens_6({"architecture": "standard", **cfg}, file)  # SAELens' own default
    for name in ("d_in", "d_sae"):
        if type(cfg.get(name)) is not int or not 1 <= cfg[name] <= _LARGEST:
            raise ValueError(f"{file}: {name} must be a positive integer, found {repr(cfg.get(name))[:80]} (largest: {_LARGEST})")
    for name, supported in _UNSUPPORTED.items():
        if cfg.get(name, supported) not in (supported, None):
            raise ValueError(f"{file}: {name} is {cfg[name]!r}; only {supported!r} is supported: fold it into the weights first")
    return cfg


def _as_saelens_6(cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a ``cfg.json`` of SAELens 3 to 5 with the fields of SAELens 6; one of SAELens 6 stays as it is.

    Raises ``ValueError`` for an activation function that the architecture does not have.
    """
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    if cfg.get("metadata") is None:
        old = {"hook_name": cfg.get("hook_point"), "hook_layer": cfg.get("hook_point_layer"), **cfg}
        cfg["metadata"] = {name: old[name] for name in _OLD_METADATA if old.get(name) is not None}
    if not isinstance(cfg["metadata"], dict) or not isinstance(cfg["metadata"].get(_OWN_CONFIG, {}), dict):
        raise ValueError(f"{file}: metadata and its {_OWN_CONFIG} must be objects")
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if activation == "topk" and cfg["architecture"] in ("standard", "topk"):
        of_function = cfg.get("activation_fn_kwargs")
        k = of_function.get("k") if isinstance(of_function, dict) else None
        return {"k": k, **cfg, "architecture": "topk"}
    if activation not in ("relu", cfg["architecture"]):
        raise ValueError(f"{file}: activation function {activation!r} of architecture {cfg['architecture']!r} is not supported")
    return cfg


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    except (KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file} holds tensors that torch cannot read: {error!r}") from error
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{file}: {name} is {weight.dtype}, expected floating point; quantised weights need their scale")
    return {name: weight.float() for name, weight in weights.items()}


def _check_shapes(weights: Mapping[str, Tensor], cls: type[SAE], cfg: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        sizes = {"d_in": cfg["d_in"], "d_sae": cfg["d_sae"]}
        expected = {name: list(weight.shape) for name, weight in cls(cls.config_class.model_construct(**sizes)).state_dict().items()}
    found = {name: list(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = [
            f"{name} {found.get(name, 'missing')} (expected {expected.get(name, 'none')})"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        raise ValueError(f"weights do not fit {CONFIG_FILE}: {', '.join(wrong)}")


def _check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{where}: {name} holds values that are not finite")
