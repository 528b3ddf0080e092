"""Commands that only read answer on a data root that cannot be written, as on one that can, and leave it as it is."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from privileges import read_only
from tiny_experiment import LAYER, NAME, Laboratory
from typer.testing import CliRunner

from saeens_pipeline import cli
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration.instance import home_folder, recorded_instance
from saeens_pipeline.storage import locks
from saeens_pipeline.storage.names import Address, Partition

COMMANDS = {
    "status": ("status", NAME),
    "plan": ("plan", NAME),
    "table": ("table", NAME, "reconstruction"),
    "lineage": ("lineage", f"{NAME}/bagging/member_1:layer={LAYER},seed=1"),
    "gc": ("gc",),
    "experiments": ("experiments",),
}


@pytest.fixture
def laboratory(finished: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """The finished experiment with Dagster's events on disk."""
    monkeypatch.undo()
    finished.activate(monkeypatch, keep_events=True)
    shutil.copytree(finished_laboratory.root / "dagster", finished.root / "dagster")
    (finished.root / "sources" / NAME / f"layer={LAYER}" / ".activations.zarr.00000000-1.partial").mkdir()
    with recorded_instance() as instance:  # writes the settings of this place
        assert instance
    return finished


@pytest.fixture
def unwritable(laboratory: Laboratory) -> Iterator[Laboratory]:
    with read_only(laboratory.root):
        yield laboratory


def _state(root: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in root.rglob("*")}


def _printed(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return re.sub(r"[\d.]+ \w+  enough", "enough", result.output)  # free disk, which other processes change


def test_commands_that_only_read_print_the_same(laboratory: Laboratory):
    expected = {name: _printed(*command) for name, command in COMMANDS.items()}
    assert ".partial" in expected["gc"]
    before = _state(laboratory.root)
    with read_only(laboratory.root):
        assert {name: _printed(*command) for name, command in COMMANDS.items()} == expected
    assert _state(laboratory.root) == before


def test_the_leaderboard_is_printed_and_not_stored(unwritable: Laboratory, capsys: pytest.CaptureFixture[str]):
    assert "boosting" in _printed("leaderboard", "--format", "csv")
    assert not (unwritable.root / "tables" / "leaderboard").exists()


def test_events_of_successful_runs_are_not_copied(unwritable: Laboratory):
    runs = {file.stem for file in (home_folder() / "storage" / "history" / "runs").glob("*-*.db")}
    assert len(runs) > 2
    with recorded_instance() as instance:
        assert instance
        assert {run.run_id for run in instance.get_runs()} == runs
        copies = list(Path(instance.root_directory).rglob("*-*.db"))
    assert copies == []


def test_a_database_that_is_being_written_is_read_as_it_was_at_one_moment(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saeens_pipeline.orchestration.instance._is_writable", lambda folder: False)
    with sqlite3.connect(home_folder() / "storage/history/runs.db") as writer:  # an uncommitted transaction, as large as the file
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("CREATE TABLE more AS SELECT * FROM runs")
        with recorded_instance() as instance:
            assert instance
            assert len(instance.get_runs()) > 2
        writer.rollback()


def test_a_damaged_database_is_named_where_it_is(laboratory: Laboratory):
    file = home_folder() / "storage/history/runs.db"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\7" * (len(whole) - 4096))
    with read_only(laboratory.root), pytest.raises(SaeensError, match=f"^{file} is damaged"), recorded_instance() as instance:
        assert instance
        instance.get_runs()


def test_a_lock_is_seen_without_permission_to_write(tmp_path: Path):
    where = Address("s", "source", "activations"), Partition(1)
    with locks.writing_if_free(tmp_path, *where), read_only(tmp_path):
        assert locks.may_be_written(tmp_path, *where)
    (tmp_path / "locks" / "left.lock").touch()
    with read_only(tmp_path):
        assert not locks._may_be_held(tmp_path / "locks" / "left.lock")
