"""Boosting from cached residuals, against computing the residual again for every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import saeens_models as sm
from benchmarks.options import Options
from benchmarks.peers import Workload
from benchmarks.peers.dense import DenseTrainer
from benchmarks.report import Section
from benchmarks.runner import Agreement, Contender, Stopwatch, compare
from benchmarks.synthetic import SyntheticActivations
from benchmarks.training import explained_variance
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore
from saeens_pipeline.storage.residuals import ResidualView, write_residual

TITLE = "Boosting"
_ROUNDS = 8
_HELD_OUT, _HELD_OUT_TOKENS = 10**6, 8192
_WORKLOAD, _STEPS = Workload("topk", 384, 4096, 32), 8
_QUICK_WORKLOAD, _QUICK_STEPS = Workload("topk", 192, 2048, 16, batch_tokens=1024), 4


class _Trained(NamedTuple):
    seconds: float
    reconstruct: Callable[[Tensor], Tensor]


def run(options: Options) -> Section:
    """Measure eight rounds over the same rows."""
    workload, steps = (_QUICK_WORKLOAD, _QUICK_STEPS) if options.quick else (_WORKLOAD, _STEPS)
    source = SyntheticActivations(workload.d_in)
    with ActivationWriter(
        options.scratch / "activations.zarr",
        workload.d_in,
        "float16",
        {"train": steps * workload.batch_tokens},
        name="activations",
        with_origin=False,
    ) as writer:
        for index in range(steps):
            writer.append("train", source.batch(index, workload.batch_tokens))
    activations = ActivationStore(options.scratch / "activations.zarr")
    numbers = count()

    def cached() -> _Trained:
        return _from_cached_residuals(activations, workload, options.scratch / f"residuals_{next(numbers)}")

    ours = Contender("saeens", "sm.train on stored residuals, each written by one pass of the round before", lambda: cached().seconds)
    held_out = source.batch(_HELD_OUT, _HELD_OUT_TOKENS)
    our_ev = explained_variance(cached().reconstruct, held_out)
    peers = {
        "parents re-run, dense steps": (
            partial(_dense, activations, workload),
            "plain torch: parents and the SAE in training are dense; Adam fused; parents without gradients",
        ),
        "parents re-run, our steps": (
            partial(_recomputed, activations, workload),
            "sm.train on batches from which the parents' reconstructions have been subtracted",
        ),
    }
    case = f"{workload}, {_ROUNDS} rounds of {steps} steps"
    rows = []
    for name, (train, settings) in peers.items():
        agreement = Agreement(our_ev, explained_variance(train().reconstruct, held_out), None)
        theirs = Contender(name, settings, lambda train=train: train().seconds)
        rows.append(compare(case, ours, theirs, options.effort, tokens=_ROUNDS * steps * workload.batch_tokens, agreement=agreement))
    about = f"{_ROUNDS} rounds, reading and writing included, on {SyntheticActivations.description}, stored as float16."
    return Section(TITLE, about, rows, notes=["Ours rounds residuals to float16, as they are stored; the others keep float32."])


def _from_cached_residuals(activations: ActivationStore, workload: Workload, folder: Path) -> _Trained:
    saes: list[sm.SAE] = []
    stopwatch = Stopwatch()
    with stopwatch:
        reader: ActivationReader = activations
        for number in range(_ROUNDS):
            (sae,) = sm.train([_config(workload, number)], _batches(reader, workload, number), _training(workload))
            saes.append(sae)
            if number + 1 < _ROUNDS:
                path = folder / f"residual_{number + 1}.zarr"
                write_residual(path, ResidualView(reader, [partial(_residual, [sae])]), name=path.stem)
                reader = ActivationStore(path)
    return _Trained(stopwatch.seconds, sm.Boosting(saes))


def _recomputed(activations: ActivationStore, workload: Workload) -> _Trained:
    saes: list[sm.SAE] = []
    stopwatch = Stopwatch()
    with stopwatch:
        for number in range(_ROUNDS):
            batches = (_residual(saes, x) for x in _batches(activations, workload, number))
            saes += sm.train([_config(workload, number)], batches, _training(workload))
    return _Trained(stopwatch.seconds, sm.Boosting(saes))


def _dense(activations: ActivationStore, workload: Workload) -> _Trained:
    trainers: list[DenseTrainer] = []
    stopwatch = Stopwatch()
    with stopwatch:
        for number in range(_ROUNDS):
            trainer = DenseTrainer(sm.build_sae(_config(workload, number)), workload)
            parents = [parent.reconstruct for parent in trainers]
            for x in _batches(activations, workload, number):
                trainer.step(_residual(parents, x))
            trainers.append(trainer)
    rounds = [trainer.reconstruct for trainer in trainers]
    return _Trained(stopwatch.seconds, lambda x: x - _residual(rounds, x))


@torch.no_grad()
def _residual(rounds: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for reconstruct in rounds:
        x = x - reconstruct(x)
    return x


def _batches(reader: ActivationReader, workload: Workload, number: int) -> Iterator[Tensor]:
    return reader.batches("train", workload.batch_tokens, seed=number)


def _config(workload: Workload, number: int) -> sm.SAEConfig:
    return sm.SAEConfig(architecture="topk", d_in=workload.d_in, d_sae=workload.d_sae, k=workload.k, init_seed=number)


def _training(workload: Workload) -> sm.TrainingConfig:
    return sm.TrainingConfig(learning_rate=workload.learning_rate, batch_tokens=workload.batch_tokens)
