"""The real `saeens ui`: a new checkpoint's experiment is trained and on the leaderboard, and nobody reloads anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_experiment import CORPUS, LAYER, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.orchestration.instance import WORKSPACE, prepare_home
from saeens_pipeline.storage.names import LEADERBOARD_ADDRESS, Partition

DEADLINE_SECONDS = 900  # it takes two minutes on two idle cores, one of which the daemon waits before it notices the reload
# The location of WORKSPACE without the shipped files, and with sensors that do not wait between two looks.
LOCATION = """\
from saeens_pipeline import defs as files
from saeens_pipeline.orchestration import automation, new_models, retraining
files.__path__ = []
automation.TICK_SECONDS = new_models.TICK_SECONDS = retraining.TICK_SECONDS = 1
from saeens_pipeline.definitions import defs
"""
UNQUEUED = "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n"
RUNS = "{ runsOrError { ... on Runs { results { status assetSelection { path } tags { key value } } } } }"
TICKS = """
{
  sensorOrError(sensorSelector: {repositoryLocationName: "saeens", repositoryName: "__repository__", sensorName: "new_models"}) {
    ... on Sensor { sensorState { ticks(limit: 500) { status skipReason error { message } } } }
  }
}"""


@pytest.fixture
def ui(empty: Laboratory, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`saeens ui` on an experiment that follows checkpoints of the embedded language model, and its address."""
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    for name, texts in (("train", CORPUS.train), ("test", CORPUS.test)):
        (experiments / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = source_settings(
        "",
        name="mine",
        language_model={"each": "../checkpoints/step-*"},
        corpus={"files": "train.jsonl", "test_files": "test.jsonl"},
        packing=None,
        train_tokens=300,
        test_tokens=100,
    )
    experiment = experiment_settings(
        name="mine",
        source="mine",
        automation=True,
        ensemble={"members": 1, "seeds": [1]},
        baselines=[],
        evaluations=["reconstruction"],
        keep_residuals=None,
    )
    (experiments / "mine.yaml").write_text(experiment_file(("ActivationSource", source), ("EnsembleExperiment", experiment)))
    home = prepare_home()
    (home / "tiny_location.py").write_text(LOCATION)
    (home / "workspace.yaml").write_text(WORKSPACE.replace("saeens_pipeline.definitions", "tiny_location"))
    with (home / "dagster.yaml").open("a") as settings:
        settings.write(UNQUEUED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "SAEENS_EXPERIMENTS": str(experiments),
        "PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "saeens_pipeline", "ui", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process, f"http://127.0.0.1:{port}/graphql"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def _query(url: str, query: str) -> dict[str, Any] | None:
    """The answer's data; None as long as nobody answers."""
    request = urllib.request.Request(url, json.dumps({"query": query}).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


@pytest.mark.slow
def test_a_new_checkpoint_is_trained_and_on_the_leaderboard(ui: tuple[subprocess.Popen[bytes], str], empty: Laboratory, tmp_path: Path):
    (process, url), log = ui, tmp_path / "log"
    deadline = time.monotonic() + DEADLINE_SECONDS

    def pause() -> None:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"waited {DEADLINE_SECONDS} s in vain:\n{_query(url, TICKS)}\n{log.read_text()[-4000:]}"
        time.sleep(0.5)

    def add(name: str) -> None:
        shutil.copytree(describe_language_model("builtin/reference").path, tmp_path / "checkpoints" / name)

    def leaderboard() -> list[str]:
        path = empty.store.path(LEADERBOARD_ADDRESS, Partition())
        return list(dict.fromkeys(pl.read_parquet(path, glob=False)["experiment"])) if path.exists() else []

    while _query(url, "{ version }") is None:
        pause()
    add("step-9")
    while leaderboard() != ["mine__step_9"]:
        pause()
    add("step-10")
    while leaderboard() != ["mine__step_9", "mine__step_10"]:
        pause()
    data = _query(url, RUNS)
    assert data is not None
    made: list[tuple[str, str | None]] = []
    for run in data["runsOrError"]["results"]:
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        assert tags.get("user") == "automation"
        assert run["status"] in ("SUCCESS", "STARTED", "STARTING", "NOT_STARTED"), run
        made += [("/".join(asset["path"]), tags.get("dagster/partition")) for asset in run["assetSelection"] or ()]
    members = [each for each in made if each[0].endswith("bagging/member_1")]
    assert sorted(members) == [(f"mine__step_{n}/bagging/member_1", f"{LAYER}|1") for n in (10, 9)]
    data = _query(url, TICKS)
    assert data is not None
    ticks = data["sensorOrError"]["sensorState"]["ticks"]
    assert {tick["status"] for tick in ticks} <= {"SKIPPED", "STARTED"}, ticks
    assert sum(tick["skipReason"] is not None and "is being reloaded" in tick["skipReason"] for tick in ticks) == 2
