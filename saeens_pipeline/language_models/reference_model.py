"""The embedded reference model: a small GPT-NeoX, trained on the builtin corpus and part of the project.

With it the quickstart uses real text and a trained language model on a machine without access to the hub. `saeens reference-model train`
trains it again from the installed packages.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saeens_models.architectures.weight_files import write_safetensors
from saeens_pipeline.language_models.documents import Corpus, Document
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.tokens import batched

END_OF_TEXT = "<|endoftext|>"  # token 0: separates documents


@dataclass(frozen=True)
class ReferenceModelRecipe:
    """Settings that decide the reference model."""

    vocab_size: int = 4096
    context_length: int = 128
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    train_tokens: int = 45_056_000  # about two epochs: 22 000 steps
    batch_windows: int = 16  # windows of context_length tokens per step
    learning_rate: float = 2.5e-3  # peak; linear warm-up, then cosine decay to `final_learning_rate`
    final_learning_rate: float = 5e-5
    warmup_steps: int = 200
    weight_decay: float = 0.05  # on matrices only
    seed: int = 0


@dataclass(frozen=True)
class TrainingStatus:
    """One line of the training log; `bits_per_byte` is measured on held-out documents at some steps."""

    step: int
    tokens: int
    seconds: float
    loss: float  # nats per token, smoothed over about 100 steps
    bits_per_byte: float | None = None


def train_reference_model(
    output: Path,
    recipe: ReferenceModelRecipe | None = None,
    corpus: Corpus | None = None,
    compile_model: bool = False,
    report: Callable[[TrainingStatus], None] = lambda status: None,
) -> list[TrainingStatus]:
    """Train tokenizer and model on the corpus' training split, write them to `output` in transformers' format, and return the log.

    Also writes `training.json`: the recipe, the corpus (packages, documents, bytes, hash), versions and the log. Weights are stored in
    float16. `compile_model` needs a C++ compiler; training is then about a third faster. Raises FloatingPointError for a loss that is not
    finite.
    """
    recipe, corpus = recipe or ReferenceModelRecipe(), corpus or InstalledPackages()
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(corpus, recipe)
    tokenizer.save(str(output / "tokenizer.json"))
    train_ids = torch.cat([torch.tensor(ids) for ids in _encode(tokenizer, corpus.documents("train"))])
    held_out = _held_out_windows(tokenizer, corpus, recipe.context_length)
    predicted = tokenizer.decode_batch(held_out[:, 1:].tolist(), skip_special_tokens=False)
    predicted_bytes = sum(len(text.encode()) for text in predicted)

    torch.manual_seed(recipe.seed)
    model = _new_model(recipe)
    loss_of = torch.compile(_loss) if compile_model else _loss
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)

    tokens_per_step = recipe.batch_windows * recipe.context_length
    total_steps = recipe.train_tokens // tokens_per_step
    evaluate_every = max(1, total_steps // 24)
    log: list[TrainingStatus] = []
    smoothed, began = None, time.monotonic()
    for step, batch in enumerate(_batches(train_ids, recipe, total_steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step, total_steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smoothed = loss.item() if smoothed is None else 0.99 * smoothed + 0.01 * loss.item()
        if not math.isfinite(smoothed):
            raise FloatingPointError(f"the reference model's loss is {smoothed} at step {step}: lower the learning rate")
        status = TrainingStatus(step, step * tokens_per_step, time.monotonic() - began, smoothed)
        if step % evaluate_every == 0 or step == total_steps:
            status = replace(status, bits_per_byte=_bits_per_byte(model, held_out, predicted_bytes))
            log.append(status)
            _save(model, output, recipe, corpus, log)
        if status.bits_per_byte is not None or step % 100 == 0:
            report(status)
    return log


def _train_tokenizer(corpus: Corpus, recipe: ReferenceModelRecipe) -> Tokenizer:
    """Train a byte-level BPE, which encodes every text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for i, document in enumerate(corpus.documents("train")) if i % 4 == 0)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: Iterator[Document]) -> Iterator[list[int]]:
    """Yield the separator and the token ids of each document."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    for batch in batched(documents):
        yield from ([separator, *encoding.ids] for encoding in tokenizer.encode_batch([document.text for document in batch]))


def _held_out_windows(tokenizer: Tokenizer, corpus: Corpus, context_length: int, n_windows: int = 512) -> torch.Tensor:
    """Return token ids `[n, context_length]` of random windows of the test split."""
    windows = [
        ids[start : start + context_length]
        for ids in _encode(tokenizer, corpus.documents("test"))
        for start in range(0, len(ids) - context_length + 1, context_length)
    ]
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:n_windows].tolist()
    return torch.tensor([windows[i] for i in chosen])


def _new_model(recipe: ReferenceModelRecipe) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        intermediate_size=4 * recipe.d_model,
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    config._attn_implementation = "eager"  # on a CPU faster than the backward pass of the fused kernel at this size
    return GPTNeoXForCausalLM(config).train()


def _loss(model: GPTNeoXForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _batches(ids: torch.Tensor, recipe: ReferenceModelRecipe, n_steps: int) -> Iterator[torch.Tensor]:
    """Yield windows in random order; every epoch cuts the token stream at another offset."""
    generator = torch.Generator().manual_seed(recipe.seed)
    length, given = recipe.context_length, 0
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = ids[offset : offset + (len(ids) - offset) // length * length].view(-1, length)
        for chosen in torch.randperm(len(windows), generator=generator).split(recipe.batch_windows):
            if given == n_steps:
                return
            if len(chosen) == recipe.batch_windows:
                given += 1
                yield windows[chosen]


def _learning_rate(recipe: ReferenceModelRecipe, step: int, total_steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    decayed = recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * cosine
    return decayed * min(1.0, step / recipe.warmup_steps)


def _bits_per_byte(model: GPTNeoXForCausalLM, windows: torch.Tensor, predicted_bytes: int) -> float:
    model.eval()
    with torch.no_grad():
        nats = sum(float(_loss(model, batch)) * batch[:, 1:].numel() for batch in windows.split(64))
    model.train()
    return nats / math.log(2) / predicted_bytes


def _save(model: GPTNeoXForCausalLM, output: Path, recipe: ReferenceModelRecipe, corpus: Corpus, log: list[TrainingStatus]) -> None:
    model.config.save_pretrained(output)
    tied = {"embed_out.weight", "lm_head.weight"}
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items() if name not in tied}
    write_safetensors(weights, output / "model.safetensors", metadata={"format": "pt"})
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": corpus.identity | (corpus.summary() if isinstance(corpus, InstalledPackages) else {}),
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "log": [asdict(status) for status in log],
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
