"""One SAE in a folder, in the format of SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from saeens_models.architectures.base import SAE
from saeens_models.architectures.registry import sae_class
from saeens_models.architectures.weight_files import (
    check_finite,
    check_shapes,
    check_width,
    in_words,
    read_json,
    read_safetensors,
    write_safetensors,
)

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
_UNSUPPORTED = {"normalize_activations": "none", "reshape_activations": "none"}


class InputScaleMissingError(ValueError):
    """The weights of an SAE take scaled activations, and the scale is not in its files."""


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
    check_finite(weights, f"the {sae.config.architecture} SAE to save")
    cfg = {
        "architecture": sae.config.architecture,
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        **sae.saelens_fields(),
        "metadata": {
            **metadata,
            _OWN_CONFIG: sae.config.model_dump(mode="json"),
            **({} if trained_as is sae.config else {_TRAINED_AS: trained_as.model_dump(mode="json")}),
        },
    }
    write_saelens_folder(Path(path), cfg, weights)


def write_saelens_folder(folder: Path, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Write a folder of SAELens 6; ``cfg`` is completed by the fields that are the same for every SAE."""
    metadata = {"sae_lens_training_version": None, **cfg["metadata"], "sae_lens_version": SAELENS_VERSION}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    text = json.dumps({"dtype": dtype, "device": "cpu", **_UNSUPPORTED, **cfg, "metadata": metadata}, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_sae(path: str | Path, input_scale: float | None = None) -> SAE:
    """Load the SAE in the folder ``path``, written by :func:`save_sae` or by SAELens 3 to 6, on the CPU in float32.

    SAELens 3 to 5 name an activation function, too: TopK SAEs are standard ones with ``activation_fn_str: topk``.
    The SAE's ``metadata`` are those of the folder.

    ``input_scale``: for a folder with ``normalize_activations: expected_average_only_in``, whose weights take activations of mean norm
    ``sqrt(d_in)``: the factor that scales them so. It is folded into the weights, as SAELens does; codes stay those of the scaled input.

    Raises ``FileNotFoundError`` if the folder or one of its files is missing, and :class:`InputScaleMissingError`, a ``ValueError``, for
    such a folder without a scale. Raises ``ValueError`` for a file that cannot be read, an unknown architecture, a variant that is not
    supported, missing, superfluous or misshapen weights, and weights that are not finite.
    """
    folder = Path(path)
    for file in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: an SAE is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    cfg = _read_cfg(folder / CONFIG_FILE, input_scale)
    metadata = cfg["metadata"]
    weights = read_safetensors(folder / WEIGHTS_FILE)
    try:
        cls = sae_class(cfg["architecture"])
        check_shapes(weights, cls, cfg["d_in"], cfg["d_sae"], CONFIG_FILE)
        check_finite(weights, str(folder / WEIGHTS_FILE))
        own_fields, weights = cls.from_saelens(cfg, weights)
        if input_scale is not None:
            weights |= {"W_enc": weights["W_enc"] * input_scale} if "W_enc" in weights else {}
            weights |= {name: weights[name] / input_scale for name in ("W_dec", "b_dec")}
        written_by_us = metadata.get(_OWN_CONFIG, {})
        shared = {name: cfg[name] for name in ("architecture", "d_in", "d_sae", "apply_b_dec_to_input") if name in cfg}
        sae = cls(cls.config_class.model_validate({**written_by_us, **own_fields, **shared}))
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {in_words(error)}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    sae.load_state_dict(weights)
    sae.metadata = {name: value for name, value in metadata.items() if name not in (_OWN_CONFIG, "sae_lens_version")}
    return sae


def _read_cfg(file: Path, input_scale: float | None) -> dict[str, Any]:
    cfg = read_json(file)
    cfg = _as_saelens_6({"architecture": "standard", **cfg}, file)  # SAELens' own default
    for name in ("d_in", "d_sae"):
        check_width(file, name, cfg.get(name))
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(cfg.get(name, False), bool):
            raise ValueError(f"{file}: {name} must be true or false, found {cfg[name]!r}")
    if cfg.get("use_error_term"):
        raise ValueError(f"{file}: use_error_term: an error term, which no SAE here has")
    is_scaled = cfg.get("normalize_activations") == "expected_average_only_in"
    if is_scaled and input_scale is None:
        raise InputScaleMissingError(
            f"{file}: normalize_activations is 'expected_average_only_in': its weights take activations of mean norm sqrt(d_in). "
            "Give input_scale, sqrt(d_in) / (mean norm of the activations that it was trained on)"
        )
    if input_scale is not None:
        if not is_scaled or cfg["architecture"] == "matching_pursuit":
            raise ValueError(f"{file}: input_scale is given, and the SAE takes activations as they are")
        if not 0 < input_scale < float("inf"):
            raise ValueError(f"input_scale = {input_scale}: expected a positive number")
        cfg["normalize_activations"] = "none"
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
