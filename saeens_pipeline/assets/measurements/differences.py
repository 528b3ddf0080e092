"""Rows of the table `differences`: pairs of dictionaries compared on the same draws of held-out documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

from saeens_models.evaluation import SizeEvaluation
from saeens_models.metrics import paired_difference
from saeens_pipeline.assets.measurements.dictionaries import sizes
from saeens_pipeline.assets.registry import Making, Row
from saeens_pipeline.storage.names import ENSEMBLES

METRICS = ("explained_variance", "l0", "ce_loss_added_nats")

_Measured = tuple[Row, SizeEvaluation]


def difference_rows(making: Making) -> Iterator[Row]:
    """Yield a row for each metric of each pair."""
    reasons: dict[str, str] = {}
    for (row, size), (other_row, other_size) in _pairs(making):
        others = {f"other_{name}": other_row[name] for name in ("method", "n_members", "sae_data_versions")}
        for metric in METRICS:
            measured: Row = {}
            one, other = size.resampled.get(metric), other_size.resampled.get(metric)
            if one is None or other is None:
                reasons[metric] = "the next-token loss was not measured"
            elif not math.isfinite(one.value - other.value):
                reasons[metric] = "the test activations have no variance"
            else:
                measured = paired_difference(one, other)._asdict() | {"tokens": one.tokens, "documents": one.documents}
                if one.documents < 2:
                    reasons[f"interval of {metric}"] = "an interval over documents needs two, and there is one"
            yield row | others | {"metric": metric} | measured
    if reasons:
        making.provenance["not_measured"] = reasons


def _pairs(making: Making) -> Iterator[tuple[_Measured, _Measured]]:
    """Yield all pairs of whole methods, and the consecutive sizes of an ensemble, the larger first."""
    measured = [*sizes(making)]
    sizes_of = {name: [each for each in measured if each[0]["method"] == name] for name in making.subject.ensembles}
    whole = [each for each in measured if each[0]["method"] not in ENSEMBLES]
    whole[1:1] = [of_ensemble[-1] for of_ensemble in sizes_of.values()]
    yield from combinations(whole, 2)
    for of_ensemble in sizes_of.values():
        yield from ((larger, smaller) for smaller, larger in pairwise(of_ensemble))
