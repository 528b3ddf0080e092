"""The lineage of a number, against the recipes on disk; and errors with candidates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import polars as pl
import pytest
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, experiment_file, experiment_settings
from typer.testing import CliRunner

from saeens_pipeline import cli
from saeens_pipeline.assets.lineage import Ancestor, lineage
from saeens_pipeline.assets.saes import SAE_VERSION
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.tables import read_table

SEED = SEEDS[0]
ROW = f"reconstruction:layer={LAYER},seed={SEED},method=boosting,n_members={MEMBERS}"


def _trace(laboratory: Laboratory, argument: str) -> Ancestor:
    declarations = [output for op in laboratory.catalogue.all_ops() for output in op.outputs]
    return lineage(laboratory.store, declarations, argument)


def _all(ancestor: Ancestor) -> Iterator[Ancestor]:
    yield ancestor
    for parent in ancestor.parents:
        yield from _all(parent)


def _place(key: str, seed: int | None = None, layer: int | None = LAYER) -> str:
    return ", ".join([f"{NAME}/{key}", *([f"layer {layer}"] if layer is not None else []), *([f"seed {seed}"] if seed else [])])


def test_a_row_is_traced_to_its_saes_in_order_and_to_corpus_and_language_model(finished: Laboratory):
    row = read_table(finished.root, NAME, "reconstruction").row(
        by_predicate=(pl.col("method") == "boosting") & (pl.col("n_members") == MEMBERS) & (pl.col("seed") == SEED), named=True
    )
    found = _trace(finished, ROW)
    *saes, measured_on = found.parents
    assert [sae.data_version for sae in saes] == row["sae_data_versions"].split(",")
    assert [sae.title for sae in saes] == [_place(f"boosting/round_{j}", SEED) for j in range(1, MEMBERS + 1)]
    assert (measured_on.role, measured_on.title) == ("measured on", _place("activations"))
    assert f"explained_variance {row['explained_variance']:.4g}" in found.facts[0]
    nodes = {node.title: node for node in _all(found) if not node.shown_before}
    assert {_place("boosting/residual_1", SEED), _place("boosting/residual_2", SEED), _place("tokens", layer=None)} <= nodes.keys()
    assert nodes[str(finished.model)].role in ("tokenizer", "language model, trained weights")
    assert any(node.role == "corpus" for node in nodes.values())
    assert list(found.problems()) == []


def test_every_artefact_shows_its_version_run_and_code(finished: Laboratory):
    for node in _all(_trace(finished, ROW)):
        if node.role.startswith("SAE"):
            artefact = finished.artefact(f"boosting/round_{node.role.split()[1]}", SEED)
            assert node.data_version == artefact.data_version
            for part in (
                artefact.provenance["run_id"][:8],
                artefact.provenance["date"],
                artefact.provenance["device"],
                f"sae version {SAE_VERSION}",
            ):
                assert part in " ".join(node.facts)


def test_a_repeated_artefact_is_shown_once_and_then_referenced(finished: Laboratory):
    nodes = list(_all(_trace(finished, ROW)))
    told = [node for node in nodes if node.title == _place("activations")]
    assert [node.shown_before for node in told] == [False] + [True] * (len(told) - 1)
    assert len(told) > 2
    assert all(node.parents == () for node in told[1:])


def test_language_model_and_corpus_have_the_hashes_of_the_recipes(finished: Laboratory):
    nodes = list(_all(_trace(finished, f"{NAME}/activations:layer={LAYER}")))
    (model,) = [node for node in nodes if node.role.startswith("language model")]
    identity = finished.artefact("activations").recipe["settings"]["language_model"]
    assert model.facts[0] == f"revision {identity['revision']}"
    for file, sha256 in identity["sha256"].items():
        assert f"{file} {sha256[:16]}" in model.facts[1]


@pytest.mark.parametrize(
    "argument",
    [
        f"{NAME}/bagging/member_1:layer={LAYER},seed={SEED}",
        f"bagging/member_1:seed={SEED}",
        f"{NAME}/eval/cost:layer={LAYER},seed={SEED}",
        f"{NAME}/eval/stability",
        f"stability:layer={LAYER}",
        f"{NAME}/tokens",
    ],
)
def test_assets_are_found_by_their_names(finished: Laboratory, argument: str):
    found = _trace(finished, argument)
    key, _, seed = argument.removeprefix(f"{NAME}/").partition(":")
    key = f"eval/{key}" if key == "stability" else key
    layer = None if key == "tokens" else LAYER
    artefact = finished.artefact(key, SEED if "seed" in seed else None, layer)
    assert found.data_version == artefact.data_version
    assert {parent.data_version for parent in found.parents} >= set(artefact.recipe["inputs"].values())


@pytest.mark.parametrize("digits", [4, 8, 16])
def test_an_artefact_is_found_by_a_prefix_of_its_data_version(finished: Laboratory, digits: int):
    version = finished.artefact("boosting/residual_2", SEED).data_version
    assert _trace(finished, version[:digits]).title == _place("boosting/residual_2", SEED)


@pytest.mark.parametrize(
    ("row", "saes"),
    [
        ("reconstruction:method=single,seed=2", ["bagging/member_1"]),
        ("reconstruction:method=bagging,n_members=2,seed=2", ["bagging/member_1", "bagging/member_2"]),
        ("stability:method=bagging,n_members=2,seed=2", ["bagging/member_1", "bagging/member_2"]),
        ("members:method=boosting,member=3,seed=2", ["boosting/round_3"]),
        ("training_curves:method=bagging,member=2,seed=2", ["bagging/member_2"]),
        ("cost:method=expanded_l0_matched,seed=2", ["baseline/expanded_l0_matched"]),
    ],
)
def test_rows_of_all_tables_and_methods_are_traced_to_their_saes(finished: Laboratory, row: str, saes: list[str]):
    assert [each.title for each in _trace(finished, row).parents if each.role.startswith("SAE")] == [_place(key, 2) for key in saes]


def test_a_retrained_sae_is_reported_with_both_versions(finished: Laboratory):
    before = finished.artefact("boosting/round_2", SEED).data_version
    finished.declare(training=EXPERIMENT["training"] | {"learning_rate": 0.02})
    finished.run(select=["boosting/round_2"])
    after = finished.artefact("boosting/round_2", SEED).data_version
    second = _trace(finished, ROW).parents[1]
    assert (second.title, second.data_version) == (_place("boosting/round_2", SEED), before)
    assert second.problem == f"this version is no longer on disk; there it is {after} now"


def test_removed_and_damaged_saes_are_reported(finished: Laboratory):
    shutil.rmtree(finished.artefact("boosting/round_3", SEED).path)
    file = finished.artefact("boosting/round_2", SEED).path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    gone, damaged = sorted(_trace(finished, ROW).problems(), reverse=True)
    assert gone == f"{_place('boosting/round_3', SEED)}: this version is no longer on disk; nothing is there now"
    assert str(file) in damaged


def test_undeclared_artefacts_are_traced(finished: Laboratory):
    version = finished.artefact("bagging/member_3", SEED).data_version
    finished.declare(ensemble={"members": 1, "seeds": list(SEEDS)})
    found = _trace(finished, f"bagging/member_3:seed={SEED}")
    assert found.data_version == version
    assert found.parents[0].title == _place("activations")


def test_the_lineage_command_prints_a_tree_and_a_note_for_removed_artefacts(finished: Laboratory):
    printed = CliRunner().invoke(cli.app, ["lineage", ROW])
    assert (printed.exit_code, printed.stderr) == (0, "")
    versions = [finished.artefact(f"boosting/round_{j}", SEED).data_version for j in (1, 2, 3)]
    lines = [line for line in printed.stdout.splitlines() if "SAE " in line]
    assert all(version in line for version, line in zip(versions, lines, strict=True))
    assert "(see above)" in printed.stdout
    shutil.rmtree(finished.artefact("boosting/round_3", SEED).path)
    assert "no longer on disk" in CliRunner().invoke(cli.app, ["lineage", ROW]).stderr


# what cannot be traced


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("reconstrution:layer=1", [f"{NAME}/eval/reconstruction"]),
        (f"{NAME}/bagging/member_7", [f"{NAME}/bagging/member_1"]),
        (f"{NAME}/bagging/member_1", [f"{NAME}/bagging/member_1:layer={LAYER},seed={seed}" for seed in SEEDS]),
        (f"{NAME}/bagging/member_1:layer=7", ["is not on disk", f"seed={SEED}"]),
        (f"{NAME}/bagging/member_1:n_members=7", ["no n_members", "layer, seed"]),
        ("reconstruction:method=baging", ["no row with method=baging", "method=bagging", "method=expanded"]),
        (f"members:method=bagging,layer={LAYER},seed=1", ["several rows", "member=1", "member=3"]),
        ("cost:speed=3", ["no speed", "train_flops"]),
        ("cost:method", ["'method'", "NAME=VALUE"]),
        ("member_1", ["any of several", f"layer={LAYER},seed={SEEDS[1]}"]),
    ],
)
def test_unknown_and_ambiguous_names_are_refused_with_candidates(finished: Laboratory, argument: str, parts: list[str]):
    with pytest.raises(ConfigurationError) as error:
        _trace(finished, argument)
    for part in parts:
        assert part in str(error.value)


def test_a_table_of_two_experiments_needs_its_full_name(finished: Laboratory):
    finished.write(experiment_file(("EnsembleExperiment", experiment_settings(name="other"))), "other")
    shutil.copytree(finished.root / "tables" / NAME, finished.root / "tables" / "other")
    with pytest.raises(ConfigurationError, match=rf"any of several assets; there are\n  other/eval/cost\n  {NAME}/eval/cost"):
        _trace(finished, "cost:method=single")
    assert _trace(finished, f"{NAME}/cost:method=single,seed=1").title.startswith(f"{NAME}/eval/cost")


def test_an_unknown_data_version_and_a_missing_asset_are_reported(empty: Laboratory):
    with pytest.raises(SaeensError, match=r"no artefact .* has a data version that begins with abcd1234"):
        _trace(empty, "abcd1234")
    with pytest.raises(SaeensError, match=f"{NAME}/eval/cost is not computed yet: `saeens run {NAME}` computes it"):
        _trace(empty, "cost:method=single")
