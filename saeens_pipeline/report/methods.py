"""How each method is called, drawn and explained, the same on every page and in every picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method as a reader meets it.

    Colours are those of Okabe and Ito, which colour-blind readers can tell apart; symbols say the same to who sees none.
    `baseline`: of single SAEs that stand beside an ensemble of n members, what makes them comparable.
    """

    name: str
    label: str
    description: str
    colour: str
    symbol: str  # in plotly's names
    marker: str  # the same in matplotlib's
    glyph: str  # the same as text
    baseline: str = ""

    def at(self, n_members: int, most: int) -> str:
        """Which SAEs these are, beside ensembles of up to `most` members: only expanded ones have their own size in the tables."""
        n = n_members if self.name.startswith("expanded") else most
        return self.baseline.format(n=n) if self.baseline else f"n = {n_members}"


_KNOWN = {
    method.name: method
    for method in (
        Method("single", "single", "One SAE by itself: the first member of the bag.", "#7f7f7f", "circle", "o", "●", "one SAE"),
        Method(
            "bagging",
            "bagging",
            "An ensemble: the mean of SAEs that were trained on the same activations and differ in their random initial weights only.",
            "#0072b2",
            "square",
            "s",
            "■",
        ),
        Method(
            "boosting",
            "boosting",
            "An ensemble: the sum of SAEs, of which each (a round) is trained on what those before it leave over (the residual).",
            "#d55e00",
            "diamond",
            "D",
            "◆",
        ),
        Method(
            "expanded",
            "expanded",
            "One SAE with as many features as the whole ensemble, of which only as many fire per token as of a single SAE.",
            "#e69f00",
            "triangle-up",
            "^",
            "▲",
            "one SAE with as many features as {n} members",
        ),
        Method(
            "expanded_l0_matched",
            "expanded (L0 matched)",
            "One SAE with as many features as the whole ensemble, of which as many fire per token as of the ensemble.",
            "#009e73",
            "triangle-down",
            "v",
            "▼",
            "one SAE with as many features as {n} members, and as many that fire",
        ),
        Method(
            "compute_matched",
            "compute matched",
            "One SAE with a member's number of features, trained for as many steps as all members together.",
            "#cc79a7",
            "cross",
            "P",
            "✚",
            "one SAE, trained as long as {n} members together",
        ),
        Method(
            "matching_pursuit",
            "matching pursuit",
            "One SAE with as many features as the whole ensemble, which chooses them one after another, each for what is then left over.",
            "#56b4e9",
            "star",
            "*",
            "★",
            "one SAE with as many features as {n} members",
        ),
    )
}
ENSEMBLES = ("bagging", "boosting")
_RAW = Method("raw", "activations", "The activations themselves, without any dictionary.", "#b8a500", "x", "X", "✖")
_OTHER_COLOURS = ("#b8a500", "#8c6d31", "#5254a3", "#637939", "#843c39")


def method(name: str) -> Method:
    """What is known of a method, or for one that is not known here its name with a colour of its own."""
    if name in _KNOWN:
        return _KNOWN[name]
    if name == _RAW.name:
        return _RAW
    colour = _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)]
    return Method(name, name.replace("_", " "), "", colour, "hexagon", "h", "⬢")


def in_order(names: Iterable[str]) -> list[str]:
    """Each once: the known ones as they are explained above, then the others by name."""
    known = list(_KNOWN)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
