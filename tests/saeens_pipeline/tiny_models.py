"""Tiny language models in transformers' format, built from a configuration, and the corpora to go with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saeens_pipeline.language_models.corpora import Document, Split

END_OF_TEXT = 0
VOCAB_SIZE = 257  # one token per byte, and the end of text
D_MODEL = 16
N_LAYERS = 3
CONTEXT_LENGTH = 16


def write_tiny_model(path: Path, architecture: Literal["gpt_neox", "llama"] = "gpt_neox", seed: int = 0) -> Path:
    """A random model of 3 blocks with large enough weights that its blocks differ, and a tokenizer of one token per byte."""
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)) if architecture == "gpt_neox" else LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


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

    def documents(self, split: Split) -> Iterator[Document]:
        for index, text in enumerate(getattr(self, split)):
            self.read[split] += 1
            yield Document(f"{split}-{index}", text, "python" if index % 2 else "prose")
