"""Laboratories for tests: an empty one, and copies of one in which the tiny experiment has been run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from fake_hub import UNREACHABLE, FakeHub, reach, serving
from huggingface_hub import constants
from hypothesis import settings
from tiny_experiment import Laboratory
from tiny_models import write_tiny_model

settings.load_profile("ci")  # the same examples in every run, and no complaint about a slow machine


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real hub."""
    reach(monkeypatch, UNREACHABLE)


@pytest.fixture
def fresh_forkserver() -> None:
    """Processes are forked from a server that starts anew: one that an earlier test has started has that test's environment."""
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub without repositories, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(FakeHub()) as fake:
        reach(monkeypatch, fake.url)
        yield fake


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="session")
def finished_laboratory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment, run once, with Dagster's events on disk; for reading only."""
    home = tmp_path_factory.mktemp("finished")
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch, keep_events=True)
        laboratory.declare()
        laboratory.run()
    return laboratory


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
