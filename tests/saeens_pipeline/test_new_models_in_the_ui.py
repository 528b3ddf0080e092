"""The real `saeens ui`: a new checkpoint's experiment is trained and on the leaderboard, and nobody reloads anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from live_server import UI, Server
from tiny_experiment import CORPUS, LAYER, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.orchestration.instance import prepare_home
from saeens_pipeline.storage.names import LEADERBOARD_ADDRESS, Partition

# The location of WORKSPACE without the shipped files, and with sensors that do not wait between two looks.
LOCATION = """\
from saeens_pipeline import defs as files
from saeens_pipeline.orchestration import automation, new_models, retraining
files.__path__ = []
automation.TICK_SECONDS = new_models.TICK_SECONDS = retraining.TICK_SECONDS = 1
from saeens_pipeline.definitions import defs
"""
RUNS = "{ runsOrError { ... on Runs { results { status assetSelection { path } tags { key value } } } } }"
TICKS = """
{
  sensorOrError(sensorSelector: {repositoryLocationName: "saeens", repositoryName: "__repository__", sensorName: "new_models"}) {
    ... on Sensor { sensorState { ticks(limit: 500) { status skipReason error { message } } } }
  }
}"""


@pytest.fixture
def ui(empty: Laboratory, tmp_path: Path) -> Iterator[Server]:
    """`saeens ui` on an experiment that follows checkpoints of the embedded language model."""
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
    server = Server(prepare_home(), UI, LOCATION, SAEENS_EXPERIMENTS=str(experiments))
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.slow
def test_a_new_checkpoint_is_trained_and_on_the_leaderboard(ui: Server, empty: Laboratory, tmp_path: Path):
    def add(name: str) -> None:
        shutil.copytree(describe_language_model("builtin/reference").path, tmp_path / "checkpoints" / name)

    def leaderboard() -> list[str]:
        path = empty.store.path(LEADERBOARD_ADDRESS, Partition())
        return list(dict.fromkeys(pl.read_parquet(path, glob=False)["experiment"])) if path.exists() else []

    ui.query("{ version }")
    add("step-9")
    while leaderboard() != ["mine__step_9"]:
        ui.pause()
    add("step-10")
    while leaderboard() != ["mine__step_9", "mine__step_10"]:
        ui.pause()
    made: list[tuple[str, str | None]] = []
    for run in ui.query(RUNS)["runsOrError"]["results"]:
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        assert tags.get("user") == "automation"
        assert run["status"] in ("SUCCESS", "STARTED", "STARTING", "NOT_STARTED"), run
        made += [("/".join(asset["path"]), tags.get("dagster/partition")) for asset in run["assetSelection"] or ()]
    members = [each for each in made if each[0].endswith("bagging/member_1")]
    assert sorted(members) == [(f"mine__step_{n}/bagging/member_1", f"{LAYER}|1") for n in (10, 9)]
    ticks = ui.query(TICKS)["sensorOrError"]["sensorState"]["ticks"]
    assert {tick["status"] for tick in ticks} <= {"SKIPPED", "STARTED"}, ticks
    assert sum(tick["skipReason"] is not None and "is being reloaded" in tick["skipReason"] for tick in ticks) == 2
