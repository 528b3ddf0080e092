"""Memory of training: SAEs per group and tokens per micro-batch that fit, and smaller portions after running out of memory."""

from __future__ import annotations

import errno
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from saeens_pipeline.errors import ConfigurationError, counted

if TYPE_CHECKING:
    from saeens_models import SAEConfig

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't start new thread", "std::bad_alloc")  # of torch, Python and C++

FEWEST_TOKENS = 64
"""Smallest micro-batch: below it the weights, not the batch, fill the memory."""


class Portion(NamedTuple):
    """The SAEs of one group and the tokens of one micro-batch."""

    n_saes: int
    micro_batch_tokens: int | None
    """None: whole batches."""

    def half(self, batch_tokens: int) -> Portion | None:
        """Return a portion with half as many SAEs or, for one SAE, half as many tokens per micro-batch; None below FEWEST_TOKENS."""
        if self.n_saes > 1:
            return self._replace(n_saes=(self.n_saes + 1) // 2)
        tokens = (self.micro_batch_tokens or batch_tokens) // 2
        return self._replace(micro_batch_tokens=tokens) if tokens >= FEWEST_TOKENS else None

    def __str__(self) -> str:
        tokens = "whole batches" if self.micro_batch_tokens is None else f"micro-batches of {self.micro_batch_tokens} tokens"
        return f"{counted(self.n_saes, 'SAE')} at once, {tokens}"


class MemoryPlan(NamedTuple):
    """The portion to train with, and the larger ones that ran out of memory."""

    portion: Portion
    too_much: tuple[Portion, ...] = ()


def train_in_portions(saes: Sequence[Item], batch_tokens: int, first: Portion, train: Callable[[Sequence[Item], MemoryPlan], None]) -> None:
    """Call `train` with groups of `first.n_saes` SAEs until all are trained.

    When memory runs out, the portion is halved and the group starts again. SAEs do not depend on the others of their group, and
    micro-batches give the same gradients up to rounding. Raises the out-of-memory error if no smaller portion is left.
    """
    plan, done = MemoryPlan(first), 0
    while done < len(saes):
        group = saes[done : done + plan.portion.n_saes]
        tried = plan.portion._replace(n_saes=len(group))
        smaller = None
        try:
            train(group, plan)
        except Exception as error:
            smaller = tried.half(batch_tokens) if is_out_of_memory(error) else None
            if smaller is None:
                raise
        if smaller is None:
            done += len(group)
            continue
        gc.collect()  # after the error's end, because its traceback keeps the tensors alive
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory with %s: continuing with %s", tried, smaller)
        plan = MemoryPlan(smaller, (*plan.too_much, tried))


class TrainingMemory(NamedTuple):
    """Memory of training one SAE in float32, in bytes. Compiled steps need less."""

    weights: int
    """Four numbers for each weight: value, gradient, two moments."""
    token: int
    """For each token of a batch: one number for each feature, eight for each dimension."""


def training_memory(config: SAEConfig) -> TrainingMemory:
    """Return the memory that training an SAE with this configuration takes, by part."""
    weights = 16 * (2 * config.d_in * config.d_sae + 2 * config.d_sae + config.d_in)
    return TrainingMemory(weights, token=4 * (config.d_sae + 8 * config.d_in))


def portion_within(memory_gb: float, configs: Sequence[SAEConfig], batch_tokens: int, name: str) -> Portion:
    """Return the largest portion that should fit into `memory_gb`; 0 is no limit.

    Every SAE counts as the widest. Raises ConfigurationError if not even one SAE fits.
    """
    everything = Portion(len(configs), None)
    if not memory_gb:
        return everything
    budget = memory_gb * 1e9
    largest = max(configs, key=lambda config: config.d_sae)
    weights, token = training_memory(largest)
    fitting = int(budget // (weights + batch_tokens * token))
    if fitting:
        return everything._replace(n_saes=min(fitting, len(configs)))
    tokens = int((budget - weights) // token)
    if tokens < min(FEWEST_TOKENS, batch_tokens):
        least = (weights + FEWEST_TOKENS * token) / 1e9
        raise ConfigurationError(
            f"SAEENS_MEMORY_GB={memory_gb:g}: one SAE of {name} (d_in {largest.d_in}, d_sae {largest.d_sae}) takes at least {least:.2g} GB"
        )
    return Portion(1, tokens)


def out_of_memory_message(found: str) -> str:
    """Return the message about memory that ran out, with what the library said."""
    found = " ".join(found.split())[:200]
    return f"memory ran out{found and f' ({found})'}: free some, or set SAEENS_MEMORY_GB, SAEENS_THREADS or smaller sizes"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error that says that memory ran out, on the device or the machine."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
