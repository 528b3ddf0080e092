"""The benchmark of GPUs, on the CPU: both ways of training agree, and without a GPU nothing is measured."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.options import Options
from benchmarks.runner import Effort
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL

ONCE = Effort(rounds=1, budget_seconds=0)


def test_without_a_gpu_the_section_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = gpu.run(Options(quick=True, scratch=tmp_path))
    assert section.rows == []
    assert "no NVIDIA GPU" in section.left_out[0]


def test_training_rows_time_the_same_training_and_compare_its_results() -> None:
    rows = gpu.training_rows(gpu.Case("topk", 24, 96, 4, 2, 2, 64), torch.device("cpu"), ONCE)
    assert [row.against for row in rows] == ["without graphs", "plain torch"]
    for row in rows:
        assert row.agreement is not None
        assert row.agreement.holds
        assert row.ours.seconds > 0


def test_a_forward_row_has_the_tokens_of_its_windows() -> None:
    row = gpu.forward_row(REFERENCE_MODEL, 1, "float32", torch.device("cpu"), ONCE)
    assert row.tokens == 64 * 128
    assert row.ours.seconds > 0
