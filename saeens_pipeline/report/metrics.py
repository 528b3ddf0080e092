"""The metrics of pages and pictures: table and column, format, and meaning of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A column of a table, or one of the table's totals, with its heading, its name on axes and its meaning."""

    title: str
    table: str
    column: str
    name: str
    form: str
    about: str
    better: Literal["more", "less", ""] = ""
    log: bool = False


def written(value: float, form: str) -> str:
    """Return a number in a format, powers of ten in short: `1.5e8`."""
    return re.sub(r"e\+?(-?)0*", r"e\1", format(value, form))


EV = Metric(
    "EV", "reconstruction", "explained_variance", "explained variance", ".4f",
    "share of the held-out activations' variance that the reconstruction explains. 1 is perfect, 0 no better than the mean", "more",
)  # fmt: skip
MSE = Metric(
    "MSE", "reconstruction", "mse", "mean squared error", ".4g",
    "squared error of the reconstruction, summed over dimensions, mean over held-out tokens. Its scale is the activations' own: compare it "
    "within one language model and layer", "less", True,
)  # fmt: skip
CE = Metric(
    "CE rec.", "reconstruction", "ce_loss_recovered", "loss recovered", ".4f",
    "how well the language model predicts the next token (cross-entropy) with the reconstruction in place of the activations. 1: as well "
    "as with the activations, 0: as badly as with zeros", "more",
)  # fmt: skip
L0 = Metric("L0", "reconstruction", "l0", "L0 (features per token)", ".1f", "features that fire (are not zero) per token", log=True)
BITS = Metric(
    "bits", "reconstruction", "description_length_bits", "description length (bits per token)", ",.0f",
    "bits per token that send the code: which features fire, and how strongly", log=True,
)  # fmt: skip
STABILITY = Metric(
    "stability", "stability", "stability", "stability", ".4f",
    "do the same features come back under another seed? Mean over features of the largest cosine to a feature of any other run. 1: every "
    "feature comes back", "more",
)  # fmt: skip
CONNECTIVITY = Metric(
    "connectivity", "coactivation", "connectivity", "connectivity", ".4f", "share of feature pairs that never fire on the same token"
)
DIVERSITY = Metric(
    "diversity", "coactivation", "diversity", "diversity (features)", ",.0f",
    "features whose largest cosine to any other feature of the dictionary is below 0.7",
)  # fmt: skip
FLOPS = Metric(
    "train FLOPs", "cost", "total_flops", "training FLOPs", ".3g",
    "operations of training, dense equivalents: each feature counts for each token, so that they do not depend on the implementation. "
    "Boosting's passes over the activations that make the residuals are counted in", log=True,
)  # fmt: skip
METRICS = (
    EV, MSE, CE, L0, BITS, STABILITY, CONNECTIVITY,
    Metric("dead", "reconstruction", "dead_features", "dead features", ".1%", "share of features silent on the held-out tokens", "less"),
    Metric("features", "reconstruction", "n_features", "features", ",.0f", "features of the whole dictionary"),
    FLOPS,
    Metric("seconds", "cost", "total_seconds", "training seconds", ",.1f", "seconds of training on this machine, with boosting's passes"),
    Metric(
        "use FLOPs", "cost", "inference_flops_per_token", "FLOPs per token", ".3g",
        "operations to encode and decode one token with the trained dictionary, dense equivalents",
    ),
)  # fmt: skip
"""The columns of the main table and of the leaderboard's page."""

GAINS = tuple(
    Metric(name, "marginal_gain", column, name, ".4g", about)
    for column, name, about in (
        ("explained_variance_gain", "explained variance that a member adds", "over that of one member less"),
        ("stability_gain", "stability that a member adds", "over that of one member less. Below 0: it takes away"),
        ("new_features", "new features of a member", "features whose largest cosine to all features before them is below 0.7"),
    )
)
