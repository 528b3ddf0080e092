"""The plots of the pages, as what plotly's JavaScript draws. Colours of text and grid are the page's, which sets them when it draws.

They are written as plotly has them, `data` and `layout`, without plotly's Python classes, which would take seconds to check each key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saeens_pipeline.report.methods import ENSEMBLES, Method, in_order, listed, method
from saeens_pipeline.report.results import Results, Size, Spread, spreads

if TYPE_CHECKING:
    import polars as pl

MAX_CURVE_POINTS = 120
BINS = 30
MANY_DECADES = 2.5
FALL = 0.05  # of explained variance, from where on a training curve swings
RISE = 1.5  # likewise, of the loss, as a ratio
SYMBOL_STEP = 0.04  # of a plot's width, between symbols that would cover each other
SYMBOL_HEIGHT = 0.05  # of what a plot shows, within which they would
_PLAIN = range(-4, 7)  # exponents of ten of numbers that are written out on axes
NEAR_DUPLICATE = 0.7  # cosine similarity, as in the tables

Plot = dict[str, Any]
"""`data`, a list of traces, and `layout`"""


@dataclass(frozen=True)
class Figure:
    """A plot with its heading and what to read in it. `name` is what its image is called when it is downloaded."""

    name: str
    title: str
    caption: str
    figure: Plot


@dataclass(frozen=True)
class Axis:
    """What is along an axis: a column of a table, its title, whether more is better, and how it is scaled and written."""

    table: str
    column: str
    title: str
    log: bool = False
    form: str = ".4g"


EV = Axis("reconstruction", "explained_variance", "explained variance")
CE = Axis("reconstruction", "ce_loss_recovered", "loss recovered")
L0 = Axis("reconstruction", "l0", "L0 (features per token)", log=True)
BITS = Axis("reconstruction", "description_length_bits", "description length (bits per token)", log=True)
STABILITY = Axis("stability", "stability", "stability")
FLOPS = Axis("cost", "total_flops", "training FLOPs", log=True, form=".3g")

_BY_MEMBERS = (
    (EV, "Explained variance", "Share of the held-out activations' variance that the reconstruction has. Higher is better."),
    (
        Axis("reconstruction", "mse", "MSE", log=True),
        "Squared error",
        "Summed over dimensions, mean over held-out tokens. Lower is better.",
    ),
    (STABILITY, "Stability", "Do the same features come back under another seed? Mean of the largest cosine. Higher is better."),
    (
        Axis("coactivation", "diversity", "diversity (features)", form=",.0f"),
        "Diversity",
        f"Features that are like no other of the dictionary: largest cosine below {NEAR_DUPLICATE}.",
    ),
    (
        Axis("coactivation", "connectivity", "connectivity"),
        "Connectivity",
        "Share of feature pairs that never fire on the same token.",
    ),
    (CE, "Loss recovered", "Next-token loss with the reconstruction put in the activations' place: 1 is as good as the activations."),
)

_TRADE_OFFS = (
    (L0, EV, "Reconstruction for its sparsity", "Up and to the left is better: more explained with fewer features per token."),
    (BITS, EV, "Reconstruction for its code length", "The same with the bits that it takes to send the code, magnitudes included."),
    (STABILITY, EV, "Reconstruction and reproducibility", "Up: rebuilds better. To the right: the same features come back."),
    (FLOPS, EV, "Reconstruction for its training", "Up and to the left is better: more explained for less computation in training."),
    (FLOPS, STABILITY, "Reproducibility for its training", "Up and to the left is better: more features come back for less computation."),
    (L0, CE, "Loss recovered for its sparsity", "What the language model loses when it reads the reconstruction instead."),
)


def by_members(results: Results) -> Iterator[Figure]:
    """Each metric against the number of members."""
    for axis, title, caption in _BY_MEMBERS:
        values = results.spreads(axis.table, axis.column)
        if any(size.n_members > 1 for size in values):
            yield Figure(f"{axis.column}_by_members", title, caption, _by_members(values, axis))


def trade_offs(results: Results) -> Iterator[Figure]:
    """Two metrics against each other, with the line of those that none is better than in both."""
    for x, y, title, caption in _TRADE_OFFS:
        xs, ys = results.spreads(x.table, x.column), results.spreads(y.table, y.column)
        if len(xs.keys() & ys.keys()) > 1:
            yield Figure(f"{y.column}_for_{x.column}", title, caption, _trade_off(xs, ys, x, y))


def training(results: Results) -> Iterator[Figure]:
    """Training curves, and what rounds leave over."""
    curves = results.tables.get("training_curves")
    if curves is not None:
        seed = min(curves["seed"].unique())
        of_seed = curves.filter(seed=seed)
        for column, title, caption, log in (
            (
                "explained_variance",
                "Explained variance in training",
                "On the training batch, of what the SAE is given: for the rounds of boosting after the first, the residual, what those "
                f"before leave over.{_falls(of_seed)}",
                False,
            ),
            ("loss", "Loss in training", f"What training makes small, mean over the batch.{_by_round(of_seed)}{_rises(of_seed)}", True),
            (
                "dead_features",
                "Dead features in training",
                "Share of features that have not fired for as many tokens as dead_after_tokens says.",
                False,
            ),
        ):
            figure = _curves(of_seed, column, log=log)
            yield Figure(f"training_{column}", title, f"{caption} Seed {seed}, a line for each SAE{_without_single(of_seed)}.", figure)
    yield from _rounds(results)


def _without_single(curves: pl.DataFrame) -> str:
    """Why a method that all else is shown of has no line."""
    return "; single is the first member of bagging" if "bagging" in curves["method"] and "single" not in curves["method"] else ""


def _by_round(curves: pl.DataFrame) -> str:
    """Why losses of later rounds begin at another height, often a larger one, though less is left over."""
    if curves.filter(method="boosting")["member"].n_unique() < 2:
        return ""
    return (
        " Every round of boosting begins anew, and its loss is of the residual that it is given, not of the activations. With "
        "normalize_activations a residual is scaled to the activations' size: then later rounds, whose input is harder to rebuild, have "
        "the larger loss, though less is left over."
    )


def _falls(curves: pl.DataFrame) -> str:
    """Why explained variance falls far below what it had reached, if it does while features are dead."""
    import polars as pl

    reached = pl.col("explained_variance").cum_max().over("method", "member", order_by="tokens")
    names = _with_dead_features(curves, reached - pl.col("explained_variance") > FALL)
    if not names:
        return ""
    why = "while features are dead (see that plot): training of TopK SAEs then revives them, too."
    return f" Explained variance falls for {listed(names)} {why}"


def _rises(curves: pl.DataFrame) -> str:
    """Why the loss rises far above what it had reached, if it does while features are dead."""
    import polars as pl

    reached = pl.col("loss").cum_min().over("method", "member", order_by="tokens")
    names = _with_dead_features(curves, pl.col("loss") > RISE * reached)
    if not names:
        return ""
    return f" The loss rises for {listed(names)} while features are dead (see that plot): of TopK SAEs, what revives them is a part of it."


def _with_dead_features(curves: pl.DataFrame, when: pl.Expr) -> list[str]:
    """Methods of which more features are dead at the points of their curves that are meant than at the others, on average."""
    import polars as pl

    points = curves.filter(_is_largest().over("method")).with_columns(meant=when)
    means = points.group_by("method", "meant").agg(pl.col("dead_features").mean()).pivot("meant", index="method", values="dead_features")
    if not {"true", "false"} <= set(means.columns):
        return []
    return [method(name).label for name in in_order(means.filter(pl.col("true") > 2 * pl.col("false"))["method"])]


def features(results: Results) -> Iterator[Figure]:
    """How often features fire, and how well each comes back under another seed."""
    table = results.tables.get("features")
    if table is None:
        return
    dead = {name: _share(rows["density"] <= 0) for name, rows in _by_method(table)}
    silent = [f"{method(name).label} {share:.1%}" for name, share in dead.items() if share]
    left_out = f" Features that never fire are left out: {', '.join(silent)}." if silent else ""
    caption = f"On what share of the test tokens a feature fires.{left_out}"
    yield Figure("density", "How often features fire", caption, _density_histogram(table))
    if table["nearest_other_seed_cosine"].null_count() < len(table):
        caption = "Largest cosine of each feature to any feature under another seed: 1 is the same direction again."
        yield Figure("other_seed_cosine", "Do features come back?", caption, _cosine_histogram(table))


def marginal_gain(results: Results) -> Iterator[Figure]:
    """What each further member adds, with the size that is enough."""
    table = results.tables.get("marginal_gain")
    if table is None:
        return
    suggested = suggested_sizes(table)
    for column, title, caption in (
        ("explained_variance_gain", "Explained variance that a member adds", "Over that of one member less."),
        ("stability_gain", "Stability that a member adds", "Over that of one member less. Below 0: it takes away."),
        ("new_features", "New features that a member brings", f"Largest cosine to all features before them below {NEAR_DUPLICATE}."),
    ):
        values = {size: spread for size, spread in results.spreads("marginal_gain", column).items() if size.n_members > 1}
        if values:
            axis = Axis("marginal_gain", column, column.replace("_", " "))
            figure = _by_members(values, axis)
            most = max(size.n_members for size in values)
            _set(figure, "xaxis", range=[1.5, most + 0.5])
            for name, n in suggested.items():
                if n < most:
                    _add_vertical(figure, n, method(name).colour)
            what = ", ".join(f"{method(name).label} {n}{'' if n < most else ' or more'}" for name, n in suggested.items())
            yield Figure(column, title, f"{caption}{f' Enough (dotted): {what}.' if what else ''}", figure)


def downstream(results: Results) -> Iterator[Figure]:
    """Concept detection and spurious correlations by the number of features that are looked at, and scores of explanations."""
    concepts, correlations = (results.tables.get(name) for name in ("concept_detection", "spurious_correlation"))
    if concepts is not None:
        caption = "Accuracy of a probe that is given the n features which tell a label best: mean over labels, then over data sets."
        figure = _by_count(concepts, "n_probe_features", "accuracy", "dataset", "features of the probe")
        yield Figure("concept_detection", "Concept detection", caption, figure)
    if correlations is not None:
        caption = "Share of what a biased probe lost that comes back when n features are zeroed (SCR), mean over tasks. 0: nothing."
        figure = _by_count(correlations, "n_ablated", "scr_metric", "task", "features zeroed")
        yield Figure("spurious_correlation", "Removing a spurious correlation", caption, figure)
    explained = results.tables.get("autointerp")
    if explained is not None and explained["detection_score"].count():
        caption = (
            "How well a language model tells by the explanation of a feature where it fires: balanced accuracy, mean over features. "
            "Beside it the control, the same texts with the explanation of another feature. 0.5: guessing."
        )
        yield Figure("autointerp", "Explanations", caption, _explanations(results))


def layer_profile(board: pl.DataFrame, experiment: str) -> Iterator[Figure]:
    """Of an experiment with several layers, metrics of the leaderboard against the layer."""
    rows = board.filter(experiment=experiment)
    if rows["layer"].n_unique() < 2:
        return
    for column, title in (
        ("explained_variance", "explained variance"),
        ("stability", "stability"),
        ("connectivity", "connectivity"),
        ("ce_loss_recovered", "loss recovered"),
    ):
        there = rows.drop_nulls(column)
        if there.is_empty():
            continue
        figure = _empty("layer", title)
        _set(figure, "xaxis", dtick=1)
        for name in in_order(there["method"]):
            of_method = there.filter(method=name).sort("layer")
            largest = of_method.filter(_is_largest()).unique("layer", keep="first").sort("layer")
            spread = [from_board(row, column) for row in largest.iter_rows(named=True)]
            whats = [f"layer {layer}" for layer in largest["layer"]]
            _add(figure, method(name), largest["layer"].to_list(), spread, whats=whats, lines=True)
        yield Figure(f"{experiment}_{column}_by_layer", f"{experiment}: {title} by layer", "Every method at its full size.", figure)


def from_board(row: Mapping[str, Any], column: str) -> Spread:
    """A metric of a row of the leaderboard over its seeds."""
    pairs = [
        (float(point), int(seed)) for point, seed in zip(row[f"{column}_by_seed"].split(","), row["seeds"].split(","), strict=True) if point
    ]
    return Spread.of([point for point, _ in pairs], [seed for _, seed in pairs])


def suggested_sizes(marginal_gain: pl.DataFrame) -> dict[str, int]:
    """By method, how many members are enough."""
    rows = marginal_gain.drop_nulls("suggested").unique(["method"], keep="first")
    sizes = dict(rows.select("method", "suggested").iter_rows())
    return {name: sizes[name] for name in in_order(sizes)}


def _empty(x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> Plot:
    axes = {
        name: {"title": {"text": title, "standoff": 8}, "type": "log" if log else "linear", "zeroline": False, "automargin": True}
        for name, title, log in (("xaxis", x, log_x), ("yaxis", y, log_y))
    }
    margin = {"l": 58, "r": 14, "t": 10, "b": 46}
    return {"data": [], "layout": {"showlegend": False, "margin": margin, "hovermode": "closest", "dragmode": "zoom", **axes}}


def _set(figure: Plot, axis: str, **keys: Any) -> None:
    """Set keys of an axis; None is plotly's own choice."""
    figure["layout"][axis] |= _given(keys)


def _add_trace(figure: Plot, **keys: Any) -> None:
    """Add points or a line; None is plotly's own choice."""
    figure["data"].append({"type": "scatter", **_given(keys)})


def _add_vertical(figure: Plot, x: float, colour: str) -> None:
    """A dotted line from the bottom to the top."""
    ends = {"x0": x, "x1": x, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
    line = {"color": colour, "dash": "dot", "width": 1.5}
    figure["layout"].setdefault("shapes", []).append({"type": "line", **ends, "line": line})


def _given(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}


def _label_decades(figure: Plot, axis: str, values: Sequence[float]) -> None:
    """Label a logarithmic axis at powers of ten, and where these are few between them, too, far enough to zoom out.

    Labels that are long are fewer: side by side they have to fit into a plot on paper.
    """
    positive = [value for value in values if value > 0]
    if positive:
        low, high = math.log10(min(positive)), math.log10(max(positive))
        between = (1, 2, 5) if low >= _PLAIN[0] and high <= _PLAIN[-1] else (1, 3)
        digits = between if high - low < MANY_DECADES else (1,)
        ticks = [(digit, exponent) for exponent in range(math.floor(low) - 1, math.ceil(high) + 2) for digit in digits]
        labels = {"tickvals": [digit * 10.0**exponent for digit, exponent in ticks], "ticktext": [_tick(*tick) for tick in ticks]}
        _set(figure, axis, **labels)


def _tick(digit: int, exponent: int) -> str:
    if exponent in _PLAIN:
        return f"{digit * 10**exponent:,}" if exponent >= 0 else f"{digit * 10.0**exponent:.{-exponent}f}"
    power = f"10<sup>{exponent}</sup>"
    return power if digit == 1 else f"{digit}·{power}"


def _by_members(values: dict[Size, Spread], axis: Axis) -> Plot:
    figure = _empty("members", axis.title, log_y=axis.log)
    if axis.log:
        _label_decades(figure, "yaxis", [spread.mean for spread in values.values()])
    most = max(size.n_members for size in values)
    _set(figure, "xaxis", range=[0.5, most + 0.5], dtick=1 if most <= 10 else None)
    by_method = {name: sorted(size for size in values if size.method == name) for name in in_order(size.method for size in values)}
    levels = {name for name, sizes in by_method.items() if name not in ENSEMBLES and len(sizes) == 1 and most > 1}
    last = {name: values[sizes[-1]].mean for name, sizes in by_method.items()}
    places = _symbol_places(last, levels, [spread.mean for spread in values.values()], log=axis.log)
    for name, sizes in by_method.items():
        about = method(name)
        chosen = [values[size] for size in sizes]
        if name in levels:
            at = most * (1 - SYMBOL_STEP * places[name])
            _add_level(figure, about, most, at=at, what=about.at(sizes[0].n_members, most), spread=chosen[0], form=axis.form)
        else:
            whats = [about.at(size.n_members, most) for size in sizes]
            _add(figure, about, [size.n_members for size in sizes], chosen, form=axis.form, whats=whats, lines=len(sizes) > 1)
    return figure


def _symbol_places(last: Mapping[str, float], levels: set[str], values: Sequence[float], *, log: bool) -> dict[str, int]:
    """How many steps from the right end the symbol of each level stands: none, or more where another symbol about as high is there."""
    height = math.log if log and min(values) > 0 else float
    near = SYMBOL_HEIGHT * (height(max(values)) - height(min(values)))
    taken = [(0, height(value)) for name, value in last.items() if name not in levels]
    places: dict[str, int] = {}
    for name in last:
        if name in levels:
            here = height(last[name])
            beside = {place for place, other in taken if abs(here - other) <= near}
            places[name] = next(place for place in itertools.count() if place not in beside)
            taken.append((places[name], here))
    return places


def _add_level(figure: Plot, about: Method, most: int, *, at: float, what: str, spread: Spread, form: str) -> None:
    """One SAE beside ensembles of every size: a level, which says what it is wherever it is pointed at, with its symbol near the end."""
    _add_trace(
        figure,
        x=list(range(1, most + 1)),
        y=[spread.mean] * most,
        mode="lines",
        line={"color": about.colour, "dash": "dot", "width": 1.5},
        name=about.label,
        meta={"method": about.name},
        hovertemplate=f"<b>{about.label}</b>, {what}<br>{_in_words(spread, form)}<extra></extra>",
    )
    _add(figure, about, [at], [spread], whats=[what], form=form, lines=False)


def _add(
    figure: Plot, about: Method, xs: Sequence[float], chosen: Sequence[Spread], *, whats: Sequence[str], form: str = ".4g", lines: bool
) -> None:
    """A method: means as a line or as points, with bars for seeds, and what each point is."""
    _add_trace(
        figure,
        x=list(xs),
        y=[spread.mean for spread in chosen],
        error_y=_bars(chosen, about.colour),
        mode="lines+markers" if lines else "markers",
        line={"color": about.colour, "width": 2},
        marker={"color": about.colour, "symbol": about.symbol, "size": 7 if lines else 10, "line": {"width": 0}},
        name=about.label,
        meta={"method": about.name},
        customdata=[[what, _in_words(spread, form)] for what, spread in zip(whats, chosen, strict=True)],
        hovertemplate=f"<b>{about.label}</b>, %{{customdata[0]}}<br>%{{customdata[1]}}<extra></extra>",
    )


def _trade_off(xs: dict[Size, Spread], ys: dict[Size, Spread], x: Axis, y: Axis) -> Plot:
    figure = _empty(x.title, y.title, log_x=x.log, log_y=y.log)
    both = sorted(xs.keys() & ys.keys())
    most = max(size.n_members for size in both)
    if x.log:
        _label_decades(figure, "xaxis", [xs[size].mean for size in both])
    _add_front(figure, [(xs[size].mean, ys[size].mean) for size in both], less_x=x is not STABILITY)
    for name in in_order(size.method for size in both):
        about = method(name)
        sizes = [size for size in both if size.method == name]
        last = len(sizes) - 1
        _add_trace(
            figure,
            x=[xs[size].mean for size in sizes],
            y=[ys[size].mean for size in sizes],
            error_x=_bars([xs[size] for size in sizes], about.colour),
            error_y=_bars([ys[size] for size in sizes], about.colour),
            mode="lines+markers" if last else "markers",
            line={"color": about.colour, "width": 1.5},
            marker={
                "color": about.colour,
                "symbol": about.symbol,
                "size": [12 if i == last else 6 for i in range(len(sizes))],
                "opacity": 1,
                "line": {"width": 0},
            },
            name=about.label,
            meta={"method": about.name},
            customdata=[[about.at(size.n_members, most), _in_words(xs[size], x.form), _in_words(ys[size], y.form)] for size in sizes],
            hovertemplate=f"<b>{about.label}</b>, %{{customdata[0]}}<br>{y.title}: %{{customdata[2]}}<br>"
            f"{x.title}: %{{customdata[1]}}<extra></extra>",
        )
    return figure


def _add_front(figure: Plot, points: Sequence[tuple[float, float]], *, less_x: bool) -> None:
    """The points that none is better than in both, joined by a line."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0] if less_x else -point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    if len(front) > 1:
        _add_trace(
            figure,
            x=[x for x, _ in front],
            y=[y for _, y in front],
            mode="lines",
            line={"color": "#9a9a9a", "dash": "dot", "width": 1.2},
            name="front",
            hoverinfo="skip",
        )


def _curves(rows: pl.DataFrame, column: str, *, log: bool) -> Plot:
    figure = _empty("training tokens of the SAE", column.replace("_", " "), log_x=True, log_y=log)
    _label_decades(figure, "xaxis", rows["tokens"].to_list())  # some SAEs are trained many times as long as others
    if log:
        _label_decades(figure, "yaxis", rows[column].drop_nulls().to_list())
    if column == "explained_variance":  # the first steps can be far below
        _set(figure, "yaxis", range=[-0.1, 1.02])
    for name in in_order(rows["method"]):
        about, of_method = method(name), rows.filter(method=name)
        largest = of_method.filter(_is_largest())
        for (member,), curve in largest.partition_by("member", as_dict=True, maintain_order=True).items():
            thinned = curve.drop_nulls(column).gather_every(max(1, math.ceil(len(curve) / MAX_CURVE_POINTS)))
            _add_trace(
                figure,
                x=thinned["tokens"].to_list(),
                y=[float(f"{value:.5g}") for value in thinned[column]],
                mode="lines",
                line={"color": about.colour, "width": 1.1},
                opacity=0.75,
                name=about.label,
                meta={"method": name},
                hovertemplate=f"<b>{about.label}</b>{_sae_of(name, member, ', ')}<br>%{{x:,}} tokens: %{{y:.4g}}<extra></extra>",
            )
    return figure


def _rounds(results: Results) -> Iterator[Figure]:
    left_over = {
        size: spread for size, spread in results.spreads("reconstruction", "fvu").items() if size.method in ("boosting", "bagging")
    }
    if any(size.method == "boosting" and size.n_members > 1 for size in left_over):
        rows = results.tables["reconstruction"]
        relative = spreads(rows.with_columns(norm=rows["fvu"].sqrt()), "norm")
        figure = _empty("rounds or members", "residual norm, relative", log_y=True)
        _label_decades(figure, "yaxis", [spread.mean for spread in relative.values()])
        _set(figure, "xaxis", dtick=1 if max(size.n_members for size in relative) <= 10 else None)
        for name in ("bagging", "boosting"):
            sizes = sorted(size for size in relative if size.method == name)
            if sizes:
                ns = [size.n_members for size in sizes]
                _add(figure, method(name), ns, [relative[size] for size in sizes], whats=[f"n = {n}" for n in ns], lines=True)
        caption = "Root mean squared norm of what is left over after n rounds, as a share of the activations' own spread around their mean."
        yield Figure("residual_norm", "What is left over", caption, figure)
    members = results.tables.get("members")
    if members is None:
        return
    for column, title, caption, log in (
        (
            "explained_variance",
            "What each SAE does on its own input",
            "Explained variance of what it was given: for rounds, the residual.",
            False,
        ),
        (
            "median_density",
            "How narrow features are",
            "Median share of test tokens on which a feature of that member or round fires.",
            True,
        ),
    ):
        if members[column].null_count() == len(members):
            continue
        figure = _empty("member or round", column.replace("_", " "), log_y=log)
        _set(figure, "xaxis", dtick=1 if members["member"].n_unique() <= 10 else None)
        for name, rows in _by_method(members):
            renamed = rows.with_columns(n_members=rows["member"])
            values = spreads(renamed, column)
            sizes = sorted(values)
            whats = [_sae_of(name, size.n_members) for size in sizes]
            _add(figure, method(name), [s.n_members for s in sizes], [values[s] for s in sizes], whats=whats, lines=len(sizes) > 1)
        yield Figure(f"member_{column}", title, caption, figure)


def _density_histogram(table: pl.DataFrame) -> Plot:
    fires = table.filter(table["density"] > 0)
    figure = _empty("share of tokens on which it fires", "share of features", log_x=True)
    if fires.is_empty():
        return figure
    _label_decades(figure, "xaxis", [float(fires["density"].min() or 0), 1])  # pyright: ignore[reportArgumentType]
    logs = fires["density"].log10()
    low, high = math.floor(float(logs.min() or 0) * 2) / 2, 0.0  # pyright: ignore[reportArgumentType]
    for name, rows in _by_method(fires):
        edges, shares = _histogram(rows["density"].log10().to_list(), low, high, BINS, _count(table, name))
        _add_steps(figure, method(name), [10**edge for edge in edges], shares, ".2g")
    _set(figure, "xaxis", range=[low, high], tickangle=0)
    return figure


def _cosine_histogram(table: pl.DataFrame) -> Plot:
    there = table.drop_nulls("nearest_other_seed_cosine")
    figure = _empty("largest cosine under another seed", "share of features")
    low = min(0.0, math.floor(float(there["nearest_other_seed_cosine"].min() or 0) * 10) / 10)  # pyright: ignore[reportArgumentType]
    for name, rows in _by_method(there):
        edges, shares = _histogram(rows["nearest_other_seed_cosine"].to_list(), low, 1.0, BINS, len(rows))
        _add_steps(figure, method(name), edges, shares, ".2f")
    _set(figure, "xaxis", range=[low, 1.0])
    return figure


def _histogram(values: Sequence[float], low: float, high: float, bins: int, total: int) -> tuple[list[float], list[float]]:
    """`bins + 1` edges, and in each bin the share of `total`; a value at or beyond an end counts to the last bin there."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    return [low + (high - low) * i / bins for i in range(bins + 1)], [count / total for count in counts]


def _add_steps(figure: Plot, about: Method, edges: Sequence[float], shares: Sequence[float], form: str) -> None:
    """A step for each bin, drawn from its left edge to its right one: at the last edge the last share stands once more."""
    bins = [f"from {left:{form}} to {right:{form}}" for left, right in itertools.pairwise(edges)]
    _add_trace(
        figure,
        x=[float(f"{edge:.4g}") for edge in edges],
        y=[float(f"{share:.4g}") for share in (*shares, shares[-1])],
        mode="lines",
        line={"color": about.colour, "width": 1.8, "shape": "hv"},
        name=about.label,
        meta={"method": about.name},
        customdata=[*bins, bins[-1]],
        hovertemplate=f"<b>{about.label}</b><br>%{{customdata}}: %{{y:.2%}} of the features<extra></extra>",
    )


def _by_count(rows: pl.DataFrame, x: str, y: str, group: str, x_title: str) -> Plot:
    """Of whole ensembles and codes as they are: the mean over what is measured in each group, then over groups, for every seed."""
    import polars as pl

    chosen = rows.filter(_is_largest().over("method")).drop_nulls(y).filter(pl.col(x) > 0)
    if "code_scale" in chosen.columns:
        chosen = chosen.filter(code_scale="unscaled")
    of_groups = chosen.group_by("method", "seed", x, group).agg(pl.col(y).mean())
    means = of_groups.group_by("method", "seed", x).agg(pl.col(y).mean()).rename({x: "n_members"})
    figure = _empty(x_title, y.removesuffix("_metric").replace("_", " "), log_x=True)
    _label_decades(figure, "xaxis", means["n_members"].to_list())
    for name, of_method in _by_method(means):
        values = spreads(of_method, y)
        sizes = sorted(values)
        whats = [f"{s.n_members} {x_title.split(maxsplit=1)[0]}" for s in sizes]
        _add(figure, method(name), [s.n_members for s in sizes], [values[s] for s in sizes], whats=whats, lines=len(sizes) > 1)
    return figure


def _explanations(results: Results) -> Plot:
    """Mean scores with a feature's own explanation, and with another's."""
    figure = _empty("", "balanced accuracy")
    _set(figure, "xaxis", type="category")
    scores = {"own explanation": "detection_score", "another's": "control_score"}
    of_column = {title: results.spreads("autointerp", column) for title, column in scores.items()}
    for name in in_order(size.method for found in of_column.values() for size in found):
        of_method = [(title, s) for title, found in of_column.items() for size, s in found.items() if size.method == name]
        about, chosen = method(name), [spread for _, spread in of_method]
        _add_trace(
            figure,
            x=[title for title, _ in of_method],
            y=[spread.mean for spread in chosen],
            error_y=_bars(chosen, about.colour),
            mode="lines+markers",
            line={"color": about.colour, "width": 2},
            marker={"color": about.colour, "symbol": about.symbol, "size": 9},
            name=about.label,
            meta={"method": about.name},
            customdata=[_in_words(spread, ".3f") for spread in chosen],
            hovertemplate=f"<b>{about.label}</b>, %{{x}}<br>%{{customdata}}<extra></extra>",
        )
    return figure


def _bars(chosen: Sequence[Spread], colour: str) -> dict[str, Any] | None:
    """From the lower to the upper end of the interval or, with two seeds, from one to the other."""
    if all(len(spread.points) == 1 for spread in chosen):
        return None
    ups, downs = [spread.bar[1] - spread.mean for spread in chosen], [spread.mean - spread.bar[0] for spread in chosen]
    return {"type": "data", "array": ups, "arrayminus": downs, "symmetric": False, "color": colour, "thickness": 1.2, "width": 3}


def _in_words(spread: Spread, form: str) -> str:
    if spread.has_interval and spread.low is not None and spread.high is not None:
        return f"{spread.mean:{form}} [{spread.low:{form}}, {spread.high:{form}}]"
    if len(spread.points) == 2:
        return f"{spread.mean:{form}} (seeds: {', '.join(format(point, form) for point in spread.points)})"
    return format(spread.mean, form)


def _by_method(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for name in in_order(rows["method"]):
        of_method = rows.filter(method=name)
        yield name, of_method


def _sae_of(name: str, number: int, before: str = "") -> str:
    """Which SAE of an ensemble; of the others there is one."""
    return {"bagging": f"{before}member {number}", "boosting": f"{before}round {number}"}.get(name, "")


def _is_largest() -> pl.Expr:
    import polars as pl

    return pl.col("n_members") == pl.col("n_members").max()  # of the rows at hand


def _count(table: pl.DataFrame, name: str) -> int:
    return len(table.filter(method=name))


def _share(mask: pl.Series) -> float:
    return float(mask.sum()) / max(1, len(mask))
