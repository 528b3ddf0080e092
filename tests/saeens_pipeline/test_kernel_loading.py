"""Kernels are compiled by one process at a time, during the stages before training."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saeens_pipeline.assets.kernels import compiled_meanwhile, load_kernels
from saeens_pipeline.orchestration import runs
from saeens_pipeline.storage.locks import FOLDER, holding
from saeens_pipeline.storage.recipes import Store


@pytest.mark.slow
def test_another_process_compiles_kernels_and_removes_its_files(tmp_path):
    with compiled_meanwhile(tmp_path, ["topk", "standard", "topk"]) as process:
        assert isinstance(process.args, list)
        assert process.args[3:] == [str(tmp_path), "standard", "topk"]
        assert process.wait(timeout=300) == 0
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_the_compiling_process_ends_with_its_context(tmp_path):
    with holding(tmp_path, "kernels"), compiled_meanwhile(tmp_path, ["topk"]) as process:
        assert process.poll() is None
    assert process.returncode is not None


def test_loading_kernels_waits_for_another_process_to_compile_them(tmp_path):
    waiting = threading.Thread(target=load_kernels, args=(tmp_path, ["topk"]))
    with holding(tmp_path, "kernels"):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(300)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    ("builders", "device", "compiled"),
    [
        (("tokens", "activations", "sae"), "cpu", ["topk"]),
        (("activations", "sae", "residual"), "cpu", ["topk"]),
        (("sae", "residual"), "cpu", None),  # needed at once
        (("tokens", "activations"), "cpu", None),
        (("tokens", "sae"), "meta", None),
    ],
)
def test_kernels_are_compiled_ahead_only_during_the_stages_before_training(
    tmp_path, monkeypatch, builders: tuple[str, ...], device: str, compiled: list[str] | None
):
    asked: list[list[str]] = []

    def compiled_instead(root: Any, architectures: Any) -> nullcontext[None]:
        assert root == tmp_path
        asked.append(sorted(architectures))
        return nullcontext()

    monkeypatch.setattr("saeens_pipeline.orchestration.runs.compiled_meanwhile", compiled_instead)
    monkeypatch.setattr("saeens_pipeline.assets.compute.Compute.resolve", lambda self: device)
    wanted: Any = [SimpleNamespace(builder=builder, tags={"architecture": "topk"} if builder == "sae" else {}) for builder in builders]
    with runs.compiling_ahead(Store(tmp_path), wanted):
        pass
    assert asked == ([compiled] if compiled else [])


def test_loading_kernels_restores_torchs_threads(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_kernels(tmp_path, ["topk"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
