"""Trackers: what each tool's own reader finds after a run, and runs whose tracker is wrong, missing or fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_experiment import LAYER, NAME, Laboratory
from typer.testing import CliRunner

from saeens_pipeline.cli import app
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration import trackers
from saeens_pipeline.orchestration.garbage import declared, find_garbage
from saeens_pipeline.orchestration.trackers import TRACKERS, TrackedRun, Tracker
from saeens_pipeline.storage.root import PROJECT_ROOT

SEED = 1
SAE, TABLE = "bagging/member_1", "eval/reconstruction"
CONFIG = {"asset": f"{NAME}/{SAE}", "layer": LAYER, "seed": SEED, "sae.architecture": "topk", "sae.k": 4, "training.learning_rate": 0.01}
Points = dict[int, dict[str, float]]
Found = tuple[dict[str, Any], Points]


@pytest.fixture(autouse=True)
def _tools_without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No tool has failed before; none has an address, a key or a folder of this machine."""
    monkeypatch.setattr(trackers, "_failed", set())
    of_tools = [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]
    ours = [variable for tracker in TRACKERS.values() for variable in tracker.environment]
    for name in {*of_tools, *ours, "TRACKIO_DIR", "WANDB_CACHE_DIR", trackers.VARIABLE}:
        monkeypatch.setenv(name, "")  # so that a value that a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps the settings of its first run


@pytest.fixture
def small(empty: Laboratory) -> Laboratory:
    """Two members, two rounds and one table, nothing made yet."""
    empty.declare(baselines=[], ensemble={"members": 2, "seeds": [SEED]}, evaluations=["reconstruction"])
    return empty


def read_tensorboard(folder: Path) -> dict[str, Found]:
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator  # pyright: ignore[reportMissingImports]

    found = {}
    for file in folder.rglob("events.*"):
        events = EventAccumulator(str(file.parent), {TENSORS: 0}).Reload()
        points: Points = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                points.setdefault(event.step, {})[tag] = event.value
        (text,) = events.Tensors("config/text_summary")
        lines = text.tensor_proto.string_val[0].decode().splitlines()
        name = file.parent.relative_to(folder / NAME).as_posix()
        found[name] = dict(line.strip().split(": ", 1) for line in lines), points
    return found


def read_wandb(folder: Path) -> dict[str, Found]:
    """Only wandb's Go program reads offline files. Records are protocol buffers in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    found = {}
    for file in folder.rglob("*.wandb"):
        data, name, config, points = file.read_bytes(), "", {}, {}
        assert data.startswith(b":W&B")
        at, whole = 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block holds no header
                at += 32768 - at % 32768
                continue
            length, part = struct.unpack("<HB", data[at + 4 : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if part not in (1, 4):  # full, last
                continue
            record, whole = Record.FromString(whole), b""
            if record.run.run_id:
                name = record.run.display_name
                config = {each.key: json.loads(each.value_json) for each in record.run.config.update}
            values = {each.key or each.nested_key[0]: json.loads(each.value_json) for each in record.history.item}
            if values:
                points[values["_step"]] = {key: value for key, value in values.items() if not key.startswith("_")}
        found[name] = config, points
    return found


def read_mlflow(folder: Path) -> dict[str, Found]:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    client, found = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}"), {}
    experiment = client.get_experiment_by_name(NAME)
    assert experiment
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.status == "FINISHED"
        points: Points = {}
        for metric in run.data.metrics:
            for each in client.get_metric_history(run.info.run_id, metric):
                points.setdefault(each.step, {})[metric] = each.value
        found[run.info.run_name] = run.data.params, points
    return found


def read_trackio(folder: Path) -> dict[str, Found]:
    import trackio  # pyright: ignore[reportMissingImports]

    found = {}
    for run in trackio.Api().runs(NAME):
        with sqlite3.connect(folder / f"{NAME}.db") as database:
            rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", [run.name]).fetchall()
        found[run.name] = run.config, {step: json.loads(metrics) for step, metrics in rows}
    return found


READERS: dict[str, Callable[[Path], dict[str, Found]]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def _needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(TRACKERS[name].package), reason=f"{name} is not installed")


@pytest.mark.parametrize("name", [pytest.param(name, marks=_needs(name)) for name in TRACKERS])
def test_a_tool_has_the_curve_of_a_trained_sae_and_the_headlines_of_a_table(name: str, small: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(trackers.VARIABLE, name)
    small.run()
    made = {key: small.artefact(key, SEED) for key in (SAE, "bagging/member_2", "boosting/round_2", TABLE)}
    found = READERS[name](small.root / "trackers" / name)
    names = {key: f"{key}/layer={LAYER}/seed={SEED}/{artefact.data_version[:8]}" for key, artefact in made.items()}
    assert sorted(found) == sorted(names.values())

    config, points = found[names[SAE]]
    assert {key: str(config[key]) for key in CONFIG} == {key: str(value) for key, value in CONFIG.items()}
    assert config["data_version"] == made[SAE].data_version
    curve = pl.read_parquet(made[SAE].path / "training_curve.parquet", glob=False)
    assert list(points) == curve["tokens"].to_list() and len(points) > 2
    for column in ("loss", "explained_variance", "l0", "dead_features", "learning_rate"):
        assert [values[column] for values in points.values()] == pytest.approx(curve[column].to_list(), rel=1e-6)

    _, points = found[names[TABLE]]
    rows = pl.read_parquet(made[TABLE].path, glob=False, hive_partitioning=False)
    measured = {(row["n_members"], f"{row['method']}/explained_variance"): row["explained_variance"] for row in rows.iter_rows(named=True)}
    mirrored = {(n, key): value for n, values in points.items() for key, value in values.items() if key.endswith("/explained_variance")}
    assert mirrored == pytest.approx(measured, rel=1e-6)
    assert {n for n, key in mirrored if key.startswith("boosting/")} == {1, 2}


def _use(monkeypatch: pytest.MonkeyPatch, write: Callable[[TrackedRun, Path], None]) -> None:
    """Choose a tracker with this function."""
    monkeypatch.setitem(TRACKERS, "tried", Tracker("json", write))
    monkeypatch.setenv(trackers.VARIABLE, "tried")


def test_a_run_mirrors_each_artefact_once_and_a_second_run_nothing(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []
    _use(monkeypatch, lambda run, folder: written.append(f"{run.experiment}/{run.name.rpartition('/')[0]}"))
    empty.run(seeds=[SEED])
    of_seed = f"layer={LAYER}/seed={SEED}"
    trained = ["bagging/member_1", "bagging/member_2", "bagging/member_3", "boosting/round_2", "boosting/round_3"]  # round 1 is member 1
    trained += ["baseline/expanded", "baseline/expanded_l0_matched"]
    measured = ["eval/coactivation", "eval/cost", "eval/reconstruction"]
    assert sorted(written) == sorted(f"{NAME}/{key}/{of_seed}" for key in (*trained, *measured))
    written.clear()
    empty.run(seeds=[SEED])
    assert not written


def test_a_tracker_that_fails_is_reported_once_and_the_run_is_complete(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")

    def fail(run: TrackedRun, folder: Path) -> None:
        calls.append(run.name)
        raise ConnectionError("http://me:hidden@server/api?token=hidden2 refused the key 0123456789abcdef")

    calls: list[str] = []
    _use(monkeypatch, fail)
    printed = empty.run(seeds=[SEED])
    assert len(calls) == printed.count("the tracker tried failed") == 1
    assert "ConnectionError: http://***server/api?token=*** refused the key ***" in printed
    assert "hidden" not in printed and "0123456789abcdef" not in printed
    assert empty.artefact("boosting/round_3", SEED) and empty.artefact(TABLE, SEED)
    assert "nothing to do" in empty.run(seeds=[SEED])


WITHOUT_SERVER = {
    "wandb": {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_API_KEY": "hidden" * 7},
    "mlflow": {"MLFLOW_TRACKING_URI": "http://me:hidden@127.0.0.1:1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
    "trackio": {"TRACKIO_SERVER_URL": "http://127.0.0.1:1", "TRACKIO_WRITE_TOKEN": "hidden"},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=_needs(name)) for name in WITHOUT_SERVER])
def test_a_server_out_of_reach_is_such_a_failure(name: str, small: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(trackers.VARIABLE, name)
    for variable, value in WITHOUT_SERVER[name].items():
        monkeypatch.setenv(variable, value)
    printed = small.run(select=[SAE])
    assert printed.count(f"the tracker {name} failed") == 1
    assert "127.0.0.1" in printed and "hidden" not in printed
    assert small.artefact(SAE, SEED)


WRITE = """
import os, sys
from pathlib import Path
from saeens_pipeline.orchestration.trackers import TRACKERS, TrackedRun
name, folder = sys.argv[1:]
os.environ.update(TRACKERS[name].environment)
run = TrackedRun("tiny", "member", {"asset": "tiny/member", "data_version": "0"}, [(1, {"loss": 2.0}), (2, {"loss": 1.0})])
TRACKERS[name].write(run, Path(folder))
"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=_needs(name)) for name in TRACKERS])
def test_a_local_store_asks_no_server_and_writes_nowhere_else(name: str, tmp_path: Path):
    home, store = tmp_path / "home", tmp_path / "store"
    home.mkdir()
    store.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # requests to any server would come here
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(PROJECT_ROOT), **proxies}
        subprocess.run([sys.executable, "-c", WRITE, name, str(store)], cwd=home, env=environment, check=True, timeout=120)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert READERS[name](store) if name in ("tensorboard", "wandb", "mlflow") else any(store.iterdir())
    assert not [path for path in home.rglob("*") if path.is_file()]


@_needs("wandb")
def test_wandb_online_without_a_key_asks_for_none(small: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    printed = small.run(select=[SAE])
    assert "the tracker wandb failed" in printed and "set WANDB_API_KEY" in printed


@pytest.mark.parametrize("name", ["tensorbord", "missing"])
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_any_work(
    name: str, empty: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(TRACKERS, "missing", Tracker("no_such_package", lambda run, folder: None))
    monkeypatch.setenv(trackers.VARIABLE, name)
    expected = {"tensorbord": "one of: tensorboard, wandb, mlflow, trackio", "missing": "pip install 'saeens[missing]'"}[name]
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        empty.run()
    assert not (empty.root / "sources").exists()
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == 1 and f"{trackers.VARIABLE}={name}" in outcome.output


def test_gc_leaves_the_files_of_trackers(empty: Laboratory):
    file = empty.root / "trackers" / "tensorboard" / NAME / "events"
    file.parent.mkdir(parents=True)
    file.touch()
    inventory = find_garbage(empty.root, declared(empty.catalogue))
    assert not [each.path for each in (*inventory.garbage, *inventory.unknown) if "trackers" in each.path.parts]


def test_a_tool_is_imported_when_it_is_first_written_to():
    script = (
        "import sys; from saeens_pipeline.orchestration.resources import TrackerResource; TrackerResource.from_environment();"
        f"print([name for name in {list(TRACKERS)} if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    chosen = next((name for name, tracker in TRACKERS.items() if importlib.util.find_spec(tracker.package)), "")
    printed = subprocess.run(command, env=os.environ | {trackers.VARIABLE: chosen}, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "[]"
