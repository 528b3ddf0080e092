"""The charts of the pages, from the tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from saeens_pipeline.assets.over_seeds import Spread, written
from saeens_pipeline.assets.registry import Headline, listed
from saeens_pipeline.report.charts import CURVE, FRONT, LEVEL, LINE, PATH, POINTS, STEPS, THIN, Axis, Chart, Series
from saeens_pipeline.report.methods import Method, in_order, method
from saeens_pipeline.report.metrics import (
    BITS,
    CE,
    CONNECTIVITY,
    DIVERSITY,
    EQUAL_RECOVERED,
    EQUAL_STABILITY,
    EV,
    FEATURES,
    FLOPS,
    GAINS,
    L0,
    MSE,
    RECOVERED,
    STABILITY,
)
from saeens_pipeline.report.results import Results, Size, spread_of_row, spreads
from saeens_pipeline.storage.names import ENSEMBLES

MAX_CURVE_POINTS = 120
BINS = 30
SYMBOL_STEP = 0.04  # of a plot's width, between symbols that would cover each other
SYMBOL_HEIGHT = 0.05  # of the values' range, within which they would


class _Context(NamedTuple):
    """Context of a metric that grows with the number of features: the metric at equal numbers of features, and `levels` beside it.

    Levels are columns of the rows of bagging.
    """

    equal: Headline
    what_equals: str
    levels: tuple[Method, ...]
    caption: str


def _level(column: str, label: str, *symbols: str) -> Method:
    return Method(column, label, "", "#7d7d7d", *symbols)


_CONTEXTS = {
    STABILITY: _Context(
        EQUAL_STABILITY, "equal candidates",
        (
            _level("stability_reference", "one SAE, as many features", "x", "x", "✕"),
            _level("stability_chance_data", "chance: picked activations", "cross", "+", "+"),
            _level("stability_chance_covariance", "chance: random, same covariance", "hexagon", "h", "⬢"),
            _level("stability_chance_isotropic", "chance: random", "circle", "o", "●"),
        ),
        "Grey: one SAE against as many features, with nothing ensembled; and dictionaries that have learned nothing.",
    ),
    RECOVERED: _Context(
        EQUAL_RECOVERED, "equal rows", (_level("recovered_fraction_chance", "chance: random", "circle", "o", "●"),),
        "Grey: as many random directions.",
    ),
}  # fmt: skip
_FRONT = Method("front", "front", "", "#9a9a9a", "circle", "o", "●")

BY_MEMBERS = (EV, MSE, STABILITY, RECOVERED, CONNECTIVITY, DIVERSITY, CE)
_TRADE_OFFS = (
    (L0, EV, "Reconstruction and sparsity", "Up and to the left is better: more variance explained with fewer features per token."),
    (BITS, EV, "Reconstruction and code length", "Up and to the left is better. The bits send the code, magnitudes included."),
    (EQUAL_STABILITY, EV, "Reconstruction and reproducibility",
     "Up: explains more. To the right: the same features come back, among as many as one SAE has."),
    (FLOPS, EV, "Reconstruction and training", "Up and to the left is better: more variance explained for less computation in training."),
    (FLOPS, EQUAL_STABILITY, "Reproducibility and training", "Up and to the left is better: more features come back for less computation."),
    (L0, CE, "Loss recovered and sparsity", "Up and to the left is better: a smaller loss of the language model with fewer features."),
    (BITS, CE, "Loss recovered and code length", "Up and to the left is better: a smaller loss of the language model for fewer bits."),
    (FEATURES, RECOVERED, "True features and rows", "Up and to the left is better: more true features found with fewer rows."),
    (EQUAL_RECOVERED, EV, "Reconstruction and truth", "Up: explains more. To the right: more true features, with as many rows as one SAE."),
)  # fmt: skip
_REVIVAL = "Training of TopK SAEs revives dead features, which can lower explained variance and raise the loss for a while."
_CURVES = (
    ("explained_variance", f"Of the SAE's input, on the training batch: for later rounds of boosting, the residual. {_REVIVAL}",
     Axis("explained variance", range=(-0.1, 1.02))),  # the first steps can be far below
    ("loss",
     "The training objective, mean over the batch. A round of boosting has the loss of its residual. Scaled to the activations' size "
     "(normalize_activations), it can be larger in later rounds though less is left over.", Axis("loss", log=True)),
    ("dead_features", "Share of features that have not fired for dead_after_tokens tokens.", Axis("dead features")),
)  # fmt: skip
_OF_MEMBERS = (
    ("explained_variance", "Explained variance of each SAE's input", "The input of a round is the residual.", False),
    ("median_density", "Density of features", "Median share of test tokens on which a feature of that member or round fires.", True),
)


def all_charts(results: Results) -> dict[str, list[Chart]]:
    """Return every chart of a report, by the section of its page."""
    sections = {
        "members": by_members,
        "trade-offs": trade_offs,
        "gain": marginal_gain,
        "training": training,
        "features": features,
        "downstream": downstream,
    }
    return {section: list(draw(results)) for section, draw in sections.items()}


def by_members(results: Results) -> Iterator[Chart]:
    """Yield each metric against the number of members."""
    for metric in BY_MEMBERS:
        if chart := against_members(results.of(metric), metric):
            yield _with_context(chart, _CONTEXTS[metric], results) if metric in _CONTEXTS else chart


def _with_context(chart: Chart, context: _Context, results: Results) -> Chart:
    """Return the chart with the ensembles at equal numbers of features, and with the levels."""
    series = list(chart.series)
    for name in ENSEMBLES:
        equal = _by_size(results.of(context.equal), name)
        if len(equal) > 1:
            whats = [f"n = {n}, as many features as one SAE" for n in equal]
            points = _points(name, list(equal), list(equal.values()), whats)
            series.append(replace(points, style=THIN, label=f"{method(name).label}, {context.what_equals}"))
    for about in context.levels:
        levels = _by_size(results.spreads(context.equal.table, about.name), "bagging")
        if levels:
            texts = [_in_words(spread, ".3f") for spread in levels.values()]
            series.append(Series(about, list(levels), _means(list(levels.values())), THIN, text=texts, is_named=True))
    caption = f"{chart.caption} Dotted, small symbols: as many features as one SAE has, drawn from every dictionary. {context.caption}"
    return replace(chart, series=series, caption=caption)


def _by_size(values: Mapping[Size, Spread], name: str) -> dict[int, Spread]:
    """Return the values of a method by its number of members, in order."""
    return {size.n_members: values[size] for size in sorted(values) if size.method == name}


def marginal_gain(results: Results) -> Iterator[Chart]:
    """Yield the gains of each further member, with the suggested number of members marked."""
    table = results.tables.get(GAINS[0].table)
    suggested = {} if table is None else dict(table.drop_nulls("suggested").select("method", "suggested").iter_rows())
    for metric in GAINS:
        if chart := against_members(results.of(metric), metric, suggested):
            yield chart


def against_members(values: Mapping[Size, Spread], metric: Headline, suggested: Mapping[str, int] | None = None) -> Chart | None:
    """Return a metric against the number of members, or None without ensembles of several.

    Single SAEs are dotted levels, for comparison with every size. Gains start at the second member, and `suggested` numbers are marked.
    """
    if not any(size.n_members > 1 for size in values):
        return None
    start = 2 if metric in GAINS else 1
    values = {size: spread for size, spread in values.items() if metric not in GAINS or size.n_members >= start}
    most = max(size.n_members for size in values)
    by_method = {name: sorted(size for size in values if size.method == name) for name in in_order(size.method for size in values)}
    levels = {name for name, sizes in by_method.items() if name not in ENSEMBLES and len(sizes) == 1 and most > 1}
    last = {name: values[sizes[-1]].mean for name, sizes in by_method.items()}
    places = _symbol_places(last, levels, [spread.mean for spread in values.values()], log=metric.log)
    series: list[Series] = []
    for name, sizes in by_method.items():
        whats = [method(name).at(size.n_members, most) for size in sizes]
        chosen = [values[size] for size in sizes]
        if name in levels:
            text = f"{whats[0]}<br>{_in_words(chosen[0], metric.form)}"
            series.append(Series(method(name), list(range(1, most + 1)), [chosen[0].mean] * most, LEVEL, text=text))
            series.append(_points(name, [most * (1 - SYMBOL_STEP * places[name])], chosen, whats, metric.form))
        else:
            series.append(_points(name, [size.n_members for size in sizes], chosen, whats, metric.form))
    marks = [(method(name), suggested[name]) for name in in_order(suggested or ()) if suggested and suggested[name] < most]
    dotted = (
        " Dotted: a number of members that is enough; without a dotted line, none is, or it cannot be told."
        if suggested is not None
        else ""
    )
    return Chart(
        metric.column if metric in GAINS else f"{metric.column}_by_members",
        _capital(metric.name),
        f"{_capital(metric.about)}.{f' {_capital(metric.better)} is better.' if metric.better else ''}{dotted}",
        Axis("members", range=(start - 0.5, most + 0.5), whole=True),
        Axis(metric.name, log=metric.log),
        series,
        marks,
    )


def _symbol_places(last: Mapping[str, float], levels: set[str], values: Sequence[float], *, log: bool) -> dict[str, int]:
    """Return the steps of each level's symbol from the right end, so that symbols of about the same height do not cover each other."""
    height = math.log if log and min(values) > 0 else float
    near = SYMBOL_HEIGHT * (height(max(values)) - height(min(values)))
    taken = [(0, height(value)) for name, value in last.items() if name not in levels]
    places: dict[str, int] = {}
    for name in (name for name in last if name in levels):
        here = height(last[name])
        beside = {place for place, other in taken if abs(here - other) <= near}
        places[name] = next(place for place in itertools.count() if place not in beside)
        taken.append((places[name], here))
    return places


def trade_offs(results: Results) -> Iterator[Chart]:
    """Yield pairs of metrics against each other, with the front: the points that none is better than in both."""
    for x, y, title, caption in _TRADE_OFFS:
        xs, ys = results.of(x), results.of(y)
        both = sorted(xs.keys() & ys.keys())
        if len(both) < 2:
            continue
        series = list(_front([(xs[size].mean, ys[size].mean) for size in both], less_x=x.better != "more"))
        most = max(size.n_members for size in both)
        for name in in_order(size.method for size in both):
            sizes = [size for size in both if size.method == name]
            of_x, of_y = [xs[size] for size in sizes], [ys[size] for size in sizes]
            whats = [method(name).at(size.n_members, most) for size in sizes]
            numbers = [f"{y.name}: {_in_words(ys[size], y.form)}<br>{x.name}: {_in_words(xs[size], x.form)}" for size in sizes]
            texts = [f"{what}<br>{values}" for what, values in zip(whats, numbers, strict=True)]
            series.append(Series(method(name), _means(of_x), _means(of_y), PATH, _bars(of_x), _bars(of_y), texts))
        yield Chart(f"{y.column}_for_{x.column}", title, caption, Axis(x.name, log=x.log), Axis(y.name, log=y.log), series)


def _front(points: Sequence[tuple[float, float]], *, less_x: bool) -> Iterator[Series]:
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0] if less_x else -point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    if len(front) > 1:
        yield Series(_FRONT, [x for x, _ in front], [y for _, y in front], FRONT)


def training(results: Results) -> Iterator[Chart]:
    """Yield training curves, residual norms, and metrics of each member or round on its own input."""
    curves = results.tables.get("training_curves")
    if curves is not None:
        seed = curves["seed"].min()
        rows = curves.filter(_is_largest().over("method"), seed=seed)
        for column, about, axis in _CURVES:
            caption = f"{about} Seed {seed}, a line for each SAE; single is the first member of bagging."
            x = Axis("training tokens of the SAE", log=True)  # some SAEs are trained many times as long as others
            yield Chart(f"training_{column}", f"{_capital(axis.title)} in training", caption, x, axis, list(_curves(rows, column)))
    norms = {}
    if "reconstruction" in results.tables:
        rows = results.tables["reconstruction"]
        norms = spreads(rows.filter(pl.col("method").is_in(ENSEMBLES)).with_columns(norm=pl.col("fvu").sqrt()), "norm")
    if any(size.method == "boosting" and size.n_members > 1 for size in norms):
        caption = "Root mean squared norm of the residual after n rounds, relative to the activations' spread around their mean."
        x, y = Axis("rounds or members", whole=True), Axis("residual norm, relative", log=True)
        yield Chart("residual_norm", "Residual", caption, x, y, list(_of_methods(norms, lambda _, n: f"n = {n}")))
    for column, title, caption, log in _OF_MEMBERS if "members" in results.tables else ():
        values = spreads(results.tables["members"], column, by="member")
        if values:
            x, y = Axis("member or round", whole=True), Axis(column.replace("_", " "), log=log)
            yield Chart(f"member_{column}", title, caption, x, y, list(_of_methods(values, _sae_of)))


def _curves(rows: pl.DataFrame, column: str) -> Iterator[Series]:
    for name in in_order(rows["method"]):
        of_method = rows.filter(pl.col(column).is_finite(), method=name)
        for (member,), curve in of_method.partition_by("member", as_dict=True, maintain_order=True).items():
            places = np.geomspace(1, len(curve), MAX_CURVE_POINTS).round().astype(int) - 1  # about evenly along the logarithmic axis
            thinned = curve[np.unique(places)]
            text = f"{_sae_of(name, member)}<br>%{{x:,}} tokens: %{{y:.4g}}"
            yield Series(method(name), thinned["tokens"].to_list(), thinned[column].round_sig_figs(5).to_list(), CURVE, text=text)


def features(results: Results) -> Iterator[Chart]:
    """Yield histograms: of the features' densities, of their largest cosines to features under other seeds, and of the seeds with one."""
    yield from _found_again(results)
    table = results.tables.get("features")
    if table is None:
        return
    y = Axis("share of features")
    fires = table.filter(pl.col("density") > 0)
    if len(fires):
        low = min(-0.5, math.floor(np.log10(fires["density"].to_numpy().min()) * 2) / 2)
        caption = "Share of the test tokens on which a feature fires. Features that never fire (dead) are left out."
        x = Axis("share of tokens on which it fires", log=True, range=(10**low, 1))
        series = list(_histograms(fires, "density", table, np.logspace(low, 0, BINS + 1), ".2g"))
        yield Chart("density", "Density of features", caption, x, y, series)
    there = table.drop_nulls("nearest_other_seed_cosine")
    if len(there):
        low = min(0.0, math.floor(there["nearest_other_seed_cosine"].to_numpy().min() * 10) / 10)
        caption = "Largest cosine of each feature to any feature under another seed. 1: the same direction again."
        series = list(_histograms(there, "nearest_other_seed_cosine", there, np.linspace(low, 1, BINS + 1), ".2f"))
        yield Chart("other_seed_cosine", "Stability of features", caption, Axis("largest cosine", range=(low, 1.0)), y, series)


def _found_again(results: Results) -> Iterator[Chart]:
    """Yield a histogram: in how many of the other seeds a feature is found."""
    table = results.tables.get("feature_stability")
    found = None if table is None else table.drop_nulls("n_found")
    if found is None or not len(found):
        return
    most = found["n_runs"].to_numpy().max() - 1
    caption = "In how many other seeds a feature of cosine at least 0.7 exists. An ensemble has more features among which to find one."
    series = list(_histograms(found, "n_found", found, np.arange(most + 2) - 0.5, ".1f"))
    x = Axis("other seeds in which it is found", range=(-0.5, most + 0.5), whole=True)
    yield Chart("found_in_seeds", "Features found again", caption, x, Axis("share of features"), series)


def _histograms(rows: pl.DataFrame, column: str, whole: pl.DataFrame, edges: np.ndarray, form: str) -> Iterator[Series]:
    """Yield a histogram per method, as shares of the method's features in `whole`. Values beyond the edges count in the outer bins."""
    bins = [f"from {left:{form}} to {right:{form}}" for left, right in itertools.pairwise(edges)]
    for name in in_order(rows["method"]):
        values = rows.filter(method=name)[column].to_numpy().clip(edges[0], edges[-1])
        shares = np.histogram(values, edges)[0] / len(whole.filter(method=name))
        texts = [f"{bin_}: {share:.2%} of the features" for bin_, share in zip(bins, shares, strict=True)]
        x, y = ([float(f"{value:.4g}") for value in each] for each in (edges, [*shares, shares[-1]]))  # drawn up to the last edge
        yield Series(method(name), x, y, STEPS, text=[*texts, texts[-1]])


def downstream(results: Results) -> Iterator[Chart]:
    """Yield concept detection and spurious correlations by the number of features used, and scores of explanations."""
    for table in listed(over_experiments=False):
        if (curve := table.curve) and table.name in results.tables:
            lines = _by_count(results.tables[table.name], curve.x, curve.y, curve.group)
            yield Chart(table.name, curve.title, curve.about, Axis(curve.x_title, log=True), Axis(curve.y_title), lines)
    scores = {"own explanation": "detection_score", "another's": "control_score"}
    of_column = {title: results.spreads("autointerp", column) for title, column in scores.items()}
    if of_column["own explanation"]:
        caption = (
            "Balanced accuracy of a language model that tells by a feature's explanation where the feature fires, mean over features. "
            "The control: the same texts with the explanation of another feature. 0.5 is chance."
        )
        series: list[Series] = []
        for name in in_order(size.method for found in of_column.values() for size in found):
            chosen = {title: s for title, found in of_column.items() for size, s in found.items() if size.method == name}
            series.append(_points(name, list(chosen), list(chosen.values()), list(chosen), ".3f"))
        yield Chart("autointerp", "Explanations", caption, Axis(""), Axis("balanced accuracy"), series)


def by_count(rows: pl.DataFrame, x: str, y: str, group: str) -> dict[Size, Spread]:
    """Return, of whole ensembles by method and number of features, the mean within each group, then over groups, for every seed."""
    rows = rows.filter(code_scale="unscaled") if "code_scale" in rows.columns else rows
    chosen = rows.filter(_is_largest().over("method"), pl.col(x) > 0).drop_nulls(y)
    return spreads(chosen.group_by("method", "seed", x, group).agg(pl.col(y).mean()), y, by=x)


def _by_count(rows: pl.DataFrame, x: str, y: str, group: str) -> list[Series]:
    """Return a line for each method against the number of features, as `by_count`."""
    return list(_of_methods(by_count(rows, x, y, group), lambda _, n: f"{n} features"))


def layer_profile(board: pl.DataFrame, experiment: str) -> Iterator[Chart]:
    """Yield charts of the leaderboard's metrics against the layer, for an experiment with several layers."""
    rows = board.filter(experiment=experiment)
    if rows["layer"].n_unique() < 2:
        return
    for metric in (EV, STABILITY, CONNECTIVITY, CE):
        there = rows.drop_nulls(metric.column).filter(_is_largest().over("method", "layer"))
        values = {
            Size(row["method"], row["layer"]): spread
            for row in there.sort("method", "layer").iter_rows(named=True)
            if (spread := spread_of_row(row, metric.column))
        }
        if values:
            name, title = f"{experiment}_{metric.column}_by_layer", f"{experiment}: {metric.name} by layer"
            series = list(_of_methods(values, lambda _, layer: f"layer {layer}"))
            yield Chart(name, title, "Every method at its full size.", Axis("layer", whole=True), Axis(metric.name), series)


def sweep(table: pl.DataFrame) -> list[list[Chart]]:
    """Return, for each layer of the table `pareto`, explained variance against L0 and against bits, and recovered loss if it was measured.

    Without rows, explained variance without points.
    """
    layers = [(f"layer {layer}", table.filter(layer=layer)) for layer in sorted(set(table["layer"]))] or [("", table)]
    gained = [EV, CE] if table["ce_loss_recovered"].is_not_null().any() else [EV]
    return [[_of_sweep(rows, spent, gain, title) for spent in (L0, BITS)] for title, rows in layers for gain in gained]


def _of_sweep(table: pl.DataFrame, spent: Headline, gained: Headline, title: str) -> Chart:
    """Return a line for each method and size: means over seeds, joined in the order of the sweep's values, with bars for the seeds."""
    known = table.filter(pl.col(spent.column).is_finite(), pl.col(gained.column).is_finite())
    series: list[Series] = []
    for (name, n), rows in known.sort("value").partition_by("method", "n_members", as_dict=True, maintain_order=True).items():
        label = f"{method(name).label} ({n})" if known.filter(method=name)["n_members"].n_unique() > 1 else ""
        x, y = (
            [spread for row in rows.iter_rows(named=True) if (spread := spread_of_row(row, metric.column))] for metric in (spent, gained)
        )
        series.append(Series(method(name), _means(x), _means(y), LINE, [each.bar for each in x], [each.bar for each in y], label=label))
    return Chart(f"{gained.column}_for_{spent.column}", title, "", Axis(spent.name, log=spent.log), Axis(gained.name), series)


def _of_methods(values: Mapping[Size, Spread], what: Callable[[str, int], str]) -> Iterator[Series]:
    """Yield a line for each method against its sizes."""
    for name in in_order(size.method for size in values):
        sizes = sorted(size.n_members for size in values if size.method == name)
        yield _points(name, sizes, [values[Size(name, n)] for n in sizes], [what(name, n) for n in sizes])


def _points(name: str, xs: Sequence[Any], chosen: Sequence[Spread], whats: Sequence[str], form: str = ".4g") -> Series:
    texts = [f"{what}<br>{_in_words(spread, form)}" for what, spread in zip(whats, chosen, strict=True)]
    return Series(method(name), xs, _means(chosen), LINE if len(xs) > 1 else POINTS, y_bars=_bars(chosen), text=texts)


def _means(chosen: Sequence[Spread]) -> list[float]:
    return [spread.mean for spread in chosen]


def _bars(chosen: Sequence[Spread]) -> list[tuple[float, float]]:
    return [] if all(len(spread.points) == 1 for spread in chosen) else [spread.bar for spread in chosen]


def _in_words(spread: Spread, form: str) -> str:
    around = spread.around(form)
    return f"{written(spread.mean, form)} ({around})" if around else written(spread.mean, form)


def _sae_of(name: str, number: int) -> str:
    return {"bagging": f"member {number}", "boosting": f"round {number}"}.get(name, "one SAE")


def _is_largest() -> pl.Expr:
    return pl.col("n_members") == pl.col("n_members").max()  # of the rows at hand


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
