"""The environment of a result: machine, threads, allocator, library versions."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

Allocator = Literal["retain", "system"]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "POLARS_MAX_THREADS")
_PACKAGES = (
    "torch", "numpy", "numba", "scipy", "zarr", "transformers", "datasets",
    "sae-lens", "transformer-lens", "dictionary-learning", "eai-sparsify",
)  # fmt: skip
_FEATURES = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER_TRIM = 2**31 - 1


@dataclass(frozen=True)
class Environment:
    """The environment that is printed and stored with every result."""

    date: str
    commit: str | None
    """Commit of this project, with a mark for uncommitted changes; None outside of a checkout."""
    processor: str
    """Name, instruction sets for matrix products, and number of cores."""
    system: str
    python: str
    threads: dict[str, int]
    """Number of threads by library."""
    allocator: str
    load_average: float | None
    """Runnable processes in the last minute; more than the threads in use means noisy timings."""
    versions: dict[str, str]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Give every library the same number of threads. Call it before torch, numpy and numba are imported."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)


def set_allocator(allocator: Allocator) -> None:
    """Set the allocator. ``retain``: freed memory stays with the process and is not mapped again in every step; glibc only.

    Both sides of a comparison run in one process, hence under the same setting.
    """
    libc = ctypes.CDLL(None)
    if allocator == "retain" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)


def allocator_of_children(allocator: Allocator) -> dict[str, str]:
    """Return the environment variables with which glibc sets the same allocator in a new process."""
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_NEVER_TRIM)} if allocator == "retain" else {}


def describe(allocator: Allocator) -> Environment:
    """Return the present environment."""
    import torch

    threads = {"torch": torch.get_num_threads()}
    try:
        import numba

        threads["numba"] = numba.get_num_threads()
    except ImportError:
        pass
    load_average: Callable[[], tuple[float, float, float]] | None = getattr(os, "getloadavg", None)
    return Environment(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        processor=", ".join([_processor(), *_features(), f"{available_cores()} cores"]),
        system=platform.platform(),
        python=platform.python_version(),
        threads=threads,
        allocator=f"{allocator} ({platform.libc_ver()[0] or 'unknown libc'})",
        load_average=round(load_average()[0], 2) if load_average else None,
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _features() -> list[str]:
    import torch

    found = torch.cpu.get_capabilities()
    return [text for name, text in _FEATURES.items() if found.get(name)]


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
