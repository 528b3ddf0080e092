"""Caching activations of the embedded language model, against SAELens' cache runner and a plain loop over transformers."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Contender, Stopwatch, compare
from saeens_pipeline.language_models.caching import cache_activations
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens, write_tokens
from saeens_pipeline.storage.activations import ActivationStore

TITLE = "Activation caching"
_LAYER = 1
_SAE_LENS_HOOK = f"gpt_neox.layers.{_LAYER}"
_CONTEXT, _BATCH_WINDOWS = 128, 32
_WINDOWS, _QUICK_WINDOWS = 2048, 128
_TEST_WINDOWS = 1  # a token store has a test split, too
_DTYPES: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")
_LARGEST_DIFFERENCE = 0.05
"""Largest accepted difference of single activations. They go up to 50, where half a step of float16 is 0.016."""


class _Source(NamedTuple):
    model: LanguageModel
    tokens: TokenStore
    windows: torch.Tensor
    """`[n, context]`: the tokens of the training split."""


def run(options: Options) -> Section:
    """Measure tokens per second from token ids to activations on disk, at the output of the second block."""
    n_windows = _QUICK_WINDOWS if options.quick else _WINDOWS
    source = _prepare(options.scratch / "tokens.zarr", n_windows)
    folders = (options.scratch / f"run_{number}" for number in count())
    rows, left_out = [], {}
    for dtype in _DTYPES:
        our_folder = options.scratch / f"ours_{dtype}"
        ours = Contender("saeens", f"cache_activations, stored as {dtype}", partial(_ours, source, folders, dtype))
        peers = [
            Contender(
                f"transformers, {dtype}",
                f"model(..., output_hidden_states=True), written to a raw {dtype} memory map",
                partial(_transformers, source, folders, dtype),
            )
        ]
        _ours(source, iter([our_folder]), dtype)
        first_rows = ActivationStore(our_folder).read_chunk("train", 0).float()
        try:
            peers.append(_sae_lens(source, folders, dtype, first_rows))
        except ImportError as error:
            left_out[f"SAELens, which cannot be imported: {error}"] = None
        case = f"{n_windows * _CONTEXT:,} tokens, d_in {first_rows.shape[1]}, {dtype}"
        rows += [compare(case, ours, peer, options.effort, tokens=n_windows * _CONTEXT) for peer in peers]
    about = f"The embedded language model in float32, output of block {_LAYER}, windows of {_CONTEXT} tokens, {_BATCH_WINDOWS} at a time."
    notes = [
        "Ours also writes the origin of every row and statistics, SAELens the token ids; both stop the forward pass "
        "after the block. Loading the model does not count."
    ]
    return Section(TITLE, about, rows, list(left_out), notes)


def _prepare(path: Path, n_windows: int) -> _Source:
    description = describe_language_model(REFERENCE_MODEL)
    write_tokens(
        path,
        open_corpus("builtin/installed_packages"),
        description,
        context_length=_CONTEXT,
        packing="concatenate",
        drop=[],
        train_tokens=n_windows * _CONTEXT,
        test_tokens=_TEST_WINDOWS * _CONTEXT,
    )
    tokens = open_tokens(path)
    windows = torch.cat([batch.tokens for batch in tokens.batches("train", _BATCH_WINDOWS)])
    return _Source(load_language_model(description), tokens, windows)


def _ours(source: _Source, folders: Iterator[Path], dtype: Literal["float32", "float16"]) -> float:
    stopwatch = Stopwatch()
    with stopwatch:
        cache_activations(source.model, source.tokens, "resid_post", {_LAYER: next(folders)}, dtype, batch_windows=_BATCH_WINDOWS)
    return stopwatch.seconds


def _transformers(source: _Source, folders: Iterator[Path], dtype: str) -> float:
    model, path = source.model.model, next(folders).with_suffix(".npy")
    stopwatch = Stopwatch()
    with stopwatch, torch.no_grad():
        shape = (source.windows.numel(), source.model.description.d_model)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        done = 0
        for tokens in source.windows.split(_BATCH_WINDOWS):
            hidden = cast("Any", model)(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[_LAYER + 1]
            file[done : done + tokens.numel()] = hidden.flatten(0, 1).numpy()
            done += tokens.numel()
        file.flush()
    return stopwatch.seconds


def _sae_lens(source: _Source, folders: Iterator[Path], dtype: str, expected: torch.Tensor) -> Contender:
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    d_in = expected.shape[1]

    def cache() -> tuple[float, Dataset]:
        config = CacheActivationsRunnerConfig(
            dataset_path="given below",
            model_name=str(source.model.description.path),
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            model_batch_size=_BATCH_WINDOWS,
            hook_name=_SAE_LENS_HOOK,
            d_in=d_in,
            training_tokens=source.windows.numel(),
            context_size=_CONTEXT,
            new_cached_activations_path=str(next(folders)),
            shuffle=False,
            dtype=dtype,
            device="cpu",
            buffer_size_gb=source.windows.numel() * d_in * np.dtype(dtype).itemsize / 1e9,
        )
        runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"tokens": source.windows.tolist()}))
        stopwatch = Stopwatch()
        with stopwatch:
            cached = runner.run()
        return stopwatch.seconds, cached

    n_windows = len(expected) // _CONTEXT
    found = cache()[1].with_format("torch")[:n_windows][_SAE_LENS_HOOK].flatten(0, 1).float()
    difference = float((found - expected[: len(found)]).abs().max())
    if difference > _LARGEST_DIFFERENCE:
        raise ArithmeticError(f"SAELens caches other activations: they differ by up to {difference}")
    settings = (
        f"CacheActivationsRunner, dtype={dtype}, model_batch_size={_BATCH_WINDOWS}, AutoModelForCausalLM in float32 (by default it takes "
        "the files' float16, which is slower on a CPU), pre-tokenised data set, shuffle=False, one buffer for all tokens (to fill the "
        "default of 2 GB it would go through the tokens several times)"
    )
    return Contender(f"SAELens, {dtype}", settings, lambda: cache()[0])
