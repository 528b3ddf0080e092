"""Which failures of a step may pass, and are tried again: a hub that does not answer, memory that ran out, a step that was killed.

Wrong settings, wrong input and losses that are not finite would come again: they fail at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

import dagster as dg

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.executors import VARIABLE

MAX_RETRIES = 2
DELAY_SECONDS = 10.0
"""Before the first retry; before the next it is twice as long."""

_HUB = (
    ("builtins", "ConnectionError"),
    ("builtins", "TimeoutError"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
)
_MEMORY = (("builtins", "MemoryError"), ("torch", "OutOfMemoryError"))


def killed_step_policy() -> dg.RetryPolicy | None:
    """The policy of ops whose steps are processes of their own: one that is killed is tried again. In one process there is none left to."""
    if os.environ.get(VARIABLE) != "multiprocess":
        return None
    return dg.RetryPolicy(max_retries=MAX_RETRIES, delay=DELAY_SECONDS, backoff=dg.Backoff.EXPONENTIAL)


def can_pass(error: BaseException) -> bool:
    """Whether trying again may help: memory ran out, or a hub did not answer, which may be said in other words by then.

    Not a SaeensError about memory, which is a budget that is too small, and nothing that is configured wrongly.
    """
    if isinstance(error, ConfigurationError):
        return False
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return isinstance(error, _loaded(_MEMORY)) or any(isinstance(each, _loaded(_HUB)) for each in causes)


@contextlib.contextmanager
def retried(attempt: int, policy: dg.RetryPolicy | None) -> Iterator[None]:
    """Ask Dagster to run a step again, the `attempt` + 1st time that it runs, if what leaves the context may pass.

    Under a `policy` Dagster would try everything again: what cannot pass becomes a Failure that says no.
    """
    try:
        yield
    except Exception as error:
        if can_pass(error):
            raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=DELAY_SECONDS * 2**attempt) from error
        if policy is not None:
            raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error
        raise


def _loaded(names: Iterable[tuple[str, str]]) -> tuple[type[BaseException], ...]:
    """Errors of the packages that are imported: one that is not cannot have raised."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if hasattr(sys.modules.get(module), name))
