"""States of artefacts (fresh, stale, missing) and the order of a plan."""

from __future__ import annotations

import inspect
import shutil
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of

from saeens_pipeline.assets import residuals, saes, training
from saeens_pipeline.assets.measurements import dictionaries
from saeens_pipeline.assets.staleness import Status, plan
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.names import Address, Partition

PER_SEED = ("reconstruction", "differences", "members", "coactivation", "token_curves", "cost", "training_curves")  # tables
N_PER_SEED = 2 * MEMBERS + (MEMBERS - 1) + 2 + 2 + len(PER_SEED)  # members and rounds, residuals, baselines, ensembles, tables
ACROSS_SEEDS = ("eval/stability", "eval/marginal_gain", "report")
N_ALL = 2 + len(SEEDS) * N_PER_SEED + len(ACROSS_SEEDS)  # two: tokens and activations
TRAINING = EXPERIMENT["training"]
TABLES = ExperimentSettings.model_fields["evaluations"].default


def _states(statuses: list[Status]) -> Counter[str]:
    return Counter(status.state for status in statuses)


def _reasons(state: str) -> dict[tuple[str, int | None], str]:
    statuses = [status for status in status_of(NAME) if status.state == state]
    return {(str(status.declaration.address).removeprefix(f"{NAME}/"), status.partition.seed): status.reason for status in statuses}


def test_everything_is_missing_then_fresh(empty: Laboratory, finished_laboratory: Laboratory):
    assert _states(status_of(NAME)) == {"missing": N_ALL}
    shutil.copytree(finished_laboratory.root, empty.root)
    assert _states(status_of(NAME)) == {"fresh": N_ALL}


def test_status_writes_no_file(empty: Laboratory):
    status_of(NAME)
    assert not empty.root.exists()


def test_inputs_precede_their_descendants_in_a_plan(empty: Laboratory):
    catalogue = empty.catalogue
    stages = plan(empty.store, catalogue.ops(catalogue.experiment(NAME)), [0, 2], SEEDS)
    made: set[tuple[Address, Partition]] = set()
    for stage in stages:
        for status in stage.statuses:
            assert status.partition == stage.partition
            for upstream in status.declaration.inputs:
                where = upstream.artefact.narrow(status.partition)
                wanted = (
                    [where]
                    if where.seed or upstream.artefact.dimensions != "layer_and_seed"
                    else [Partition(where.layer, s) for s in SEEDS]
                )
                assert {(upstream.artefact.address, each) for each in wanted} <= made
            made.add((status.declaration.address, status.partition))
    assert len(made) == 1 + 2 * (N_ALL - 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sae": EXPERIMENT["sae"] | {"k": 5}}, "setting sae.k: 4 -> 5"),
        ({"training": TRAINING | {"learning_rate": 0.02}}, "setting training.learning_rate: 0.01 -> 0.02"),
        ({"training": TRAINING | {"gradient_clip_norm": None}}, "setting training.gradient_clip_norm"),
        ({"training": TRAINING | {"learning_rate_decay_fraction": 0.5}}, "setting training.learning_rate_decay_fraction"),
    ],
    ids=["k", "learning rate", "gradient clipping switched off", "decay"],
)
def test_a_changed_sae_or_training_makes_everything_except_tokens_and_activations_stale(finished: Laboratory, changes: dict, reason: str):
    finished.declare(**changes)
    stale = _reasons("stale")
    assert _reasons("fresh").keys() == {("tokens", None), ("activations", None)}
    assert len(stale) == N_ALL - 2
    assert reason in stale["bagging/member_1", SEEDS[0]]
    first_cause = f"{NAME}/boosting/round_1, layer {LAYER}, seed {SEEDS[0]}, which is stale: "
    assert stale["boosting/residual_1", SEEDS[0]].startswith(f"follows from {first_cause}")
    assert reason in stale["boosting/residual_1", SEEDS[0]]
    assert reason in stale["eval/stability", None]
    n_roots = (MEMBERS + 1 + 2) * len(SEEDS)  # members, round 1 and baselines; later rounds follow from the first
    assert f"; {n_roots - 1} more that it follows from are not fresh" in stale["eval/stability", None]


def _comment(laboratory: Laboratory) -> None:
    file = laboratory.folder / NAME / "defs.yaml"
    file.write_text("# a comment\n" + file.read_text().replace("k: 4", "k:   4 # another"))


@pytest.mark.parametrize(
    "change",
    [
        _comment,
        lambda laboratory: laboratory.declare(keep_residuals="all"),
        lambda laboratory: laboratory.declare(keep_residuals="none"),
        lambda laboratory: laboratory.declare(automation=False),
        lambda laboratory: laboratory.declare(evaluations=None),
        lambda laboratory: laboratory.declare(evaluation_memory_gb=0.5),
        lambda laboratory: laboratory.declare(checks={"min_explained_variance": 0.9, "target_l0": 3}),
        lambda laboratory: laboratory.declare(expanded_sizes=[MEMBERS]),
        lambda laboratory: laboratory.declare(training=dict(reversed(TRAINING.items()))),
    ],
    ids=[
        "comment",
        "keep all residuals",
        "keep none",
        "automation",
        "all evaluations",
        "memory for evaluation",
        "thresholds of checks",
        "the default said",
        "order of keys",
    ],
)
def test_changes_outside_the_recipes_make_nothing_stale(finished: Laboratory, change: Callable[[Laboratory], None]):
    change(finished)
    assert _states(status_of(NAME)) == {"fresh": N_ALL}


CHANGED_TOKENS = [{"train_tokens": 599}, {"context_length": 8}, {"drop": None}, {"packing": "concatenate"}, {"windows_per_document": 9}]


@pytest.mark.parametrize("change", CHANGED_TOKENS)
def test_changed_tokens_make_everything_stale(finished: Laboratory, change: dict):
    finished.declare(source=change)
    assert _states(status_of(NAME)) == {"stale": N_ALL}


@pytest.mark.parametrize("change", [{"hook": "mlp_out"}, {"dtype": "float32"}, {"weights": "random"}])
def test_changed_activation_settings_leave_tokens_fresh(finished: Laboratory, change: dict):
    finished.declare(source=change)
    assert _reasons("fresh").keys() == {("tokens", None)}
    assert next(iter(change)) in _reasons("stale")["activations", None]


def test_a_changed_language_model_makes_everything_stale(finished: Laboratory):
    copy = finished.root.parent / "model"
    shutil.copytree(finished.model, copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    finished.declare(source={"language_model": str(copy)})
    assert _states(status_of(NAME)) == {"stale": N_ALL}


_MAKING = ("train_", "_write", "evaluate", "_evaluate")


@pytest.mark.parametrize("module", [training, dictionaries, residuals], ids=["SAEs", "tables", "residuals"])
def test_changed_code_without_a_changed_version_makes_nothing_stale(
    finished: Laboratory, monkeypatch: pytest.MonkeyPatch, module: ModuleType
):
    """Functions of the builders are replaced, as by editing them; their output is not used."""
    for name, function in vars(module).copy().items():
        if (
            inspect.isfunction(function)
            and function.__module__ == module.__name__
            and name.startswith(("train_", "_write", "evaluate", "_evaluate"))
        ):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
    assert _states(status_of(NAME)) == {"fresh": N_ALL}
    assert "no training" in finished.run()


def test_one_more_layer_leaves_the_first_fresh(finished: Laboratory):
    finished.declare(source={"layers": [LAYER, 2]})
    statuses = status_of(NAME)
    assert {status.state for status in statuses if status.partition.layer in (None, LAYER)} == {"fresh"}
    assert _states(statuses) == {"fresh": N_ALL, "missing": N_ALL - 1}


def test_one_more_member_leaves_the_others_fresh(finished: Laboratory):
    finished.declare(ensemble={"members": MEMBERS + 1, "seeds": list(SEEDS)})
    fresh = {name for name, _ in _reasons("fresh")}
    assert {f"bagging/member_{j}" for j in range(1, MEMBERS + 1)} | {f"boosting/round_{j}" for j in range(1, MEMBERS + 1)} <= fresh
    assert {name for name, _ in _reasons("missing")} == {"bagging/member_4", "boosting/residual_3", "boosting/round_4"}
    stale = {name for name, _ in _reasons("stale")}
    assert {"bagging/bagging_ensemble", "baseline/expanded", "eval/reconstruction", "eval/stability"} <= stale


def test_one_more_seed_makes_only_comparisons_of_seeds_stale(finished: Laboratory):
    finished.declare(ensemble={"members": MEMBERS, "seeds": [*SEEDS, 3]})
    assert _states(status_of(NAME)) == {
        "fresh": N_ALL - len(ACROSS_SEEDS),
        "missing": N_PER_SEED,
        "stale": len(ACROSS_SEEDS),
    }
    assert _reasons("stale").keys() == {(name, None) for name in ACROSS_SEEDS}


def test_a_removed_artefact_is_missing_and_its_descendants_are_stale(finished: Laboratory):
    shutil.rmtree(finished.artefact("boosting/round_2", seed=1).path)
    assert _reasons("missing").keys() == {("boosting/round_2", 1)}
    tables = {f"eval/{table}" for table in PER_SEED}
    after = {"boosting/residual_2", "boosting/round_3", "boosting/boosting_ensemble"} | tables
    assert _reasons("stale").keys() == {(name, 1) for name in after} | {(name, None) for name in ACROSS_SEEDS}


def test_stale_descendants_name_their_root_by_address_and_partition(finished: Laboratory):
    shutil.rmtree(finished.artefact("boosting/round_2", seed=1).path)
    statuses = {(str(s.declaration.address), s.partition): s for s in status_of(NAME)}
    root = statuses[f"{NAME}/boosting/round_2", Partition(LAYER, 1)]
    for key, partition in (
        ("boosting/round_3", Partition(LAYER, 1)),
        ("eval/cost", Partition(LAYER, 1)),
        ("eval/stability", Partition(LAYER)),
    ):
        status = statuses[f"{NAME}/{key}", partition]
        assert status.causes == (root,), key
        assert status.reason == f"follows from {NAME}/boosting/round_2, layer {LAYER}, seed 1, which is missing", key


def test_a_rebuilt_input_is_named_by_address_and_versions(finished: Laboratory):
    """As after another process has made the activations again: everything that was made from them is stale, they are not."""
    finished.declare(source={"dtype": "float32"})
    before = finished.artefact("activations").data_version
    finished.run(select=["activations"])
    after = finished.artefact("activations").data_version
    stale = _reasons("stale")
    assert stale["bagging/member_1", 1] == f"input {NAME}/activations, layer {LAYER}: {before} -> {after}"
    assert stale["boosting/round_1", 2] == stale["bagging/member_1", 1]
    assert stale["eval/cost", 1].startswith(
        f"follows from {NAME}/bagging/member_1, layer {LAYER}, seed 1, which is stale: input {NAME}/act"
    )


def test_a_changed_builder_version_makes_its_artefacts_stale(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saes, "SAE_VERSION", saes.SAE_VERSION + 1)
    assert _reasons("stale")["bagging/member_1", 1] == "the code of sae changed"
    assert _reasons("fresh").keys() == {("tokens", None), ("activations", None)}


def test_a_damaged_artefact_is_named_and_its_descendants_are_stale(finished: Laboratory):
    file = finished.artefact("boosting/round_3", seed=2).path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    table = finished.artefact("eval/cost", seed=1).path
    table.write_bytes(b"")
    damaged = _reasons("damaged")
    assert damaged.keys() == {("boosting/round_3", 2), ("eval/cost", 1)}
    assert f"tiny/boosting/round_3 is damaged: {file} has" in damaged["boosting/round_3", 2]
    assert f"{table} cannot be read" in damaged["eval/cost", 1]
    after = {"boosting/boosting_ensemble"} | {f"eval/{table}" for table in PER_SEED}
    assert _reasons("stale").keys() == {(name, 2) for name in after} | {(name, None) for name in ACROSS_SEEDS}
    assert not _reasons("missing")
