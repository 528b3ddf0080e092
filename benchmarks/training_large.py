"""As `training`, at the width of Pythia-160M: d_in 768, d_sae 16128. A step of a peer takes seconds."""

from __future__ import annotations

from benchmarks.options import Options
from benchmarks.peers import Workload
from benchmarks.report import Section
from benchmarks.training import Case, compare_training

TITLE = "Training, d_in 768"
_DEFAULTS = frozenset({"SAELens, defaults"})
_CASES = [
    Case(Workload("topk", 768, 16128, 64), 1, 4, _DEFAULTS),
    Case(Workload("topk", 768, 16128, 128), 1, 4, _DEFAULTS),
    Case(Workload("standard", 768, 16128, 64), 1, 4, _DEFAULTS),
    Case(Workload("jumprelu", 768, 16128, 64), 1, 4, _DEFAULTS),
]


def run(options: Options) -> Section:
    """Measure every case against every setting of every peer; with ``quick`` one of them."""
    return compare_training(TITLE, _CASES[:1] if options.quick else _CASES, options)
