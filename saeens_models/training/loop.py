"""Train several SAEs on one stream of activations."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from saeens_models.architectures import SAE, SAEConfig, sae_class
from saeens_models.kernels import Team, cpu_team
from saeens_models.training.checkpoints import Checkpoints, TrainingState, batches_from, writing
from saeens_models.training.config import TrainingConfig
from saeens_models.training.step_graph import Step, StepGraphs
from saeens_models.training.trainer import CurvePoint, SAETrainer, load_kernels

_OBSERVATIONS, _STEPS_PER_OBSERVATION = 200, 4
"""Observations per training, and fewest steps between two: an observation of a small SAE takes a tenth of the time of a step."""
_STEPS_PER_OBSERVATION_OF_UNKNOWN_LENGTH = 100
_KEPT_OF_MEAN_NORM = 0.9
_TOO_LATE = "it would have to be silent for {:,} tokens, and training takes {:,}; lower dead_after_tokens, or give total_tokens alone"
_UNIT_NORM_TOLERANCE = 1e-3
_ENTRIES_FOR_ONE_THREAD = 2**20
"""Entries of W_enc up to which one SAE per thread is faster than one SAE on all threads."""
_ENTRIES_FOR_ONE_LAUNCH = {"cuda": 2**22}
"""Entries of W_enc up to which SAEs share kernel launches, by device type. Estimated, not measured: with 4096 tokens per step, the work of
one SAE of this size takes an H200 about as long as its launches, a little under a millisecond. Larger SAEs would gain little, and cost a
copy of their weights in every step."""
_GRAPHS_ON = {"cuda"}
"""Device types on which steps of SAEs up to that size are launched as a graph."""


_CALIBRATION_BATCHES, _ROWS_PER_CALIBRATION_BATCH = 16, 1024
"""Batches at the end of the stream, and rows of each, on which SAEs are calibrated."""


def train(
    configs: Sequence[SAEConfig],
    batches: Iterable[Tensor],
    training: TrainingConfig,
    observe: Callable[[Sequence[CurvePoint]], None] | None = None,
    *,
    initial: Sequence[SAE | None] | None = None,
    checkpoints: Checkpoints | None = None,
    micro_batch_tokens: int | None = None,
) -> list[SAE]:
    """Train one SAE per configuration, all on the same batches, and return them in the order of ``configs``.

    ``batches`` is read once: tensors `[n, d_in]` of any floating dtype on the training device, one per step. Reading stops at
    ``training.total_tokens``; a stream that ends more than a batch earlier gives a warning. ``observe`` gets one :class:`CurvePoint`
    per SAE about 200 times, at most every fourth step (every 100 steps without ``total_tokens``), and after the last step.

    ``initial``: for each configuration an SAE with the initial weights, or None to draw them. The SAE takes unscaled activations, as
    trained SAEs do, has the same architecture and size, and is not changed; its ``b_dec`` has priority over ``training.input_mean``. The
    key of a checkpoint does not include ``initial``: give :class:`Checkpoints` recipes that do.

    ``checkpoints``: write the state of the training at intervals, and resume from it. ``batches`` must then be the same stream from its
    beginning: batches before the checkpoint are skipped (see :class:`SeekableBatches`). ``observe`` first gets the earlier points again,
    and the result has the same bits as without the interruption. Ctrl-C and SIGTERM wait for the end of the step and for a last checkpoint.

    ``micro_batch_tokens``: process so many tokens of a batch at a time, which needs less memory and gives the same gradients up to
    rounding. A training may resume with another number.

    An SAE does not depend on the SAEs that are trained with it: on the CPU bit for bit; on CUDA, where small TopK SAEs of one
    configuration share kernel launches, up to rounding. On the CPU the same call gives the same bits. The returned SAEs take unscaled
    activations.

    Raises ``ValueError`` for no configuration, for configurations of different d_in, for settings that need missing statistics of the
    stream, for a batch of another shape, an empty stream, or an initial SAE that does not fit. Raises :class:`NonFiniteLossError` for a
    loss that is not finite, and :class:`CheckpointError` if a checkpoint cannot be written.
    """
    _check_initial(configs, initial, training)
    decisive, trainings, step = [[config] for config in configs], [training] * len(configs), _steps_side_by_side()
    return _train(decisive, trainings, batches, step, observe, checkpoints, micro_batch_tokens, initial)


def train_boosting_concurrently(
    configs: Sequence[SAEConfig],
    batches: Iterable[Tensor],
    training: TrainingConfig,
    observe: Callable[[Sequence[CurvePoint]], None] | None = None,
    *,
    boosting_scale: Literal["shared", "per_round"] = "shared",
    checkpoints: Checkpoints | None = None,
    micro_batch_tokens: int | None = None,
) -> list[SAE]:
    """Train the rounds of boosting, one per configuration, in one pass over ``batches``, and return them in round order.

    On every batch ``x`` round 1 takes a step on ``r_1 = x``, round 2 on ``r_2 = r_1 - sae_1(r_1)``, and so on. ``sae_j(r_j)`` is the
    reconstruction from the step of round j, with the weights before the step; no gradient passes through it. Sequential boosting calls
    :func:`train` on the residuals of finished rounds. Here later rounds start on residuals that still change: this costs a little
    explained variance, and saves storing or recomputing the residuals.

    ``training.input_scale`` and ``input_mean`` describe the input of round 1. The mean of the residuals is not known in advance: in later
    rounds b_dec starts at 0. With normalisation all rounds share ``input_scale``, so that a sparsity coefficient means the same in each.
    With ``boosting_scale="per_round"`` the input of later rounds is scaled by ``sqrt(d_in)`` over a running mean of the residual's norm,
    to which each batch contributes 0.1; the last scale is folded into the SAE.

    A round depends on earlier rounds only; the first is bit for bit the SAE that :func:`train` returns. Other arguments and errors are
    those of :func:`train`.
    """
    later = training.model_copy(update={"input_mean": None} | ({"input_scale": None} if boosting_scale == "per_round" else {}))
    decisive = [configs[:number] for number in range(1, len(configs) + 1)]
    trainings = [training, *[later] * (len(configs) - 1)]
    return _train(decisive, trainings, batches, _step_concurrent_rounds, observe, checkpoints, micro_batch_tokens)


def _train(  # noqa: PLR0917 - the arguments of `train`
    decisive: Sequence[Sequence[SAEConfig]],
    trainings: Sequence[TrainingConfig],
    batches: Iterable[Tensor],
    step: Step,
    observe: Callable[[Sequence[CurvePoint]], None] | None,
    checkpoints: Checkpoints | None,
    micro_batch_tokens: int | None,
    initial: Sequence[SAE | None] | None = None,
) -> list[SAE]:
    """Train one SAE for each entry of ``decisive``: the configurations that decide its result, its own last.

    ``trainings`` differ in ``input_mean`` and ``input_scale`` only. A training that resumes reads the batches before the checkpoint again
    that SAEs are calibrated on.
    """
    configs = [each[-1] for each in decisive]
    training = _validated(configs, trainings)
    state = checkpoints.load(decisive, trainings) if checkpoints is not None else None
    n_steps, n_tokens, largest_batch, points, *_ = state or (0, 0, 0, [])
    if observe is not None:
        for observation in points:
            observe(observation)
    observed = _observations_due(n_steps, n_tokens, training.total_tokens)
    finished = training.total_tokens is not None and n_tokens >= training.total_tokens
    calibrates = any(sae_class(config.architecture).calibrates for config in configs)
    n_again = min(n_steps, _CALIBRATION_BATCHES) if calibrates else 0
    stream = iter(batches_from(batches, n_steps - n_again))
    rows = deque(map(_calibration_rows, islice(stream, n_again)), maxlen=_CALIBRATION_BATCHES)
    trainers: list[SAETrainer] = []
    with writing(checkpoints) as write_if_due:
        with ExitStack() as stack:
            for batch in () if finished else stream:
                n_steps += 1
                x = _scaled_input(batch, configs[0].d_in, training.input_scale or 1.0, n_steps)
                if not trainers:
                    _load_kernels(configs, x)
                    team = stack.enter_context(cpu_team(x.device))
                    starts = initial or [None] * len(configs)
                    trainers = [
                        SAETrainer(config, own, x.device, index, team, initial=start, micro_batch_tokens=micro_batch_tokens)
                        for index, (config, own, start) in enumerate(zip(configs, trainings, starts, strict=True))
                    ]
                    _restore(trainers, state)
                step(trainers, x)
                if calibrates:
                    rows.append(_calibration_rows(batch))
                n_tokens += len(x)
                largest_batch = max(largest_batch, len(x))
                finished = training.total_tokens is not None and n_tokens >= training.total_tokens
                if observe is not None and not finished and _observations_due(n_steps, n_tokens, training.total_tokens) > observed:
                    observed = _observations_due(n_steps, n_tokens, training.total_tokens)
                    points.append(_curve_points(trainers, trainers[0].team))
                    observe(points[-1])
                write_if_due(trainers, largest_batch, points)
                if finished:
                    break
        if not trainers and state is not None:  # the checkpoint was written after the last batch
            trainers = [SAETrainer(*each, index=index) for index, each in enumerate(zip(configs, trainings, strict=True))]
            _restore(trainers, state)
        if not trainers:
            raise ValueError("nothing to train on: batches is empty")
        _check_length(configs, training, n_tokens, largest_batch)
        if observe is not None:
            observe(_curve_points(trainers))
        saes = [trainer.finish() for trainer in trainers]
        _calibrate(saes, rows, rounds=len(decisive[-1]) > 1)
        return saes


def _load_kernels(configs: Sequence[SAEConfig], x: Tensor) -> None:
    if x.is_cpu:
        for architecture in sorted({config.architecture for config in configs}):
            load_kernels(architecture)


def _calibration_rows(batch: Tensor) -> Tensor:
    return batch[:_ROWS_PER_CALIBRATION_BATCH].to(torch.float32, copy=True)


@torch.no_grad()
def _calibrate(saes: Sequence[SAE], rows: Iterable[Tensor], rounds: bool) -> None:
    """Calibrate finished SAEs on unscaled rows; boosting rounds on what the earlier rounds leave of them."""
    parts = [part.to(saes[0].b_dec.device) for part in rows]
    for number, sae in enumerate(saes):
        sae.calibrate(parts)
        if rounds and number + 1 < len(saes):
            parts = [part - sae(part) for part in parts]


def _validated(configs: Sequence[SAEConfig], trainings: Sequence[TrainingConfig]) -> TrainingConfig:
    """Return the first training. Raises ``ValueError`` for SAEs that cannot be trained together, and for missing statistics."""
    if not configs:
        raise ValueError("nothing to train: configs is empty")
    if any(config.d_in != configs[0].d_in for config in configs):
        raise ValueError(f"SAEs on one stream have one d_in; found {sorted({config.d_in for config in configs})}")
    trainings[0].check_input_is_known(configs[0].d_in)
    total_tokens, dead_after = trainings[0].total_tokens, trainings[0].dead_after
    if total_tokens is not None and dead_after >= total_tokens:
        warnings.warn(f"no feature can be called dead or be revived: {_TOO_LATE.format(dead_after, total_tokens)}", stacklevel=4)
    return trainings[0]


def _check_length(configs: Sequence[SAEConfig], training: TrainingConfig, n_tokens: int, largest_batch: int) -> None:
    """Warn if the stream was too short for the schedules, or for a feature to be called dead."""
    if training.total_tokens is not None and n_tokens + largest_batch <= training.total_tokens:
        warnings.warn(
            f"the stream ended after {n_tokens} of total_tokens = {training.total_tokens}: schedules did not finish", stacklevel=4
        )
    revives = any(getattr(config, "aux_loss_coefficient", 0) > 0 for config in configs)
    if training.total_tokens is None and revives and n_tokens <= training.dead_after:
        warnings.warn(f"no feature was called dead or revived: {_TOO_LATE.format(training.dead_after, n_tokens)}", stacklevel=4)


def _check_initial(configs: Sequence[SAEConfig], initial: Sequence[SAE | None] | None, training: TrainingConfig) -> None:
    """Raise ``ValueError`` unless every initial SAE fits its configuration and the training."""
    if initial is None:
        return
    if len(initial) != len(configs):
        raise ValueError(f"there are {len(initial)} initial SAEs for {len(configs)} configurations: one each, or None")
    for number, (config, sae) in enumerate(zip(configs, initial, strict=True), start=1):
        if sae is None:
            continue
        wanted, found = ((c.architecture, c.d_in, c.d_sae) for c in (config, sae.config))
        if wanted != found:
            shapes = [f"{architecture} with d_in {d_in} and d_sae {d_sae}" for architecture, d_in, d_sae in (found, wanted)]
            raise ValueError(f"SAE {number} cannot start from {shapes[0]}: it is {shapes[1]}")
        if config.apply_b_dec_to_input != (of_weights := sae.config.apply_b_dec_to_input):
            raise ValueError(
                f"SAE {number} has apply_b_dec_to_input = {config.apply_b_dec_to_input}, and starts from weights with {of_weights}: "
                "saeens_models.interop.with_input_bias rewrites them"
            )
        if training.unit_norm_decoder and not bool(((sae.W_dec.norm(dim=1) - 1).abs() < _UNIT_NORM_TOLERANCE).all()):
            raise ValueError(f"SAE {number} cannot start from decoder rows with norms other than 1: train with unit_norm_decoder = False")


def _restore(trainers: Sequence[SAETrainer], state: TrainingState | None) -> None:
    if state is not None:
        for trainer, tensors, last in zip(trainers, state.tensors, state.last, strict=True):
            trainer.restore(tensors, last)


def _steps_side_by_side() -> Step:
    graphs = StepGraphs()

    def step(trainers: Sequence[SAETrainer], x: Tensor) -> None:
        device = x.device.type
        if device in _GRAPHS_ON and _largest(trainers) <= _ENTRIES_FOR_ONE_LAUNCH[device]:
            graphs.step(trainers, x, _step_side_by_side)
        else:
            _step_side_by_side(trainers, x)

    return step


def _largest(trainers: Sequence[SAETrainer]) -> int:
    return max(trainer.sae.W_enc.numel() for trainer in trainers)


def _step_side_by_side(trainers: Sequence[SAETrainer], x: Tensor) -> None:
    team = trainers[0].team
    largest = _largest(trainers)
    if team is not None and len(trainers) >= team.n_threads and largest <= _ENTRIES_FOR_ONE_THREAD:
        team.run(lambda index: trainers[index].step(x), len(trainers))
        return
    in_one = len(trainers) > 1 and largest <= _ENTRIES_FOR_ONE_LAUNCH.get(x.device.type, 0)
    if in_one and SAETrainer.step_together(trainers, x):
        return
    for trainer in trainers:
        trainer.step(x)


def _curve_points(trainers: Sequence[SAETrainer], team: Team | None = None) -> list[CurvePoint]:
    if team is None:
        return [trainer.curve_point() for trainer in trainers]
    return team.run(lambda index: trainers[index].curve_point(), len(trainers))


def _step_concurrent_rounds(trainers: Sequence[SAETrainer], x: Tensor) -> None:
    """Take the steps of boosting rounds, each on the residual of the round before, in the scale of the first or in one of its own."""
    scale: float | Tensor = trainers[0].input_scale
    for trainer in trainers:
        if trainer.training.normalize_activations != "none" and trainer.training.input_scale is None:
            before, scale = scale, _follow_norm(trainer, x, scale)
            x = x * (scale / before)
        x = x - trainer.step(x).x_hat


def _follow_norm(trainer: SAETrainer, x: Tensor, scale: float | Tensor) -> Tensor:
    """Return the scale that gives this round's residual the mean norm sqrt(d_in). ``x`` is the residual times ``scale``.

    The result stays on the device.
    """
    mean_norm = x.norm(dim=1).mean() / scale
    trainer.mean_norm = mean_norm.lerp(mean_norm if trainer.mean_norm is None else trainer.mean_norm, _KEPT_OF_MEAN_NORM)
    trainer.input_scale = followed = x.shape[1] ** 0.5 / trainer.mean_norm
    return followed


def _observations_due(n_steps: int, n_tokens: int, total_tokens: int | None) -> int:
    if total_tokens is None:
        return n_steps // _STEPS_PER_OBSERVATION_OF_UNKNOWN_LENGTH
    return min(n_tokens * _OBSERVATIONS // total_tokens, n_steps // _STEPS_PER_OBSERVATION)


def _scaled_input(batch: Tensor, d_in: int, scale: float, step: int) -> Tensor:
    """Return the scaled batch in float32, as a new, contiguous tensor: results must not depend on the batch's memory layout."""
    if batch.ndim != 2 or batch.shape[1] != d_in or len(batch) == 0:
        raise ValueError(f"batch {step} has shape {list(batch.shape)}, expected [n, {d_in}] (d_in) with n > 0")
    if not batch.is_floating_point():
        raise ValueError(f"batch {step} is {batch.dtype}, expected floating point")
    return batch.to(torch.float32, memory_format=torch.contiguous_format, copy=True).mul_(scale)
