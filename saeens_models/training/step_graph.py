"""Training steps that are launched as one CUDA graph: the launches of small SAEs take longer than their work.

Written without a GPU at hand, where it has not run yet. So a graph is not trusted: it has to repeat a step that was taken without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from saeens_models.architectures import Objective
from saeens_models.training.trainer import SAETrainer

Step = Callable[[Sequence[SAETrainer], Tensor], None]
"""One step of all trainers on a batch `[n, d_in]`, scaled by the training's ``input_scale``."""

_TOLERANCE = 1e-2
"""Largest difference between a step and its repetition, by norm, as a share of how far the step moved the weights."""
_WARM_UPS = 3  # libraries and the autograd engine make their plans for a stream when they are first used on it


class Graph(Protocol):
    """What :class:`torch.cuda.CUDAGraph` is needed for: work that was recorded when this was made, and is done again by ``replay``."""

    def replay(self) -> None: ...


def record_on_cuda(work: Callable[[], None], device: torch.device) -> Graph:
    """The work as a CUDA graph: it is done a few times, and then recorded, which does not do it."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


class StepGraphs:
    """The steps of trainers on one stream of batches, by a graph where that can be and is trusted.

    The first step on batches of another shape is taken without a graph. So is the second in a row, and then it is repeated by a graph
    that is made for the shape: if both agree, the graph takes the steps on such batches from then on. If they do not, or if recording
    fails, a warning says so once, and no graph is used any more; no step depends on a graph that was not trusted. Steps with dead
    features, whose number decides the sizes within the auxiliary loss, in the warm-up of the sparsity coefficient, or in micro-batches
    are taken without a graph.

    Memory: that of a step once more, held for the graph, and while it is made the weights and the optimiser's state twice more.
    """

    def __init__(self, record: Callable[[Callable[[], None], torch.device], Graph] = record_on_cuda) -> None:
        self._record = record
        self._trusted = True
        self._last_shape: torch.Size | None = None
        self._recorded: _RecordedStep | None = None

    def step(self, trainers: Sequence[SAETrainer], x: Tensor, plain_step: Step) -> None:
        """Take a step, by ``plain_step`` if not by a graph. Trainers and ``plain_step`` are the same in each call."""
        again, self._last_shape = x.shape == self._last_shape, x.shape
        if not self._trusted or not all(trainer.takes_fixed_launches(x) for trainer in trainers) or _any_dead(trainers):
            plain_step(trainers, x)
        elif self._recorded is not None and self._recorded.x.shape == x.shape:
            self._recorded.step(x)
        elif again:
            self._recorded = None  # its memory is for the next
            self._take_and_repeat(trainers, x, plain_step)
        else:
            plain_step(trainers, x)

    def _take_and_repeat(self, trainers: Sequence[SAETrainer], x: Tensor, plain_step: Step) -> None:
        before = _states(trainers)
        plain_step(trainers, x)
        after, expected = _states(trainers), [trainer.last_objective for trainer in trainers]
        try:
            recorded = _RecordedStep(trainers, x, self._record)
            _set_states(trainers, before)
            recorded.replay(x)
            problem = _difference(before, after, _states(trainers), expected, recorded.objectives)
        except Exception as error:  # whatever a driver or an operation that cannot be recorded raises
            recorded, problem = None, f"{type(error).__name__}: {error}"
        _set_states(trainers, after)
        self._recorded, self._trusted = recorded, problem is None
        if problem is not None:
            self._recorded = None
            message = f"training steps are not launched as a CUDA graph on {x.device}, which is slower: {problem}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


class _RecordedStep:
    """A step on batches of one shape. The batch, the learning rate and the number of the step are read where they lie on the device."""

    def __init__(self, trainers: Sequence[SAETrainer], x: Tensor, record: Callable[[Callable[[], None], torch.device], Graph]) -> None:
        self._trainers = trainers
        self.x = x.clone()
        self._learning_rate = torch.zeros((), device=x.device)
        self.objectives: list[Objective] = []
        self._graph = record(self._work, x.device)

    def _work(self) -> None:
        kind = self.x.device.type
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):  # a cast would not be repeated
            self.objectives = SAETrainer.backpropagate_without_dead(self._trainers, self.x)
        for trainer in self._trainers:
            trainer.optimiser.move(self._learning_rate)
            trainer.sae.apply_constraints()

    def replay(self, x: Tensor) -> None:
        """Do the work of the last step that was counted, on ``x``."""
        self.x.copy_(x)
        self._learning_rate.fill_(self._trainers[0].learning_rate)
        for trainer in self._trainers:
            trainer.optimiser.set_counts()
        self._graph.replay()

    def step(self, x: Tensor) -> None:
        for trainer in self._trainers:
            trainer.count_step(x)
        self.replay(x)
        for trainer, objective in zip(self._trainers, self.objectives, strict=True):
            trainer.note(x, objective._replace(loss=objective.loss.clone()))  # the others are looked at before the next step


def _any_dead(trainers: Sequence[SAETrainer]) -> bool:
    """Asked of the device only if it can be."""
    if all(trainer.tokens <= trainer.training.dead_after_tokens for trainer in trainers):
        return False
    return bool(torch.stack([trainer.dead_mask.any() for trainer in trainers]).any())


def _tensors(trainer: SAETrainer) -> dict[str, Tensor]:
    """What the work of a step changes."""
    moments = {"mean": trainer.optimiser.means, "square": trainer.optimiser.squares}
    tensors = {f"{group} of {name}": tensor for group, named in moments.items() for name, tensor in named.items()}
    return tensors | trainer.sae.state_dict()  # buffers, too


def _states(trainers: Sequence[SAETrainer]) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in _tensors(trainer).items()} for trainer in trainers]


@torch.no_grad()
def _set_states(trainers: Sequence[SAETrainer], states: Sequence[dict[str, Tensor]]) -> None:
    for trainer, state in zip(trainers, states, strict=True):
        for name, tensor in _tensors(trainer).items():
            tensor.copy_(state[name])


def _difference(
    before: Sequence[dict[str, Tensor]],
    after: Sequence[dict[str, Tensor]],
    repeated: Sequence[dict[str, Tensor]],
    expected: Sequence[Objective],
    found: Sequence[Objective],
) -> str | None:
    """What a step and its repetition differ in; None if it is nothing."""
    for number in range(len(before)):
        for name, start in before[number].items():
            moved, moved_again = (state[number][name].double() - start.double() for state in (after, repeated))
            if not (moved - moved_again).norm() <= _TOLERANCE * moved.norm():
                return f"the {name} of SAE {number} is not moved as without it"
        for name, of_step, of_graph in zip(Objective._fields, expected[number], found[number], strict=True):
            if not (isinstance(of_step, Tensor) and isinstance(of_graph, Tensor)):
                continue  # the terms, of which the loss is the sum
            if not (of_step.double() - of_graph.double()).norm() <= _TOLERANCE * of_step.double().norm():
                return f"{name} of SAE {number} is not what it is without it"
    return None
