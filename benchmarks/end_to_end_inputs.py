"""Inputs of `end_to_end`, the same for both sides: a language model, texts, windows of tokens, and our experiment file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from benchmarks.environment import allocator_of_children
from benchmarks.options import Options
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL, LanguageModelDescription
from saeens_pipeline.language_models.documents import Corpus, Split
from saeens_pipeline.language_models.gguf_loading import dequantise
from saeens_pipeline.language_models.gguf_models import SMOLLM2
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import SPLITS, TokenStore, open_tokens, write_tokens
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS, BUILTIN_PROSE, TextFiles

DATA = "SAEENS_DATA"
CONTEXT = 128
ROWS_PER_WINDOW = CONTEXT - 1  # the first position is an attention sink, left out on both sides
BATCH_WINDOWS = 32  # of the language model, on both sides
BATCH_TOKENS = 8 * ROWS_PER_WINDOW  # a batch of windows is whole batches of rows
WARM_UP = 0.05
SEED = 1
MAX_NORM = 10.0
SOURCE = "texts"
_CHARACTERS_PER_TOKEN = 10  # twice what they are, to have enough
_DEAD_AFTER_STEPS = 1000  # as SAELens

Precision = Literal["float32", "bfloat16"]


class Size(NamedTuple):
    """A language model, a corpus, SAEs and the numbers of tokens."""

    model: str
    module: str
    """Path of the block whose output is read, with {layer}."""
    layer: int
    corpus: str
    windows: int
    """Training windows, a multiple of ``BATCH_WINDOWS``."""
    test_windows: int
    expansion: int
    k: int
    saes: int
    learning_rate: float
    rounds: int
    """Repetitions of our runs; SAELens' are repeated by the SAEs."""

    @property
    def train_tokens(self) -> int:
        return self.windows * ROWS_PER_WINDOW

    @property
    def test_tokens(self) -> int:
        return self.test_windows * ROWS_PER_WINDOW

    def with_tokens(self, tokens: int | None) -> Size:
        """Return the size with about so many training tokens: whole batches of windows, at least one."""
        of_batch = BATCH_WINDOWS * ROWS_PER_WINDOW
        return self if tokens is None else self._replace(windows=BATCH_WINDOWS * max(round(tokens / of_batch), 1))


FULL = Size(SMOLLM2, "model.layers.{layer}", 12, BUILTIN_PROSE, 992, 64, 8, 32, 8, 3e-3, 2)
QUICK = Size(REFERENCE_MODEL, "gpt_neox.layers.{layer}", 1, BUILTIN_CORPUS, 160, 32, 8, 16, 2, 3e-3, 1)


@dataclass(frozen=True)
class Inputs:
    """Inputs of both sides, and the rows on which their SAEs are compared."""

    size: Size
    model: LanguageModelDescription
    folder: Path
    train_texts: Path
    test_texts: Path
    train_windows: Path
    test_windows: Path
    held_out: torch.Tensor
    """`[n, d_in]`, float32, without massive activations."""
    environment: dict[str, str]


def prepare(size: Size, options: Options) -> Inputs:
    """Write texts, windows and the language model's folder, and compute the held-out rows."""
    folder = options.scratch / "inputs"
    folder.mkdir()
    with _data_root(folder / "data"):
        description = describe_language_model(size.model)
        dequantise(description)
    say(f"{size.model} is at hand; texts of {size.corpus} ...")
    texts: dict[Split, Path] = {split: folder / f"{split}.jsonl" for split in SPLITS}
    source = open_corpus(size.corpus)
    for split, file in texts.items():
        _write_texts(file, source, split, size)
    description = describe_language_model(str(description.path))
    corpus = open_corpus(TextFiles.model_validate({"files": str(texts["train"]), "test_files": str(texts["test"])}))
    write_tokens(folder / "tokens.zarr", corpus, description, **_token_settings(size))
    tokens = open_tokens(folder / "tokens.zarr")
    windows: dict[Split, Path] = {split: folder / f"{split}.parquet" for split in SPLITS}
    for split, file in windows.items():
        _write_windows(file, tokens, split)
    variables = {name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", DATA)}
    return Inputs(
        size=size,
        model=description,
        folder=folder,
        train_texts=texts["train"],
        test_texts=texts["test"],
        train_windows=windows["train"],
        test_windows=windows["test"],
        held_out=_held_out(size, description, tokens),
        environment={**variables, **allocator_of_children(options.allocator)},
    )


@contextmanager
def _data_root(folder: Path) -> Iterator[None]:
    """Set the data root, which holds dequantised models, inside."""
    before = os.environ.get(DATA)
    os.environ[DATA] = str(folder)
    try:
        yield
    finally:
        del os.environ[DATA]
        os.environ.update({} if before is None else {DATA: before})


def _write_texts(file: Path, corpus: Corpus, split: Split, size: Size) -> None:
    """Write enough documents for the split. Runs of white space become a space: a line break next to a window's start is an outlier."""
    characters, wanted = 0, _CHARACTERS_PER_TOKEN * CONTEXT * (size.windows if split == "train" else size.test_windows)
    with file.open("w", encoding="utf-8") as lines:
        for document in corpus.documents(split):
            text = " ".join(document.text.split())
            lines.write(json.dumps({"text": text}) + "\n")
            characters += len(text)
            if characters >= wanted:
                break


def _token_settings(size: Size) -> dict[str, Any]:
    """Return the settings that `write_tokens` and an ActivationSource share."""
    return {
        "context_length": CONTEXT,
        "packing": "concatenate",
        "drop": ["first"],
        "train_tokens": size.train_tokens,
        "test_tokens": size.test_tokens,
    }


def windows_of(tokens: TokenStore, split: Split) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in tokens.batches(split, BATCH_WINDOWS)])


def _write_windows(file: Path, tokens: TokenStore, split: Split) -> None:
    from datasets import Dataset

    Dataset.from_dict({"tokens": windows_of(tokens, split).tolist()}).to_parquet(str(file))


def _held_out(size: Size, description: LanguageModelDescription, tokens: TokenStore) -> torch.Tensor:
    model = load_language_model(description)
    found = [
        model.activations(windows, "resid_post", [size.layer])[size.layer][:, 1:].flatten(0, 1)
        for windows in windows_of(tokens, "test").split(BATCH_WINDOWS)
    ]
    rows = torch.cat(found)
    norms = rows.norm(dim=1)
    return rows[norms <= MAX_NORM * norms.median()]


def experiment_file(inputs: Inputs, data: Path, precision: Precision, *, evaluated: bool) -> str:
    """Return our experiment file. ``evaluated``: with an experiment that evaluates the SAEs that the others have trained."""
    size = inputs.size
    source = {
        "name": SOURCE,
        "language_model": str(inputs.model.path),
        "language_model_dtype": precision,
        "corpus": {"files": str(inputs.train_texts), "test_files": str(inputs.test_texts)},
        "hook": "resid_post",
        "layers": [size.layer],
        **_token_settings(size),
        "max_norm": MAX_NORM,
        "dtype": "float16",
    }
    common = {"source": SOURCE, "baselines": [], "evaluations": ["reconstruction", "members"], "ce_loss_tokens": BATCH_WINDOWS * CONTEXT}
    trained = {
        **common,
        "sae": {"architecture": "topk", "expansion": size.expansion, "k": size.k, "decoder_init_norm": 0.1},
        "training": {
            "learning_rate": size.learning_rate,
            "learning_rate_warmup_fraction": WARM_UP,
            "batch_tokens": BATCH_TOKENS,
            "unit_norm_decoder": False,
            "dead_after_tokens": _DEAD_AFTER_STEPS * BATCH_TOKENS,
        },
    }
    experiments = [
        {"name": "one", **trained, "ensemble": {"members": 1, "seeds": [SEED]}},
        {"name": "several", **trained, "ensemble": {"members": size.saes, "seeds": [SEED]}},
    ]
    if evaluated:
        published = [{"member": number, "sae": str(sae)} for number, sae in enumerate(our_saes(data, size, "several"), start=1)]
        experiments.append({"name": "evaluated", **common, "ensemble": {"members": size.saes, "seeds": [SEED], "published": published}})
    documents = [{"type": "saeens_pipeline.components.ActivationSource", "attributes": source}]
    documents += [{"type": "saeens_pipeline.components.EnsembleExperiment", "attributes": each} for each in experiments]
    return yaml.safe_dump_all(documents, sort_keys=False)


def our_saes(data: Path, size: Size, experiment: str) -> list[Path]:
    members = data / "experiments" / experiment / f"layer={size.layer}" / f"seed={SEED}" / "bagging"
    return [members / f"member_{number}" for number in range(1, (1 if experiment == "one" else size.saes) + 1)]


def require_same_windows(inputs: Inputs, data: Path) -> None:
    """Raise ArithmeticError if a data root of ours has other windows than those given to SAELens."""
    given, ours = (open_tokens(path / "tokens.zarr") for path in (inputs.folder, data / "sources" / SOURCE))
    for split in SPLITS:
        if not torch.equal(windows_of(given, split), windows_of(ours, split)):
            raise ArithmeticError(f"the {split} windows of the two sides differ")


def say(text: str) -> None:
    """Print progress."""
    print(f"  {text}", file=sys.stderr)
