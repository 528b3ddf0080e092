"""States of runs in `saeens status`: running, failed and the reason; recipes decide all other states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.executor.child_process_executor import ChildProcessCrashException
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory, status_of
from typer.testing import CliRunner

from saeens_pipeline import cli
from saeens_pipeline.assets import training
from saeens_pipeline.assets.staleness import Status
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration.instance import PROCESS_TAG, command_line_instance
from saeens_pipeline.orchestration.run_states import with_run_states
from saeens_pipeline.storage.recipes import this_machine

SEED = SEEDS[0]


@pytest.fixture
def laboratory(empty: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    """The tiny experiment with tokens and activations, and Dagster's events on disk."""
    monkeypatch.undo()
    empty.activate(monkeypatch, keep_events=True)
    empty.run(select=["activations"])
    yield empty


def _statuses(laboratory: Laboratory) -> dict[str, Status]:
    """By asset, without its owner: those of the first seed, or of none."""
    catalogue = laboratory.catalogue
    statuses = with_run_states(status_of(NAME), catalogue.ops(catalogue.experiment(NAME)))
    return {str(s.declaration.address).removeprefix(f"{NAME}/"): s for s in statuses if s.partition.seed in (None, SEED)}


def _fail_to_train(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_saes", fail)
        with pytest.raises(type(error)):
            laboratory.run(seeds=[SEED], select=["boosting/round_1"])


def _last_run() -> dg.DagsterRun:
    with command_line_instance() as instance:
        return instance.get_runs(limit=1)[0]


def test_a_failure_is_shown_with_its_run_and_the_first_line_of_its_error(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    _fail_to_train(laboratory, monkeypatch, SaeensError("the moon is full\nand more"))
    statuses = _statuses(laboratory)
    assert statuses["bagging/member_1"].state == "failed"
    assert statuses["bagging/member_1"].reason == f"run {_last_run().run_id[:8]}: SaeensError: the moon is full"
    assert statuses["boosting/round_1"].state == "missing"  # the run did not come to it
    assert statuses["tokens"].state == statuses["activations"].state == "fresh"


def test_a_step_whose_process_died_has_failed_with_a_reason(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    _fail_to_train(laboratory, monkeypatch, ChildProcessCrashException(pid=1, exit_code=-9))
    reason = _statuses(laboratory)["bagging/member_1"].reason
    assert reason.endswith(": its process was killed or aborted, mostly because memory ran out")


def test_a_failure_followed_by_a_success_is_not_shown(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    _fail_to_train(laboratory, monkeypatch, SaeensError("once"))
    laboratory.run(seeds=[SEED], select=["bagging/member_1"])
    assert _statuses(laboratory)["bagging/member_1"].state == "fresh"
    laboratory.declare(sae={"architecture": "topk", "expansion": 2, "k": 5})
    assert _statuses(laboratory)["bagging/member_1"].state == "stale"
    shutil.rmtree(laboratory.artefact("bagging/member_1", SEED).path)
    assert _statuses(laboratory)["bagging/member_1"].state == "missing"


def _unfinished_run(laboratory: Laboratory, process: str, seed: int = SEED) -> dg.DagsterRun:
    """A run that started on round 1, and that no process has ended."""
    job = laboratory.catalogue.definitions().resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey([NAME, "boosting", name]) for name in ("round_1", "residual_1")]
    with command_line_instance() as instance:
        run = instance.create_run_for_job(
            job.get_subset(asset_selection=set(keys)),
            tags={"dagster/partition": f"{LAYER}|{seed}", PROCESS_TAG: process},
            asset_selection=frozenset(keys),
            status=dg.DagsterRunStatus.STARTED,
        )
        event = dg.DagsterEvent(dg.DagsterEventType.STEP_START.value, run.job_name, step_key=f"{NAME}__boosting__round_1")
        instance.report_dagster_event(event, run.run_id)
        return run


def test_assets_of_an_active_run_are_running(laboratory: Laboratory):
    run = _unfinished_run(laboratory, f"{this_machine()}:1")
    statuses = _statuses(laboratory)
    assert (statuses["boosting/round_1"].state, statuses["boosting/round_1"].reason) == ("running", f"run {run.run_id[:8]}")
    assert statuses["boosting/residual_1"].state == "running"
    assert "has not reached it yet" in statuses["boosting/residual_1"].reason
    assert statuses["boosting/round_2"].state == "missing"


def test_assets_of_a_waiting_run_are_queued(laboratory: Laboratory):
    key = dg.AssetKey([NAME, "boosting", "round_1"])
    with command_line_instance() as instance:
        tags = {"dagster/partition": f"{LAYER}|{SEEDS[0]}"}
        instance.add_run(dg.DagsterRun("__ASSET_JOB", tags=tags, asset_selection=frozenset([key])))  # not started
    assert _statuses(laboratory)["boosting/round_1"].state == "queued"
    assert _statuses(laboratory)["boosting/round_2"].state == "missing"


def test_a_run_of_another_seed_does_not_change_the_state(laboratory: Laboratory):
    _unfinished_run(laboratory, f"{this_machine()}:1", seed=SEEDS[1])
    assert _statuses(laboratory)["boosting/round_1"].state == "missing"


def test_a_run_of_a_dead_process_has_failed_at_its_current_asset(laboratory: Laboratory):
    run = _unfinished_run(laboratory, f"{this_machine()}:{2**22 + 1}")  # above the largest process number
    statuses = _statuses(laboratory)
    assert statuses["boosting/round_1"].state == "failed"
    assert statuses["boosting/round_1"].reason == f"run {run.run_id[:8]}: its process was killed"
    assert statuses["boosting/residual_1"].state == "missing"


def test_a_run_reported_dead_has_failed_at_its_current_asset(laboratory: Laboratory):
    run = _unfinished_run(laboratory, "elsewhere:1")
    with command_line_instance() as instance:
        instance.report_run_failed(run, "The process that executed this run was killed.")
    statuses = _statuses(laboratory)
    assert statuses["boosting/round_1"].state == "failed"
    assert "was killed" in statuses["boosting/round_1"].reason
    assert statuses["boosting/residual_1"].state == "missing"


def test_the_status_command_counts_states_and_prints_json_alone(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    _fail_to_train(laboratory, monkeypatch, SaeensError("the moon is full"))
    printed = CliRunner().invoke(cli.app, ["status", NAME])
    assert printed.exit_code == 0
    assert printed.stdout.splitlines()[-1] == "43 artefacts: 2 fresh, 1 failed, 40 missing"
    rows = json.loads(CliRunner().invoke(cli.app, ["status", NAME, "--format", "json"]).stdout)
    (failed,) = [row for row in rows if row["state"] == "failed"]
    assert (failed["asset"], failed["layer"], failed["seed"]) == (f"{NAME}/bagging/member_1", LAYER, SEED)
    assert "the moon is full" in failed["why"]


def test_status_creates_no_dagster_instance(empty: Laboratory):
    assert _statuses(empty)["tokens"].state == "missing"
    assert not empty.root.exists()
