"""Laboratories for tests: an empty one, and copies of one in which the tiny experiment has been run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from alembic.config import Config
from alembic.script import ScriptDirectory
from command_line import saeens  # noqa: F401  # a fixture
from fake_hub import UNREACHABLE, FakeHub, reach, serving
from filelock import FileLock
from huggingface_hub import constants
from hypothesis import settings
from tiny_experiment import Laboratory
from tiny_models import write_tiny_model

settings.load_profile("ci")  # the same examples in every run, and no complaint about a slow machine
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: tests run in several processes, and threads would wait in loops
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real hub."""
    reach(monkeypatch, UNREACHABLE)


@pytest.fixture(scope="session", autouse=True)
def _migrations_are_read_once() -> Iterator[None]:
    """Dagster reads all its migrations for every instance, which takes longer than most of what a test does with one."""
    read, directories = ScriptDirectory.from_config, {}

    def once(config: Config) -> ScriptDirectory:
        location = config.get_main_option("script_location")
        if location not in directories:
            directories[location] = read(config)
        return directories[location]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ScriptDirectory, "from_config", once)
        yield


@pytest.fixture
def fresh_forkserver() -> None:
    """Fork processes from a new server: the server of an earlier test has that test's environment."""
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub without repositories, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(FakeHub()) as fake:
        reach(monkeypatch, fake.url)
        yield fake


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that run these tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder unless another process has; what one that failed left is removed."""
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_model(shared_folder: Path) -> Path:
    return _make_once(shared_folder / "tiny_model", write_tiny_model)


def _stamps(root: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file of an artefact. Not of Dagster's, which it writes when it is read."""
    files = [file for file in root.rglob("*") if file.is_file() and root / "dagster" not in file.parents]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="session")
def finished_laboratory(tiny_model: Path, shared_folder: Path) -> Iterator[Laboratory]:
    """The tiny experiment, run once, with Dagster's events on disk; for reading only."""

    def make(home: Path) -> None:
        laboratory = Laboratory(tiny_model, home / "defs", home / "data")
        with pytest.MonkeyPatch.context() as monkeypatch:
            laboratory.activate(monkeypatch, keep_events=True)
            laboratory.declare()
            laboratory.run()

    home = _make_once(shared_folder / "finished", make)
    before = _stamps(home / "data")
    yield Laboratory(tiny_model, home / "defs", home / "data")
    assert _stamps(home / "data") == before, "a test has changed the laboratory that all read"


@pytest.fixture
def empty(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """The tiny experiment declared, nothing made yet."""
    laboratory = Laboratory(tiny_model, tmp_path / "defs", tmp_path / "data")
    laboratory.activate(monkeypatch)
    laboratory.declare()
    return laboratory


@pytest.fixture
def finished(finished_laboratory: Laboratory, empty: Laboratory) -> Laboratory:
    """A copy of the finished laboratory, to change at will."""
    shutil.copytree(finished_laboratory.root, empty.root, ignore=shutil.ignore_patterns("dagster"))
    return empty
