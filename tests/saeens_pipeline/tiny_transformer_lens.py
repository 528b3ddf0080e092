"""GELU-1L's architecture, tiny and with three blocks, in TransformerLens' own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import CONTEXT_LENGTH, D_MODEL, N_LAYERS, VOCAB_SIZE, write_tiny_tokenizer

CONFIG = {  # the keys of GELU-1L's own file
    "d_model": D_MODEL,
    "n_layers": N_LAYERS,
    "n_ctx": CONTEXT_LENGTH,
    "d_vocab": VOCAB_SIZE,
    "d_head": 8,
    "n_heads": 2,
    "d_mlp": 32,
    "act_fn": "gelu",
    "attn_only": False,
    "normalization": "LN",
    "shortformer_pos": False,
    "seed": 98742,
    "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits",
}


def tiny_hooked(**changes: Any) -> Any:
    """The model, with what is to be different, every weight drawn so that its blocks differ and biases are not zero."""
    import transformer_lens  # pyright: ignore[reportMissingImports]

    keys = ("d_model", "n_layers", "n_ctx", "d_vocab", "d_head", "n_heads", "d_mlp", "act_fn")
    fields = {key: CONFIG[key] for key in keys} | changes
    hooked = transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**fields, normalization_type="LN", device="cpu"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in hooked.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator) * 0.3)
    return hooked.eval()


def write_hooked(folder: Path, hooked: Any, *, pickled: bool = False, **changes: object) -> Path:
    """Configuration, with what is to be different, weights and tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    weights = {name: value for name, value in hooked.state_dict().items() if not name.endswith(("mask", "IGNORE"))}
    if pickled:
        torch.save(weights, folder / "model_final.pth")
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    write_tiny_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    return folder
