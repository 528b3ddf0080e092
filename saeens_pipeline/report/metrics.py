"""The metrics of pages and pictures: the headlines of the registered tables."""

from __future__ import annotations

from saeens_pipeline.assets import tables  # noqa: F401  # registers them
from saeens_pipeline.assets.registry import listed

_HEADLINES = [headline for table in listed(over_experiments=False) for headline in table.headlines]
METRICS = tuple(sorted((each for each in _HEADLINES if each.place), key=lambda each: each.place))
"""The columns of the main table and of the leaderboard's page."""

_BY_COLUMN = {each.column: each for each in _HEADLINES}
EV, MSE, CE, L0, BITS = (_BY_COLUMN[name] for name in ("explained_variance", "mse", "ce_loss_recovered", "l0", "description_length_bits"))
STABILITY, EQUAL_STABILITY = (_BY_COLUMN[name] for name in ("stability", "stability_equal_candidates"))
RECOVERED, EQUAL_RECOVERED = (_BY_COLUMN[name] for name in ("recovered_fraction", "recovered_fraction_equal_rows"))
CONNECTIVITY, DIVERSITY, FEATURES, FLOPS = (_BY_COLUMN[name] for name in ("connectivity", "diversity", "n_features", "total_flops"))
GAINS = tuple(_BY_COLUMN[name] for name in ("explained_variance_gain", "ce_loss_gain", "new_features"))
