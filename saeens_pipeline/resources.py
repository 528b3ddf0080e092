"""What runs are given: the store of artefacts, and the device that trains and evaluates."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.recipes import Store

_PROJECT_ROOT = Path(__file__).parents[1]


def data_root() -> Path:
    """`SAEENS_DATA`, or `data` in the checkout, or `data` in the current folder where the package is not a checkout."""
    chosen = os.environ.get("SAEENS_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return (_PROJECT_ROOT if (_PROJECT_ROOT / "pyproject.toml").exists() else Path.cwd()) / "data"


class StoreResource(dg.ConfigurableResource):
    """Where artefacts lie: `root`, or where it is empty SAEENS_DATA, or `data`."""

    root: str = ""

    @property
    def store(self) -> Store:
        return Store(Path(self.root) if self.root else data_root())


@dataclass
class Measurement:
    """What a piece of work took; filled in when it is over."""

    seconds: float = 0.0
    peak_memory_bytes: int | None = None


class ComputeResource(dg.ConfigurableResource):
    """The device that trains and evaluates: `auto` (CUDA where there is a GPU, else the CPU), `cpu`, `cuda` or `cuda:N`."""

    device: str = "auto"

    def resolve(self) -> str:
        """The device's name in PyTorch. Raises ConfigurationError for one that this machine does not have."""
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        available = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if self.device not in available:
            raise ConfigurationError(f"device {self.device!r} is not available; available: auto, {', '.join(available)}")
        return self.device

    @contextlib.contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Time and peak memory of the work inside: of the device where it is a GPU, else of this whole process (Linux) or unknown."""
        import torch

        device = self.resolve()
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak_memory()
        measurement, began = Measurement(), time.perf_counter()
        yield measurement
        if on_gpu:
            torch.cuda.synchronize(device)
        measurement.seconds = time.perf_counter() - began
        measurement.peak_memory_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_memory()

    def describe(self) -> dict[str, Any]:
        """Device and versions, for provenance."""
        import torch

        device = self.resolve()
        name = (
            torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()}, {torch.get_num_threads()} threads"
        )
        return {"device": f"{device} ({name})", "versions": dict(_versions()), "date": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def _versions() -> dict[str, str]:
    packages = ("saeens", "torch", "transformers", "zarr", "dagster")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
