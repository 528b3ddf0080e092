"""The device that trains and evaluates: threads, precision, memory, and measurements of time, memory and energy."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.locks import holding_one_of
from saeens_pipeline.storage.root import PROJECT_ROOT

# fmt: off
Device = Literal[
    "auto", "cpu", "mps", "cuda", "cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5", "cuda:6", "cuda:7", "cuda:8", "cuda:9",
    "cuda:10", "cuda:11", "cuda:12", "cuda:13", "cuda:14", "cuda:15",
]
# fmt: on
"""Devices that a machine may have, spelled out for the launchpad of the UI: an enumeration is the only text that it validates."""
DEVICES = "auto, cpu, mps, cuda, or cuda:0 to cuda:15"
Precision = Literal["float32", "tf32", "bfloat16"]
MOST_MEMORY_GB, MOST_THREADS = 10_000, 1_024


@dataclass
class Measurement:
    """Time, memory and energy of a piece of work, set at its end. None: the machine has no such measurement."""

    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None


@dataclass(frozen=True)
class Compute:
    """A device and the share of it that may be used. Nothing here is part of a recipe.

    `device`: one of `Device`; `auto` is CUDA if there is a GPU, else the CPU. `precision` of float32 matrix products in training: one of
    `Precision`; sums and weights stay in float32. `memory_gb`: budget of SAEs that are trained together, or 0 for no limit. `threads` of
    the CPU, or 0 for PyTorch's default.
    """

    device: str = "auto"
    precision: str = "float32"
    memory_gb: float = 0.0
    threads: int = 0

    @classmethod
    def from_environment(cls) -> Compute:
        """Read SAEENS_DEVICE, SAEENS_PRECISION, SAEENS_MEMORY_GB and SAEENS_THREADS. Raises ConfigurationError for a wrong value."""
        device, precision = os.environ.get("SAEENS_DEVICE") or "auto", os.environ.get("SAEENS_PRECISION") or "float32"
        if device not in get_args(Device):
            raise ConfigurationError(f"SAEENS_DEVICE is {device!r}; it can be {DEVICES}")
        if precision not in _PRECISIONS:
            raise ConfigurationError(f"SAEENS_PRECISION is {precision!r}; it can be {', '.join(_PRECISIONS)}")
        memory_gb, threads = _number("SAEENS_MEMORY_GB", float, MOST_MEMORY_GB), _number("SAEENS_THREADS", int, MOST_THREADS)
        return cls(device, precision, memory_gb, threads)

    def resolve(self, *, float64: bool = False) -> str:
        """Return the device's name in PyTorch; with `float64`, the CPU if the device lacks float64.

        Raises ConfigurationError for a device that this machine does not have.
        """
        torch = _torch()
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        available = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        available += ["mps"] if torch.backends.mps.is_available() else []
        if self.device not in available:
            raise ConfigurationError(f"device {self.device!r} is not available; available: auto, {', '.join(available)}")
        return "cpu" if float64 and self.device == "mps" else self.device

    @contextlib.contextmanager
    def in_use(self, root: Path) -> Iterator[None]:
        """Set the number of threads inside and, with several GPUs, use one that no other process below `root` uses."""
        torch = _torch()
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads or threads)
        try:
            if self.resolve() == "cuda" and torch.cuda.device_count() > 1:
                with holding_one_of(root, [f"cuda_{index}" for index in range(torch.cuda.device_count())]) as name:
                    torch.cuda.set_device(int(name.removeprefix("cuda_")))  # from here on "cuda" is this GPU
                    yield
            else:
                yield
        finally:
            torch.set_num_threads(threads)

    @contextlib.contextmanager
    def training_precision(self) -> Iterator[None]:
        """Set the precision of float32 matrix products inside. For training only: residuals and evaluations stay exact."""
        torch = _torch()
        before, device = torch.get_float32_matmul_precision(), self.resolve()
        in_bfloat16 = self.precision == "bfloat16" and device.startswith("cuda")  # on CUDA, torch's own setting stops at TF32
        torch.set_float32_matmul_precision(_PRECISIONS[self.precision])
        try:
            with torch.autocast("cuda", torch.bfloat16) if in_bfloat16 else contextlib.nullcontext():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    @contextlib.contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Measure time, peak memory and energy of the `with` block. Memory is that of the GPU or, without one, of this process (Linux)."""
        torch = _torch()
        device = self.resolve()
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak_memory()
        measurement, began, energy = Measurement(), time.perf_counter(), _energy_joules(device)
        yield measurement
        if on_gpu:
            torch.cuda.synchronize(device)
        measurement.seconds = time.perf_counter() - began
        measurement.peak_memory_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_memory()
        after = _energy_joules(device)
        measurement.energy_joules = None if energy is None or after is None else after - energy

    def describe(self) -> dict[str, Any]:
        """Return device, precision, versions and date, for records."""
        torch = _torch()
        device, name = self.resolve(), f"{platform.machine()}, {self.threads or torch.get_num_threads()} threads"
        if device.startswith("cuda"):
            name = torch.cuda.get_device_name(device)
        return {
            "device": f"{device} ({name})",
            "precision": self.precision,
            "versions": dict(_versions()),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def gpu(self) -> tuple[str, int] | None:
        """Return name and bytes of memory of the GPU in use; None without one."""
        cuda, device = _torch().cuda, self.resolve()
        return (cuda.get_device_name(device), cuda.get_device_properties(device).total_memory) if device.startswith("cuda") else None


_PRECISIONS = {"float32": "highest", "tf32": "high", "bfloat16": "medium"}  # PyTorch's names for the precision of float32 matrix products


def _torch():
    """Return torch, which declarations must not load."""
    import torch

    return torch


def _number(name: str, kind: type[int] | type[float], most: int) -> Any:
    value = os.environ.get(name) or "0"
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise ConfigurationError(f"{name} is {value!r}; it has to be a number, 0 or larger, at most {most:,}")
    return number


def _energy_joules(device: str) -> float | None:
    """Return the energy that an NVIDIA GPU has used since its driver was loaded; None on other devices, or without NVML."""
    if not device.startswith("cuda"):
        return None
    torch = _torch()
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # the driver has a class for each failure, and a missing measurement must not stop the work
        return None


@cache
def _versions() -> dict[str, str]:
    packages = ("saeens", "torch", "transformers", "zarr", "dagster")
    versions = {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": checked_out_commit(PROJECT_ROOT),
    }
    return {name: value for name, value in versions.items() if value}


def checked_out_commit(folder: Path) -> str | None:
    """Return the git commit of the checkout in a folder, with `+` for changed files; None without a checkout or git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, timeout=10).stdout

    if not (folder / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
