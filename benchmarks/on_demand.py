"""Training on activations that are computed when they are read, against training on a stored copy of the same rows."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import saeens_models as sm
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Contender, Stopwatch, compare
from saeens_pipeline.language_models.caching import GROUP_TOKENS, cache_activations
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.on_demand import ActivationsOnDemand
from saeens_pipeline.language_models.tokens import open_tokens, write_tokens
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.rolling_cache import RollingCache

TITLE = "Activations on demand"
_CONTEXT, _LAYER, _D_SAE, _K, _BATCH_TOKENS, _MIXING_CHUNKS = 128, 2, 1536, 16, 4096, 16
_GROUPS, _QUICK_GROUPS = 12, 4
_CACHED = (0.0, 0.1, 0.5)


def run(options: Options) -> Section:
    """Measure a training of one epoch, of one SAE and of eight on one stream."""
    n_rows = (_QUICK_GROUPS if options.quick else _GROUPS) * GROUP_TOKENS
    description = describe_language_model(REFERENCE_MODEL)
    write_tokens(
        options.scratch / "tokens.zarr",
        open_corpus("builtin/installed_packages"),
        description,
        context_length=_CONTEXT,
        packing="concatenate",
        drop=[],
        train_tokens=n_rows,
        test_tokens=_CONTEXT,
    )
    tokens, model = open_tokens(options.scratch / "tokens.zarr"), load_language_model(description)
    stores: dict[str, list[Split]] = {"stored": [], "on_demand": ["train"]}
    for name, without_bytes in stores.items():
        cache_activations(model, tokens, "resid_post", {_LAYER: options.scratch / name}, "float16", without_bytes=without_bytes)
    stored = ActivationStore(options.scratch / "stored")
    folders = (options.scratch / "caches" / str(number) for number in count())

    def on_demand(cached: float) -> ActivationStore:
        """Open the rows with a cache that has been filled by an earlier pass, in a folder of its own."""
        bytes_ = cached * n_rows * stored.d_in * 2 * 1.01  # with the headers of files
        opened = ActivationsOnDemand(options.scratch / "on_demand", tokens, model, ("resid_post", _LAYER), _cache(next(folders), bytes_))
        for _ in opened.batches("train", _BATCH_TOKENS, seed=0, mixing_chunks=_MIXING_CHUNKS, contiguous=True) if cached else ():
            pass
        return opened

    rows = []
    for n_saes in (1, 8):
        case = f"{n_saes} TopK SAE{'s' if n_saes > 1 else ''}, d_in {stored.d_in}, d_sae {_D_SAE}, k {_K}, {n_rows:,} tokens"
        ours = Contender("saeens", "keep_activations: all, files in the page cache", _training(lambda: stored, n_saes))
        for cached in _CACHED:
            settings = f"keep_activations: test, a filled cache of {cached:.0%} of the rows"
            peer = Contender(f"on demand, cache {cached:.0%}", settings, _training(lambda share=cached: on_demand(share), n_saes))
            rows.append(compare(case, ours, peer, options.effort, tokens=n_rows))
    notes = [
        f"Both read the same blocks of {_MIXING_CHUNKS} chunks and train the same weights, bit by bit. Ratio: how much longer training on "
        "demand takes. The forward pass shares the processors with training; on a GPU it shares the GPU."
    ]
    about = f"{REFERENCE_MODEL}, block {_LAYER} of {description.n_layers}, windows of {_CONTEXT} tokens, batches of {_BATCH_TOKENS} tokens."
    return Section(TITLE, about, rows, [], notes)


def _cache(folder: Path, most_bytes: float) -> RollingCache:
    shutil.rmtree(folder.parent, ignore_errors=True)  # of the earlier measurement
    return RollingCache(folder, most_bytes)


def _training(open_reader: Callable[[], ActivationStore], n_saes: int) -> Callable[[], float]:
    def run() -> float:
        reader = open_reader()
        n_rows = reader.n_rows("train")
        statistics = reader.statistics("train")
        config = sm.TrainingConfig(
            total_tokens=n_rows, batch_tokens=_BATCH_TOKENS, learning_rate=1e-3, input_mean=tuple(statistics.mean.tolist())
        )
        configs = [sm.SAEConfig(architecture="topk", d_in=reader.d_in, d_sae=_D_SAE, k=_K, init_seed=seed) for seed in range(n_saes)]
        stopwatch = Stopwatch()
        with stopwatch:
            stream = reader.batches("train", _BATCH_TOKENS, seed=1, mixing_chunks=_MIXING_CHUNKS, contiguous=True)
            saes = sm.train(configs, stream, config)
        if not all(math.isfinite(float(sae.b_dec.sum())) for sae in saes):
            raise ArithmeticError("the weights are not finite")
        return stopwatch.seconds

    return run
