"""Asset keys, groups, op names and paths of artefacts: the names that users and tests rely on."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from pydantic import ValidationError
from tiny_experiment import experiment_settings

from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.storage.names import LEADERBOARD_ADDRESS, Address, Partition, is_above_artefacts, locate, validate_name
from saeens_pipeline.storage.recipes import Store

E = "pythia_160m_topk"
BOTH = Partition(layer=8, seed=42)
LAYER = Partition(layer=8)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        (Address("pythia_160m", "source", "tokens"), "pythia_160m/tokens"),
        (Address("pythia_160m", "source", "activations"), "pythia_160m/activations"),
        (Address(E, "bagging", "member_1"), f"{E}/bagging/member_1"),
        (Address(E, "boosting", "round_2"), f"{E}/boosting/round_2"),
        (Address(E, "boosting", "residual_1"), f"{E}/boosting/residual_1"),
        (Address(E, "baseline", "expanded"), f"{E}/baseline/expanded"),
        (Address(E, "eval", "stability"), f"{E}/eval/stability"),
        (Address(E, "report", "report"), f"{E}/report"),
        (LEADERBOARD_ADDRESS, "leaderboard"),
    ],
)
def test_addresses_have_the_expected_asset_keys(address: Address, key: str):
    assert address.key == key.split("/")
    assert str(address) == key


@pytest.mark.parametrize(
    ("address", "group"),
    [
        (Address("pythia_160m", "source", "tokens"), "sources"),
        (Address("pythia_160m", "source", "activations"), "sources"),
        (Address(E, "bagging", "member_1"), f"{E}_saes"),
        (Address(E, "boosting", "round_8"), f"{E}_saes"),
        (Address(E, "boosting", "residual_7"), f"{E}_saes"),
        (Address(E, "bagging", "bagging_ensemble"), E),
        (Address(E, "boosting", "boosting_ensemble"), E),
        (Address(E, "baseline", "expanded_l0_matched"), E),
        (Address(E, "eval", "reconstruction"), E),
        (Address(E, "report", "report"), E),
        (LEADERBOARD_ADDRESS, "leaderboard"),
    ],
)
def test_groups_separate_sources_saes_and_evaluations(address: Address, group: str):
    assert address.group == group


@pytest.mark.parametrize(
    ("address", "partition", "path"),
    [
        (Address("pythia_160m", "source", "tokens"), Partition(), "sources/pythia_160m/tokens.zarr"),
        (Address("pythia_160m", "source", "activations"), LAYER, "sources/pythia_160m/layer=8/activations.zarr"),
        (Address(E, "bagging", "member_1"), BOTH, f"experiments/{E}/layer=8/seed=42/bagging/member_1"),
        (Address(E, "boosting", "round_2"), BOTH, f"experiments/{E}/layer=8/seed=42/boosting/round_2"),
        (Address(E, "boosting", "residual_1"), BOTH, f"experiments/{E}/layer=8/seed=42/boosting/residual_1.zarr"),
        (Address(E, "boosting", "boosting_ensemble"), BOTH, f"experiments/{E}/layer=8/seed=42/boosting/boosting_ensemble"),
        (Address(E, "baseline", "expanded"), BOTH, f"experiments/{E}/layer=8/seed=42/baseline/expanded"),
        (Address(E, "eval", "cost"), BOTH, f"tables/{E}/cost/layer=8/seed=42/part.parquet"),
        (Address(E, "eval", "stability"), LAYER, f"tables/{E}/stability/layer=8/part.parquet"),
        (Address(E, "report", "report"), LAYER, f"reports/{E}/layer=8"),
        (Address(E, "report", "pareto"), Partition(), f"reports/{E}/pareto"),
        (LEADERBOARD_ADDRESS, Partition(), "tables/leaderboard/part.parquet"),
    ],
)
def test_addresses_map_to_paths_and_back(address: Address, partition: Partition, path: str, tmp_path: Path):
    assert address.path(partition).as_posix() == path
    assert Store(tmp_path).path(address, partition) == tmp_path / path
    assert locate(PurePosixPath(path)) == (address, partition)
    assert all(is_above_artefacts(folder) for folder in PurePosixPath(path).parents[:-1])
    assert not is_above_artefacts(PurePosixPath(path))


@pytest.mark.parametrize(
    "path",
    [
        "sources",
        "sources/pythia_160m/tokens",
        "sources/Pythia/tokens.zarr",
        f"experiments/{E}/layer=8/seed=42/bagging",
        f"experiments/{E}/layer=08/seed=42/bagging/member_1",
        f"experiments/{E}/seed=42/layer=8/bagging/member_1",
        f"experiments/{E}/layer=8/seed=42/stacking/member_1",
        f"experiments/{E}/layer=8/seed=42/boosting/residual_1",
        f"experiments/{E}/layer=8/seed=42/bagging/member_1/cfg.json",
        f"tables/{E}/part.parquet",
        f"tables/{E}/cost/layer=8/part.csv",
        f"reports/{E}",
        f"tables/../{E}/cost/layer=8/part.parquet",
    ],
)
def test_other_paths_belong_to_no_artefact(path: str):
    assert locate(PurePosixPath(path)) is None


def test_layer_and_seed_zero_are_valid_partitions():
    path = Address("e", "bagging", "member_1").path(Partition(layer=0, seed=0))
    assert path.as_posix() == "experiments/e/layer=0/seed=0/bagging/member_1"
    assert str(Partition(layer=0, seed=0)) == "layer 0, seed 0"
    assert str(Partition()) == ""


def test_op_names_have_only_characters_that_dagster_allows():
    assert Address("quickstart", "bagging", "member_1").op_name == "quickstart__bagging__member_1"


@pytest.mark.parametrize("name", ["quickstart", "pythia_160m", "quickstart__k_4", "x__l1_0p75", "0", "_"])
def test_names_of_lower_case_letters_digits_and_underscore_are_accepted(name: str):
    assert validate_name(name) == name


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "a.b", "a-b", "a b", "A", "é", "a\n", "٣", "a\0", "a|b", "a=1", "*"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_root_or_break_a_key_are_refused(name: str):
    with pytest.raises(ValueError, match="lower-case letters, digits and _"):
        validate_name(name)
    for owner, own_name in ((name, "member_1"), ("quickstart", name)):
        with pytest.raises(ValueError, match="lower-case letters, digits and _"):
            Address(owner, "bagging", own_name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_experiment_files_refuse_invalid_names(name: str):
    for field in ("name", "source"):
        with pytest.raises(ValidationError, match="lower-case letters, digits and _"):
            ExperimentSettings.model_validate(experiment_settings(**{field: name}))
    with pytest.raises(ValidationError, match="lower-case letters, digits and _"):
        SourceSettings.model_validate({"name": name, "language_model": "m", "layers": [0], "context_length": 4} | dict.fromkeys(
            ("train_tokens", "test_tokens"), 1
        ))  # fmt: skip


@pytest.mark.parametrize("name", ["sources", "leaderboard", "quickstart_saes"])
def test_experiment_names_that_collide_with_a_group_are_refused(name: str):
    with pytest.raises(ValidationError, match=f"'{name}' would collide with a group"):
        ExperimentSettings.model_validate(experiment_settings(name=name))
