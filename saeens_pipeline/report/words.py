"""What the numbers say in words, and what they do not: every sentence is made from the tables, and left out where they lack it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from saeens_pipeline.components.ensemble_experiment import Baseline
from saeens_pipeline.report.control import Comparison
from saeens_pipeline.report.figures import suggested_sizes
from saeens_pipeline.report.methods import ENSEMBLES, Method, listed, method
from saeens_pipeline.report.results import Results, Spread

SAME_L0 = 0.1  # relative difference up to which sparsity counts as the same
SAME_COMPUTE = 1.25  # ratio up to which training counts as the same
MANY_DEAD = 0.1


@dataclass(frozen=True)
class Choice:
    """A need, the method that serves it best, its number, what it costs, and where that is no ensemble, which of these to take."""

    need: str
    method: Method
    value: str
    evidence: str
    price: str
    ensemble: str


def choices(results: Results) -> Iterator[Choice]:
    """Which method to use for what."""
    variance = results.full("reconstruction", "explained_variance")
    stability = results.full("stability", "stability")
    if len(variance) > 1:
        yield _first(results, "the closest reconstruction", "explained variance", variance)
    if len(stability) > 1:
        yield _first(results, "features that come back under another seed", "stability", stability)
    sparsity = results.full("reconstruction", "l0")
    if "single" in sparsity and "single" in variance:
        limit = sparsity["single"].mean * (1 + SAME_L0)
        sparse = {name: spread for name, spread in variance.items() if name in sparsity and sparsity[name].mean <= limit}
        if len(sparse) > 1 and len(sparse) < len(variance):
            need = f"as few features per token as one SAE ({sparsity['single'].mean:.3g})"
            yield _first(results, need, "explained variance", sparse, _too_dense(results, sparse))


def _first(results: Results, need: str, metric: str, by_method: Mapping[str, Spread], otherwise: str = "") -> Choice:
    best = _largest(by_method)
    value, ensemble = f"{metric} {by_method[best].mean:.3f}", ""
    if best not in ENSEMBLES:
        ensemble = _best_ensemble(results, by_method) or otherwise
    return Choice(need, method(best), value, _lead(best, by_method, ".3f"), _price(results, best), ensemble)


def _best_ensemble(results: Results, by_method: Mapping[str, Spread]) -> str:
    ensembles = {name: spread for name, spread in by_method.items() if name in ENSEMBLES}
    if not ensembles:
        return ""
    best = _largest(ensembles)
    price = _price(results, best)
    return f"If it is to be an ensemble: {method(best).label}, {ensembles[best].mean:.3f}{f', for {price}' if price else ''}."


def _too_dense(results: Results, sparse: Mapping[str, Spread]) -> str:
    """What the ensembles spend, where none is so sparse."""
    sparsity = results.full("reconstruction", "l0")
    spent = [f"{method(name).label} {sparsity[name].mean:.3g}" for name in ENSEMBLES if name in sparsity and name not in sparse]
    return f"No ensemble is as sparse: features per token are, for {listed(spent)}." if spent else ""


def says(results: Results) -> Iterator[str]:
    """What is seen in the numbers."""
    yield from _at_equal_sparsity(results)
    yield from _growth(results)
    yield from _trade_off(results)
    yield from _loss(results)
    yield from _enough(results)
    yield from _narrow_rounds(results)


def does_not_say(results: Results, comparisons: Sequence[Comparison], control_hint: str) -> Iterator[str]:
    """What must not be read into the numbers: where methods differ in what they spend, and how sure anything is."""
    yield from _unequal_sparsity(results)
    yield from _unequal_compute(results)
    yield from _unequal_sizes(results)
    yield from _few_seeds(results)
    yield from _dead(results)
    if comparisons:
        yield about_control(comparisons)
    elif control_hint:
        yield control_hint
    measured = [name for name in ("reconstruction", "stability") if name in results.tables]
    if measured:
        what = listed([{"reconstruction": "explained variance", "stability": "stability"}[name] for name in measured])
        yield (
            f"{_capital(what)} {'do' if len(measured) > 1 else 'does'} not say that features mean something to a reader, nor that they are "
            "the language model's own. All numbers are from held-out text of the same corpus, at this layer."
        )


def about_control(comparisons: Sequence[Comparison]) -> str:
    """What the untrained language model shows."""
    same = [each.title for each in comparisons if each.same_order]
    nearly = [each for each in comparisons if each.moved]
    common = [about for about in nearly[0].moved if all(about in each.moved for each in nearly)] if nearly else []
    but_one: dict[str, list[str]] = {}
    for each in nearly:
        but_one.setdefault((common or each.moved)[0].label, []).append(each.title)
    other = [each.title for each in comparisons if not each.same_order and not each.moved]
    alike = [f"by {listed(same)}"] if same else []
    alike += [f"by {listed(titles)} but for {label}" for label, titles in but_one.items()]
    if not alike:
        return (
            f"An untrained language model of the same shape ranks the methods differently by {listed(other)}: "
            "the order here is not one that any activations would give."
        )
    differs = f" By {listed(other)} it ranks them differently." if other else ""
    return (
        f"An untrained language model of the same shape ranks the methods alike {', and '.join(alike)}: that order is no evidence that "
        f"features are the language model's; it would come out of activations without any meaning.{differs}"
    )


def _at_equal_sparsity(results: Results) -> Iterator[str]:
    variance, sparsity = results.full("reconstruction", "explained_variance"), results.full("reconstruction", "l0")
    if not variance or not sparsity:
        return
    best = _largest({name: spread for name, spread in variance.items() if name in sparsity})
    alike = [
        name for name in variance if name in sparsity and abs(sparsity[name].mean - sparsity[best].mean) <= SAME_L0 * sparsity[best].mean
    ]
    rest = {name: variance[name] for name in alike if name != best}
    if rest:
        second = _largest(rest)
        saved = 1 - (1 - variance[best].mean) / (1 - variance[second].mean)
        yield (
            f"With about {sparsity[best].mean:.3g} features per token each, {method(best).label} explains {variance[best].mean:.1%} of the "
            f"variance and {method(second).label}, the next best, {variance[second].mean:.1%}: "
            f"{saved:.0%} of what that leaves unexplained is gone."
        )
    else:
        yield (
            f"{_capital(method(best).label)} explains most, {variance[best].mean:.1%} of the variance, with {sparsity[best].mean:.3g} "
            "features per token; no other method here spends as many."
        )


def _growth(results: Results) -> Iterator[str]:
    for table, column, what in (("reconstruction", "explained_variance", "explained variance"), ("stability", "stability", "stability")):
        values = results.spreads(table, column)
        parts = []
        for name in ("bagging", "boosting"):
            sizes = sorted(size for size in values if size.method == name)
            if len(sizes) > 1:
                first, last = sizes[0], sizes[-1]
                verb = "raises" if values[last].mean > values[first].mean else "lowers"
                parts.append(f"{name} {verb} it from {values[first].mean:.3f} to {values[last].mean:.3f} with {last.n_members} members")
        if parts:
            yield f"{_capital(what)}, from one member to all: {'; '.join(parts)}."


def _trade_off(results: Results) -> Iterator[str]:
    variance, stability = results.full("reconstruction", "explained_variance"), results.full("stability", "stability")
    if len(variance) < 2 or len(stability) < 2:
        return
    rebuilds, returns = _largest(variance), _largest(stability)
    if rebuilds == returns:
        yield f"{_capital(method(rebuilds).label)} is first both in explained variance and in stability."
    elif rebuilds in stability and returns in variance:
        yield (
            f"No method is first in both: {method(rebuilds).label} rebuilds best and has a stability of {stability[rebuilds].mean:.3f}; "
            f"the features of {method(returns).label} come back most (stability {stability[returns].mean:.3f}), and it explains "
            f"{variance[returns].mean:.1%} of the variance."
        )


def _loss(results: Results) -> Iterator[str]:
    loss, variance = results.full("reconstruction", "ce_loss_recovered"), results.full("reconstruction", "explained_variance")
    if len(loss) < 2:
        return
    by_loss = sorted(loss, key=lambda name: -loss[name].mean)
    by_variance = sorted((name for name in variance if name in loss), key=lambda name: -variance[name].mean)
    agree = "the same order as by explained variance" if by_loss == by_variance else "another order than by explained variance"
    order = ", ".join(f"{method(name).label} {loss[name].mean:.1%}" for name in by_loss)
    yield f"Of the language model's next-token loss they recover {order}: {agree}."


def _enough(results: Results) -> Iterator[str]:
    table = results.tables.get("marginal_gain")
    sizes = suggested_sizes(table) if table is not None else {}
    for name, n in sizes.items():
        most = max(size.n_members for size in results.spreads("marginal_gain", "new_features") if size.method == name)
        if n < most:
            yield (
                f"{_capital(name)} needs no more than {n} of the {most} members: no further one takes 5% off what explained variance or "
                "stability lack."
            )
        else:
            yield f"{_capital(name)} still gains with the last of {most} members: more may help."


def _narrow_rounds(results: Results) -> Iterator[str]:
    rows = results.tables.get("members")
    if rows is None:
        return
    rounds = rows.filter(method="boosting").select("member", "median_density").group_by("member").mean().sort("member")
    if len(rounds) > 1:
        first, last = rounds["median_density"][0], rounds["median_density"][-1]
        if first and last:
            more = "more rarely" if last < first else "more often"
            yield (
                f"Features of the last boosting round fire {more} than those of the first: on {last:.2%} of tokens against {first:.2%} "
                "(median)."
            )


def _unequal_sparsity(results: Results) -> Iterator[str]:
    sparsity = results.full("reconstruction", "l0")
    groups = _alike(sparsity, lambda one, other: abs(one - other) <= SAME_L0 * max(one, other))
    if len(groups) > 1:
        parts = [f"{listed([method(name).label for name in names])} about {sparsity[names[0]].mean:.3g}" for names in groups]
        yield (
            f"Methods do not spend equally many features per token: {'; '.join(parts)}. More features explain more. "
            "Compare inside a group, or look at the plots against L0 and bits."
        )


def _unequal_compute(results: Results) -> Iterator[str]:
    flops = results.full("cost", "total_flops")
    groups = _alike(flops, lambda one, other: max(one, other) <= SAME_COMPUTE * min(one, other))
    if len(groups) > 1:
        least = min(spread.mean for spread in flops.values())
        parts = [f"{listed([method(name).label for name in names])} {flops[names[0]].mean / least:.3g}" for names in groups]
        yield f"Training took unequal amounts of computation. In multiples of the cheapest: {'; '.join(parts)}."
        if "compute_matched" not in flops and "compute_matched" in get_args(Baseline):
            yield "Missing is one SAE that was trained for as long as all members together: `baselines: [compute_matched]` trains it."


def _unequal_sizes(results: Results) -> Iterator[str]:
    features = results.full("reconstruction", "n_features")
    if features and max(s.mean for s in features.values()) > min(s.mean for s in features.values()):
        low, high = (f(spread.mean for spread in features.values()) for f in (min, max))
        yield (
            f"Dictionaries have {low:,.0f} to {high:,.0f} features. In a larger one a feature finds a near neighbour more easily, which "
            "by itself raises stability, and two features meet on a token more rarely, which raises connectivity."
        )


def _few_seeds(results: Results) -> Iterator[str]:
    n, compared = len(results.seeds), "stability" in results.tables
    if n == 1:
        yield "One seed says nothing about chance: there are no intervals and no stability. Add a seed to `ensemble.seeds`."
    elif n == 2:
        yield (
            "Two seeds say little about chance: their 95% interval would be 12.7 standard errors wide, so the points are shown instead."
            f"{' Stability compares two runs; with more runs it is larger.' if compared else ''}"
        )
    elif n:
        yield f"Intervals are Student's, of {n} seeds (95%)."
        if compared:
            yield f"Stability compares {n} runs; it grows with their number."


def _dead(results: Results) -> Iterator[str]:
    dead = {name: spread.mean for name, spread in results.full("reconstruction", "dead_features").items() if spread.mean > MANY_DEAD}
    if dead:
        parts = ", ".join(f"{method(name).label} {share:.0%}" for name, share in dead.items())
        yield f"Many features never fire on the held-out tokens: {parts}. Longer training may change these methods' numbers."


def _alike(values: Mapping[str, Spread], same: Callable[[float, float], bool]) -> list[list[str]]:
    """Methods in groups of about equal values, the smallest first."""
    groups: list[list[str]] = []
    for name in sorted(values, key=lambda name: values[name].mean):
        if groups and same(values[groups[-1][0]].mean, values[name].mean):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _lead(best: str, values: Mapping[str, Spread], form: str) -> str:
    second = _largest({name: spread for name, spread in values.items() if name != best})
    sure = "seeds differ by less" if values[best].is_above(values[second]) else "seeds differ by as much"
    if len(values[best].points) == 1:
        sure = "of one seed"
    return f"the next is {method(second).label} with {values[second].mean:{form}}; {sure}"


def _price(results: Results, name: str) -> str:
    """L0 and training, relative to a single SAE where there is one."""
    sparsity = results.full("reconstruction", "l0")
    flops = {name: spread.mean for name, spread in results.full("cost", "total_flops").items()}
    parts = [f"{sparsity[name].mean:.3g} features per token"] if name in sparsity else []
    if name in flops:
        cheapest = flops.get("single")
        parts.append(_times(flops[name] / cheapest) if cheapest else f"{flops[name]:.3g} training FLOPs")
    return " and ".join(parts)


def _times(ratio: float) -> str:
    return (
        "the training of one SAE" if abs(ratio - 1) < 0.05 else f"{ratio:{'.0f' if ratio >= 10 else '.2g'}} times the training of one SAE"
    )


def _largest(values: Mapping[str, Spread]) -> str:
    return max(values, key=lambda name: values[name].mean)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
