"""`l0_target` in an experiment: recipes of the baselines that multiply it, the L0 reached, and the warning about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, Laboratory

from saeens_pipeline.assets.baselines.registry import names_of
from saeens_pipeline.assets.health import warnings_of
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

TARGET, SEED = 5.0, 1
SAE = {"architecture": "standard", "expansion": 2, "l0_target": TARGET}


@pytest.fixture(scope="module")
def aimed(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment with standard SAEs and a target, run with one seed; for reading only."""
    home = tmp_path_factory.mktemp("aimed")
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(sae=SAE, baselines=None, evaluations=["reconstruction"], ensemble={"members": MEMBERS, "seeds": [SEED]})
        assert names_of(laboratory.catalogue.experiment(NAME)) == ["expanded", "expanded_l0_matched"]
        laboratory.run()
    return laboratory


def test_the_matched_expanded_sae_aims_at_the_l0_of_all_members(aimed: Laboratory):
    wide, matched, member = (
        aimed.artefact(key, SEED).recipe["settings"]["sae"]
        for key in ("baseline/expanded", "baseline/expanded_l0_matched", "bagging/member_1")
    )
    assert member["l0_target"] == TARGET
    assert wide == member | {"expansion": 2 * MEMBERS}
    assert matched == wide | {"l0_target": MEMBERS * TARGET}


def test_the_table_has_the_distance_from_the_target(aimed: Laboratory):
    rows = read_table(aimed.root, NAME, "reconstruction").rows(named=True)
    assert len(rows) == 1 + 2 * MEMBERS + 2
    for row in rows:
        n = 1 if row["method"] == "expanded" else row["n_members"]  # as many features fire as in a single SAE
        assert row["l0_error"] == pytest.approx(row["l0"] / (n * TARGET) - 1)


def test_the_distance_from_k_is_in_the_table_too(finished_laboratory: Laboratory):
    k = EXPERIMENT["sae"]["k"]
    for row in read_table(finished_laboratory.root, NAME, "reconstruction").filter(method="bagging").iter_rows(named=True):
        assert row["l0_error"] == pytest.approx(row["l0"] / (row["n_members"] * k) - 1)


@pytest.mark.parametrize(
    ("key", "l0", "checks", "target"),
    [
        ("bagging/member_1", 4.0, {}, "5"),
        ("baseline/expanded_l0_matched", 4.0, {}, "15"),
        ("bagging/member_1", 5.0, {"target_l0": 9}, "9"),
        ("bagging/member_1", 5.0, {}, ""),
    ],
)
def test_the_check_of_l0_takes_the_target_as_its_default(aimed: Laboratory, key: str, l0: float, checks: dict[str, float], target: str):
    artefact = aimed.artefact(key, SEED)
    figures = artefact.provenance["last_step"] | {"l0": l0, "dead_features": 0.0}
    artefact = replace(
        artefact,
        path=aimed.root / "nowhere" / artefact.path.relative_to(aimed.root),
        provenance=artefact.provenance | {"last_step": figures},
    )
    settings = CheckSettings(max_dead_features=1, **checks)
    found = [each for each in warnings_of(_reference(aimed, key), Partition(LAYER, SEED), artefact, settings) if "fire per token" in each]
    assert len(found) == bool(target)
    assert all(f"the target is {target} " in each and "train on more tokens" in each for each in found)


def _reference(laboratory: Laboratory, key: str):
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        return laboratory.declarations()[f"{NAME}/{key}"]
