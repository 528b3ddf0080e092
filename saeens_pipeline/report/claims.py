"""The paper's claims and the rules that judge them by an experiment's tables. Source: Gadgil, Lin & Lee 2026, arXiv 2505.16077.

A claim compares two methods. It holds if the interval of the difference is above 0 (in every seed, where each seed has one), does not hold
if it is below 0, and otherwise cannot be told. A claim about explained variance cannot be told either if the better method has more
features per token (`MORE_FEATURES`), nor can any claim if an untrained language model shows the same effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import NamedTuple

import polars as pl

from saeens_pipeline.assets.registry import TABLES, Headline
from saeens_pipeline.report.methods import method
from saeens_pipeline.report.metrics import DIVERSITY, EQUAL_STABILITY, EV, L0, STABILITY
from saeens_pipeline.report.results import Results

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
MORE_FEATURES = 1.1  # times as many features per token make two methods incomparable
MAX_ABLATED = 20  # features zeroed in the claim about spurious correlations, at most


class Interval(NamedTuple):
    """The difference between two methods with the ends of its 95% interval; `of` names the seed, or all of them."""

    difference: float
    low: float
    high: float
    of: str


class Effect(NamedTuple):
    """A metric of two methods, and intervals of the difference, more being better. `missing`: the reason why there is no interval."""

    ours: float
    theirs: float
    intervals: Sequence[Interval]
    missing: str = ""

    @property
    def direction(self) -> int:
        """Return 1 if all intervals are above 0, -1 if all are below, 0 otherwise."""
        if not self.intervals:
            return 0
        return int(all(each.low > 0 for each in self.intervals)) - int(all(each.high < 0 for each in self.intervals))


@dataclass(frozen=True)
class Claim:
    """A claim that a metric of `ours` is better than that of `theirs`. `measure` returns the effect, or the reason why there is none."""

    text: str
    metric: str
    ours: str
    theirs: str
    interval: str
    measure: Callable[[Results, Claim], Effect | str]
    form: str = ".4f"
    depends_on_l0: bool = False


class Verdict(NamedTuple):
    """The judgement of a claim: one of the three words, the reasons, and the numbers behind it."""

    claim: Claim
    word: str
    why: Sequence[str]
    effect: Effect | None
    of_control: Effect | None
    l0: tuple[float, float] | None


def judge(claim: Claim, results: Results, untrained: Results | None) -> Verdict:
    """Return the verdict on a claim by the rules of this module."""
    effect, of_control = claim.measure(results, claim), claim.measure(untrained, claim) if untrained else None
    of_control = of_control if isinstance(of_control, Effect) else None
    if isinstance(effect, str):
        return Verdict(claim, UNKNOWN, [effect], None, of_control, None)
    of_l0 = results.full(L0)
    l0 = (of_l0[claim.ours].mean, of_l0[claim.theirs].mean) if {claim.ours, claim.theirs} <= of_l0.keys() else None
    if not effect.intervals:
        return Verdict(claim, UNKNOWN, [effect.missing], effect, of_control, l0)
    if effect.direction == 0:
        return Verdict(claim, UNKNOWN, ["the interval spans 0, or the seeds disagree"], effect, of_control, l0)
    why = []
    if claim.depends_on_l0 and l0 and l0[effect.direction < 0] > MORE_FEATURES * l0[effect.direction > 0]:
        why.append("it is measured at different L0, and more features per token explain more")
    if effect.direction > 0 and of_control and of_control.direction > 0:
        why.append("the control, an untrained language model, shows the same effect")
    elif effect.direction > 0 and of_control and not of_control.intervals:
        why.append("the control, an untrained language model, has no interval")
    if why:
        return Verdict(claim, UNKNOWN, why, effect, of_control, l0)
    word, side = (HOLDS, "above") if effect.direction > 0 else (FAILS, "below")
    return Verdict(claim, word, [f"the interval is {side} 0"], effect, of_control, l0)


def claims(results: Results) -> list[Claim]:
    """Return the claims that are judged, in the order of the page."""
    by_documents = "paired bootstrap over held-out documents, for each seed"
    by_seeds = "Student's t over the seeds' paired differences"
    ev = partial(Claim, metric="explained variance", interval=by_documents, measure=_over_documents, depends_on_l0=True)
    found = [
        ev("Bagging explains more variance than a single SAE.", ours="bagging", theirs="single"),
        ev("Bagging explains more than one SAE with as many features and as many features per token.",
           ours="bagging", theirs="expanded_l0_matched"),
        ev("Bagging explains more than one SAE trained with as much computation.", ours="bagging", theirs="compute_matched"),
        ev("Boosting explains more variance than bagging.", ours="boosting", theirs="bagging"),
        ev("Boosting explains more than one SAE with as many features and as many features per token.",
           ours="boosting", theirs="expanded_l0_matched"),
        Claim("Bagging is more stable than a single SAE, among as many features.", "stability at equal candidates", "bagging", "single",
              "the lowest of one minus the highest of the other, from three seeds", partial(_over_runs, metric=EQUAL_STABILITY)),
        Claim("Bagging is more stable than one SAE with as many features.", "stability", "bagging", "expanded",
              "the lowest of one minus the highest of the other, from three seeds", partial(_over_runs, metric=STABILITY)),
        Claim("Bagging has more distinct features than one SAE with as many features.", "diversity", "bagging", "expanded",
              by_seeds, partial(_over_seeds, metric=DIVERSITY), ",.0f"),
        Claim("Boosting has more distinct features than one SAE with as many features.", "diversity", "boosting", "expanded",
              by_seeds, partial(_over_seeds, metric=DIVERSITY), ",.0f"),
        Claim("Later rounds of boosting learn narrower features.", "median density of features that fire, first round against the last",
              "boosting", "boosting",
              by_seeds, _narrower, ".4f"),
    ]  # fmt: skip
    for ours, n in (("bagging", 1), ("boosting", 2)):
        text = f"With {n} feature{'s' * (n > 1)}, a probe on {ours} detects concepts better than one on a single SAE."
        metric = f"accuracy with {n} feature{'s' * (n > 1)}"
        measure = partial(_over_groups, table="concept_detection", by="dataset", n=n)
        found.append(Claim(text, metric, ours, "single", "Student's t over data sets, for each seed", measure, ".3f"))
    n = _ablated(results)
    for ours in ("bagging", "boosting"):
        text = f"Zeroing {n} features of {ours} removes more of a spurious correlation than zeroing those of a single SAE."
        measure = partial(_over_groups, table="spurious_correlation", by="task", n=n)
        found.append(Claim(text, f"SCR with {n} features zeroed", ours, "single", "Student's t over tasks, for each seed", measure, ".3f"))
    return found


def verdicts(results: Results, untrained: Results | None) -> Iterator[Verdict]:
    """Yield the verdict on every claim."""
    for claim in claims(results):
        yield judge(claim, results, untrained)


def differences(results: Results, metric: str, ours: str, theirs: str) -> list[Interval]:
    """Return metric of `ours` minus `theirs` at full size, an interval for each seed, from the table `differences`."""
    table, sizes = results.tables.get("differences"), {size.method: size.n_members for size in results.full_sizes}
    if table is None or not {ours, theirs} <= sizes.keys():
        return []
    found = []
    for one, other, sign in ((ours, theirs, 1), (theirs, ours, -1)):
        rows = table.filter(metric=metric, method=one, n_members=sizes[one], other_method=other, other_n_members=sizes[other])
        for seed, difference, low, high in rows.drop_nulls(["difference", "low"]).select("seed", "difference", "low", "high").iter_rows():
            ends = sorted((sign * low, sign * high))
            found.append(Interval(sign * difference, *ends, of=f"seed {seed}"))
    return sorted(found, key=lambda interval: interval.of)


def _over_documents(results: Results, claim: Claim) -> Effect | str:
    values = results.full(EV)
    if missing := _missing(values, claim, EV.table):
        return missing
    found = differences(results, EV.column, claim.ours, claim.theirs)
    return Effect(
        values[claim.ours].mean,
        values[claim.theirs].mean,
        found if len(found) == len(values[claim.ours].points) else [],
        "the table differences has no interval of it in every seed",
    )


def _over_seeds(results: Results, claim: Claim, metric: Headline) -> Effect | str:
    if missing := _missing(results.full(metric), claim, metric.table):
        return missing
    ours, theirs = (_by_seed(results, metric, name) for name in (claim.ours, claim.theirs))
    return _paired(ours, theirs)


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Effect:
    """Return the effect of values by seed; an interval from two seeds on."""
    from saeens_models.metrics import mean_interval

    mean, low, high = mean_interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    found = [] if low is None or high is None else [Interval(mean, low, high, "all seeds")]
    return Effect(fmean(ours.values()), fmean(theirs.values()), found, "one seed has no interval over seeds")


def _over_runs(results: Results, claim: Claim, metric: Headline) -> Effect | str:
    """Return the effect in a metric that compares seeds, whose values are not independent: the gap between all points, from three seeds."""
    if missing := _missing(results.full(metric), claim, metric.table):
        return missing
    ours, theirs = results.full(metric)[claim.ours], results.full(metric)[claim.theirs]
    gap = Interval(ours.mean - theirs.mean, min(ours.points) - max(theirs.points), max(ours.points) - min(theirs.points), "all seeds")
    found = [gap] if min(len(ours.points), len(theirs.points)) > 2 else []
    missing = f"it compares seeds: there is an interval from three seeds on, not with {len(results.seeds)}"
    return Effect(ours.mean, theirs.mean, found, missing)


def _narrower(results: Results, claim: Claim) -> Effect | str:
    """Return the effect in the median density of features that fire, of the first and the last round; dead features are not narrow."""
    table = results.tables.get("features")
    rows = None if table is None else table.filter(pl.col("density") > 0, method="boosting").select("seed", "member", "density")
    last = 0 if rows is None else rows["member"].max() or 0
    if rows is None or not isinstance(last, int) or last < 2:
        return "not measured: the table features has no rounds of boosting"
    of_last, of_first = (dict(rows.filter(member=n).group_by("seed").agg(pl.col("density").median()).iter_rows()) for n in (last, 1))
    return _paired(of_first, of_last)


def _over_groups(results: Results, claim: Claim, table: str, by: str, n: int) -> Effect | str:
    """Return the effect in a probe's score with n features, over data sets or tasks.

    Labels of one data set are averaged first: of two labels, both probes have the same texts.
    """
    from saeens_models.metrics import mean_interval

    curve, rows = TABLES[table].curve, results.tables.get(table)
    if rows is None or curve is None:
        return f"not measured: there is no table {table}"
    rows = rows.filter(code_scale="unscaled") if "code_scale" in rows.columns else rows
    rows = rows.filter(pl.col("n_members") == pl.col("n_members").max().over("method"), pl.col(curve.x) == n).drop_nulls(curve.y)
    ours, theirs = (
        rows.filter(method=name).group_by("seed", by).agg(pl.col(curve.y).mean().alias(side))
        for name, side in ((claim.ours, "ours"), (claim.theirs, "theirs"))
    )
    both = ours.join(theirs, on=["seed", by]).sort("seed", by)
    if both.is_empty():
        return f"not measured: the table {table} does not have both methods with {n} features"
    found = []
    for (seed,), of_seed in both.partition_by("seed", as_dict=True, maintain_order=True).items():
        mean, low, high = mean_interval((of_seed["ours"] - of_seed["theirs"]).to_list())
        found += [] if low is None or high is None else [Interval(mean, low, high, f"seed {seed}")]
    means = [fmean(both[side].to_list()) for side in ("ours", "theirs")]
    return Effect(means[0], means[1], found, f"one {by.replace('dataset', 'data set')} has no interval")


def _ablated(results: Results) -> int:
    """Return the largest number of zeroed features of a single SAE that is at most `MAX_ABLATED`."""
    rows, curve = results.tables.get("spurious_correlation"), TABLES["spurious_correlation"].curve
    if rows is None or curve is None:
        return MAX_ABLATED
    numbers = rows.filter(pl.col(curve.x).is_between(1, MAX_ABLATED), method="single").drop_nulls(curve.y)[curve.x]
    return max(numbers.to_list(), default=MAX_ABLATED)


def _by_seed(results: Results, metric: Headline, name: str) -> dict[int, float]:
    size = next(size.n_members for size in results.full_sizes if size.method == name)
    rows = results.tables[metric.table].filter(method=name, n_members=size).drop_nulls(metric.column)
    return dict(rows.select("seed", pl.col(metric.column).cast(float)).iter_rows())


def _missing(values: Mapping[str, object], claim: Claim, table: str) -> str:
    absent = [method(name).label for name in (claim.ours, claim.theirs) if name not in values]
    return f"not measured: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not in the table {table}" if absent else ""
