"""Training one SAE, and eight on one stream, against each peer at its defaults and its best: at d_in 384."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

import saeens_models as sm
from benchmarks.options import Options
from benchmarks.peers import PeerSetting, PeerTrainer, Workload, products_at, training_peers
from benchmarks.report import Section
from benchmarks.runner import Agreement, Contender, Effort, Row, Stopwatch, compare, timed_after
from benchmarks.synthetic import SyntheticActivations

TITLE = "Training, d_in 384"
_POOL_BATCHES = 4
_WARM_UP_STEPS = 1
_HELD_OUT, _HELD_OUT_TOKENS = 10**6, 8192
_MEMBERS = 8
_FAST_LEARNING_RATE = 3e-3
"""Learning rate for comparisons of explained variance and for training before a measurement, which have few steps."""


class Case(NamedTuple):
    """A workload with its numbers of steps."""

    workload: Workload
    steps: int
    """Timed steps of one SAE."""
    agreement_steps: int
    """Steps after which the explained variances are compared."""
    several_against: frozenset[str]
    """Settings that are also compared with several SAEs."""


_MAIN_SETTINGS = frozenset({"SAELens, defaults", "SAELens, sparse", "dictionary_learning, defaults", "sparsify, adam"})
_CASES = [
    Case(Workload("topk", 384, 4096, 32), 4, 30, _MAIN_SETTINGS),
    Case(Workload("topk", 384, 4096, 32, dead_after_steps=2), 4, 30, frozenset()),
    Case(Workload("standard", 384, 4096, 32), 4, 30, _MAIN_SETTINGS),
    Case(Workload("standard", 384, 4096, 32, trained_steps=200), 4, 10, frozenset()),
    Case(Workload("jumprelu", 384, 4096, 32), 4, 30, _MAIN_SETTINGS),
    Case(Workload("jumprelu", 384, 4096, 32, trained_steps=200), 4, 10, frozenset()),
]


def quick(case: Case) -> Case:
    """Return the case with small shapes."""
    trained = min(case.workload.trained_steps, 20)
    workload = case.workload._replace(d_in=192, d_sae=2048, k=16, batch_tokens=1024, trained_steps=trained)
    return case._replace(workload=workload, steps=1, agreement_steps=20)


_QUICK_CASES = [quick(case) for case in _CASES]


def run(options: Options) -> Section:
    """Measure every case against every setting of every peer."""
    return compare_training(TITLE, _QUICK_CASES if options.quick else _CASES, options)


def compare_training(title: str, cases: Sequence[Case], options: Options) -> Section:
    """Measure one SAE against every setting of every peer, and several SAEs against some settings."""
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    for case in cases:
        peers = training_peers(case.workload)
        left_out |= dict.fromkeys(peers.left_out)
        source = SyntheticActivations(case.workload.d_in)
        for setting in peers.settings:
            start = _trained(case.workload, setting, source) if case.workload.trained_steps else None
            agreement = check_agreement(case.workload, setting, source, case.agreement_steps, start)
            for n_saes, steps in ((1, case.steps), (_MEMBERS, 1)):
                if n_saes > 1 and setting.label not in case.several_against:
                    continue
                row = compare_steps(
                    case.workload, setting, source, n_saes=n_saes, steps=steps, effort=options.effort, agreement=agreement, start=start
                )
                rows.append(row)
    sizes = {(w.d_in, w.d_sae): 3 * 4 * (2 * w.d_in * w.d_sae + w.d_sae + w.d_in) / 1e9 for w, *_ in cases}
    agreement_steps = " or ".join(map(str, sorted({case.agreement_steps for case in cases})))
    notes = [
        "A step is forward pass, loss, backward pass, gradient clipping, optimiser and the count of dead features, as each library's own "
        "training loop does it; the step before the timed ones does not count. With several SAEs it is one step of each.",
        f"Weights and Adam's moments alone take {', '.join(f'{size:.2f} GB at {d} x {f}' for (d, f), size in sizes.items())}, per SAE.",
        f"EV is after {agreement_steps} steps, the fewest of these from trained weights, at a constant learning rate of "
        f"{_FAST_LEARNING_RATE} on either side; times are at {cases[0].workload.learning_rate}, which they do not depend on.",
        "'After n steps': both sides start from what n steps of our own training at that rate left. Few features are active in most of a "
        "training, and many at its beginning.",
        "Dead features: SAELens counts steps (1000 by default) and this project tokens, set to the same. dictionary_learning (10 million "
        "tokens) and sparsify (auxiliary loss off) never see one here; the case with an active auxiliary loss is against SAELens alone.",
    ]
    about = f"One SAE, and {_MEMBERS} on the same batches of {cases[0].workload.batch_tokens}, on {SyntheticActivations.description}."
    return Section(title, about, rows, list(left_out), notes)


def compare_steps(
    workload: Workload,
    setting: PeerSetting,
    source: SyntheticActivations,
    *,
    n_saes: int,
    steps: int,
    effort: Effort,
    agreement: Agreement | None = None,
    start: sm.SAE | None = None,
    per_step: bool = True,
) -> Row:
    """Time ``steps`` steps of ``n_saes`` SAEs on both sides, each after a warm-up, from equal initial weights or all from ``start``.

    Returns the time of one step or, with ``per_step=False``, of all steps.
    """
    unit = steps if per_step else 1
    pool = [source.batch(index, workload.batch_tokens) for index in range(_POOL_BATCHES)]

    def batches(stopwatch: Stopwatch) -> Iterator[Tensor]:
        return timed_after(_WARM_UP_STEPS, islice(cycle(pool), _WARM_UP_STEPS + steps), stopwatch)

    def ours() -> float:
        stopwatch = Stopwatch()
        configs = our_configs(workload, setting, n_saes)
        with _products(setting):
            sm.train(configs, batches(stopwatch), our_training(workload, setting), initial=[start] * n_saes)
        return stopwatch.seconds / unit

    def theirs() -> float:
        stopwatch = Stopwatch()
        trainers = [setting.build(start or sm.build_sae(config), workload) for config in our_configs(workload, setting, n_saes)]
        _step_all(trainers, batches(stopwatch))
        return stopwatch.seconds / unit

    ours_side = Contender("saeens", "sm.train", ours)
    ours()  # compiles kernels
    case = f"{workload}, {n_saes} SAE{'s' if n_saes > 1 else ''}" + ("" if per_step else f", {steps} steps")
    if start is not None:
        case += f", {_active_share(start, pool[0]):.1%} of codes active"
    tokens = workload.batch_tokens * steps // unit
    return compare(case, ours_side, Contender(setting.label, setting.settings, theirs), effort, tokens=tokens, agreement=agreement)


def check_agreement(
    workload: Workload, setting: PeerSetting, source: SyntheticActivations, steps: int, start: sm.SAE | None = None
) -> Agreement:
    """Train both sides from the same weights on the same batches, and compare their explained variance on held-out rows."""

    def batches() -> Iterator[Tensor]:
        return (source.batch(index, workload.batch_tokens) for index in range(steps))

    workload = workload._replace(learning_rate=_FAST_LEARNING_RATE)
    (config,) = our_configs(workload, setting, 1)
    with _products(setting):
        (sae,) = sm.train([config], batches(), our_training(workload, setting), initial=[start])
    trainer = setting.build(start or sm.build_sae(config), workload)
    _step_all([trainer], batches())
    held_out = source.batch(_HELD_OUT, _HELD_OUT_TOKENS)
    return Agreement(
        ours=explained_variance(sae, held_out),
        theirs=explained_variance(trainer.reconstruct, held_out),
        difference_in_mathematics=setting.difference,
    )


def _trained(workload: Workload, setting: PeerSetting, source: SyntheticActivations) -> sm.SAE:
    """Return the SAE that both sides start from, trained with the settings that compute the same as the peer."""
    batches = (source.batch(index, workload.batch_tokens) for index in range(workload.trained_steps))
    training = our_training(workload._replace(learning_rate=_FAST_LEARNING_RATE), setting)
    (sae,) = sm.train(our_configs(workload, setting, 1), batches, training)
    return sae


@torch.no_grad()
def _active_share(sae: sm.SAE, x: Tensor) -> float:
    return float((sae.encode(x) > 0).float().mean())


@torch.no_grad()
def explained_variance(reconstruct: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the explained variance of rows ``x`` `[n, d_in]`, by the same formula for every side."""
    return sm.metrics.reconstruction(x, reconstruct(x).float()).explained_variance


def our_configs(workload: Workload, setting: PeerSetting, n_saes: int) -> list[sm.SAEConfig]:
    """Return configurations of this project that differ in their initial weights."""
    own = {"k": workload.k} if workload.architecture == "topk" else {}
    sizes = {"architecture": workload.architecture, "d_in": workload.d_in, "d_sae": workload.d_sae}
    return [sm.SAEConfig(**sizes, **own, **setting.sae, init_seed=seed) for seed in range(n_saes)]


def our_training(workload: Workload, setting: PeerSetting) -> sm.TrainingConfig:
    """Return the training settings of this project that compute the same as the peer's."""
    return sm.TrainingConfig(learning_rate=workload.learning_rate, batch_tokens=workload.batch_tokens, **setting.training)


def _products(setting: PeerSetting) -> AbstractContextManager[None]:
    """Set the precision as SAEENS_PRECISION=bfloat16 does, for settings with ``bfloat16``."""
    return products_at("medium" if setting.bfloat16 else "highest")


def _step_all(trainers: Sequence[PeerTrainer], batches: Iterator[Tensor]) -> None:
    for x in batches:
        for trainer in trainers:
            trainer.step(x)
