"""Tiny language models in transformers' format, built from a configuration, and the corpora to go with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from saeens_pipeline.language_models.documents import Document, Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END_OF_TEXT = 0
VOCAB_SIZE = 257  # one token per byte, and the end of text
D_MODEL = 16
N_LAYERS = 3
CONTEXT_LENGTH = 16


Architecture = Literal["gpt_neox", "llama", "gemma2", "gpt2"]


def write_tiny_model(path: Path, architecture: Architecture = "gpt_neox", seed: int = 0) -> Path:
    """A random model of 3 blocks with large enough weights that its blocks differ, and a tokenizer of one token per byte."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny_model(architecture).save_pretrained(path)
    write_tiny_tokenizer(path)
    return path


def tiny_model(architecture: Architecture) -> PreTrainedModel:
    """The model alone, its weights drawn from the global generator."""
    # imported here: processes that tests start import this module for its constants, and transformers takes seconds
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.2,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
    }
    match architecture:
        case "gpt_neox":
            return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(**sizes | {"intermediate_size": None, "n_inner": 32}))
        case "gemma2":  # every other layer sees a window; norms after attention and MLP, with weights that are not all the same
            model = Gemma2ForCausalLM(
                Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=CONTEXT_LENGTH // 2)
            )
            for name, weights in model.named_parameters():
                if "layernorm" in name:
                    torch.nn.init.normal_(weights, std=0.3)
            return model


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
}
"""Sizes by the names that most configurations of transformers give them."""


def write_random_model(path: Path, name: str, **settings: object) -> Path:
    """A class of transformers, such as `Falcon` (`FalconForCausalLM`), with these settings and random norms, and a tokenizer."""
    import transformers

    name, _, kind = name.partition("For")
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}For{kind or 'CausalLM'}")(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    write_tiny_tokenizer(path)
    return path


def write_tiny_tokenizer(path: Path) -> None:
    """A tokenizer of one token per byte, and one between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(path / "tokenizer.json"))


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@dataclass
class ListedCorpus:
    """A corpus of given texts."""

    train: Sequence[str]
    test: Sequence[str]
    read: dict[Split, int] = field(default_factory=lambda: {"train": 0, "test": 0})  # documents that were asked for

    @property
    def identity(self) -> dict[str, object]:
        return {"corpus": "listed"}

    def require_readable(self) -> None:
        """There is nothing to read."""

    def documents(self, split: Split) -> Iterator[Document]:
        for index, text in enumerate(getattr(self, split)):
            self.read[split] += 1
            yield Document(f"{split}-{index}", text, {"language": "python" if index % 2 else "prose"})
