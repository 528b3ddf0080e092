"""Device, memory, threads and precision: set by the environment, the same for every run, restored afterwards."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from saeens_pipeline.assets.compute import Compute, checked_out_commit
from saeens_pipeline.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    for name in ("SAEENS_DEVICE", "SAEENS_PRECISION", "SAEENS_MEMORY_GB", "SAEENS_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_by_default_the_device_is_detected_and_nothing_is_limited():
    compute = Compute.from_environment()
    assert (compute.device, compute.precision, compute.memory_gb, compute.threads) == ("auto", "float32", 0, 0)
    assert compute.resolve() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_environment_variables_set_the_device_precision_memory_and_threads(monkeypatch):
    for name, value in {"DEVICE": "cpu", "PRECISION": "bfloat16", "MEMORY_GB": "1.5", "THREADS": "1"}.items():
        monkeypatch.setenv(f"SAEENS_{name}", value)
    compute = Compute.from_environment()
    assert (compute.device, compute.precision, compute.memory_gb, compute.threads) == ("cpu", "bfloat16", 1.5, 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SAEENS_PRECISION", "float16", "float32, tf32, bfloat16"),
        ("SAEENS_THREADS", "two", "SAEENS_THREADS is 'two'"),
        ("SAEENS_THREADS", "-1", "0 or larger"),
        ("SAEENS_MEMORY_GB", "nan", "0 or larger"),
    ],
)
def test_an_invalid_setting_is_refused_by_name(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        Compute.from_environment()


def test_a_missing_device_is_refused_with_the_available_ones():
    with pytest.raises(ConfigurationError, match=r"'cuda:99' is not available; available: auto, cpu"):
        Compute(device="cuda:99").resolve()


def test_float64_runs_on_the_cpu_if_the_device_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Compute(device="mps").resolve() == "mps"
    assert Compute(device="mps").resolve(float64=True) == "cpu"
    assert Compute(device="cpu").resolve(float64=True) == "cpu"


def test_threads_and_precision_apply_in_the_context_and_are_restored(tmp_path):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    compute = Compute(device="cpu", threads=3, precision="bfloat16")
    with pytest.raises(ArithmeticError), compute.in_use(tmp_path), compute.training_precision():
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "medium")
        raise ArithmeticError
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    with compute.in_use(tmp_path):
        assert torch.get_float32_matmul_precision() == before[1]  # of evaluation nobody asked for less
    with Compute(device="cpu").in_use(tmp_path), Compute(device="cpu").training_precision():
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (before[0], "highest")


def test_each_process_takes_a_free_gpu(monkeypatch, tmp_path):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with Compute().in_use(tmp_path), Compute().in_use(tmp_path), Compute(device="cpu").in_use(tmp_path):
        assert chosen == [0, 1]
    with Compute(device="cuda:2").in_use(tmp_path):
        assert chosen == [0, 1]  # what names its GPU gets that one
    with Compute().in_use(tmp_path):
        assert chosen == [0, 1, 0]


def test_energy_is_the_difference_of_the_devices_counter(monkeypatch):
    readings = iter([5_000_000, 5_012_500])  # millijoules
    binding = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings) if handle == "GPU-abc" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(Compute, "resolve", lambda self: "cuda")
    with Compute().measure() as measured:
        pass
    assert measured.energy_joules == 12.5
    assert measured.peak_memory_bytes == 7


def test_energy_is_none_if_the_device_reports_none():
    with Compute(device="cpu").measure() as measured:
        pass
    assert measured.energy_joules is None
    assert measured.seconds > 0


def test_provenance_has_the_commit_of_the_checkout_and_whether_it_is_modified(tmp_path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    assert checked_out_commit(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "HEAD")[:12]
    assert checked_out_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert checked_out_commit(tmp_path) == f"{commit}+"
