"""The compute-matched SAE: member 1, trained for as many steps as all members together."""

from __future__ import annotations

from saeens_pipeline.assets.baselines.registry import Baseline, register, single_sae
from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings


def _target(experiment: ExperimentSettings, n: int) -> Target:
    title, note = f"Member 1, trained as long as {n} members", f"{n} passes, each in another order."
    return single_sae(title, experiment.saes[0], note, init_index=1, epochs=n)


def _complaint(experiment: ExperimentSettings) -> str:
    if any(each.documents for each in experiment.ensemble.specialised):
        return "compute_matched sees every row once per member, and specialised members with documents see fewer: leave it out"
    return ""


register(
    Baseline(
        name="compute_matched",
        label="compute matched",
        about="One SAE with as many features as a member, trained for as many steps as all members together.",
        size="one SAE, trained as long as {n} members together",
        target=_target,
        order=30,
        of_lists=False,
        complaint=_complaint,
    )
)
