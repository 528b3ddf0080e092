"""The state of a training on disk: a training whose process was killed goes on where it was, and ends with the same bits.

A checkpoint is one safetensors file. Its tensors are what a step changes, ``NUMBER.NAME`` of every SAE: weights, Adam's moments, when
each feature last fired, and the scale of the input where it follows the stream. Its metadata, JSON, hold the position in the stream,
the training curve so far, and a key of each SAE, which says what decides it. Schedules follow the position; no generator is used
after the weights are drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saeens_models.architectures import SAEConfig
from saeens_models.training.config import TrainingConfig
from saeens_models.training.signals import hold_signals
from saeens_models.training.trainer import CurvePoint, NonFiniteLossError, SAETrainer

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300.0
_FORMAT = 1
_PATIENCE = 50  # where writing takes a second, it is done at most every 50 seconds: 2 % of the time
_METADATA = "training"
_CHECKSUM = "crc32"


class CheckpointError(OSError):
    """A checkpoint cannot be written. The one before, if there is one, is untouched."""


@runtime_checkable
class SeekableBatches(Protocol):
    """A stream of batches that can begin in the middle without making what comes before."""

    def __iter__(self) -> Iterator[Tensor]:
        """All batches."""
        ...

    def starting_at(self, step: int) -> Iterator[Tensor]:
        """All but the first ``step`` batches, the same ones as iterating gives."""
        ...


WriteIfDue = Callable[[Sequence[SAETrainer], int, Sequence[Sequence[CurvePoint]]], None]
"""Called after every step with the trainers, the tokens of the largest batch, and what was observed so far."""


class Position(NamedTuple):
    """How far a training has come between two steps."""

    steps: int
    """Batches taken from the stream."""
    tokens: int
    """Tokens in them."""
    largest_batch: int
    """Tokens in the largest of them."""
    points: list[list[CurvePoint]]
    """What was observed so far, one list per observation, one point per SAE."""


class TrainingState(NamedTuple):
    """All that a training goes on from."""

    position: Position
    last: list[CurvePoint]
    """Where each SAE stands."""
    tensors: list[dict[str, Tensor]]
    """What :meth:`SAETrainer.state` gives, per SAE."""


class Checkpoints:
    """Keeps the state of one training in ``file``, and goes on from what is there.

    ``sm.train(configs, batches, training, checkpoints=sm.Checkpoints("training.safetensors"))`` writes a checkpoint about every
    ``interval_seconds`` (0: after every step), and on Ctrl-C and SIGTERM, which then take their course. Calling it once more, with
    the same arguments, goes on from there. Whoever has stored the SAEs calls :meth:`remove`.

    A state is taken up only for SAEs of the same configuration and training, and of the same entry of ``recipes``, one per SAE: what
    decides them beside these, above all the stream, which the file knows nothing of. SAEs do not depend on those that are trained beside
    them, so a part of those in the file can go on; if one is asked for that is not there, all start anew. A file that does not serve,
    or is damaged, is said in the log and removed.

    ``others``: recipes of SAEs that are not trained now and may go on later. As long as the file holds one of them it is neither
    written nor removed, and this training keeps no state.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        interval_seconds: float = CHECKPOINT_SECONDS,
        recipes: Sequence[str] | None = None,
        others: Collection[str] = (),
    ) -> None:
        self.file = Path(file)
        self.interval_seconds = interval_seconds
        self.recipes = recipes
        self.others = others
        self.resumed_at_tokens: list[int] = []
        """After how many tokens the training went on from a checkpoint, each time that it did."""
        self.seconds_before = 0.0
        """What the part of the training took that was taken up."""
        self.tokens: int | None = None
        """Tokens of what is in the file; None where there is none."""
        self._keys: list[str] = []
        self._is_of_others = False
        self._began = self._written = time.monotonic()
        self._seconds_of_writing = 0.0

    def load(self, configs: Sequence[Sequence[SAEConfig]], trainings: Sequence[TrainingConfig]) -> TrainingState | None:
        """The state to go on from, or None to start at the beginning.

        ``configs``: for each SAE the configurations that decide it, its own the last of them. Raises ``ValueError`` for another number
        of recipes.
        """
        recipes = self.recipes or [""] * len(configs)
        if len(recipes) != len(configs):
            raise ValueError(f"there are {len(recipes)} recipes for {len(configs)} SAEs")
        self._keys = [_key(*decisive) for decisive in zip(configs, trainings, recipes, strict=True)]
        _aside(self.file).unlink(missing_ok=True)
        self._is_of_others = False
        self._began = self._written = time.monotonic()
        if not self.file.exists():
            return None
        try:
            record, tensors = _read(self.file)
            numbers = [record["keys"].index(key) if key in record["keys"] else None for key in self._keys]
            chosen = [number for number in numbers if number is not None]
            self._is_of_others = not set(self.others).isdisjoint(record.get("recipes", ()))
            if self._is_of_others:
                logger.info("%s is kept for other SAEs that go on from it later; until then no other checkpoint is written", self.file)
            if len(chosen) < len(numbers) and self._is_of_others:
                return None
            if len(chosen) < len(numbers):
                logger.warning("%s is a checkpoint of other SAEs: it is removed, and training starts anew", self.file)
                self.remove()
                return None
            points = [[CurvePoint(*observed[number]) for number in chosen] for observed in record["points"]]
            position = Position(record["steps"], record["tokens"], record["largest_batch"], points)
            state = TrainingState(
                position,
                last=[CurvePoint(*record["last"][number]) for number in chosen],
                tensors=[_of_sae(tensors, number) for number in chosen],
            )
            self.resumed_at_tokens, self.seconds_before = [*record["resumed_at_tokens"], position.tokens], record["seconds"]
        except Exception as error:  # whatever is wrong with a file that nobody but this module writes: it does not serve
            logger.warning("%s is damaged: it is removed, and training starts anew (%s)", self.file, error)
            self._is_of_others = False
            self.remove()
            return None
        self.tokens = position.tokens
        logger.info("training goes on from %s, after step %d and %d tokens", self.file, position.steps, position.tokens)
        return state

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        if self.interval_seconds == 0:
            return True
        return time.monotonic() - self._written >= max(self.interval_seconds, _PATIENCE * self._seconds_of_writing)

    def save(self, trainers: Sequence[SAETrainer], largest_batch: int, points: Sequence[Sequence[CurvePoint]]) -> None:
        """Write where the trainers stand; what was written before is replaced when this is whole, and on the disk.

        Where a weight is not finite nothing is written: the next step will say it, and what was written before is the last that is good.
        Nor is anything where the file is kept for others. Raises :class:`CheckpointError` with what is needed.
        """
        if self._is_of_others:
            return
        began = time.monotonic()
        last = [trainer.curve_point() for trainer in trainers]
        tensors = {f"{number}.{name}": tensor for number, trainer in enumerate(trainers) for name, tensor in trainer.state().items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        if all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            record = {
                "format": _FORMAT,
                "keys": self._keys,
                "recipes": list(self.recipes or ()),
                "steps": last[0].step,
                "tokens": last[0].tokens,
                "largest_batch": largest_batch,
                "seconds": self.seconds_before + began - self._began,
                "resumed_at_tokens": self.resumed_at_tokens,
                "points": points,
                "last": last,
            }
            _write(self.file, record, tensors)
            self.tokens = last[0].tokens
        self._written = time.monotonic()
        self._seconds_of_writing = self._written - began

    def remove(self) -> None:
        """Remove the file, if it is there and not kept for others."""
        if self._is_of_others:
            return
        for file in (self.file, _aside(self.file)):
            file.unlink(missing_ok=True)
        self.tokens = None


@contextmanager
def writing(checkpoints: Checkpoints | None) -> Iterator[WriteIfDue]:
    """Give what writes a checkpoint when it is time, or when a signal asks the process to end, which is then delivered.

    A :class:`NonFiniteLossError` that leaves the context names the last good checkpoint. Without checkpoints nothing is done.
    """
    if checkpoints is None:
        yield lambda *_: None
        return
    with hold_signals() as held:

        def write_if_due(trainers: Sequence[SAETrainer], largest_batch: int, points: Sequence[Sequence[CurvePoint]]) -> None:
            if checkpoints.is_due or held.pending:
                try:
                    checkpoints.save(trainers, largest_batch, points)
                finally:
                    held.deliver()

        try:
            yield write_if_due
        except NonFiniteLossError as error:
            if checkpoints.tokens is None:
                raise
            raise NonFiniteLossError(
                f"{error}. The last good checkpoint is {checkpoints.file}, after {checkpoints.tokens} tokens"
            ) from None


def batches_from(batches: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    """All but the first ``step`` batches: skipped where the stream can, else read and dropped."""
    if step and isinstance(batches, SeekableBatches):
        return batches.starting_at(step)
    return islice(batches, step, None)


def checkpoint_bytes(configs: Sequence[SAEConfig]) -> int:
    """What a checkpoint of these SAEs takes, about: weights and two moments of each, in float32, and a counter for each feature."""
    return sum(3 * 4 * (2 * c.d_in * c.d_sae + 2 * c.d_sae + c.d_in) + 8 * c.d_sae for c in configs)


def _key(configs: Sequence[SAEConfig], training: TrainingConfig, recipe: str) -> str:
    decisive = [[config.model_dump(mode="json") for config in configs], training.model_dump(mode="json"), recipe]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _of_sae(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write(file: Path, record: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Aside, flushed to the disk, and renamed."""
    text = json.dumps(record)
    aside = _aside(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, {_METADATA: text, _CHECKSUM: str(_checksum(text, tensors))})
        _flush(aside)
        aside.replace(file)
        _flush(file.parent)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        kept = f"; {file}, the one before, is kept" if file.exists() else ""
        raise CheckpointError(f"a checkpoint of {n_bytes:,} bytes cannot be written to {file.parent} ({error}){kept}") from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises whatever error a file that is not whole leads to."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    record = json.loads(metadata[_METADATA])
    if record["format"] != _FORMAT:
        raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
    if metadata[_CHECKSUM] != str(_checksum(metadata[_METADATA], tensors)):
        raise ValueError("its checksum is wrong")
    return record, tensors


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
