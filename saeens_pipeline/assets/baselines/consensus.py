"""The consensus of the members' features, and an SAE of its width that is trained from scratch."""

from __future__ import annotations

from dataclasses import replace

from saeens_pipeline.assets.baselines.registry import Baseline, register, single_sae
from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings

_CLUSTERS = {"threshold": 0.7, "min_members": 2}


def _consensus(experiment: ExperimentSettings, n: int) -> Target:
    note = "One feature for each cluster of similar features of at least two members; `clusters.parquet` lists them. The decoder is fixed."
    training = {"frozen": "decoder", "unit_norm_decoder": False}
    target = single_sae("Features that several members have in common", experiment.saes[0], note, consensus=_CLUSTERS, training=training)
    return replace(target, kind="consensus")


def _matched(experiment: ExperimentSettings, n: int) -> Target:
    note = "As many features as the consensus has."
    settings = {**_CLUSTERS, "from_scratch": True}
    return single_sae("One SAE as wide as the consensus, trained from scratch", experiment.saes[0], note, consensus=settings)


def _complaint(experiment: ExperimentSettings) -> str:
    if experiment.ensemble.members < 2:
        return "a consensus needs at least two members: add some, or leave it out"
    return ""


register(
    Baseline(
        name="consensus",
        label="consensus",
        about="One SAE of the features that at least two members have in common. Its decoder is theirs, its encoder is trained.",
        size="one SAE of the features that {n} members have in common",
        target=_consensus,
        order=50,
        of_lists=False,
        of_published=True,
        complaint=_complaint,
    )
)
register(
    Baseline(
        name="consensus_matched",
        label="consensus matched",
        about="One SAE with as many features as the consensus, trained from scratch.",
        size="one SAE as wide as the consensus of {n} members",
        target=_matched,
        order=51,
        of_lists=False,
        of_published=True,
        complaint=_complaint,
    )
)
