"""Dagster declarations of an experiment: ops, keys, groups, lineage, partitions, and code versions that follow the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pytest
from tiny_experiment import EXPERIMENT, LAYER, NAME, SEEDS, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_pipeline.assets import saes, training
from saeens_pipeline.assets.registry import columns_of
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import SaeensError

ENSEMBLES = ["bagging/bagging_ensemble", "boosting/boosting_ensemble"]
BASELINES = ["baseline/expanded", "baseline/expanded_l0_matched"]
EXTERNAL = ("corpus", "language_model")  # observed, not made: see test_external_data.py
# key -> keys that it is made from, all below the experiment's name
LINEAGE = {
    "tokens": [*EXTERNAL],
    "activations": ["tokens", "language_model"],
    "bagging/member_1": ["activations"],
    "bagging/member_2": ["activations"],
    "bagging/member_3": ["activations"],
    "boosting/round_1": ["activations", "bagging/member_1"],
    "boosting/residual_1": ["activations", "boosting/round_1"],
    "boosting/round_2": ["boosting/residual_1"],
    "boosting/residual_2": ["boosting/residual_1", "boosting/round_2"],
    "boosting/round_3": ["boosting/residual_2"],
    "baseline/expanded": ["activations"],
    "baseline/expanded_l0_matched": ["activations"],
    "bagging/bagging_ensemble": ["bagging/member_1", "bagging/member_2", "bagging/member_3"],
    "boosting/boosting_ensemble": ["boosting/round_1", "boosting/round_2", "boosting/round_3"],
    "eval/reconstruction": ["tokens", "activations", *ENSEMBLES, *BASELINES],
    "eval/differences": ["tokens", "activations", *ENSEMBLES, *BASELINES],
    "eval/members": ["activations", *ENSEMBLES, *BASELINES],
    "eval/coactivation": ["activations", *ENSEMBLES, *BASELINES],
    "eval/token_curves": ["activations", *ENSEMBLES, *BASELINES],
    "eval/cost": [*ENSEMBLES, *BASELINES],
    "eval/training_curves": [*ENSEMBLES, *BASELINES],
    "eval/stability": [*ENSEMBLES, *BASELINES],
    "eval/marginal_gain": ["eval/reconstruction", "eval/differences", *ENSEMBLES],
}
PER_SEED = ("reconstruction", "differences", "members", "coactivation", "token_curves", "cost", "training_curves")
LINEAGE["report"] = [key for key in LINEAGE if key.startswith("eval/")]


def _specs(laboratory: Laboratory) -> dict[str, dg.AssetSpec]:
    specs = laboratory.catalogue.definitions().resolve_all_asset_specs()
    specs = [spec for spec in specs if spec.key.path[0] != "leaderboard" and spec.key.path[-1] not in EXTERNAL]
    return {spec.key.to_user_string().removeprefix(f"{NAME}/"): spec for spec in specs}


def _code_versions(laboratory: Laboratory) -> dict[str, str | None]:
    return {key: spec.code_version for key, spec in _specs(laboratory).items()}


def test_definitions_can_be_loaded(empty: Laboratory):
    dg.Definitions.validate_loadable(empty.catalogue.definitions())


def test_members_share_one_op_tables_another_and_all_other_assets_have_their_own(empty: Laboratory):
    assets = [asset for asset in empty.catalogue.definitions().assets or () if isinstance(asset, dg.AssetsDefinition)]
    assets = [asset for asset in assets if asset.is_materializable and not asset.op.name.startswith("leaderboard")]
    outputs = {asset.op.name: sorted(key.to_user_string().removeprefix(f"{NAME}/") for key in asset.keys) for asset in assets}
    shared = {
        f"{NAME}__bagging__members": [f"bagging/member_{j}" for j in (1, 2, 3)],
        f"{NAME}__eval__tables": [f"eval/{table}" for table in sorted(PER_SEED)],
    }
    alone = LINEAGE.keys() - {key for keys in shared.values() for key in keys}
    assert outputs == shared | {f"{NAME}__{key.replace('/', '__')}": [key] for key in alone}
    assert {asset.op.name for asset in assets if asset.can_subset} == shared.keys()
    off_device = {"tokens", "report", *ENSEMBLES}
    assert {op for op, keys in outputs.items() if not off_device.intersection(keys)} == {a.op.name for a in assets if a.op.pool == "gpu"}


def test_dependencies_of_assets_are_their_inputs(empty: Laboratory):
    found = {key: sorted(d.asset_key.to_user_string().removeprefix(f"{NAME}/") for d in spec.deps) for key, spec in _specs(empty).items()}
    assert found == {key: sorted(upstream) for key, upstream in LINEAGE.items()}


def test_rounds_name_those_whose_residual_they_fit(empty: Laboratory):
    specs = _specs(empty)
    said = [(specs[f"boosting/round_{j}"].description or "").splitlines()[0] for j in (1, 2, 3)]
    assert said == [
        "Round 1: the activations; equals member 1",
        "Round 2 of 3: residual of round 1",
        "Round 3 of 3: residual of rounds 1 to 2",
    ]


def test_assets_have_the_expected_partitions_and_partition_mappings(empty: Laboratory):
    for key, spec in _specs(empty).items():
        partitions = spec.partitions_def
        match key:
            case "tokens":
                assert partitions is None
            case "activations" | "eval/stability" | "eval/marginal_gain" | "report":
                assert isinstance(partitions, dg.DynamicPartitionsDefinition)
                assert partitions.name == f"{NAME}_layers"
            case _:
                assert isinstance(partitions, dg.MultiPartitionsDefinition)
                dimensions = {each.name: each.partitions_def for each in partitions.partitions_defs}
                assert isinstance(dimensions["layer"], dg.DynamicPartitionsDefinition)
                assert dimensions["layer"].name == f"{NAME}_layers"
                assert dimensions["seed"].get_partition_keys() == [str(seed) for seed in SEEDS]
        for dependency in spec.deps:
            upstream = dependency.asset_key.to_user_string().removeprefix(f"{NAME}/")
            of_all_seeds = ("eval/stability", "eval/marginal_gain", "report")
            compares_seeds = key in of_all_seeds and upstream not in of_all_seeds
            across_seeds = compares_seeds or (upstream == "activations" and key != "activations")
            assert isinstance(dependency.partition_mapping, dg.MultiToSingleDimensionPartitionMapping) == across_seeds


def test_assets_have_groups_kinds_tags_and_owners(empty: Laboratory):
    groups = {key: spec.group_name for key, spec in _specs(empty).items()}
    saes = {key for key in LINEAGE if key.split("/")[-1].startswith(("member_", "round_", "residual_"))}
    assert {key for key, group in groups.items() if group == "sources"} == {"tokens", "activations"}
    assert {key for key, group in groups.items() if group == f"{NAME}_saes"} == saes
    assert {key for key, group in groups.items() if group == NAME} == LINEAGE.keys() - saes - {"tokens", "activations"}
    kinds = {
        "tokens": {"zarr"},
        "activations": {"zarr", "pytorch"},
        "residual": {"zarr"},
        "eval": {"parquet", "polars"},
        "report": {"html", "plotly"},
    }
    for key, spec in _specs(empty).items():
        kind = "residual" if "residual" in key else "eval" if "eval" in key else key
        assert spec.kinds == kinds.get(kind, {"pytorch"})
        assert spec.tags["source"] == NAME
        assert spec.owners
        first_line = (spec.description or "").split("\n")[0]
        assert 0 < len(first_line.replace(str(empty.model), "builtin/reference")) <= 80, first_line
        if kind == "eval":
            assert spec.tags["table"] == key.removeprefix("eval/")
        elif "/" in key:
            assert spec.tags["method"] == (key.removeprefix("baseline/") if key.startswith("baseline/") else key.split("/")[0])
            assert spec.tags["experiment"] == NAME


def test_tables_have_column_schemas_before_their_materialisation(empty: Laboratory):
    schema = _specs(empty)["eval/stability"].metadata["dagster/column_schema"]
    assert [column.name for column in schema.columns] == [column.name for column in columns_of("stability")]


SAES = {key for key in LINEAGE if "member_" in key or "round_" in key} | set(BASELINES)
TABLES = {key for key in LINEAGE if key.startswith("eval/")}


@pytest.mark.parametrize(
    ("source", "experiment", "changed"),
    [
        ({}, {"sae": EXPERIMENT["sae"] | {"k": 5}}, SAES),
        ({}, {"training": EXPERIMENT["training"] | {"learning_rate": 0.5}}, SAES),
        ({}, {"training": EXPERIMENT["training"] | {"gradient_clip_norm": None}}, SAES),
        ({}, {"ensemble": {"members": 3, "seeds": [1, 2, 3]}}, {"eval/stability", "eval/marginal_gain"}),
        ({}, {"keep_residuals": "all"}, set()),
        ({}, {"automation": False}, set()),
        ({"dtype": "float32"}, {}, {"activations"}),
        ({"train_tokens": 500}, {}, {"tokens"}),
        ({"layers": [0, 1]}, {}, set()),
    ],
    ids=["k", "learning rate", "clipping", "seeds", "kept residuals", "automation", "dtype", "tokens", "layers"],
)
def test_code_versions_change_with_settings_of_the_recipe(empty: Laboratory, source: dict, experiment: dict, changed: set[str]):
    before = _code_versions(empty)
    empty.declare(source=source, **experiment)
    after = _code_versions(empty)
    assert {key for key in before if before[key] != after[key]} == changed


def test_code_versions_change_with_the_builders_version(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    before = _code_versions(empty)
    monkeypatch.setattr(saes, "SAE_VERSION", saes.SAE_VERSION + 1)
    after = _code_versions(empty)
    assert {key for key in before if before[key] != after[key]} == SAES


def test_code_versions_do_not_change_with_a_comment_or_with_another_experiment(empty: Laboratory):
    before = _code_versions(empty)
    file = empty.declare()
    file.write_text("# a comment\n" + file.read_text())
    other: Mapping[str, Any] = experiment_settings(name="another", ensemble={"members": 2, "seeds": [7, 8, 9]})
    empty.write(experiment_file(("EnsembleExperiment", other)), "another")
    after = _code_versions(empty)
    assert {key: after[key] for key in before} == before
    assert any(key.startswith("another/") for key in after)


def test_sources_and_experiments_of_several_files_are_loaded_together(empty: Laboratory):
    empty.write(
        experiment_file(
            ("ActivationSource", source_settings(empty.model, name="control", weights="random")),
            ("EnsembleExperiment", experiment_settings(name="control", source="control")),
        ),
        "control",
    )
    definitions = empty.catalogue.definitions()
    dg.Definitions.validate_loadable(definitions)
    assert len(definitions.resolve_all_asset_specs()) == 2 * len([*LINEAGE, *EXTERNAL]) + 2  # and one leaderboard, and its page


def test_a_non_numeric_layer_is_refused_by_name(empty: Laboratory):
    job = empty.catalogue.definitions().resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(f"{NAME}_layers", ["last"])
        with pytest.raises(dg.Failure, match="the layer 'last' is not a number"):
            job.execute_in_process(instance=instance, partition_key="last", asset_selection=[dg.AssetKey([NAME, "activations"])])


def test_a_layer_partition_beyond_the_model_is_refused_with_the_existing_layers(empty: Laboratory):
    empty.materialise([f"{NAME}/tokens"], Partition())
    job = empty.catalogue.definitions().resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER, 99])
        with pytest.raises(dg.Failure, match="has no layer 99: it has layers 0 to 2") as failed:
            job.execute_in_process(instance=instance, partition_key="99", asset_selection=[dg.AssetKey([NAME, "activations"])])
    told = {name: value.value for name, value in failed.value.metadata.items()}
    correct = "Correct the experiment file or the partition that the message names, reload the definitions, and materialise."
    assert told == {"assets": f"{NAME}/activations", "partition": "99", "what to do": correct}
    assert isinstance(failed.value.__cause__, SaeensError)


def test_numeric_artefacts_have_health_checks_and_all_have_checks_of_bytes(empty: Laboratory):
    specs = list(empty.catalogue.definitions().resolve_asset_graph().asset_check_keys)
    checks: dict[str, set[str]] = {}
    for key in specs:
        checks.setdefault(key.asset_key.to_user_string().removeprefix(f"{NAME}/"), set()).add(key.name)
    unchecked = {key for key in LINEAGE if "residual" in key} | set(ENSEMBLES) | {"report"}
    assert {key for key, names in checks.items() if names == {"bytes", "recipe"}} == unchecked
    assert {key for key, names in checks.items() if names == {"bytes", "health", "recipe"}} == LINEAGE.keys() - unchecked
    assert (checks["leaderboard"], checks["leaderboard/report"]) == ({"bytes", "health"}, {"bytes"})


def test_the_command_line_runs_without_the_checks_that_read_everything(empty: Laboratory):
    graph = empty.catalogue.definitions(disk_checks=False).resolve_asset_graph()
    assert {key.name for key in graph.asset_check_keys} == {"health"}


@pytest.mark.parametrize(
    "tags", [{}, {"dagster/backfill": "abcdefgh"}, {"dagster/auto_materialize": "true"}], ids=["ui", "backfill", "automation"]
)
def test_saes_materialised_outside_the_command_line_are_cache_hits(
    empty: Laboratory, monkeypatch: pytest.MonkeyPatch, tags: dict[str, str]
):
    empty.run(select=["activations"])
    where = Partition(LAYER, SEEDS[0])
    members = [f"{NAME}/bagging/member_{j}" for j in (1, 2, 3)]
    made = empty.materialise(members, where, tags)
    assert all(event.metadata["cache_hit"].value is False for event in made.values())
    monkeypatch.setattr(training, "train_saes", lambda *_: pytest.fail("trained again"))
    assert "nothing to do" in empty.run(seeds=[SEEDS[0]], select=["member_1", "member_2", "member_3"])
    again = empty.materialise([*members, f"{NAME}/boosting/round_1"], where, tags)
    assert all(again[key].metadata["cache_hit"].value is True for key in members)
    assert again[f"{NAME}/boosting/round_1"].metadata["same as"].value == members[0]


def test_tables_and_ensembles_link_to_the_saes_of_their_partition(finished: Laboratory):
    where = Partition(LAYER, SEEDS[0])
    keys = [f"{NAME}/eval/cost", f"{NAME}/bagging/bagging_ensemble"]
    events = finished.materialise(keys, where)
    page = f"/assets/{NAME}/bagging/member_2?view=partitions&partition={LAYER}%7C{SEEDS[0]}"
    assert f"[member_2]({page})" in str(events[keys[0]].metadata["SAEs of bagging_ensemble"].value)
    assert f"[member_2]({page})" in str(events[keys[1]].metadata["its SAEs"].value)
    assert "[expanded](" in str(events[keys[0]].metadata["baselines"].value)
    assert events[keys[1]].metadata["SAEs (J)"].value == 3
    assert events[keys[1]].metadata["features"].value == 3 * 32
    assert events[keys[1]].metadata["L0 in training [features per token]"].value == pytest.approx(12, abs=0.5)


def _column_lineage(event: dg.AssetMaterialization) -> dict[str, set[tuple[str, str]]]:
    """By column the assets, without their owner, and columns that it is computed from."""
    lineage = event.metadata["dagster/column_lineage"].value
    assert isinstance(lineage, dg.TableColumnLineage)
    return {
        column: {("/".join(dep.asset_key.path[1:]), dep.column_name) for dep in deps} for column, deps in lineage.deps_by_column.items()
    }


def test_column_lineage_of_tables_points_to_the_measured_assets(finished: Laboratory):
    where = Partition(LAYER, SEEDS[0])
    events = finished.materialise([f"{NAME}/eval/{table}" for table in ("reconstruction", "cost")], where)
    reconstruction, cost = (_column_lineage(event) for event in events.values())
    saes = {*ENSEMBLES, *BASELINES}
    assert reconstruction["explained_variance"] == {("activations", "test/activations")} | {(key, "weights") for key in saes}
    assert reconstruction["sae_data_versions"] == {(key, "data_version") for key in saes}
    assert reconstruction["language_model"] == {("activations", "language_model")}
    assert reconstruction["ce_loss_recovered"] == reconstruction["explained_variance"] | {("tokens", "test/tokens")}
    assert "method" not in reconstruction
    assert cost["train_seconds"] == {(key, "provenance") for key in saes}


def test_materialisations_have_a_summary_and_a_path(finished: Laboratory):
    where = Partition(LAYER, SEEDS[0])
    keys = [f"{NAME}/{key}" for key in ("bagging/member_2", "boosting/residual_2", "boosting/boosting_ensemble", "eval/reconstruction")]
    events = finished.materialise(keys, where)
    for key, event in events.items():
        artefact = finished.artefact(key.removeprefix(f"{NAME}/"), SEEDS[0])
        assert event.metadata["path"].value == str(artefact.path)
        assert event.metadata["recipe"].value == artefact.recipe
        assert event.metadata["device"].value == artefact.provenance["device"]
    assert events[keys[0]].metadata["train tokens"].value == 600
    assert events[keys[1]].metadata["train rows"].value == 600
    assert events[keys[3]].metadata["dagster/row_count"].value == 9
    assert "| boosting | 3 |" in str(events[keys[3]].metadata["summary"].value)
