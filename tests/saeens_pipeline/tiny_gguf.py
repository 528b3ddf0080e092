"""Tiny Llama models in GGUF files, written with the package gguf as llama.cpp lays them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TOKENS = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "\u0120t"]  # one token per byte, the end of text, and " t", which is one merge
D_MODEL, N_LAYERS, N_HEADS, CONTEXT_LENGTH, END_OF_TEXT = 32, 3, 2, 16, 0
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama(seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    """A random model of three blocks whose sizes are multiples of the 32 weights of a quantised block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        intermediate_size=64,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def write_gguf(
    file: Path,
    model: LlamaForCausalLM | None = None,
    quantised: str = "F32",
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    leave_out: str = "",
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write a Llama model with its matrices in this type of weights, and leave one tensor out, or the tokenizer."""
    model = model or tiny_llama()
    kind = gguf.GGMLQuantizationType[quantised]
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(64)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(D_MODEL // N_HEADS)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(TOKENS) - 1)])
        writer.add_token_merges(["\u0120 t"])
        writer.add_bos_token_id(END_OF_TEXT)
        writer.add_eos_token_id(END_OF_TEXT)
    change(writer)
    state: dict[str, Any] = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, weights in state.items():
        values = weights.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbouring dimensions, transformers the two halves of a head
            values = values.reshape(N_HEADS, 2, -1, D_MODEL).swapaxes(1, 2).reshape(values.shape)
        own = _gguf_name(name)
        if own != leave_out:
            is_matrix = values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32
            data = gguf.quantize(values, kind) if is_matrix else np.ascontiguousarray(values)
            writer.add_tensor(own, data, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OTHERS:
        return f"{_OTHERS[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_BLOCK[part]}.weight"
