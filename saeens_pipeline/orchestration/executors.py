"""Which process runs the steps of what the UI, the automation and backfills launch."""

from __future__ import annotations

import os

import dagster as dg

from saeens_pipeline.errors import ConfigurationError

VARIABLE = "SAEENS_EXECUTOR"


def executor_from_environment() -> dg.ExecutorDefinition:
    """The executor that SAEENS_EXECUTOR names: `in_process` (the default) or `multiprocess`. Raises ConfigurationError for others.

    In one process a step costs 0.1 s; one of its own costs over a second, and returns all of its memory. Forked from a server
    that has imported torch, which a fresh process would spend seconds on, and that has used neither threads nor CUDA yet.
    """
    match os.environ.get(VARIABLE) or "in_process":
        case "in_process":
            return dg.in_process_executor
        case "multiprocess":
            return dg.multiprocess_executor.configured({"start_method": {"forkserver": {"preload_modules": ["torch"]}}})
        case other:
            raise ConfigurationError(f"{VARIABLE}={other}: there are in_process and multiprocess")
