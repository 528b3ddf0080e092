"""What the numbers say in words, and what they do not: every sentence is made from the tables, and left out where they lack it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from saeens_pipeline.report.control import Comparison
from saeens_pipeline.report.figures import suggested_sizes
from saeens_pipeline.report.methods import ENSEMBLES, Method, listed, method
from saeens_pipeline.report.results import Results, Spread, written
from saeens_pipeline.settings.experiments import Baseline

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
            need = f"as few features per token as one SAE ({_between([sparsity['single']])})"
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
    """What the ensembles use, where none is so sparse."""
    sparsity = results.full("reconstruction", "l0")
    names = [name for name in ENSEMBLES if name in sparsity and name not in sparse]
    if not names:
        return ""
    use = f"use{'s' if len(names) == 1 else ''} {_between([sparsity[name] for name in names])} features per token"
    return f"No ensemble is as sparse: {listed([method(name).label for name in names])} {use}."


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
    yield from _unequal_training(results)
    yield from _unequal_inference(results)
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
    other = [each.title for each in comparisons if not each.same_order and not each.exception]
    alike: dict[str, list[str]] = {}  # by exception, first those without
    for each in sorted(comparisons, key=lambda each: bool(each.exception)):
        if each.title not in other:
            alike.setdefault(each.exception, []).append(each.title)
    if not alike:
        return (
            f"On an untrained language model of the same shape, the methods come in another order by {listed(other)}: the order here is "
            "not one that any activations would give."
        )
    parts = [f"by {listed(titles)}{f' ({exception})' if exception else ''}" for exception, titles in alike.items()]
    differs = f" By {listed(other)} the order is another one." if other else ""
    return (
        f"On an untrained language model of the same shape, the methods come in the same order {', and '.join(parts)}. So that order says "
        f"nothing about what a language model has learnt: activations without any meaning give it, too.{differs}"
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
        yield (
            f"With {_between([sparsity[name] for name in alike])} features per token each, {method(best).label} explains "
            f"{variance[best].mean:.1%} of the variance and {method(second).label}, the next best, {variance[second].mean:.1%}"
            f"{_saved(best, second, variance)}."
        )
    else:
        yield (
            f"{_capital(method(best).label)} explains most, {variance[best].mean:.1%} of the variance, with {_between([sparsity[best]])} "
            "features per token; no other method here uses as many."
        )


def _saved(best: str, second: str, variance: Mapping[str, Spread]) -> str:
    """By how much the best leaves less of the variance unexplained than the second, where that is anything in whole percent."""
    ours, theirs = 1 - variance[best].mean, 1 - variance[second].mean
    saved = f"{1 - ours / theirs:.0%}" if theirs > 0 else "0%"
    return f": {method(best).label} leaves {saved} less of it unexplained" if saved != "0%" else ""


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
            f"No method is first both in explained variance and in stability: {method(rebuilds).label} explains most, "
            f"{variance[rebuilds].mean:.1%}, with a stability of {stability[rebuilds].mean:.3f}; the features of {method(returns).label} "
            f"come back most (stability {stability[returns].mean:.3f}), and it explains {variance[returns].mean:.1%}."
        )


def _loss(results: Results) -> Iterator[str]:
    loss, variance = results.full("reconstruction", "ce_loss_recovered"), results.full("reconstruction", "explained_variance")
    if len(loss) < 2:
        return
    by_loss = sorted(loss, key=lambda name: -loss[name].mean)
    by_variance = sorted((name for name in variance if name in loss), key=lambda name: -variance[name].mean)
    agree = "the same order as by explained variance" if by_loss == by_variance else "another order than by explained variance"
    order = ", ".join(f"{method(name).label} {loss[name].mean:.1%}" for name in by_loss)
    yield (
        "How well the language model still predicts the next token when it reads reconstructions (loss recovered; 100%: as well as with "
        f"the activations themselves): {order}. This is {agree}."
    )


def _enough(results: Results) -> Iterator[str]:
    table = results.tables.get("marginal_gain")
    sizes = suggested_sizes(table) if table is not None else {}
    for name, n in sizes.items():
        most = max(size.n_members for size in results.spreads("marginal_gain", "new_features") if size.method == name)
        if n < most:
            yield (
                f"{_capital(name)} needs no more than {n} of its {most} members: each further one closes less than 5% of the gap that "
                "explained variance and stability still have to\u00a01."
            )
        else:
            yield (
                f"{_capital(name)} still gains from the last of its {most} members, which closes 5% or more of the gap that explained "
                "variance or stability had to\u00a01. More members may help."
            )


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
                f"Features of the last boosting round fire {more} than those of the first: the median one on {last:.2%} of tokens, in the "
                f"first round on {first:.2%}."
            )


def _unequal_sparsity(results: Results) -> Iterator[str]:
    sparsity = results.full("reconstruction", "l0")
    groups = _alike(sparsity, lambda one, other: abs(one - other) <= SAME_L0 * max(one, other))
    if len(groups) > 1:
        parts = [f"{listed([method(name).label for name in names])} {_between([sparsity[name] for name in names])}" for names in groups]
        yield (
            f"Methods do not use equally many features per token: {'; '.join(parts)}. More features explain more, so compare methods that "
            "use about as many, or look at the plots against L0 and bits."
        )


def _unequal_training(results: Results) -> Iterator[str]:
    flops = results.full("cost", "total_flops")
    if multiples := _multiples(flops):
        yield f"Training took unequal amounts of computation. In multiples of the cheapest: {multiples}."
        if "compute_matched" not in flops and "compute_matched" in get_args(Baseline):
            yield "Missing is one SAE that was trained for as long as all members together: `baselines: [compute_matched]` trains it."


def _unequal_inference(results: Results) -> Iterator[str]:
    if multiples := _multiples(results.full("cost", "inference_flops_per_token")):
        yield f"Using a trained dictionary costs unequally much, too. Computation per token, in multiples of the cheapest: {multiples}."


def _multiples(flops: Mapping[str, Spread]) -> str:
    """Methods with their computation in multiples of the cheapest; empty where all take about the same."""
    groups = _alike(flops, lambda one, other: max(one, other) <= SAME_COMPUTE * min(one, other))
    if len(groups) < 2:
        return ""
    least = flops[groups[0][0]].mean
    return "; ".join(
        f"{listed([method(name).label for name in names])} {_range([flops[name].mean / least for name in names])}" for names in groups
    )


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
    sure = "seeds do not change this order" if values[best].is_above(values[second]) else "seeds may change this order"
    if len(values[best].points) == 1:
        sure = "with one seed, this may be chance"
    return f"the next is {method(second).label} with {values[second].mean:{form}}; {sure}"


def _price(results: Results, name: str) -> str:
    """L0, training, and where it is more, computation in use: relative to a single SAE where there is one."""
    sparsity = results.full("reconstruction", "l0")
    training, inference = (
        {name: spread.mean for name, spread in results.full("cost", column).items()}
        for column in ("total_flops", "inference_flops_per_token")
    )
    parts = [f"{_between([sparsity[name]])} features per token"] if name in sparsity else []
    if name in training:
        single = training.get("single")
        parts.append(_times(training[name] / single) if single else f"{written(training[name], '.3g')} training FLOPs")
    if name in inference and inference[name] > SAME_COMPUTE * inference.get("single", inference[name]):
        parts.append(f"{_short(inference[name] / inference['single'])} times its computation in use")
    return listed(parts)


def _between(values: Sequence[Spread]) -> str:
    return _range([spread.mean for spread in values])


def _range(values: Sequence[float]) -> str:
    """`64` where all are written alike, else from the least to the most: `63 to 64`."""
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low} to {high}"


def _short(value: float) -> str:
    """Whole from ten on, else with two digits."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def _times(ratio: float) -> str:
    return "the training of one SAE" if abs(ratio - 1) < 0.05 else f"{_short(ratio)} times the training of one SAE"


def _largest(values: Mapping[str, Spread]) -> str:
    return max(values, key=lambda name: values[name].mean)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
