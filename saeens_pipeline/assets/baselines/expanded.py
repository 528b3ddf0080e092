"""The expanded SAEs: as wide as an ensemble, with the L0 of one member or of all."""

from __future__ import annotations

from saeens_pipeline.assets.baselines.registry import Baseline, register, single_sae
from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings


def _expanded(experiment: ExperimentSettings, n: int) -> Target:
    return _target(experiment, n, "same sparsity", l0_matched=False)


def _l0_matched(experiment: ExperimentSettings, n: int) -> Target:
    return _target(experiment, n, "with their L0", l0_matched=True)


def _target(experiment: ExperimentSettings, n: int, sparsity: str, *, l0_matched: bool) -> Target:
    others = "Other settings are those of member 1." if isinstance(experiment.sae, list) else ""
    return single_sae(f"One SAE as wide as {n} members, {sparsity}", experiment.joined_sae(n, l0_matched=l0_matched), others)


register(
    Baseline(
        name="expanded",
        label="expanded",
        about="One SAE with as many features as the whole ensemble. As many features fire per token as in a single SAE.",
        size="one SAE with as many features as {n} members",
        target=_expanded,
        order=10,
        is_sized=True,
        by_default=True,
    )
)
register(
    Baseline(
        name="expanded_l0_matched",
        label="expanded (L0 matched)",
        about="One SAE with as many features as the whole ensemble. As many features fire per token as in the ensemble.",
        size="one SAE with as many features as {n} members, and as many that fire",
        target=_l0_matched,
        order=20,
        is_sized=True,
        by_default=True,
        adds_l0=True,
    )
)
