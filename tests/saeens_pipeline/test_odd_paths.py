"""Roots and experiment folders whose names hold characters that globs, URLs and shells treat specially."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from tiny_experiment import NAME, Laboratory

from saeens_pipeline import cli
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.orchestration.instance import prepare_home
from saeens_pipeline.settings.files import FOLDERS_VARIABLE
from saeens_pipeline.storage.tables import read_table

NAMES = {"a[1] b*c {e,f} #g %h $i 'j' \"k\" & l": True, "%20?\u00fc \u65e5\u672c": False}  # whether Dagster's databases lie there, too


@pytest.mark.parametrize("name", NAMES)
def test_a_root_and_an_experiment_folder_may_have_any_name(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    laboratory = Laboratory(tiny_model, tmp_path / name / "defs", tmp_path / name / "data")
    laboratory.activate(monkeypatch, keep_events=NAMES[name])
    monkeypatch.setenv("DAGSTER_HOME", "" if NAMES[name] else str(tmp_path / "home"))
    file = laboratory.declare(
        evaluations=["reconstruction", "training_curves"], baselines=["expanded"], ensemble={"members": 2, "seeds": [3]}
    )
    laboratory.run()
    assert "nothing to do" in laboratory.run()
    for table in ("reconstruction", "training_curves"):
        assert len(read_table(laboratory.root, NAME, table)) > 3
    monkeypatch.setenv(FOLDERS_VARIABLE, str(file.parent))
    assert laboratory.catalogue.broken == {}


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "root \\udcff ä"), ("ascii", "root \\udcff \\xe4")])
def test_paths_that_are_not_utf8_are_printed(empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str):
    """Also to a pipe whose encoding lacks the characters of a path."""
    root = tmp_path / os.fsdecode(b"root " + b"\xff" + " ä".encode())
    root.mkdir()
    (root / os.fsdecode(b"foreign \xfe")).touch()
    monkeypatch.setenv("SAEENS_DATA", str(root))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    new = ["new", "mine", "--model", "builtin/reference", "--layers", "1", "--output", str(root / "mine.yaml")]
    for command, named in ((["gc"], "foreign \\udcfe"), (new, "mine.yaml")):
        contents = io.BytesIO()
        printed = io.TextIOWrapper(contents, encoding)
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
            patched.setattr(sys, "stdout", printed)
            patched.setattr(sys, "argv", ["saeens", *command])
            cli.main()
        assert not ended.value.code
        printed.flush()
        text = contents.getvalue().decode(encoding)
        assert shown in text
        assert named in text
    assert (root / "mine.yaml").exists()


def test_a_root_that_is_not_utf8_is_refused_before_any_work(empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_DATA", str(root := tmp_path / os.fsdecode(b"\xff")))
    with pytest.raises(SaeensError, match="is not UTF-8, and safetensors and polars read no such paths: choose another root"):
        empty.run()
    assert not list(root.rglob("sources"))


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_home_that_dagster_cannot_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / name))
    with pytest.raises(ConfigurationError, match=r"with \? or %20: set DAGSTER_HOME"):
        prepare_home()
