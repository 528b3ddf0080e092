"""One NVIDIA GPU: our kernels and graphs of steps against plain torch on the same GPU, the forward pass of two models, the quickstart."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import saeens_models as sm
from benchmarks import quickstart
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Agreement, Contender, Effort, Row, Side, Stopwatch, compare
from benchmarks.synthetic import SyntheticActivations
from saeens_models.kernels import cuda_topk
from saeens_models.training import loop
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.gguf_models import SMOLLM2
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model

TITLE = "One GPU"
_NO_GPU = "everything: torch sees no NVIDIA GPU here (a CPU build, or no driver)"
_ABOUT = (
    "Training steps with our kernels and graphs of steps, against plain torch on the same GPU: the same weights and batches, 8 SAEs on one "
    f"stream where it says so, on {SyntheticActivations.description}. Forward passes up to a block, for activations. The quickstart with "
    "SAEENS_DEVICE=cuda. Memory of training is that of the host; notes have that of the GPU."
)
_WARM_UP_STEPS, _POOL_BATCHES = 5, 4
_HELD_OUT, _HELD_OUT_TOKENS = 10**6, 8192
_CONTEXT, _BATCH_WINDOWS = 128, 64
_TOLERANCE = 0.01
"""Largest difference of explained variances: sums in another order."""


class Case(NamedTuple):
    """SAEs that are trained, with the number of timed steps."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    n_saes: int
    steps: int
    batch_tokens: int = 4096

    def __str__(self) -> str:
        sparsity = f", k {self.k}" if self.architecture == "topk" else ""
        return f"{self.architecture}, {self.d_in} x {self.d_sae}{sparsity}, {self.batch_tokens} tokens, {self.n_saes} SAE(s)"


_CASES = (
    Case("topk", 384, 4096, 32, 1, 100),
    Case("topk", 384, 4096, 32, 8, 50),
    Case("topk", 768, 16128, 128, 1, 50),
    Case("topk", 768, 16128, 128, 8, 10),
    Case("standard", 768, 16128, 0, 1, 50),
    Case("jumprelu", 768, 16128, 0, 1, 50),
)
_QUICK = (Case("topk", 192, 2048, 16, 2, 4, 1024),)


def run(options: Options) -> Section:
    """Measure training, forward passes and the quickstart. Without a GPU nothing is measured, which the section says."""
    if not torch.cuda.is_available():
        return Section(TITLE, _ABOUT, [], [_NO_GPU])
    device, left_out = torch.device("cuda", 0), []
    rows, notes = [], [f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}."]
    for case in _QUICK if options.quick else _CASES:
        torch.cuda.reset_peak_memory_stats(device)
        rows += training_rows(case, device, options.effort)
        notes.append(f"{case}: up to {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU, either way of training.")
    for model, layer in ((REFERENCE_MODEL, 1), (SMOLLM2, 12)):
        try:
            rows += [
                forward_row(model, layer, "float32", device, options.effort),
                forward_row(model, layer, "bfloat16", device, options.effort),
            ]
        except ConfigurationError as error:  # its package is not installed
            left_out.append(f"{model}: {error}")
    with mock.patch.dict(os.environ, {"SAEENS_DEVICE": "cuda"}):
        rows += quickstart.run(options).rows
    return Section(TITLE, _ABOUT, rows, left_out, notes)


def training_rows(case: Case, device: torch.device, effort: Effort) -> list[Row]:
    """Compare training as it is with training without graphs, and without graphs and kernels."""
    source = SyntheticActivations(case.d_in)
    pool = [source.batch(index, case.batch_tokens).to(device) for index in range(_POOL_BATCHES)]
    own = {"k": case.k} if case.architecture == "topk" else {}
    sizes = {"architecture": case.architecture, "d_in": case.d_in, "d_sae": case.d_sae, **own}
    configs = [sm.SAEConfig(**sizes, init_seed=seed) for seed in range(case.n_saes)]
    training = sm.TrainingConfig(learning_rate=1e-3, batch_tokens=case.batch_tokens)
    held_out = source.batch(_HELD_OUT, _HELD_OUT_TOKENS).to(device)

    def train(*, graphs: bool = True, kernels: bool = True) -> tuple[float, float]:
        """Return the seconds of a step, and the explained variance of the first SAE."""
        stopwatch = Stopwatch()
        with _without(graphs=not graphs, kernels=not kernels):
            sae, *_ = sm.train(configs, _batches(pool, case.steps, stopwatch, device), training)
        with torch.no_grad():
            return stopwatch.seconds / case.steps, sm.metrics.reconstruction(held_out, sae(held_out)).explained_variance

    _, variance = train()  # compiles the kernels
    ours = Contender("saeens", "sm.train", lambda: train()[0])
    rows = []
    for name, settings in (("without graphs", {"graphs": False}), ("plain torch", {"graphs": False, "kernels": False})):
        agreement = Agreement(variance, train(**settings)[1], None, _TOLERANCE)
        other = Contender(name, f"sm.train, {name}", lambda settings=settings: train(**settings)[0])
        rows.append(compare(str(case), ours, other, effort, tokens=case.batch_tokens, agreement=agreement))
    return rows


def _batches(pool: list[Tensor], steps: int, stopwatch: Stopwatch, device: torch.device) -> Iterator[Tensor]:
    """Give batches; the stopwatch runs from the end of the warm-up to the end of the work that was queued for the last one."""
    for number in range(_WARM_UP_STEPS):
        yield pool[number % len(pool)]
    _wait_for(device)
    with stopwatch:
        for number in range(steps):
            yield pool[number % len(pool)]
        _wait_for(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without(*, graphs: bool, kernels: bool) -> Iterator[None]:
    """Train without graphs of steps, or without the kernels for TopK."""
    with (
        mock.patch.object(loop, "_GRAPHS_ON", set() if graphs else loop._GRAPHS_ON),
        mock.patch.object(cuda_topk, "TRITON_STEP_MAX_DENSITY", 0.0 if kernels else cuda_topk.TRITON_STEP_MAX_DENSITY),
    ):
        yield


def forward_row(name: str, layer: int, dtype: Literal["float32", "bfloat16"], device: torch.device, effort: Effort) -> Row:
    """Time the forward pass up to a block, in windows of random tokens."""
    model = load_language_model(describe_language_model(name), device=str(device), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(model.description.vocab_size, (_BATCH_WINDOWS, _CONTEXT), generator=generator)
    seconds = []
    for _ in range(effort.rounds + 1):
        stopwatch = Stopwatch()
        with stopwatch:
            model.activations(windows, "resid_post", [layer])
            _wait_for(device)
        seconds.append(stopwatch.seconds)
    ours = Side(statistics.median(seconds[1:]), None)
    case = f"{name}, up to block {layer}, {dtype}, {_BATCH_WINDOWS} windows of {_CONTEXT} tokens"
    return Row(case, "", "", ours, None, None, None, rounds=effort.rounds, tokens=windows.numel())
