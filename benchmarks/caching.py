"""Caching activations of two language models, against SAELens' cache runner and a plain loop over transformers."""

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
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.caching import cache_activations
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.gguf_models import SMOLLM2
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens, write_tokens
from saeens_pipeline.storage.activations import ActivationStore

TITLE = "Activation caching"
_CONTEXT, _BATCH_WINDOWS = 128, 32
_TEST_WINDOWS = 1  # a token store has a test split, too
_LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 0.03}
"""Largest accepted root mean square error of rows, as a share of their norm, by the dtype of the forward pass."""

Dtype = Literal["float32", "float16", "bfloat16"]


class _Case(NamedTuple):
    model: str
    corpus: str
    layer: int
    peer_hook: str
    """Hook of SAELens: a module path."""
    windows: int
    forward: Dtype
    """dtype of the forward pass, of all sides."""
    stored: Dtype


_REFERENCE = _Case(REFERENCE_MODEL, "builtin/installed_packages", 1, "gpt_neox.layers.1", 2048, "float32", "float32")
_SMOLLM2 = _Case(SMOLLM2, "builtin/prose", 12, "model.layers.12", 256, "float32", "float16")
_CASES = (
    _REFERENCE,
    _REFERENCE._replace(stored="float16"),
    _SMOLLM2,
    _SMOLLM2._replace(forward="bfloat16"),
)
_QUICK_WINDOWS = 128


class _Source(NamedTuple):
    case: _Case
    model: LanguageModel
    tokens: TokenStore
    windows: torch.Tensor
    """`[n, context]`: the tokens of the training split."""


def run(options: Options) -> Section:
    """Measure tokens per second from token ids to activations on disk, at the output of a block."""
    folders = (options.scratch / f"run_{number}" for number in count())
    rows, left_out, notes = (
        [],
        {},
        [
            "Ours also writes the origin of every row and statistics, SAELens the token ids; both stop the pass after the block. The "
            "plain loop, model(..., output_hidden_states=True), computes all blocks and the logits. Loading the model does not count."
        ],
    )
    in_float32: dict[str, float] = {}
    for case in _CASES[:2] if options.quick else _CASES:
        try:
            source = _prepare(next(folders), case._replace(windows=min(case.windows, _QUICK_WINDOWS) if options.quick else case.windows))
        except ConfigurationError as error:  # the package of the language model is not installed
            left_out[f"{case.model}: {error}"] = None
            continue
        our_folder = next(folders)
        ours = Contender("saeens", f"cache_activations, {case.forward}, stored as {case.stored}", partial(_ours, source, folders))
        loop = f"model(..., output_hidden_states=True), {case.forward}, written to a raw {case.stored} memory map"
        peers = [Contender(f"transformers, {case.forward}", loop, partial(_transformers, source, folders))]
        _ours(source, iter([our_folder]))
        first_rows = ActivationStore(our_folder).read_chunk("train", 0).float()
        try:
            peers.append(_sae_lens(source, folders, first_rows))
        except ImportError as error:
            left_out[f"SAELens, which cannot be imported: {error}"] = None
        n_tokens = source.windows.numel()
        name = f"{case.model}, layer {case.layer}, {n_tokens:,} tokens, d_in {first_rows.shape[1]}, {case.forward}, stored as {case.stored}"
        measured = [compare(name, ours, peer, options.effort, tokens=n_tokens) for peer in peers]
        rows += measured
        key = f"{case.model}, layer {case.layer}"
        if case.forward == "float32":
            in_float32[key] = measured[0].ours.seconds
        elif key in in_float32:
            notes.append(_beside_float32(source, key, in_float32[key] / measured[0].ours.seconds))
    about = f"Output of a block, windows of {_CONTEXT} tokens; the peers take {_BATCH_WINDOWS} windows at a time, ours its own batches."
    return Section(TITLE, about, rows, list(left_out), notes)


def _prepare(path: Path, case: _Case) -> _Source:
    description = describe_language_model(case.model)
    write_tokens(
        path,
        open_corpus(case.corpus),
        description,
        context_length=_CONTEXT,
        packing="concatenate",
        drop=[],
        train_tokens=case.windows * _CONTEXT,
        test_tokens=_TEST_WINDOWS * _CONTEXT,
    )
    tokens = open_tokens(path)
    windows = torch.cat([batch.tokens for batch in tokens.batches("train", _BATCH_WINDOWS)])
    return _Source(case, load_language_model(description, dtype=case.forward), tokens, windows)


def _beside_float32(source: _Source, name: str, ratio: float) -> str:
    """Return the speed and the error of a forward pass in another dtype, on the same tokens."""
    layer, windows = source.case.layer, source.windows[:64]
    exact = load_language_model(source.model.description)
    found, expected = (
        model.activations(windows, "resid_post", [layer])[layer][:, 1:].flatten(0, 1).float() for model in (source.model, exact)
    )
    within = expected.norm(dim=1) <= 10 * expected.norm(dim=1).median()
    error, rows = (found - expected)[within], expected[within]
    share = float(error.square().sum() / (rows - rows.mean(0)).square().sum())
    return (
        f"{name}, {source.case.forward}: {ratio:.1f} times as fast as our float32, medians of this run; its error is "
        f"{float(error.norm() / rows.norm()):.2%} of the norm (root mean square), {share:.3%} of the variance "
        f"({len(rows):,} tokens, without first positions and massive activations)."
    )


def _ours(source: _Source, folders: Iterator[Path]) -> float:
    stopwatch = Stopwatch()
    with stopwatch:
        cache_activations(source.model, source.tokens, "resid_post", {source.case.layer: next(folders)}, source.case.stored)
    return stopwatch.seconds


def _transformers(source: _Source, folders: Iterator[Path]) -> float:
    model, path = source.model.model, next(folders).with_suffix(".npy")
    stopwatch = Stopwatch()
    with stopwatch, torch.no_grad():
        shape = (source.windows.numel(), source.model.description.d_model)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=source.case.stored, shape=shape)
        done = 0
        for tokens in source.windows.split(_BATCH_WINDOWS):
            hidden = cast("Any", model)(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[source.case.layer + 1]
            file[done : done + tokens.numel()] = hidden.flatten(0, 1).to(getattr(torch, source.case.stored)).numpy()
            done += tokens.numel()
        file.flush()
    return stopwatch.seconds


def _sae_lens(source: _Source, folders: Iterator[Path], expected: torch.Tensor) -> Contender:
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    d_in, (_, _, _, hook, _, forward, stored) = expected.shape[1], source.case

    def cache() -> tuple[float, Dataset]:
        config = CacheActivationsRunnerConfig(
            dataset_path="given below",
            model_name=str(source.model.description.path),
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": getattr(torch, forward)},
            model_batch_size=_BATCH_WINDOWS,
            hook_name=hook,
            d_in=d_in,
            training_tokens=source.windows.numel(),
            context_size=_CONTEXT,
            new_cached_activations_path=str(next(folders)),
            shuffle=False,
            dtype=stored,
            device="cpu",
            buffer_size_gb=source.windows.numel() * d_in * np.dtype(stored).itemsize / 1e9,
        )
        runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"tokens": source.windows.tolist()}))
        stopwatch = Stopwatch()
        with stopwatch:
            cached = runner.run()
        return stopwatch.seconds, cached

    n_windows = len(expected) // _CONTEXT
    found = cache()[1].with_format("torch")[:n_windows][hook].flatten(0, 1).float()
    error = float((found - expected[: len(found)]).norm() / expected[: len(found)].norm())
    if error > _LARGEST_ERROR[forward]:
        raise ArithmeticError(f"SAELens caches other activations: they differ by {error:.2%} of their norm")
    settings = (
        f"CacheActivationsRunner, dtype={stored}, model_batch_size={_BATCH_WINDOWS}, AutoModelForCausalLM in {forward} (by default "
        "that of the files; float16 is slower on a CPU), pre-tokenised data set, shuffle=False, one buffer for all tokens (to fill the "
        "default of 2 GB it would go through the tokens several times)"
    )
    return Contender(f"SAELens, {forward}", settings, lambda: cache()[0])
