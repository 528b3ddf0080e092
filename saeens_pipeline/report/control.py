"""The control of an experiment: the same settings on an untrained language model of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saeens_pipeline.report.methods import Method, in_order, method
from saeens_pipeline.report.results import Results, Spread

if TYPE_CHECKING:
    from saeens_pipeline.catalogue import Catalogue
    from saeens_pipeline.components import ExperimentSettings

_DECIDES_NO_SAE = {
    *("name", "source", "automation", "schedule", "freshness", "checks", "keep_residuals", "evaluation_memory_gb"),
    *("evaluations", "baselines", "expanded_sizes", "ce_loss_tokens"),
}
COMPARED = (
    ("reconstruction", "explained_variance", "EV"),
    ("reconstruction", "ce_loss_recovered", "CE rec."),
    ("stability", "stability", "stability"),
)


@dataclass(frozen=True)
class Comparison:
    """A metric of every method, on the trained language model and on the untrained one."""

    title: str
    rows: list[tuple[Method, Spread, Spread]]

    @property
    def same_order(self) -> bool:
        """Whether both models rank the methods alike."""
        trained = sorted(self.rows, key=lambda row: -row[1].mean)
        return trained == sorted(self.rows, key=lambda row: -row[2].mean)


def find_control(catalogue: Catalogue, experiment: ExperimentSettings) -> ExperimentSettings | None:
    """The experiment whose source differs by `weights: random` alone, and that is the same in all that decides its SAEs."""
    source = catalogue.sources[experiment.source]
    if source.weights == "random":
        return None
    wanted = source.model_dump(exclude={"name", "layers"}) | {"weights": "random"}
    same = experiment.model_dump(exclude=_DECIDES_NO_SAE)
    for other in catalogue.experiments.values():
        its_source = catalogue.sources[other.source].model_dump(exclude={"name", "layers"})
        if its_source == wanted and other.model_dump(exclude=_DECIDES_NO_SAE) == same:
            return other
    return None


def compare(trained: Results, untrained: Results) -> Iterator[Comparison]:
    """Each metric that both have, of the methods that both have."""
    for table, column, title in COMPARED:
        ours, theirs = trained.full(table, column), untrained.full(table, column)
        both = in_order(ours.keys() & theirs.keys())
        if both:
            yield Comparison(title, [(method(name), ours[name], theirs[name]) for name in both])
