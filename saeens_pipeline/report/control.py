"""The control of an experiment: the same settings on an untrained language model of the same shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saeens_pipeline.report.methods import Method, in_order, listed, method
from saeens_pipeline.report.results import Results, Spread

COMPARED = (
    ("reconstruction", "explained_variance", "explained variance"),
    ("reconstruction", "ce_loss_recovered", "loss recovered"),
    ("stability", "stability", "stability"),
)


@dataclass(frozen=True)
class Comparison:
    """A metric of every method, on the trained language model and on the untrained one."""

    title: str
    rows: list[tuple[Method, Spread, Spread]]

    def of(self, about: Method) -> tuple[Spread, Spread] | tuple[None, None]:
        """A method on either model, where it was measured on both."""
        return next(((ours, theirs) for each, ours, theirs in self.rows if each == about), (None, None))

    @property
    def same_order(self) -> bool:
        """Whether both models rank the methods alike."""
        return _same_order(self.rows)

    @property
    def moved(self) -> list[Method]:
        """Where the models do not rank all methods alike, of four or more: each without which they rank the others alike."""
        if self.same_order or len(self.rows) < 4:
            return []
        return [row[0] for row in self.rows if _same_order([other for other in self.rows if other is not row])]

    @property
    def exception(self) -> str:
        """In words, what keeps both orders from being the same; empty where they are, and where it is more than one method's place."""
        labels = [about.label for about in self.moved]
        if len(labels) > 1:  # neighbours: without either, the others rank alike
            return f"but {listed(labels)} change places"
        return f"but for {labels[0]}" if labels else ""


def _same_order(rows: Sequence[tuple[Method, Spread, Spread]]) -> bool:
    return sorted(rows, key=lambda row: -row[1].mean) == sorted(rows, key=lambda row: -row[2].mean)


def compare(trained: Results, untrained: Results) -> Iterator[Comparison]:
    """Each metric that both have, of the methods that both have."""
    for table, column, title in COMPARED:
        ours, theirs = trained.full(table, column), untrained.full(table, column)
        both = in_order(ours.keys() & theirs.keys())
        if both:
            yield Comparison(title, [(method(name), ours[name], theirs[name]) for name in both])
