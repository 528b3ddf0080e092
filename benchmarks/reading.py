"""Shuffled reading of stored activations, against a raw memory map, zarr-python and SAELens' store and buffer."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Contender, Stopwatch, compare
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationStore

TITLE = "Activation reading"
_D_IN = 768
_ROWS, _QUICK_ROWS = 2**18, 2**15
_BATCH_TOKENS = 4096
_MIXING_CHUNKS = 64
_SEED = 0
_WRITTEN_AT_ONCE = 2**14
_CONTEXT, _PROMPTS, _TUTORIAL_BATCHES = 128, 32, 64  # of SAELens: rows per sequence, sequences read at once, n_batches_in_buffer
_HOOK = "activations"


_SETTINGS = {
    "saeens": f"ActivationStore.batches, mixing_chunks={_MIXING_CHUNKS}",
    "raw memmap": "numpy.memmap of the bare rows; the same chunks mixed, one gather from the map per batch, then float32",
    "zarr-python": "the same store through zarr.Array, chunk by chunk; the same chunks mixed",
}


class _Stored(NamedTuple):
    """The same rows in the formats of both sides."""

    store: Path
    raw: Path
    n_rows: int


def run(options: Options) -> Section:
    """Measure one pass over all rows, in float32 batches."""
    n_rows = _QUICK_ROWS if options.quick else _ROWS
    stored = _write(options.scratch, n_rows)
    reader = ActivationStore(stored.store)
    exact = {
        "saeens": lambda: reader.batches("train", _BATCH_TOKENS, seed=_SEED, mixing_chunks=_MIXING_CHUNKS),
        "raw memmap": lambda: _from_memmap(stored, reader.chunk_rows),
        "zarr-python": lambda: _from_zarr(stored, reader.chunk_rows),
    }
    _check_same_rows(exact)
    ours, *peers = (_contender(name, _SETTINGS[name], batches) for name, batches in exact.items())
    left_out = []
    try:
        peers += _sae_lens_contenders(stored, options.scratch / "arrow")
    except ImportError as error:
        left_out.append(f"SAELens, which cannot be imported: {error}")
    case = f"{n_rows:,} rows of {_D_IN} float16"
    os.sync()  # no writes to disk during the measurement
    for contender in (ours, *peers):
        contender.run()  # fills the page cache
    rows = [compare(case, ours, peer, options.effort, tokens=n_rows) for peer in peers]
    notes = [
        "Files are in the page cache. SAELens' buffer drops the rows of a last incomplete batch; all others give every row exactly once."
    ]
    about = f"One shuffled pass in float32 batches of {_BATCH_TOKENS}; values are Gaussian, which no side's time depends on."
    return Section(TITLE, about, rows, left_out, notes)


def _contender(name: str, settings: str, batches: Callable[[], Iterator[Tensor]]) -> Contender:
    def run() -> float:
        stopwatch = Stopwatch()
        with stopwatch:
            for batch in batches():
                if batch.dtype != torch.float32:
                    raise TypeError(f"{name} gives {batch.dtype}: not the same work")
        return stopwatch.seconds

    return Contender(name, settings, run)


def _check_same_rows(readers: Mapping[str, Callable[[], Iterator[Tensor]]]) -> None:
    """Raise ArithmeticError unless all readers give the same rows, each once: the sums of all rows in float64 are compared."""
    sums = {name: torch.stack([batch.double().sum(0) for batch in batches()]).sum(0) for name, batches in readers.items()}
    first = next(iter(sums.values()))
    different = [name for name, total in sums.items() if not torch.allclose(total, first, rtol=0, atol=1e-6)]
    if different:
        raise ArithmeticError(f"{', '.join(different)}: not the same rows as {next(iter(sums))}")


def _write(folder: Path, n_rows: int) -> _Stored:
    stored = _Stored(folder / "activations.zarr", folder / "activations.npy", n_rows)
    generator = torch.Generator().manual_seed(_SEED)
    raw = np.lib.format.open_memmap(stored.raw, mode="w+", dtype=np.float16, shape=(n_rows, _D_IN))
    with ActivationWriter(stored.store, _D_IN, "float16", {"train": n_rows}, name="activations", with_origin=False) as writer:
        for start in range(0, n_rows, _WRITTEN_AT_ONCE):
            rows = torch.randn(min(_WRITTEN_AT_ONCE, n_rows - start), _D_IN, generator=generator).half()
            raw[start : start + len(rows)] = rows.numpy()
            writer.append("train", rows)
    raw.flush()
    return stored


def _mixed_chunks(n_rows: int, chunk_rows: int) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
    generator = np.random.default_rng(_SEED)
    order = generator.permutation(-(-n_rows // chunk_rows))
    for start in range(0, len(order), _MIXING_CHUNKS):
        yield order[start : start + _MIXING_CHUNKS], generator


def _from_memmap(stored: _Stored, chunk_rows: int) -> Iterator[Tensor]:
    rows = torch.from_numpy(np.load(stored.raw, mmap_mode="c"))
    for chunks, generator in _mixed_chunks(stored.n_rows, chunk_rows):
        taken = (chunks[:, None] * chunk_rows + np.arange(chunk_rows)).flatten()
        order = torch.from_numpy(generator.permutation(taken[taken < stored.n_rows]))
        for batch in order.split(_BATCH_TOKENS):
            yield rows[batch].float()


def _from_zarr(stored: _Stored, chunk_rows: int) -> Iterator[Tensor]:
    import zarr

    array = cast("Any", zarr.open_group(stored.store, mode="r")["train/activations"])
    for chunks, generator in _mixed_chunks(stored.n_rows, chunk_rows):
        rows = torch.cat([torch.from_numpy(array[index * chunk_rows : (index + 1) * chunk_rows]) for index in chunks.tolist()])
        for batch in torch.from_numpy(generator.permutation(len(rows))).split(_BATCH_TOKENS):
            yield rows[batch].float()


def _sae_lens_contenders(stored: _Stored, folder: Path) -> list[Contender]:
    from datasets import Array2D, Dataset, Features
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.mixing_buffer import mixing_buffer

    sequences = np.load(stored.raw).reshape(-1, _CONTEXT, _D_IN)
    features = Features({_HOOK: Array2D(shape=(_CONTEXT, _D_IN), dtype="float16")})
    Dataset.from_dict({_HOOK: sequences}, features=features).save_to_disk(folder)  # as its CacheActivationsRunner does

    def from_store() -> Iterator[Tensor]:
        store = ActivationsStore(
            model=cast("Any", None),
            dataset=None,
            streaming=False,
            hook_name=_HOOK,
            hook_head_index=None,
            context_size=_CONTEXT,
            d_in=_D_IN,
            n_batches_in_buffer=_TUTORIAL_BATCHES,
            total_training_tokens=stored.n_rows,
            store_batch_size_prompts=_PROMPTS,
            train_batch_size_tokens=_BATCH_TOKENS,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder),
        )
        return (next(store) for _ in range(stored.n_rows // _BATCH_TOKENS))

    def from_buffer(buffer_rows: int) -> Iterator[Tensor]:
        rows = torch.from_numpy(np.load(stored.raw, mmap_mode="c"))
        loader = (block.float() for block in rows.split(_CONTEXT * _PROMPTS))
        return mixing_buffer(buffer_rows, _BATCH_TOKENS, loader)

    small = _TUTORIAL_BATCHES * _CONTEXT
    large = min(_MIXING_CHUNKS * 1024, stored.n_rows // 2)
    return [
        _contender(
            "SAELens, cached activations",
            f"ActivationsStore on cached activations (arrow, float16), n_batches_in_buffer={_TUTORIAL_BATCHES}: mixes {small} rows, "
            "activations_mixing_fraction=0.5",
            from_store,
        ),
        _contender(
            "SAELens, buffer alone",
            f"mixing_buffer of {small} rows fed from the memory map: no data set in between",
            lambda: from_buffer(small),
        ),
        _contender(
            "SAELens, buffer alone, wide",
            f"mixing_buffer of {large} rows: about the mixing range of the others",
            lambda: from_buffer(large),
        ),
    ]
