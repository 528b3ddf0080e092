"""The optimiser step: Adam with gradient clipping and unit-norm decoder rows."""

from functools import cached_property
from math import isfinite, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam

from saeens_models.architectures import SAE
from saeens_models.kernels import Team
from saeens_models.kernels.team import WORTH_SHARING
from saeens_models.training.config import TrainingConfig

EPSILON = 1e-8
LEAST_COSINE = 0.8
"""Least cosine of a softly frozen row of W_dec to its initial value."""
_FROZEN = {"decoder": "W_dec", "encoder": "W_enc"}
_TASK_ENTRIES = 2**16
_MOST_TASKS = 64
_OPERATIONS = 10  # per entry, about


class _Rows(NamedTuple):
    """Rows of a weight for one thread, with their moments, as arrays `[n, d]`."""

    name: str
    rows: slice
    weight: np.ndarray
    mean: np.ndarray
    square: np.ndarray


class Adam:
    """Adam (Kingma & Ba 2015) for the weights of one SAE, with gradient clipping and unit-norm decoder rows as the training sets them.

    With unit-norm decoder rows, the gradient's part along a row is removed first: the normalisation after the step would undo it, and
    Adam's moments would keep it. Steps with a team of CPU threads are compiled, others use torch; the two round differently.

    Raises ``ValueError`` if the weight to freeze does not exist.
    """

    def __init__(self, sae: SAE, training: TrainingConfig) -> None:
        self._training = training
        self._parameters = dict(sae.named_parameters())
        if (frozen := _FROZEN.get(training.frozen)) and self._parameters.pop(frozen, None) is None:
            raise ValueError(f"frozen: {training.frozen}, but {sae.config.architecture} has no {frozen} of its own")
        self._weights = {name: _as_in_memory(parameter.detach()) for name, parameter in self._parameters.items()}
        self.means = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        """Running mean of each weight's gradients, in the weight's order of memory."""
        self.squares = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        """Running mean of each weight's squared gradients, in the same order."""
        self.steps = 0
        self._counts = torch.zeros(len(self._parameters), device=sae.W_dec.device)
        if training.unit_norm_decoder:
            _normalise_rows(sae.W_dec)
        self._unit_norm = training.unit_norm_decoder and "W_dec" in self._weights
        self._initial_rows = F.normalize(sae.W_dec.detach(), dim=1) if training.frozen == "decoder_soft" else None

    def step(self, learning_rate: float, team: Team | None = None) -> None:
        """Update the weights with their gradients, which are in the parameters' ``grad``.

        ``team``: CPU threads for a compiled step; None: a step in torch.
        """
        self.steps += 1
        if team is None:
            self.set_counts()
            self.move(learning_rate)
        else:
            self._compiled_step(learning_rate, team)

    def set_counts(self) -> None:
        """Set the step number on the device, for :meth:`move`, to the last step in :attr:`steps`."""
        self._counts.fill_(self.steps - 1)

    def _gradients(self) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient: the objective does not depend on it")
            gradients[name] = _as_in_memory(parameter.grad)
        return gradients

    @torch.no_grad()
    def move(self, learning_rate: float | Tensor) -> None:
        """Update the weights with torch, without a new step number.

        A CUDA graph can record the update if the learning rate is a tensor on the device: all values that change from step to step are
        then in device memory.
        """
        gradients = self._gradients()
        training = self._training
        if self._unit_norm:
            W_dec = self._weights["W_dec"]
            along = torch.linalg.vecdot(gradients["W_dec"], W_dec, dim=1)
            gradients["W_dec"].addcmul_(W_dec, along[:, None], value=-1)
        if training.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), training.gradient_clip_norm)
        beta1, beta2 = training.adam_betas
        weights, of_weights, means, squares = (list(each.values()) for each in (self._weights, gradients, self.means, self.squares))
        settings: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "weight_decay": 0.0, "eps": EPSILON}
        counts = list(self._counts.unbind())  # counted up by the call
        adam(weights, of_weights, means, squares, [], counts, beta1=beta1, beta2=beta2, lr=learning_rate, **settings)
        if self._unit_norm:
            _normalise_rows(self._weights["W_dec"])
        self._restrain()

    def _restrain(self) -> None:
        """Turn rows of a softly frozen W_dec back until their cosine to the initial row is ``LEAST_COSINE``; norms stay."""
        if self._initial_rows is None:
            return
        W_dec = self._weights["W_dec"]
        norms = W_dec.norm(dim=1, keepdim=True)
        along = (W_dec * self._initial_rows).sum(1, keepdim=True)
        across = F.normalize(W_dec - along * self._initial_rows, dim=1)
        nearest = norms * (LEAST_COSINE * self._initial_rows + (1 - LEAST_COSINE**2) ** 0.5 * across)
        W_dec.copy_(torch.where(along < LEAST_COSINE * norms, nearest, W_dec))

    def _compiled_step(self, learning_rate: float, team: Team) -> None:
        training, t, tasks, compiled = self._training, self.steps, self._tasks, team.compiled
        beta1, beta2 = training.adam_betas
        arrays = {name: _as_rows(gradient).numpy() for name, gradient in self._gradients().items()}
        unit_norm = {name: self._unit_norm and name == "W_dec" for name in arrays}

        def prepare(i: int) -> float:
            name, rows, weight, *_ = tasks[i]
            gradient = arrays[name][rows]
            return compiled.remove_parallel(gradient, weight) if unit_norm[name] else compiled.squares(gradient)

        norm = sum(team.run(prepare, len(tasks), self._work)) ** 0.5
        clip = training.gradient_clip_norm
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        scale = scale if isfinite(norm) else nan  # one NaN gradient makes all weights NaN, so that the next loss shows it
        factors = np.array([scale, learning_rate / (1 - beta1**t), beta1, beta2, (1 - beta2**t) ** -0.5, EPSILON], np.float32)

        def move(i: int) -> None:
            name, rows, weight, mean, square = tasks[i]
            compiled.adam(weight, arrays[name][rows], mean, square, *factors, unit_norm[name])

        team.run(move, len(tasks), self._work)
        if self._initial_rows is not None:
            with team.resting(), torch.no_grad():
                self._restrain()

    @property
    def _work(self) -> int:
        return _OPERATIONS * sum(weight.numel() for weight in self._weights.values())

    @cached_property
    def _tasks(self) -> list[_Rows]:
        """The weights, cut into parts if it is worth sharing them among threads."""
        shared = self._work >= WORTH_SHARING
        tasks: list[_Rows] = []
        for name, weight in self._weights.items():
            arrays = [_as_rows(tensor).numpy() for tensor in (weight, self.means[name], self.squares[name])]
            n_rows, n_tasks = len(arrays[0]), min(max(weight.numel() // _TASK_ENTRIES, 1), _MOST_TASKS) if shared else 1
            size = -(-n_rows // n_tasks)
            for rows in (slice(first, min(first + size, n_rows)) for first in range(0, n_rows, size)):
                tasks.append(_Rows(name, rows, *(array[rows] for array in arrays)))
        return tasks


def _as_in_memory(weight: Tensor) -> Tensor:
    """Return a view of a weight in its order of memory, in which optimisers are fast: W_enc is stored transposed."""
    return weight.t() if weight.ndim == 2 and weight.t().is_contiguous() else weight


def _as_rows(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.view(1, -1)


@torch.no_grad()
def _normalise_rows(W_dec: Tensor) -> None:
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))
