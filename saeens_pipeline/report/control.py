"""The control of an experiment: the same settings on an untrained language model of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saeens_pipeline.report.methods import Method, in_order, method
from saeens_pipeline.report.metrics import CE, EV, STABILITY
from saeens_pipeline.report.results import Results, Spread


@dataclass(frozen=True)
class Comparison:
    """A metric of every method, on the trained language model and on the untrained one."""

    title: str
    rows: list[tuple[Method, Spread, Spread]]

    def of(self, about: Method) -> tuple[Spread, Spread] | tuple[None, None]:
        """Return both spreads of a method, or None twice where either is missing."""
        return next(((ours, theirs) for each, ours, theirs in self.rows if each == about), (None, None))

    @property
    def same_order(self) -> bool:
        """Return True if both models rank the methods alike."""
        return sorted(self.rows, key=lambda row: -row[1].mean) == sorted(self.rows, key=lambda row: -row[2].mean)


def compare(trained: Results, untrained: Results) -> Iterator[Comparison]:
    """Yield each metric that both have, of the methods that both have."""
    for metric in (EV, CE, STABILITY):
        ours, theirs = trained.full(metric), untrained.full(metric)
        both = in_order(ours.keys() & theirs.keys())
        if both:
            yield Comparison(metric.name, [(method(name), ours[name], theirs[name]) for name in both])
