"""The main table: method by metric at the full size, with what seeds say of each number and the SAEs that it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from saeens_pipeline.report.methods import Method, method
from saeens_pipeline.report.record import Found, Record
from saeens_pipeline.report.results import Results, Size, Spread, written


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
        return written(value, self.form)


N_MEMBERS = (
    "how many SAEs the ensemble has. A single SAE has 1, matching pursuit too, though it has as many features as all members together. "
    "Only of expanded SAEs, which are single ones as well, n says of how many members they have the features"
)


METRICS = (
    Metric(
        "EV",
        "reconstruction",
        "explained_variance",
        ".4f",
        "more",
        "explained variance: the share of what varies in the activations that the reconstruction has, on text that was held out from "
        "training. 1 is perfect, 0 no better than the mean",
    ),
    Metric(
        "MSE",
        "reconstruction",
        "mse",
        ".4g",
        "less",
        "mean squared error: by how much the reconstruction misses the activations, summed over dimensions. Its scale is the activations' "
        "own, so compare it within one language model and layer only",
    ),
    Metric(
        "CE rec.",
        "reconstruction",
        "ce_loss_recovered",
        ".4f",
        "more",
        "loss recovered: how well the language model predicts the next token (its cross-entropy loss) when it reads the reconstruction in "
        "the activations' place. 1: as well as with the activations themselves, 0: as badly as with zeros",
    ),
    Metric("L0", "reconstruction", "l0", ".1f", "", "how many features fire (are not zero) per token: what a reconstruction spends"),
    Metric(
        "bits",
        "reconstruction",
        "description_length_bits",
        ",.0f",
        "",
        "description length: bits per token to say which features fire, and how strongly",
    ),
    Metric(
        "stability",
        "stability",
        "stability",
        ".4f",
        "more",
        "do the same features come back when all is trained again from another seed? The mean, over features, of the cosine to the "
        "feature of any other run that is most alike. 1: every feature comes back",
    ),
    Metric(
        "connectivity",
        "coactivation",
        "connectivity",
        ".4f",
        "",
        "share of pairs of features that never fire on the same token",
    ),
    Metric("dead", "reconstruction", "dead_features", ".1%", "less", "dead features: share that never fires on the held-out text"),
    Metric("features", "reconstruction", "n_features", ",.0f", "", "how many features the whole dictionary has"),
    Metric(
        "train FLOPs",
        "cost",
        "total_flops",
        ".3g",
        "",
        "floating-point operations of training, counted as if each feature were computed for each token (dense equivalents), so that "
        "they do not depend on the implementation. Boosting's passes over the activations that make the residuals are counted in, here "
        "and wherever training is spoken of",
    ),
    Metric("seconds", "cost", "total_seconds", ",.1f", "", "how long training took on this machine, boosting's passes counted in"),
    Metric(
        "use FLOPs",
        "cost",
        "inference_flops_per_token",
        ".3g",
        "",
        "floating-point operations to encode and decode one token with the trained dictionary, counted likewise: what it costs to use",
    ),
)


def why_empty(metric: Metric, experiment: str, n_seeds: int) -> str:
    """Why a method that was measured has no number here."""
    if metric.column == "stability" and n_seeds < 2:
        return "there is one seed, and stability compares seeds"
    if metric.column == "ce_loss_recovered":
        return (
            "not measured, because of `ce_loss_tokens: 0`, a language model without an output head, or one whose loss zeros in the "
            "activations' place change by less than 0.05 nats, as often in an untrained one"
        )
    return f"not in the table {metric.table}, which `saeens run {experiment}` makes where it is among the `evaluations`"


@dataclass(frozen=True)
class Cell:
    """A number: as it is written, exactly as the tables have it, what seeds say, and whether no method is better. Or why there is none."""

    text: str = ""
    value: float | None = None
    seeds: str = ""
    best: bool = False
    why: str = ""


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
    cells: Sequence[Cell]
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
    """The half width of the 95% interval or, with two seeds, the points: of two, Student's interval is 12.7 standard errors wide."""
    if spread.has_interval and spread.high is not None:
        half_width = spread.high - spread.mean
        return f"±{half_width:.1%}" if form.endswith("%") else f"±{written(half_width, '.2g')}"
    if len(spread.points) == 2:
        one, other = (written(point, form) for point in spread.points)
        return one if one == other else f"{one}, {other}"
    return ""


def cell_of(spread: Spread, metric: Metric, *, best: bool = False) -> Cell:
    """The mean, with what seeds say where they differ."""
    seeds = "" if len(set(spread.points)) == 1 and len(spread.points) > 1 else seeds_in_words(spread, metric.form)
    return Cell(metric.written(spread.mean), spread.mean, seeds, best)


def _cell(results: Results, metric: Metric, size: Size) -> Cell:
    spread = results.spreads(metric.table, metric.column).get(size)
    if spread is None:
        return Cell(why=why_empty(metric, results.experiment, len(results.seeds)))
    return cell_of(spread, metric, best=_is_best(results, metric, spread))


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
