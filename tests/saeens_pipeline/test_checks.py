"""Health checks: findings, stopped runs, and warnings to the user."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of, write_rows

from saeens_pipeline.assets import materialise, training
from saeens_pipeline.assets.health import Health, UnsoundArtefactError, examine
from saeens_pipeline.cli.doctor import diagnose
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.orchestration.assets import HEALTH, partition_key
from saeens_pipeline.orchestration.disk_checks import BYTES
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.orchestration.staleness import RECIPE
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Artefact, read_artefact

HERE = Partition(LAYER, SEEDS[0])
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _examine(
    laboratory: Laboratory, key: str, changed: Callable[[Artefact], Artefact] = lambda artefact: artefact, **settings: Any
) -> Health:
    """The health of an artefact of the first seed, read without a look at its bytes."""
    declaration = laboratory.declarations()[f"{NAME}/{key}"]
    where = declaration.narrow(HERE)
    artefact = read_artefact(laboratory.store.path(declaration.address, where))
    return examine(declaration, where, changed(artefact), CheckSettings(**settings))


def _last_step(**values: float) -> Callable[[Artefact], Artefact]:
    """An SAE whose training ended otherwise."""
    return lambda artefact: replace(artefact, provenance=artefact.provenance | {"last_step": artefact.provenance["last_step"] | values})


def _states() -> dict[str, str]:
    return {str(each.declaration.address): each.state for each in status_of(NAME) if each.partition.seed in (None, SEEDS[0])}


def _evaluations(
    laboratory: Laboratory, keys: list[str], checks: Mapping[str, str] | None = None, partition: Partition | None = HERE
) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """Run assets with all their checks as the UI does, or only some checks (asset to check). By asset, without the owner, and check."""
    catalogue, declarations = laboratory.catalogue, laboratory.declarations()
    assets = {dg.AssetKey([NAME, *key.split("/")]) for key in keys}
    wanted = {dg.AssetCheckKey(dg.AssetKey([NAME, *key.split("/")]), check) for key, check in (checks or {}).items()}
    job = catalogue.definitions().resolve_implicit_global_asset_job_def()
    job = job.get_subset(asset_selection=assets, asset_check_selection=None if checks is None else wanted)
    example = declarations[f"{NAME}/{next(iter(checks or keys))}"]
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        result = job.execute_in_process(
            instance=instance,
            partition_key=partition_key(example, example.narrow(partition)) if partition else None,
            run_config=QUIET,
            raise_on_error=False,
        )
    return {("/".join(each.asset_key.path[1:]), each.check_name): each for each in result.get_asset_check_evaluations()}


def _break_model(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    activations = LanguageModel.activations

    def changed(self: LanguageModel, *arguments: Any) -> dict[int, torch.Tensor]:
        return {layer: change(x) for layer, x in activations(self, *arguments).items()}

    monkeypatch.setattr(LanguageModel, "activations", changed)


def _constant(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, 0.5)


def _clamped(x: torch.Tensor) -> torch.Tensor:
    return (x * 1e5).clamp(-65504, 65504)


# errors


def test_all_artefacts_of_a_finished_experiment_are_healthy(finished: Laboratory):
    for key, declaration in finished.declarations().items():
        if declaration.builder in ("tokens", "activations", "sae") or declaration.address.is_table:
            health = _examine(finished, key.removeprefix(f"{NAME}/"))
            assert health.errors == [], key
            assert health.measured, key


@pytest.mark.parametrize(
    ("change", "message"), [(_constant, "all 16 dimensions are the same in every row"), (_clamped, "at the limit of float16")]
)
def test_constant_and_clamped_activations_stop_every_run_and_are_kept(
    empty: Laboratory, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], message: str
):
    with monkeypatch.context() as patched:
        _break_model(patched, change)
        with pytest.raises(UnsoundArtefactError, match=rf"{NAME}/activations, layer {LAYER}, train split.*{message}"):
            empty.run()
    assert empty.artefact("activations")
    monkeypatch.setattr(training, "train_saes", lambda *_: pytest.fail("trained on unsound activations"))
    with pytest.raises(UnsoundArtefactError, match=message):
        empty.run()
    assert {key for key, state in _states().items() if state == "fresh"} == {f"{NAME}/tokens", f"{NAME}/activations"}


@pytest.mark.parametrize("row", [0, 599])
def test_non_finite_activations_are_an_error(finished: Laboratory, row: int):
    group: Any = zarr.open_group(finished.artefact("activations").path, mode="r+")
    group["train/activations"][row, 3] = float("nan")
    (message,) = _examine(finished, "activations").errors
    assert "train split, has 1 of 9,600 sampled values that are not finite" in message


@pytest.mark.parametrize(("key", "shape"), [("activations", "[600, 16] and was written as [599, 16]"), ("tokens", "599 train rows")])
def test_fewer_rows_than_declared_are_an_error(finished: Laboratory, key: str, shape: str):
    def shortened(artefact: Artefact) -> Artefact:
        statistics = artefact.provenance["statistics"]
        return replace(artefact, provenance={"statistics": statistics | {"train": statistics["train"] | {"rows": 599}}})

    (message,) = _examine(finished, key, shortened).errors
    assert shape in message


@pytest.mark.parametrize("change", [lambda w: w.fill_(float("nan")), lambda w: w[:, :-1].contiguous()], ids=["not finite", "misshapen"])
def test_weights_that_are_not_finite_or_of_the_wrong_shape_are_an_error(
    finished: Laboratory, change: Callable[[torch.Tensor], torch.Tensor]
):
    file = finished.artefact("bagging/member_2", SEEDS[0]).path / "sae_weights.safetensors"
    weights = load_file(file)
    save_file(weights | {"W_enc": change(weights["W_enc"])}, file)
    (message,) = _examine(finished, "bagging/member_2").errors
    assert message.startswith(f"{NAME}/bagging/member_2, layer {LAYER}, seed {SEEDS[0]} cannot be read")
    assert "W_enc" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.with_columns(mse=pl.lit(float("nan"))), "mse is nan in 9 of 9 rows, first for method single, n_members 1"),
        (lambda rows: rows.with_columns(fvu=pl.when(pl.col("n_members") == 3).then(float("inf"))), "fvu is inf in 4 of 9 rows"),
        (lambda rows: rows.drop("l0"), "has the columns"),
        (lambda rows: rows.head(0), "is empty"),
    ],
    ids=["nan", "inf", "columns", "rows"],
)
def test_tables_with_numbers_that_are_not_finite_or_of_the_wrong_shape_are_an_error(
    finished: Laboratory, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], message: str
):
    path = tmp_path / "part.parquet"
    change(pl.read_parquet(finished.artefact("eval/reconstruction", SEEDS[0]).path, hive_partitioning=False)).write_parquet(path)
    (error,) = _examine(finished, "eval/reconstruction", lambda artefact: replace(artefact, path=path)).errors
    assert message in error


# warnings


@pytest.mark.parametrize(
    ("key", "last_step", "message"),
    [
        ("bagging/member_1", {"dead_features": 0.21}, "21% of its features are dead, more than 20%"),
        ("bagging/member_1", {"l0": 3.5}, "3.5 features fire per token, and the target is 4"),
        ("baseline/expanded_l0_matched", {"l0": 4.0}, "the target is 12"),
        ("boosting/round_2", {"explained_variance": 0.009}, "too little to reduce it"),
    ],
)
def test_poor_saes_give_warnings_and_stop_no_run(finished: Laboratory, key: str, last_step: dict[str, float], message: str):
    shutil.rmtree(finished.root / "tables")
    usual = {"dead_features": 0.0, "explained_variance": 0.5, "l0": 12.0 if "matched" in key else 4.0}
    health = _examine(finished, key, _last_step(**usual))
    assert (health.errors, health.warnings) == ([], [])
    health = _examine(finished, key, _last_step(**usual | last_step))
    assert health.errors == []
    (warning,) = health.warnings
    assert f"{NAME}/{key}, layer {LAYER}, seed {SEEDS[0]}" in warning
    assert message in warning


@pytest.mark.parametrize(
    ("key", "method", "n", "member"),
    [("bagging/member_2", "bagging", 3, 2), ("boosting/round_3", "boosting", 3, 3), ("baseline/expanded", "expanded", 3, None)],
)
def test_held_out_figures_replace_those_of_the_last_batch(finished: Laboratory, key: str, method: str, n: int, member: int | None):
    part = finished.artefact(f"eval/{'reconstruction' if member is None else 'members'}", SEEDS[0]).path
    is_row = (pl.col("method") == method) & (pl.col("n_members") == n) & (pl.lit(True) if member is None else pl.col("member") == member)
    figures = {"dead_features": 0.5, "explained_variance": 0.25, "l0": 3.9}
    changed = {name: pl.when(is_row).then(value).otherwise(name) for name, value in figures.items()}
    write_rows(finished.store, part, pl.read_parquet(part, hive_partitioning=False).with_columns(**changed))
    health = _examine(finished, key, _last_step(dead_features=1.0, explained_variance=-1.0, l0=100.0), min_explained_variance=0.3)
    assert health.measured["explained variance (held-out tokens)"] == 0.25
    assert (health.measured["dead features"], health.measured["L0 [features per token]"]) == (0.5, 3.9)
    assert "50% of its features are dead, more than 20% (held-out tokens)" in health.warnings[0]
    assert len(health.warnings) == (1 if "round" in key else 2)
    assert "round" in key or "explained variance 0.250 on held-out tokens is below 0.3" in health.warnings[1]
    health = _examine(finished, key, lambda artefact: replace(artefact, data_version="trained again"))
    assert "explained variance (the last training batch)" in health.measured


def test_a_poor_first_round_gives_no_warning_of_an_empty_residual(finished: Laboratory):
    shutil.rmtree(finished.root / "tables")
    for key in ("boosting/round_1", "bagging/member_2"):
        assert _examine(finished, key, _last_step(explained_variance=0.001, dead_features=0.0)).warnings == []


def test_explained_variance_below_the_threshold_gives_a_warning_for_each_method(finished: Laboratory):
    table = pl.read_parquet(finished.artefact("eval/reconstruction", SEEDS[0]).path, hive_partitioning=False)
    full = table.filter((pl.col("n_members") == MEMBERS) | (pl.col("method") == "single"))
    threshold = full["explained_variance"].median()
    assert isinstance(threshold, float)
    below = set(full.filter(pl.col("explained_variance") < threshold)["method"])
    warnings = _examine(finished, "eval/reconstruction", min_explained_variance=threshold).warnings
    assert below
    assert {next(method for method in full["method"] if f"of {method} with" in warning) for warning in warnings} == below
    assert _examine(finished, "eval/reconstruction").warnings == []


def test_features_that_never_fire_on_held_out_tokens_are_warned_of_by_member(finished: Laboratory):
    table = pl.read_parquet(finished.artefact("eval/members", SEEDS[0]).path, hive_partitioning=False)
    threshold = table["dead_features"].median()
    assert isinstance(threshold, float)
    above = table.filter(pl.col("dead_features") > threshold)
    warnings = _examine(finished, "eval/members", max_dead_features=threshold).warnings
    assert len(warnings) == len(above)
    for row, warning in zip(above.iter_rows(named=True), warnings, strict=True):
        assert f"{row['dead_features']:.0%} of the features of {row['method']} {row['member']} never fire on the test tokens" in warning


def test_a_training_in_which_no_feature_can_be_called_dead_is_warned_of(finished: Laboratory):
    def with_dead_after(tokens: int | None) -> Callable[[Artefact], Artefact]:
        def change(artefact: Artefact) -> Artefact:
            artefact = _last_step(dead_features=0.0, explained_variance=0.5, l0=4.0)(artefact)
            settings = artefact.recipe["settings"]
            changed = {**settings, "training": {**settings["training"], "dead_after_tokens": tokens}}
            return replace(artefact, recipe={**artefact.recipe, "settings": changed})

        return change

    shutil.rmtree(finished.root / "tables")
    n_tokens = finished.artefact("bagging/member_1", SEEDS[0]).provenance["train_tokens"]
    (warning,) = _examine(finished, "bagging/member_1", with_dead_after(n_tokens)).warnings
    assert f"dead_after_tokens is {n_tokens}, and it trained on {n_tokens} tokens" in warning
    for tokens in (None, n_tokens - 1):
        assert _examine(finished, "bagging/member_1", with_dead_after(tokens)).warnings == []


def test_thresholds_of_the_experiment_file_apply_and_make_nothing_stale(finished: Laboratory):
    finished.declare(checks={"min_explained_variance": 1.0, "max_dead_features": 1.0})
    assert set(_states().values()) == {"fresh"}
    found = _evaluations(finished, ["bagging/member_1", "bagging/bagging_ensemble"])
    of_disk = {(asset, check) for asset in ("bagging/member_1", "bagging/bagging_ensemble") for check in (BYTES, RECIPE)}
    assert found.keys() == {("bagging/member_1", HEALTH), *of_disk}
    health = found["bagging/member_1", HEALTH]
    assert (health.passed, health.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "is below 1" in (health.description or "")


@pytest.mark.parametrize("checks", [{"max_dead_features": 2}, {"min_explained_variance": "much"}, {"speed": 1}])
def test_an_invalid_threshold_is_refused_with_its_field(empty: Laboratory, checks: dict):
    empty.declare(checks=checks)
    with pytest.raises(ConfigurationError, match=f"attributes.checks.{next(iter(checks))}"):
        empty.catalogue.experiment(NAME)


def test_a_run_ends_with_its_first_warnings_and_their_number(finished: Laboratory):
    finished.declare(checks={"max_dead_features": 1.0})
    assert "warning" not in finished.run()
    finished.declare(checks={"min_explained_variance": 1.0, "max_dead_features": 1.0})
    printed = finished.run()
    assert f"warning: {NAME}/bagging/member_1, layer {LAYER}, seed {SEEDS[0]}: explained variance" in printed
    assert printed.count("warning: ") == 5
    assert "more warnings" in printed


# in Dagster


def test_a_failed_check_stops_descendants_in_the_same_run_and_keeps_the_artefact(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    empty.run(select=["activations"])

    def unsound(declaration: Any, *arguments: Any) -> Health:
        return Health(errors=["it is bad"]) if declaration.address.name == "member_2" else Health()

    monkeypatch.setattr(materialise, "examine", unsound)
    found = _evaluations(empty, [f"bagging/member_{j}" for j in range(1, MEMBERS + 1)] + ["bagging/bagging_ensemble"])
    assert {asset for (asset, check), each in found.items() if check == HEALTH and each.passed} == {"bagging/member_1", "bagging/member_3"}
    failed = found["bagging/member_2", HEALTH]
    assert (failed.passed, failed.severity, failed.description) == (False, dg.AssetCheckSeverity.ERROR, "it is bad")
    states = _states()
    assert states[f"{NAME}/bagging/member_2"] == "fresh"
    assert states[f"{NAME}/bagging/bagging_ensemble"] == "missing"


def test_a_run_without_selected_checks_examines_its_artefacts_and_stops(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    empty.run(select=["activations"])
    verdicts = {"member_1": Health(warnings=["it is poor"]), "member_2": Health(errors=["it is bad"])}
    monkeypatch.setattr(materialise, "examine", lambda declaration, *_: verdicts.get(declaration.address.name, Health()))
    members = [f"bagging/member_{j}" for j in range(1, MEMBERS + 1)]
    found = _evaluations(empty, [*members, "bagging/bagging_ensemble"], {})
    assert {asset: (each.passed, each.severity.value, each.description) for (asset, _), each in found.items()} == {
        "bagging/member_1": (False, "WARN", "it is poor"),
        "bagging/member_2": (False, "ERROR", "it is bad"),
        "bagging/member_3": (True, "WARN", None),
    }
    assert {each.partition for each in found.values()} == {f"{LAYER}|{SEEDS[0]}"}
    assert _states()[f"{NAME}/bagging/bagging_ensemble"] == "missing"


def test_health_of_all_partitions_can_be_checked_without_materialising(finished: Laboratory):
    finished.declare(checks={"min_explained_variance": 1.0, "max_dead_features": 1.0})
    found = _evaluations(finished, [], {"bagging/member_2": HEALTH, "eval/cost": HEALTH}, partition=None)
    assert {asset: each.passed for (asset, _), each in found.items()} == {"bagging/member_2": False, "eval/cost": True}
    description = found["bagging/member_2", HEALTH].description or ""
    assert all(f"seed {seed}: explained variance" in description for seed in SEEDS)


def _flip_last_bit_without_a_trace(file: Path) -> None:
    whole, times = file.read_bytes(), file.stat()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_byte_changed_at_the_same_size_and_time_is_found_by_the_check_and_rebuilt(finished: Laboratory):
    file = finished.artefact("bagging/member_3", SEEDS[0]).path / "sae_weights.safetensors"
    whole = file.read_bytes()
    _flip_last_bit_without_a_trace(file)
    assert _states()[f"{NAME}/bagging/member_3"] == "fresh"
    every_seed = {"bagging/member_3": BYTES, "bagging/member_1": BYTES, "eval/cost": BYTES}
    found = _evaluations(finished, [], every_seed, partition=None)
    assert {asset for (asset, _), each in found.items() if not each.passed} == {"bagging/member_3"}
    assert found["bagging/member_1", BYTES].metadata["partitions read"].value == len(SEEDS)
    failed = found["bagging/member_3", BYTES]
    assert failed.severity == dg.AssetCheckSeverity.ERROR
    assert str(file) in (failed.description or "")
    assert _states()[f"{NAME}/bagging/member_3"] == "damaged"
    finished.run()
    assert file.read_bytes() == whole
    assert set(_states().values()) == {"fresh"}


def test_a_byte_changed_at_the_same_size_and_time_is_found_by_doctor_and_rebuilt(finished: Laboratory):
    file = finished.artefact("bagging/member_3", SEEDS[0]).path / "sae_weights.safetensors"
    whole = file.read_bytes()
    _flip_last_bit_without_a_trace(file)
    (finding,) = [each for each in diagnose(verify=True) if each.subject == "artefact"]
    assert not finding.ok
    assert finding.detail == f"{file}: the bytes are not those that were written. The next `saeens run` computes it again"
    assert _states()[f"{NAME}/bagging/member_3"] == "damaged"
    finished.run()
    assert file.read_bytes() == whole


def test_the_check_of_a_materialisation_reads_its_partition_and_repeats_known_damage_of_others(finished: Laboratory):
    here = _evaluations(finished, ["bagging/member_3"])["bagging/member_3", BYTES]
    assert here.passed
    assert {name: value.value for name, value in here.metadata.items()} == {"partitions read": 1, "partitions on disk": len(SEEDS)}
    assert (here.description or "").startswith("Read 1 of 2 partitions")
    elsewhere = finished.artefact("bagging/member_3", SEEDS[1]).path / "sae_weights.safetensors"
    _flip_last_bit_without_a_trace(elsewhere)
    assert not _evaluations(finished, [], {"bagging/member_3": BYTES}, partition=None)["bagging/member_3", BYTES].passed
    here = _evaluations(finished, ["bagging/member_3"])["bagging/member_3", BYTES]
    assert (here.passed, here.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert str(elsewhere) in (here.description or "")


def test_the_check_of_bytes_does_not_pass_without_artefacts(empty: Laboratory):
    found = _evaluations(empty, [], {"tokens": BYTES}, partition=None)["tokens", BYTES]
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
