"""The executor of steps, and retries after transient failures: a hub that does not answer, memory that ran out, a killed step.

Wrong settings, wrong input and losses that are not finite would fail again: they are not retried.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from saeens_pipeline.assets.health import UnsoundArtefactError
from saeens_pipeline.assets.materialise import ReplacedInputError
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.recipes import DamagedArtefactError, MissingInputError

VARIABLE = "SAEENS_EXECUTOR"
MAX_RETRIES = 2
DELAY_SECONDS = 10.0
"""Delay before the first retry; it doubles for the next."""

WHAT_TO_DO: tuple[tuple[type[SaeensError], str], ...] = (
    (ConfigurationError, "Correct the experiment file or the partition that the message names, reload the definitions, and materialise."),
    (MissingInputError, "Materialise the input that the message names too."),
    (DamagedArtefactError, "Materialise the damaged artefact: it is computed anew. `saeens doctor --verify` finds others."),
    (UnsoundArtefactError, "The check `health` has the numbers. Change the settings that the message names."),
    (ReplacedInputError, "Materialise once more: what is fresh is kept."),
    (SaeensError, "Mend what the message says and materialise: what was finished is kept, and training goes on from its checkpoint."),
)
"""By class of the error, the first that fits: a sentence for the page of the failed run."""

_HUB = {
    "builtins": ("ConnectionError", "TimeoutError"),
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "requests": ("ConnectionError", "Timeout"),
}
_MEMORY = {"builtins": ("MemoryError",), "torch": ("OutOfMemoryError",)}


def executor_from_environment() -> dg.ExecutorDefinition:
    """Return the executor of runs from the UI, the automation and backfills: SAEENS_EXECUTOR, `in_process` (default) or `multiprocess`.

    In one process a step costs 0.1 s. A process per step costs over a second and frees all memory of the step. Such processes are forked
    from a server that has imported torch, which takes seconds, and has used neither threads nor CUDA. Raises ConfigurationError.
    """
    match os.environ.get(VARIABLE) or "in_process":
        case "in_process":
            return dg.in_process_executor
        case "multiprocess":
            return dg.multiprocess_executor.configured({"start_method": {"forkserver": {"preload_modules": ["torch"]}}})
        case other:
            raise ConfigurationError(f"{VARIABLE}={other}: there are in_process and multiprocess")


def killed_step_policy() -> dg.RetryPolicy | None:
    """Return the policy that retries killed steps, if steps have their own processes; else None, because the run ends with its process."""
    if os.environ.get(VARIABLE) != "multiprocess":
        return None
    return dg.RetryPolicy(max_retries=MAX_RETRIES, delay=DELAY_SECONDS, backoff=dg.Backoff.EXPONENTIAL)


def can_pass(error: BaseException) -> bool:
    """Return True for errors after which a retry may succeed: memory ran out, or a hub did not answer, perhaps as the cause of the error.

    False for a SaeensError about memory, whose budget is too small, and for wrong configuration.
    """
    if isinstance(error, ConfigurationError):
        return False
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return isinstance(error, _loaded(_MEMORY)) or any(isinstance(each, _loaded(_HUB)) for each in causes)


@contextlib.contextmanager
def retried(attempt: int, policy: dg.RetryPolicy | None, assets: Sequence[str] = (), partition: str = "") -> Iterator[None]:
    """Let Dagster retry a step if the error that leaves the context is transient. `attempt` counts earlier retries.

    With a `policy` Dagster retries every error, so other errors become a Failure that forbids retries. A SaeensError does in any case: the
    UI shows the message of a Failure first, and that of another error below a stack. Its metadata name the assets and the partition.
    """
    try:
        yield
    except Exception as error:
        if can_pass(error):
            raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=DELAY_SECONDS * 2**attempt) from error
        if isinstance(error, SaeensError):
            what_to_do = next(sentence for kind, sentence in WHAT_TO_DO if isinstance(error, kind))
            told = {"assets": ", ".join(assets), "partition": partition, "what to do": what_to_do}
            raise dg.Failure(str(error), {name: text for name, text in told.items() if text}, allow_retries=False) from error
        if policy is not None:
            raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error
        raise


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the SaeensError behind a Failure that leaves the context."""
    try:
        yield
    except dg.Failure as failure:
        error = failure.__cause__
        if not isinstance(error, SaeensError):
            raise
    else:
        return
    raise error


def _loaded(names: Mapping[str, Sequence[str]]) -> tuple[type[BaseException], ...]:
    """Return the error classes of imported packages; other packages cannot have raised."""
    loaded = [(sys.modules[module], name) for module in names.keys() & sys.modules.keys() for name in names[module]]
    return tuple(getattr(module, name) for module, name in loaded if hasattr(module, name))
