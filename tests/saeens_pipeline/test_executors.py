"""Steps run in one process or each in its own, as SAEENS_EXECUTOR says; the artefacts are the same."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import dagster as dg
import pytest
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.orchestration.retries import executor_from_environment

CHAIN = ("bagging/member_1", "boosting/round_1", "boosting/residual_1")
# What other processes load: the laboratory's experiments, and a job that has a name.
LOCATION = """\
import dagster as dg
from saeens_pipeline import defs as files
files.__path__ = [{folder!r}]
from saeens_pipeline.orchestration.catalogue import Catalogue

def chain():
    chain = dg.define_asset_job("chain", [dg.AssetKey(key) for key in {keys!r}])
    return dg.Definitions.merge(Catalogue.load().definitions(), dg.Definitions(jobs=[chain])).resolve_job_def("chain")
"""


def test_steps_run_in_one_process_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SAEENS_EXECUTOR", raising=False)
    assert executor_from_environment().name == "in_process"
    monkeypatch.setenv("SAEENS_EXECUTOR", "")
    assert executor_from_environment().name == "in_process"


def test_an_unknown_executor_is_refused_with_the_known_ones(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_EXECUTOR", "threads")
    with pytest.raises(ConfigurationError, match="SAEENS_EXECUTOR=threads: there are in_process and multiprocess"):
        empty.catalogue.definitions()


@pytest.mark.usefixtures("fresh_forkserver")
@pytest.mark.parametrize("executor", ["in_process", pytest.param("multiprocess", marks=pytest.mark.slow)])
def test_every_executor_writes_the_same_artefacts(finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str):
    before = {key: finished.artefact(key, SEEDS[0]) for key in CHAIN}
    for artefact in before.values():
        shutil.rmtree(artefact.path)
    module = f"chain_{executor}"  # Dagster loads a module of one name once
    keys = [[NAME, *key.split("/")] for key in CHAIN]
    (tmp_path / f"{module}.py").write_text(LOCATION.format(folder=str(finished.folder), keys=keys))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # not first: Dagster drops what is
    monkeypatch.setenv("SAEENS_EXECUTOR", executor)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        register_layers(instance, NAME, [LAYER])
        job = dg.reconstructable(importlib.import_module(module).chain)
        partition = {
            "dagster/partition": f"{LAYER}|{SEEDS[0]}",
            "dagster/partition/layer": str(LAYER),
            "dagster/partition/seed": str(SEEDS[0]),
        }
        result = dg.execute_job(job, instance, tags=partition, raise_on_error=True)
        with result:
            processes = [event.pid for event in result.filter_events(lambda event: event.is_step_success)]
    assert len(set(processes)) == (1 if executor == "in_process" else len(processes))
    assert {name: finished.artefact(name, SEEDS[0]).data_version for name in CHAIN} == {k: a.data_version for k, a in before.items()}
