"""The registry of baselines: a registered baseline appears everywhere without further code."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory

from saeens_pipeline.assets.baselines.registry import BASELINES, Baseline, listed, methods, register, single_sae
from saeens_pipeline.assets.saes import Target, init_seed
from saeens_pipeline.report.methods import in_order, method
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.tables import read_table

TOY = "narrow_l0_matched"
REFERENCE = Path(__file__).parents[2] / "docs" / "scripts" / "reference.py"


def _target(experiment: ExperimentSettings, n: int) -> Target:
    k = sum(int(sae.l0 or 0) for sae in experiment.saes)
    return single_sae(f"One SAE of a member's width, with the L0 of {n} members", experiment.saes[0].model_copy(update={"k": k}))


@pytest.fixture
def toy() -> Iterator[Baseline]:
    """One SAE of a member's width with the L0 of all members."""
    about, size = "One SAE as wide as a member. As many features fire as in the ensemble.", "one SAE with the L0 of {n} members"
    yield register(Baseline(name=TOY, label="narrow (L0 matched)", about=about, size=size, target=_target, adds_l0=True))
    del BASELINES[TOY]


def test_a_registered_baseline_is_trained_measured_and_shown(toy: Baseline, finished: Laboratory, tmp_path: Path):
    finished.declare(baselines=[TOY], baseline_training={TOY: {"batch_tokens": 200}}, evaluations=["reconstruction"])
    declared = finished.declarations()[f"{NAME}/baseline/{TOY}"]
    assert declared.description.startswith(
        f"One SAE of a member's width, with the L0 of {MEMBERS} members\n\narchitecture topk, expansion 2, k 12."
    )
    summary = finished.run()
    settings, member = (finished.artefact(key, SEEDS[0]).recipe["settings"] for key in (f"baseline/{TOY}", "bagging/member_1"))
    assert settings == member | {
        "sae": member["sae"] | {"k": MEMBERS * EXPERIMENT["sae"]["k"]},
        "training": member["training"] | {"batch_tokens": 200},
        "init_seed": init_seed(SEEDS[0], 0),
    }
    (l0,) = read_table(finished.root, NAME, "reconstruction").filter(method=TOY, seed=SEEDS[0])["l0"]
    assert l0 == pytest.approx(settings["sae"]["k"], abs=0.5)  # a selected feature can be 0
    assert TOY in summary
    assert toy.label in (finished.root / "reports" / NAME / f"layer={LAYER}" / "index.html").read_text()
    (page,) = [page for page in runpy.run_path(str(REFERENCE))["write_reference"](tmp_path) if page.name == "yaml.md"]
    assert f"| `{TOY}` | {toy.about} |" in page.read_text()


def test_a_registered_baseline_has_a_place_and_a_symbol_of_its_own(toy: Baseline):
    assert methods() == in_order(methods())
    assert methods()[-1] == TOY
    symbols = [method(name).glyph for name in methods()]
    assert len(set(symbols)) == len(symbols)
    assert method(TOY).at(1, MEMBERS) == f"one SAE with the L0 of {MEMBERS} members"


def test_conditions_of_a_registered_baseline_are_checked(toy: Baseline, empty: Laboratory):
    empty.declare(sae={"architecture": "standard", "expansion": 2}, baselines=[TOY])
    (complaint,) = empty.catalogue.broken.values()
    assert f"attributes.baselines.0: {TOY} has the L0 of all members: architecture 'standard' sets its L0" in complaint


def test_a_baseline_name_can_be_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register(listed()[0])
