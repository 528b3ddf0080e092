"""Folders of sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors``. SAEs are TopK with ``b_dec`` subtracted from the input."""

import json
from pathlib import Path

from saeens_models.architectures import SAE
from saeens_models.architectures.weight_files import read_json, read_safetensors, write_safetensors
from saeens_models.interop.foreign import Format, assemble, refuse_input_scale
from saeens_models.interop.rewriting import with_input_bias

_CONFIG = "cfg.json"
_WEIGHTS = "sae.safetensors"
_OWN = "saeens_metadata"
"""Field of ``cfg.json`` with the metadata, for which the format has no place; its loader leaves it out."""
_MISSING = {"skip_connection": "a skip connection", "transcode": "a transcoder"}


def read(file: Path, input_scale: float | None) -> SAE:
    """``z`` keeps the k largest of ``relu((x - b_dec) @ encoder.weight.T + encoder.bias)``; ``x_hat = z @ W_dec + b_dec``.

    Refused: groupmax, transcoders, skip connections, encoders without a decoder.
    """
    refuse_input_scale(input_scale, file)
    config_file = file.parent / _CONFIG
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} is missing: a folder of sparsify has {_CONFIG} and {_WEIGHTS}")
    cfg = read_json(config_file)
    for field, what in _MISSING.items():
        if cfg.get(field):
            raise ValueError(f"{config_file}: {field}: {what}, which no SAE here has")
    activation = cfg.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"{config_file}: activation {activation!r} is not supported, only 'topk'")
    weights = read_safetensors(file)
    if "W_skip" in weights:
        raise ValueError(f"{file}: W_skip: a skip connection, which no SAE here has")
    named = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    if doubled := sorted(theirs for theirs, ours in named.items() if {theirs, ours} <= weights.keys()):
        raise ValueError(f"{file}: {doubled[0]} and {named[doubled[0]]}: the same weights twice")
    weights = {named.get(name, name): weight for name, weight in weights.items()}
    if "W_enc" in weights:
        weights["W_enc"] = weights["W_enc"].t().contiguous()
    width = cfg.get("num_latents") or None
    if width is None and isinstance(cfg.get("expansion_factor"), int) and isinstance(cfg.get("d_in"), int):
        width = cfg["expansion_factor"] * cfg["d_in"]
    return assemble(
        "topk", weights, file=file, config=config_file, apply_b_dec_to_input=True, stated={"d_in": cfg.get("d_in"), "d_sae": width},
        metadata=cfg[_OWN] if isinstance(cfg.get(_OWN), dict) else {"hookpoint": file.parent.name, "converted_from": "sparsify"},
        k=cfg.get("k", 32),
    )  # fmt: skip


def write(sae: SAE, folder: Path) -> None:
    """Write a TopK SAE; ``b_dec`` is subtracted from the input in this format, so that ``b_enc`` takes it up where it was not."""
    if sae.config.architecture != "topk":
        raise ValueError(f"sparsify has TopK SAEs only, and this is a {sae.config.architecture} SAE")
    config = sae.config
    sae = with_input_bias(sae, True)
    weights = {
        "encoder.weight": sae.W_enc.detach().t(),
        "encoder.bias": sae.b_enc.detach(),
        "W_dec": sae.W_dec.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.d_sae,
        "k": config.model_dump()["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
        _OWN: sae.metadata,
    }
    write_safetensors({name: weight.cpu().contiguous() for name, weight in weights.items()}, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


FORMAT = Format("sparsify", f"{_CONFIG} and {_WEIGHTS}", (_WEIGHTS,), read, write)
