"""The parts of `benchmarks/end_to_end.py` that run without SAELens."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.child import ChildUse, folder_bytes, run_child
from benchmarks.end_to_end import durations
from benchmarks.end_to_end_inputs import DATA, FULL, QUICK, Inputs, experiment_file
from benchmarks.runner import Agreement
from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.storage.root import data_root


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(
        size=QUICK,
        model=describe_language_model(REFERENCE_MODEL),
        folder=tmp_path,
        train_texts=tmp_path / "train.jsonl",
        test_texts=tmp_path / "test.jsonl",
        train_windows=tmp_path / "train.parquet",
        test_windows=tmp_path / "test.parquet",
        held_out=torch.zeros(1, 192),
        environment={},
    )


def test_the_experiment_file_is_valid_and_trains_as_many_tokens_as_the_windows_hold(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEENS_EXPERIMENTS", str(tmp_path))
    text = experiment_file(inputs, tmp_path / "data", "bfloat16", evaluated=True)
    (tmp_path / "end_to_end.yaml").write_text(text)
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    assert data_root() == tmp_path / "data"
    found = Experiments.load()
    assert not found.broken
    one, several, evaluated = (found.experiments[name] for name in ("one", "several", "evaluated"))
    assert found.sources["texts"].train_tokens == 160 * 127
    assert (one.ensemble.members, several.ensemble.members) == (1, 2)
    assert one.saes == several.saes[:1] and one.training == several.training
    assert not evaluated.saes
    assert [Path(each.sae).parts[-5:] for each in evaluated.ensemble.published] == [
        ("several", "layer=1", "seed=1", "bagging", "member_1"),
        ("several", "layer=1", "seed=1", "bagging", "member_2"),
    ]


@pytest.mark.parametrize(("tokens", "windows"), [(1, 32), (60_000, 480), (65_024, 512), (None, 992)])
def test_a_number_of_tokens_is_rounded_to_whole_batches_of_windows(tokens: int | None, windows: int) -> None:
    assert FULL.with_tokens(tokens).windows == windows
    assert FULL.with_tokens(tokens).train_tokens == windows * 127


def test_durations_add_up_to_the_time_of_the_process() -> None:
    use = ChildUse(started=100.0, seconds=20.0, peak_bytes=1, disturbed=False)
    assert durations(use, {"imports": 105.0, "model": 107.0, "training": 117.5, "evaluation": 119.0}) == (5.0, 2.0, 10.5, 2.5)


def test_a_comparison_holds_within_its_own_tolerance() -> None:
    assert Agreement(0.50, 0.52, None).holds is False
    assert Agreement(0.50, 0.52, None, tolerance=0.03).holds is True
    assert Agreement(0.50, 0.54, None, tolerance=0.03).holds is False


def test_memory_of_a_command_includes_its_children(tmp_path: Path) -> None:
    hold = "import time; held = bytearray(200_000_000); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    use = run_child([sys.executable, "-c", parent], {}, tmp_path / "log.txt")
    assert 200e6 < use.peak_bytes < 400e6
    assert use.seconds > 1


def test_a_command_that_fails_raises_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        run_child([sys.executable, "-c", "raise SystemExit('no such thing')"], {}, tmp_path / "log.txt")


def test_folder_bytes_counts_files_of_subfolders_and_no_links(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert folder_bytes(tmp_path) == 8
