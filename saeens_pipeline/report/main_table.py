"""The main table: method by metric at the full size, with the seeds' spread and the SAEs behind each number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from saeens_pipeline.assets.over_seeds import Spread, written
from saeens_pipeline.assets.registry import TABLES, Headline
from saeens_pipeline.assets.ties import tied_with
from saeens_pipeline.report.methods import Method, method
from saeens_pipeline.report.metrics import CE, EQUAL_RECOVERED, EQUAL_STABILITY, EV, METRICS, RECOVERED, STABILITY
from saeens_pipeline.report.record import Found, Record
from saeens_pipeline.report.results import Results, Size

_DIFFERS_IN = {EV: EV.column, CE: "ce_loss_added_nats"}  # metric of the table differences by column
_AT_EQUAL_FEATURES = {EQUAL_STABILITY: STABILITY, EQUAL_RECOVERED: RECOVERED}
N_MEMBERS = (
    "number of SAEs in the ensemble; for expanded SAEs, which are single ones, the number of members whose features they have; else 1"
)


@dataclass(frozen=True)
class Cell:
    """A number: as text, exact, with its spread over seeds; `best` marks the best of its column, `tie` what cannot be told apart from it.

    Or the reason why there is none.
    """

    text: str = ""
    value: float | None = None
    seeds: str = ""
    best: bool = False
    why: str = ""
    tie: bool = False


@dataclass(frozen=True)
class Row:
    """A method at its full size. `origins`: by seed, the data versions of its SAEs in member order, and the SAEs still on disk."""

    method: Method
    n_members: int
    cells: Sequence[Cell]
    origins: Mapping[int, Sequence[tuple[str, Found | None]]]


def main_table(results: Results, record: Record, metrics: Sequence[Headline]) -> list[Row]:
    """Return a row for each method."""
    return [
        Row(method(size.method), size.n_members, [_cell(results, metric, size) for metric in metrics], _origins(results, size, record))
        for size in results.full_sizes
    ]


def why_empty(metric: Headline, experiment: str, n_seeds: int, has: Callable[[Headline], bool]) -> str:
    """Return the reason for an empty cell: an evaluated method has no value of this metric. `has`: whether it has one of another."""
    if metric in (STABILITY, EQUAL_STABILITY) and n_seeds < 2:
        return "there is one seed, and stability compares seeds"
    if metric in _AT_EQUAL_FEATURES and has(_AT_EQUAL_FEATURES[metric]):
        return "the dictionary has fewer features than one SAE"
    if TABLES[metric.table].of_sources == "synthetic":
        return "the true features are known for synthetic activations only"
    if metric == CE:
        return (
            "not measured, because of `ce_loss_tokens: 0`, a language model without an output head, or one whose loss changes by less than "
            "0.05 nats with zeros in the activations' place, as often in an untrained one"
        )
    return f"not in the table {metric.table}; `saeens run {experiment}` computes it if it is among the `evaluations`"


def cell_of(spread: Spread, metric: Headline, *, best: bool = False) -> Cell:
    """Return the mean, with the seeds' spread where they differ."""
    seeds = "" if len(set(spread.points)) == 1 and len(spread.points) > 1 else spread.around(metric.form)
    return Cell(written(spread.mean, metric.form), spread.mean, seeds, best)


def _cell(results: Results, metric: Headline, size: Size) -> Cell:
    spread = results.of(metric).get(size)
    if spread is None:
        return Cell(why=why_empty(metric, results.experiment, len(results.seeds), lambda other: size in results.of(other)))
    means = [each.mean for each in results.full(metric).values()]
    best = (max(means) if metric.better == "more" else min(means)) if metric.better and len(means) > 1 else None
    cell = cell_of(spread, metric, best=spread.mean == best)
    return replace(cell, tie=not cell.best and _is_tied(results, metric, size, best))


def _is_tied(results: Results, metric: Headline, size: Size, best: float | None) -> bool:
    if best is None or metric not in _DIFFERS_IN or "differences" not in results.tables:
        return False
    of_best = next(each for each in results.full_sizes if each in results.of(metric) and results.of(metric)[each].mean == best)
    tied = tied_with(results.tables["differences"], _DIFFERS_IN[metric], of_best, len(results.of(metric)[of_best].points))
    return tied.get(size, False)


def _origins(results: Results, size: Size, record: Record) -> dict[int, list[tuple[str, Found | None]]]:
    for table in dict.fromkeys(metric.table for metric in METRICS if size in results.of(metric)):
        rows = results.tables[table].filter(method=size.method, n_members=size.n_members).sort("seed")
        return {
            seed: [(version, record.sae(version, size.method)) for version in versions.split(",") if version]
            for seed, versions in rows.select("seed", "sae_data_versions").iter_rows()
        }
    return {}
