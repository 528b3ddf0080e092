"""Checkpoints: a training whose process was killed resumes and ends with the same bits.

A checkpoint is one safetensors file. Its tensors, ``NUMBER.NAME`` of every SAE, are those that a step changes: weights, Adam's moments,
the last firing of each feature, and the scale of the input if it follows the stream. Its metadata, JSON, hold the position in the stream,
the training curve so far, and a key of each SAE: the hash of everything that decides its result. Schedules follow the position; no
random generator is used after the weights are drawn.
"""

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
from torch import Tensor

from saeens_models.architectures import SAEConfig
from saeens_models.architectures.weight_files import write_safetensors
from saeens_models.training.config import TrainingConfig
from saeens_models.training.signals import hold_signals
from saeens_models.training.trainer import CurvePoint, NonFiniteLossError, SAETrainer

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300.0
_FORMAT = 1
_PATIENCE = 50  # writing takes at most 2 % of the time: if it takes a second, it happens at most every 50 seconds
_METADATA = "training"
_CHECKSUM = "crc32"


class CheckpointError(OSError):
    """A checkpoint cannot be written. An earlier one stays in place."""


@runtime_checkable
class SeekableBatches(Protocol):
    """A stream of batches that can start in the middle without computing the batches before."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield all batches."""
        ...

    def starting_at(self, step: int) -> Iterator[Tensor]:
        """Yield the batches after the first ``step``, with the same values as from ``__iter__``."""
        ...


WriteIfDue = Callable[[Sequence[SAETrainer], int, Sequence[Sequence[CurvePoint]]], None]
"""Called after every step with the trainers, the tokens of the largest batch, and the training curve so far."""


class TrainingState(NamedTuple):
    """The state from which a training resumes, between two steps."""

    steps: int
    """Batches taken from the stream."""
    tokens: int
    """Tokens in them."""
    largest_batch: int
    """Tokens in the largest of them."""
    points: list[list[CurvePoint]]
    """Training curve so far: one list per observation, one point per SAE."""
    last: list[CurvePoint]
    """Point of the curve after the last step, per SAE."""
    tensors: list[dict[str, Tensor]]
    """Result of :meth:`SAETrainer.state`, per SAE."""


class Checkpoints:
    """Writes the state of one training to ``file``, and resumes from it.

    ``sm.train(configs, batches, training, checkpoints=sm.Checkpoints("training.safetensors"))`` writes a checkpoint about every
    ``interval_seconds`` (0: after every step), and on Ctrl-C and SIGTERM before they are delivered. A second call with the same arguments
    resumes from the checkpoint. The caller calls :meth:`remove` after storing the SAEs.

    An SAE resumes only with the same configuration, training and entry of ``recipes``, one per SAE: a string for everything else that
    decides its result, above all the stream, which is not in the file. SAEs do not depend on those that are trained with them, so some of
    the SAEs in the file can resume alone; if one SAE is not in the file, all start from the beginning. A file that does not
    fit, or is damaged, is logged and removed.

    ``others``: recipes of SAEs that are not trained now and may resume later. While the file holds one of them, it is neither written nor
    removed, and this training writes no checkpoint.
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
        """Tokens at each checkpoint from which the training resumed."""
        self.seconds_before = 0.0
        """Duration of the training before it resumed."""
        self.tokens: int | None = None
        """Tokens at the checkpoint in the file; None without a file."""
        self._keys: list[str] = []
        self._is_of_others = False
        self._began = self._written = time.monotonic()
        self._seconds_of_writing = 0.0

    def load(self, configs: Sequence[Sequence[SAEConfig]], trainings: Sequence[TrainingConfig]) -> TrainingState | None:
        """Return the state to resume from, or None to start at the beginning.

        ``configs``: for each SAE the configurations that decide its result, its own last. Raises ``ValueError`` if the number of recipes
        differs.
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
            chosen = [record["keys"].index(key) for key in self._keys if key in record["keys"]]
            self._is_of_others = not set(self.others).isdisjoint(record.get("recipes", ()))
            if self._is_of_others:
                logger.info("%s is kept for other SAEs that resume from it later; until then no other checkpoint is written", self.file)
            if len(chosen) < len(self._keys):
                if not self._is_of_others:
                    logger.warning("%s is a checkpoint of other SAEs: it is removed, and training starts from the beginning", self.file)
                    self.remove()
                return None
            *points, last = [[CurvePoint(*observed[number]) for number in chosen] for observed in (*record["points"], record["last"])]
            of_saes = [{name.removeprefix(f"{n}."): each for name, each in tensors.items() if name.startswith(f"{n}.")} for n in chosen]
            state = TrainingState(record["steps"], record["tokens"], record["largest_batch"], points, last, of_saes)
            self.resumed_at_tokens, self.seconds_before = [*record["resumed_at_tokens"], state.tokens], record["seconds"]
        except Exception as error:  # only this module writes the file: with any error in reading it is damaged
            logger.warning("%s is damaged: it is removed, and training starts from the beginning (%s)", self.file, error)
            self._is_of_others = False
            self.remove()
            return None
        self.tokens = state.tokens
        logger.info("training resumes from %s, after step %d and %d tokens", self.file, state.steps, state.tokens)
        return state

    @property
    def is_due(self) -> bool:
        """It is time to write."""
        if self.interval_seconds == 0:
            return True
        return time.monotonic() - self._written >= max(self.interval_seconds, _PATIENCE * self._seconds_of_writing)

    def save(self, trainers: Sequence[SAETrainer], largest_batch: int, points: Sequence[Sequence[CurvePoint]]) -> None:
        """Write the state of the trainers. It replaces the earlier checkpoint once it is complete and on disk.

        Nothing is written if a tensor is not finite: the next step reports it, and the earlier checkpoint is the last good one. Nothing is
        written either while the file is kept for others. Raises :class:`CheckpointError`, which names the required bytes.
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
        """Remove the file if it exists and is not kept for others."""
        if self._is_of_others:
            return
        for file in (self.file, _aside(self.file)):
            file.unlink(missing_ok=True)
        self.tokens = None


def recipes_in(file: str | Path) -> list[str]:
    """Return the recipes of the SAEs in a checkpoint file; empty if it was written without them or cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads(opened.metadata()[_METADATA])["recipes"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return []


@contextmanager
def writing(checkpoints: Checkpoints | None) -> Iterator[WriteIfDue]:
    """Return a context with a function that writes a checkpoint when it is due, or on a pending signal, which it then delivers.

    A :class:`NonFiniteLossError` that leaves the context names the last good checkpoint. With None the function does nothing.
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
    """Return the batches after the first ``step``: a seekable stream skips them, another one is read and dropped."""
    if step and isinstance(batches, SeekableBatches):
        return batches.starting_at(step)
    return islice(batches, step, None)


def checkpoint_bytes(configs: Sequence[SAEConfig]) -> int:
    """Estimate the size of a checkpoint in bytes: weights and two moments in float32, and a counter per feature."""
    return sum(3 * 4 * (2 * c.d_in * c.d_sae + 2 * c.d_sae + c.d_in) + 8 * c.d_sae for c in configs)


def _key(configs: Sequence[SAEConfig], training: TrainingConfig, recipe: str) -> str:
    decisive = [[config.model_dump(mode="json") for config in configs], training.model_dump(mode="json"), recipe]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _write(file: Path, record: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the file under another name, flush it to disk, and rename it."""
    text = json.dumps(record)
    aside = _aside(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(tensors, aside, {_METADATA: text, _CHECKSUM: str(_checksum(text, tensors))})
        _flush(aside)
        aside.replace(file)
        _flush(file.parent)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        kept = f"; {file}, the one before, is kept" if file.exists() else ""
        raise CheckpointError(f"a checkpoint of {n_bytes:,} bytes cannot be written to {file.parent} ({error}){kept}") from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the file. Errors of any type mean that it is damaged."""
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
