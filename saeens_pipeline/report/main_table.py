"""The main table: method by metric at the full size, with what seeds say of each number and the SAEs that it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from saeens_pipeline.report.methods import Method, method
from saeens_pipeline.report.record import Found, Record
from saeens_pipeline.report.results import Results, Size, Spread


@dataclass(frozen=True)
class Metric:
    """A column: its heading, the table and column that it shows, how it is written, whether more or less is better, what it is."""

    title: str
    table: str
    column: str
    form: str
    better: str  # more, less, or empty where neither is
    about: str

    def written(self, value: float) -> str:
        return format(value, self.form)


METRICS = (
    Metric("EV", "reconstruction", "explained_variance", ".4f", "more", "explained variance on held-out tokens: 1 is perfect"),
    Metric("MSE", "reconstruction", "mse", ".4g", "less", "squared error summed over dimensions, mean over held-out tokens"),
    Metric(
        "CE rec.", "reconstruction", "ce_loss_recovered", ".4f", "more", "share that it recovers of the next-token loss that zeros cost"
    ),
    Metric("L0", "reconstruction", "l0", ".1f", "", "features that fire per token: what a reconstruction spends"),
    Metric("bits", "reconstruction", "description_length_bits", ",.0f", "", "bits per token that it takes to send the code"),
    Metric("stability", "stability", "stability", ".4f", "more", "do the same features come back under another seed? 1: all of them"),
    Metric("connectivity", "coactivation", "connectivity", ".4f", "", "share of feature pairs that never fire on the same token"),
    Metric("dead", "reconstruction", "dead_features", ".1%", "less", "share of features that never fire on held-out tokens"),
    Metric("features", "reconstruction", "n_features", ",.0f", "", "features of the whole dictionary"),
    Metric(
        "train FLOPs", "cost", "train_flops", ".3g", "", "dense-equivalent operations of training, without boosting's passes over residuals"
    ),
    Metric("seconds", "cost", "train_seconds", ",.1f", "", "seconds of training, without boosting's passes over residuals"),
)


@dataclass(frozen=True)
class Cell:
    """A number: as it is written, exactly as the tables have it, what seeds say, and whether no method is better."""

    text: str
    value: float
    seeds: str
    best: bool


@dataclass(frozen=True)
class Origin:
    """An SAE behind a number: its data version and, where it still is on disk, what and where."""

    version: str
    found: Found | None


@dataclass(frozen=True)
class Row:
    """A method at its full size. `origins`: the SAEs of each seed, in member order."""

    method: Method
    n_members: int
    cells: Sequence[Cell | None]
    origins: Mapping[int, Sequence[Origin]]

    @property
    def n_saes(self) -> int:
        """How many SAEs the numbers come from, over all seeds."""
        return sum(map(len, self.origins.values()))


def metrics_of(results: Results) -> list[Metric]:
    """The columns that have any number."""
    return [metric for metric in METRICS if results.full(metric.table, metric.column)]


def main_table(results: Results, record: Record) -> list[Row]:
    """A row for each method."""
    metrics = metrics_of(results)
    return [
        Row(method(size.method), size.n_members, [_cell(results, metric, size) for metric in metrics], _origins(results, size, record))
        for size in results.full_sizes
    ]


def seeds_in_words(spread: Spread, form: str) -> str:
    """The half width of the 95 % interval or, with two seeds, the points: of two, Student's interval is 12.7 standard errors wide."""
    if spread.has_interval and spread.high is not None:
        half_width = spread.high - spread.mean
        return f"±{half_width:.1%}" if form.endswith("%") else f"±{half_width:.2g}"
    if len(spread.points) == 2:
        written = [format(point, form) for point in spread.points]
        return written[0] if written[0] == written[1] else f"{written[0]}, {written[1]}"
    return ""


def _cell(results: Results, metric: Metric, size: Size) -> Cell | None:
    spread = results.spreads(metric.table, metric.column).get(size)
    if spread is None:
        return None
    seeds = "" if len(set(spread.points)) == 1 and len(spread.points) > 1 else seeds_in_words(spread, metric.form)
    return Cell(format(spread.mean, metric.form), spread.mean, seeds, _is_best(results, metric, spread))


def _is_best(results: Results, metric: Metric, spread: Spread) -> bool:
    means = [each.mean for each in results.full(metric.table, metric.column).values()]
    if not metric.better or len(means) < 2:
        return False
    return spread.mean == (max(means) if metric.better == "more" else min(means))


def _origins(results: Results, size: Size, record: Record) -> dict[int, list[Origin]]:
    for table in ("reconstruction", "coactivation", "stability", "cost"):
        if table in results.tables:
            rows = results.tables[table].filter(method=size.method, n_members=size.n_members).sort("seed")
            return {
                row["seed"]: [Origin(version, record.sae(version, size.method)) for version in _versions(row["sae_data_versions"])]
                for row in rows.iter_rows(named=True)
            }
    return {}


def _versions(joined: str) -> Iterator[str]:
    yield from filter(None, joined.split(","))
