"""Member 1 with weights that keep their initial values: controls for what learned directions contribute (arXiv 2602.14111)."""

from __future__ import annotations

from functools import partial

from saeens_pipeline.assets.baselines.registry import Baseline, register, single_sae
from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings


def _target(experiment: ExperimentSettings, n: int, *, frozen: str, title: str) -> Target:
    return single_sae(title, experiment.saes[0], "Otherwise member 1.", init_index=1, training={"frozen": frozen})


def _has_no_encoder(experiment: ExperimentSettings) -> str:
    from saeens_models.architectures import sae_class

    architecture = experiment.saes[0].architecture
    if "W_enc" in sae_class(architecture).shared_weights:
        return ""
    return f"encoder_frozen keeps W_enc, and {architecture} has no W_enc of its own: leave it out, or take decoder_frozen"


register(
    Baseline(
        name="decoder_frozen",
        label="decoder frozen",
        about="Member 1, trained with a decoder that keeps its random initial directions. What it reaches is not due to learned ones.",
        size="one SAE with a random decoder",
        target=partial(_target, frozen="decoder", title="Member 1 with its random decoder"),
        order=60,
    )
)
register(
    Baseline(
        name="decoder_soft_frozen",
        label="decoder soft-frozen",
        about="Member 1, trained with decoder rows that keep a cosine of at least 0.8 to their random initial directions.",
        size="one SAE with an almost random decoder",
        target=partial(_target, frozen="decoder_soft", title="Member 1 with an almost random decoder"),
        order=61,
    )
)
register(
    Baseline(
        name="encoder_frozen",
        label="encoder frozen",
        about="Member 1, trained with an encoder that keeps its random initial weights. Decoder and biases are learned.",
        size="one SAE with a random encoder",
        target=partial(_target, frozen="encoder", title="Member 1 with its random encoder"),
        order=62,
        complaint=_has_no_encoder,
    )
)
