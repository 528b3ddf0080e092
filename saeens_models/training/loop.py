"""Train several SAEs on one stream of activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from saeens_models.architectures import SAE, SAEConfig
from saeens_models.training.config import TrainingConfig
from saeens_models.training.trainer import CurvePoint, SAETrainer

_OBSERVATIONS = 200
_STEPS_PER_OBSERVATION_OF_UNKNOWN_LENGTH = 100


def train(
    configs: Sequence[SAEConfig],
    batches: Iterable[Tensor],
    training: TrainingConfig,
    observe: Callable[[Sequence[CurvePoint]], None] | None = None,
) -> list[SAE]:
    """Train one SAE per configuration, all on the same batches, and return them in that order.

    ``batches`` is read once: tensors `[n, d_in]` of any floating dtype, each one step, on the device to train on. Reading stops at
    ``training.total_tokens``; a stream that ends more than a batch before that gives a warning. ``observe`` is called about 200
    times (every 100 steps where ``total_tokens`` is not given) and after the last step, with one :class:`CurvePoint` per SAE.

    No SAE depends on which others are trained beside it, and on the CPU the same call gives the same bits. The returned SAEs take
    unscaled activations.

    Raises ``ValueError`` for no configuration, different d_in, settings that need what is not known of the stream, a batch of
    another shape, or an empty stream; :class:`NonFiniteLossError` if a loss stops being finite.
    """
    if not configs:
        raise ValueError("nothing to train: configs is empty")
    d_in = configs[0].d_in
    if any(config.d_in != d_in for config in configs):
        raise ValueError(f"SAEs on one stream have one d_in; found {sorted({config.d_in for config in configs})}")
    training.check_input_is_known(d_in)
    trainers: list[SAETrainer] = []
    observed = n_steps = n_tokens = largest_batch = 0
    for n_steps, batch in enumerate(batches, start=1):
        x = _scaled_input(batch, d_in, training.input_scale or 1.0, n_steps)
        if not trainers:
            trainers = [SAETrainer(config, training, x.device, index) for index, config in enumerate(configs)]
        for trainer in trainers:
            trainer.step(x)
        n_tokens += len(x)
        largest_batch = max(largest_batch, len(x))
        finished = training.total_tokens is not None and n_tokens >= training.total_tokens
        if observe is not None and not finished and _observations_due(n_steps, n_tokens, training.total_tokens) > observed:
            observed = _observations_due(n_steps, n_tokens, training.total_tokens)
            observe([trainer.curve_point() for trainer in trainers])
        if finished:
            break
    if not trainers:
        raise ValueError("nothing to train on: batches is empty")
    if training.total_tokens is not None and n_tokens + largest_batch <= training.total_tokens:
        warnings.warn(
            f"the stream ended after {n_tokens} of total_tokens = {training.total_tokens}: schedules did not finish", stacklevel=2
        )
    if observe is not None:
        observe([trainer.curve_point() for trainer in trainers])
    return [trainer.finish() for trainer in trainers]


def _observations_due(n_steps: int, n_tokens: int, total_tokens: int | None) -> int:
    if total_tokens is None:
        return n_steps // _STEPS_PER_OBSERVATION_OF_UNKNOWN_LENGTH
    return n_tokens * _OBSERVATIONS // total_tokens


def _scaled_input(batch: Tensor, d_in: int, scale: float, step: int) -> Tensor:
    """The batch in float32, scaled. Always a new tensor: results must not depend on how the batch lies in memory."""
    if batch.ndim != 2 or batch.shape[1] != d_in or len(batch) == 0:
        raise ValueError(f"batch {step} has shape {list(batch.shape)}, expected [n, {d_in}] (d_in) with n > 0")
    if not batch.is_floating_point():
        raise ValueError(f"batch {step} is {batch.dtype}, expected floating point")
    return batch.to(torch.float32, memory_format=torch.contiguous_format, copy=True).mul_(scale)
