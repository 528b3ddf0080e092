"""A matching-pursuit SAE as wide as all members together, with at most the sum of their L0."""

from __future__ import annotations

from saeens_pipeline.assets.baselines.registry import Baseline, register, single_sae
from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings


def _target(experiment: ExperimentSettings, n: int) -> Target:
    from saeens_models import SAESettings

    sae = experiment.joined_sae(n, l0_matched=True)
    if sae.architecture != "matching_pursuit" and sae.l0 is not None:
        fields = {sae.width_field: sae.width, "apply_b_dec_to_input": sae.apply_b_dec_to_input}
        sae = SAESettings(architecture="matching_pursuit", max_iterations=round(sae.l0), **fields)
    return single_sae("Matching pursuit, as wide as all members, at most their L0", sae, "One SAE.")


register(
    Baseline(
        name="matching_pursuit",
        label="matching pursuit",
        about="One SAE with as many features as the whole ensemble. It chooses them one by one, each for the residual of those before.",
        size="one SAE with as many features as {n} members",
        target=_target,
        order=40,
        adds_l0=True,
    )
)
