"""The executor of runs from the UI, the automation and backfills."""

from __future__ import annotations

import os

import dagster as dg

from saeens_pipeline.errors import ConfigurationError

VARIABLE = "SAEENS_EXECUTOR"


def executor_from_environment() -> dg.ExecutorDefinition:
    """Return the executor that SAEENS_EXECUTOR names: `in_process` (default) or `multiprocess`. Raises ConfigurationError for others.

    In one process a step costs 0.1 s. A process per step costs over a second and frees all memory of the step. Such processes are forked
    from a server that has imported torch, which takes seconds, and has used neither threads nor CUDA.
    """
    match os.environ.get(VARIABLE) or "in_process":
        case "in_process":
            return dg.in_process_executor
        case "multiprocess":
            return dg.multiprocess_executor.configured({"start_method": {"forkserver": {"preload_modules": ["torch"]}}})
        case other:
            raise ConfigurationError(f"{VARIABLE}={other}: there are in_process and multiprocess")
