"""Lines in the terminal of `saeens ui` about runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import dagster as dg
import pytest

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration import run_lines
from saeens_pipeline.orchestration.retries import retried
from saeens_pipeline.orchestration.run_lines import RunLines, name_of, tell_runs

LAYERS = dg.StaticPartitionsDefinition(["4"])
BOTH = dg.MultiPartitionsDefinition({"layer": LAYERS, "seed": dg.StaticPartitionsDefinition(["42"])})


@dg.asset(key_prefix=["tiny", "bagging"], partitions_def=BOTH)
def member_1() -> None:
    pass


@dg.asset(key_prefix=["tiny"], partitions_def=LAYERS)
def activations() -> None:
    with retried(0, None):
        raise SaeensError("the disk is full: free some space\nand run again")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def _run(instance: dg.DagsterInstance, asset: dg.AssetsDefinition, partition: str | dg.MultiPartitionKey) -> None:
    job = dg.Definitions([asset]).resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, partition_key=partition, asset_selection=[asset.key], raise_on_error=False)


def test_a_run_has_a_line_at_its_start_and_one_at_its_end(instance: dg.DagsterInstance):
    lines = RunLines(instance)
    assert lines.look() == []
    _run(instance, member_1, dg.MultiPartitionKey({"layer": "4", "seed": "42"}))
    started, finished = lines.look()
    assert re.fullmatch(r"tiny, layer 4, seed 42: started, run [0-9a-f]{8}", started)
    assert re.fullmatch(r"tiny, layer 4, seed 42: finished after \d+\.\d s", finished)
    assert lines.look() == []


def test_a_failed_run_says_its_sentence(instance: dg.DagsterInstance):
    lines = RunLines(instance)
    lines.look()
    _run(instance, activations, "4")
    _, failed = lines.look()
    assert re.fullmatch(r"tiny, layer 4: failed after \d+\.\d s: the disk is full: free some space", failed)


def test_a_cancelled_run_has_a_line(instance: dg.DagsterInstance):
    lines = RunLines(instance)
    lines.look()
    run = instance.create_run_for_job(dg.Definitions([member_1]).resolve_implicit_global_asset_job_def())
    instance.report_run_canceled(run)
    assert lines.look() == [f"{run.job_name}: cancelled"]


def test_runs_of_before_have_no_line(instance: dg.DagsterInstance):
    _run(instance, member_1, dg.MultiPartitionKey({"layer": "4", "seed": "42"}))
    lines = RunLines(instance)
    assert lines.look() == lines.look() == []


def test_a_failing_look_does_not_end_the_lines(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lines, "LOOK_SECONDS", 0.01)
    looks, look, said, stop = [], RunLines.look, [], threading.Event()

    def second_fails(lines: RunLines) -> list[str]:
        looks.append(1)
        if len(looks) == 2:
            raise OSError("database is locked")
        if len(looks) == 3:
            _run(instance, member_1, dg.MultiPartitionKey({"layer": "4", "seed": "42"}))
        return look(lines)

    def say(line: str) -> None:
        said.append(line)
        if "finished" in line:
            stop.set()

    monkeypatch.setattr(RunLines, "look", second_fails)
    watching = threading.Thread(target=tell_runs, args=(instance, say, stop), daemon=True)
    watching.start()
    watching.join(60)
    assert [line.split(":")[1].split()[0].strip(",") for line in said] == ["started", "finished"]


def test_a_run_without_assets_has_the_name_of_its_job():
    assert name_of(dg.DagsterRun(job_name="quickstart")) == "quickstart"
