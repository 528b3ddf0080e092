"""Training steps launched as one CUDA graph: launches of small SAEs take longer than their work.

This has not been measured on a GPU. A graph is therefore used only after it has repeated a step that was taken without it.
"""

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
"""Largest norm of the difference between a step and its repetition, relative to the norm of the step's change of the weights."""
_WARM_UPS = 3  # libraries and the autograd engine initialise themselves for a stream at its first use


class Graph(Protocol):
    """Recorded work that can be repeated, such as :class:`torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Repeat the work."""
        ...


def record_on_cuda(work: Callable[[], None], device: torch.device) -> Graph:
    """Record the work as a CUDA graph. It runs a few times before; recording itself does not run it."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the thread that reads ahead may use the GPU meanwhile
            work()
        return graph


class StepGraphs:
    """Takes the steps of trainers on one stream of batches, with a graph where possible.

    The first step on batches of another shape is taken without a graph. The second in a row is also taken without one, and then repeated
    by a new graph for the shape. If both agree, the graph takes further steps on such batches. If they differ, or if recording fails, a
    warning is given once, and no graph is used any more; no result depends on an unchecked graph. Steps without a graph: with dead
    features, whose number decides the sizes within the auxiliary loss; in the warm-up of the sparsity coefficient; in micro-batches.

    Memory: that of one more step, and during the check two more copies of the weights and of the optimiser's state.
    """

    def __init__(self, record: Callable[[Callable[[], None], torch.device], Graph] = record_on_cuda) -> None:
        self._record = record
        self._trusted = True
        self._last_shape: torch.Size | None = None
        self._recorded: _RecordedStep | None = None

    def step(self, trainers: Sequence[SAETrainer], x: Tensor, plain_step: Step) -> None:
        """Take a step, with a graph or with ``plain_step``. Trainers and ``plain_step`` must be the same in each call."""
        again, self._last_shape = x.shape == self._last_shape, x.shape
        if not self._trusted or not all(trainer.takes_fixed_launches(x) for trainer in trainers) or _any_dead(trainers):
            plain_step(trainers, x)
        elif self._recorded is not None and self._recorded.x.shape == x.shape:
            self._recorded.step(x)
        elif again:
            self._recorded = None  # frees its memory for the next graph
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
        except Exception as error:  # drivers and operations that cannot be recorded raise errors of any type
            recorded, problem = None, f"{type(error).__name__}: {error}"
        _set_states(trainers, after)
        self._recorded, self._trusted = recorded, problem is None
        if problem is not None:
            self._recorded = None
            message = f"training steps are not launched as a CUDA graph on {x.device}, and are slower without it: {problem}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


class _RecordedStep:
    """A recorded step on batches of one shape. It reads the batch, the learning rate and the step's number from device memory."""

    def __init__(self, trainers: Sequence[SAETrainer], x: Tensor, record: Callable[[Callable[[], None], torch.device], Graph]) -> None:
        self._trainers = trainers
        self.x = x.clone()
        self._learning_rate = torch.zeros((), device=x.device)
        self.objectives: list[Objective] = []
        self._graph = record(self._work, x.device)

    def _work(self) -> None:
        kind = self.x.device.type
        dtype = torch.get_autocast_dtype(kind)
        # a cached cast would not be repeated by the graph
        with torch.autocast(kind, dtype, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            self.objectives = SAETrainer.backpropagate_without_dead(self._trainers, self.x)
        for trainer in self._trainers:
            trainer.optimiser.move(self._learning_rate)
            trainer.sae.apply_constraints()

    def replay(self, x: Tensor) -> None:
        """Run the recorded training step on ``x``, with the trainers' learning rate and step number."""
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
            trainer.note(x, objective._replace(loss=objective.loss.clone()))  # other tensors are read before the next step


def _any_dead(trainers: Sequence[SAETrainer]) -> bool:
    """Return True if a feature of any SAE is dead. Waits for the device only if enough tokens were seen for that."""
    if all(trainer.tokens <= trainer.training.dead_after for trainer in trainers):
        return False
    return bool(torch.stack([trainer.dead_mask.any() for trainer in trainers]).any())


def _tensors(trainer: SAETrainer) -> dict[str, Tensor]:
    """Return the tensors that a step changes."""
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
    """Return the first difference between a step and its repetition; None if they agree."""
    for number in range(len(before)):
        for name, start in before[number].items():
            moved, moved_again = (state[number][name].double() - start.double() for state in (after, repeated))
            if not (moved - moved_again).norm() <= _TOLERANCE * moved.norm():
                return f"it moves the {name} of SAE {number + 1} differently"
        for name, of_step, of_graph in zip(Objective._fields, expected[number], found[number], strict=True):
            if not (isinstance(of_step, Tensor) and isinstance(of_graph, Tensor)):
                continue  # the terms, of which the loss is the sum
            if not (of_step.double() - of_graph.double()).norm() <= _TOLERANCE * of_step.double().norm():
                return f"it gives another {name} of SAE {number + 1}"
    return None
