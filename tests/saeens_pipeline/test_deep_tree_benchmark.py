"""The parts of `benchmarks/deep_tree.py` that start no server: its files are valid, and its records are fresh artefacts."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.deep_tree import environment, make_records, write_experiments
from saeens_pipeline.assets.staleness import plan
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.storage import recipes
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root


def test_every_artefact_of_the_first_experiment_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(recipes, "flush", recipes.flush)  # restored afterwards
    write_experiments(Namespace(experiments=12, members=2, seeds=2, layers=2, automated=1))
    make_records(1)
    catalogue = Ops.load()
    assert not catalogue.broken
    assert {f"experiment_{i}" for i in range(12)} <= catalogue.experiments.keys()
    assert {f"source_{i}" for i in range(2)} <= catalogue.sources.keys()
    for name, expected in (("experiment_0", {"fresh"}), ("experiment_1", {"fresh", "missing"})):
        experiment = catalogue.experiments[name]
        stages = plan(Store(data_root()), catalogue.ops(experiment), [0, 1], experiment.ensemble.seeds)
        assert {status.state for stage in stages for status in stage.statuses} == expected
