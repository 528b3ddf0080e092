"""The published figures of the paper's three settings: Gadgil, Lin & Lee 2026, arXiv 2505.16077, J = 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saeens_models import SAESettings
from saeens_pipeline.report.metrics import CONNECTIVITY, EV, MSE, STABILITY

METRICS = (EV, MSE, CONNECTIVITY, STABILITY)
MEMBERS, SEEDS, TRAIN_TOKENS = 8, 4, 800_000_000
PAPER = "Gadgil, Lin & Lee, Ensembling Sparse Autoencoders, ICML 2026 (arXiv 2505.16077)"


@dataclass(frozen=True)
class Setting:
    """A setting of the paper. `model` is the last part of the language model's name, without case and punctuation."""

    title: str
    model: str
    layer: int
    architecture: str
    expansion: int
    sparsity: tuple[str, float]
    rows: Mapping[str, tuple[float, ...]]
    """by method, with eight SAEs: the figures in the order of METRICS"""

    def deviations(self, sae: SAESettings, members: int, seeds: int, train_tokens: int | None) -> list[str]:
        """Return the differences between an experiment and this setting."""
        name, value = self.sparsity
        compared: Sequence[tuple[str, object, object]] = (
            ("architecture", sae.architecture, self.architecture),
            ("expansion", sae.width, self.expansion),
            (name, getattr(sae, name, None), value),
            ("members", members, MEMBERS),
            ("seeds", seeds, SEEDS),
            ("training tokens of an SAE", train_tokens, TRAIN_TOKENS),
        )
        return [f"{what} {_written(ours)} here, {_written(theirs)} in the paper" for what, ours, theirs in compared if ours != theirs]


SETTINGS = (
    Setting("GELU-1L", "gelu1l", 0, "standard", 32, ("l1_coefficient", 0.75), {
        "bagging": (0.895, 35.147, 0.307, 0.745), "boosting": (0.961, 12.542, 0.945, 0.707), "expanded": (0.946, 17.893, 0.959, 0.372),
    }),
    Setting("Pythia-160M", "pythia160m", 8, "topk", 21, ("k", 128), {
        "bagging": (0.929, 24.704, 0.912, 0.731), "boosting": (0.998, 0.845, 0.986, 0.680), "expanded": (0.987, 4.387, 0.978, 0.204),
    }),
    Setting("Gemma 2-2B", "gemma22b", 12, "jumprelu", 7, ("l0_coefficient", 0.75), {
        "bagging": (0.974, 234.128, 0.769, 0.633), "boosting": (0.995, 46.538, 0.989, 0.583), "expanded": (0.948, 472.330, 0.993, 0.268),
    }),
)  # fmt: skip


def setting_of(language_model: str, hook: str, layer: int, weights: str) -> Setting | None:
    """Return the setting of the paper with these activations: trained weights, the block's output, the same layer."""
    name = "".join(c for c in language_model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower() if c.isalnum())
    if hook != "resid_post" or weights != "trained":
        return None
    return next((each for each in SETTINGS if each.model == name and each.layer == layer), None)


def _written(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
