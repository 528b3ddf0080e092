"""Training as in `training`, at the width of Pythia-160M: d_in 768, d_sae 16128. A step of a peer takes seconds."""

from __future__ import annotations

from benchmarks.options import Options
from benchmarks.peers import Workload
from benchmarks.report import Section
from benchmarks.training import Case, compare_training, quick

TITLE = "Training, d_in 768"
_SEVERAL_AGAINST = frozenset({"SAELens, defaults", "SAELens, sparse"})
_CASES = [
    Case(Workload("topk", 768, 16128, 64), 1, 4, _SEVERAL_AGAINST),
    Case(Workload("topk", 768, 16128, 128), 1, 4, _SEVERAL_AGAINST),
    Case(Workload("standard", 768, 16128, 64), 1, 4, _SEVERAL_AGAINST),
    Case(Workload("jumprelu", 768, 16128, 64), 1, 4, _SEVERAL_AGAINST),
]


def run(options: Options) -> Section:
    """Measure every case against every setting of every peer; with ``quick`` two small ones."""
    return compare_training(TITLE, [quick(case) for case in _CASES[1:3]] if options.quick else _CASES, options)
