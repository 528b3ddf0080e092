"""Labels, descriptions, colours and symbols of the methods, the same on every page and in every picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method's label, description, colour and symbols.

    The colours are Okabe and Ito's, which colour-blind readers can tell apart; the symbols do not need colour. `baseline` is the size of a
    single SAE in words, with `{n}` for the number of members of the ensemble that it is compared with.
    """

    name: str
    label: str
    description: str
    colour: str
    symbol: str  # plotly's name
    marker: str  # matplotlib's name of the same symbol
    glyph: str  # the same symbol as text
    baseline: str = ""

    def at(self, n_members: int, most: int) -> str:
        """Return the size in words, compared with up to `most` members. Of the baselines, only expanded SAEs have their own size."""
        n = n_members if self.name.startswith("expanded") else most
        return self.baseline.format(n=n) if self.baseline else f"n = {n_members}"


_KNOWN = {
    name: Method(name, *about)
    for name, *about in (
        ("single", "single", "One SAE: the first member of bagging.", "#7f7f7f", "circle", "o", "●", "one SAE"),
        ("bagging", "bagging",
         "An ensemble: the mean of SAEs that are trained on the same activations and differ in their random initial weights only.",
         "#0072b2", "square", "s", "■"),
        ("boosting", "boosting", "An ensemble: the sum of SAEs. Each (a round) is trained on the residual of the rounds before it.",
         "#d55e00", "diamond", "D", "◆"),
        ("expanded", "expanded",
         "One SAE with as many features as the whole ensemble. As many features fire per token as in a single SAE.",
         "#e69f00", "triangle-up", "^", "▲", "one SAE with as many features as {n} members"),
        ("expanded_l0_matched", "expanded (L0 matched)",
         "One SAE with as many features as the whole ensemble. As many features fire per token as in the ensemble.",
         "#009e73", "triangle-down", "v", "▼", "one SAE with as many features as {n} members, and as many that fire"),
        ("compute_matched", "compute matched",
         "One SAE with as many features as a member, trained for as many steps as all members together.",
         "#cc79a7", "cross", "P", "✚", "one SAE, trained as long as {n} members together"),
        ("matching_pursuit", "matching pursuit",
         "One SAE with as many features as the whole ensemble. It chooses them one by one, each for the residual of those before.",
         "#56b4e9", "star", "*", "★", "one SAE with as many features as {n} members"),
        ("raw", "activations", "The activations themselves, without any dictionary.", "#b8a500", "x", "X", "✖"),
    )
}  # fmt: skip
ENSEMBLES = ("bagging", "boosting")
_OTHER_COLOURS = ("#b8a500", "#8c6d31", "#5254a3", "#637939", "#843c39")


def method(name: str) -> Method:
    """Return the label, colour and symbols of a method. An unknown method gets its name as label and a colour derived from the name."""
    colour = _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)]
    return _KNOWN.get(name) or Method(name, name.replace("_", " "), "", colour, "hexagon", "h", "⬢")


def in_order(names: Iterable[str]) -> list[str]:
    """Return each name once: the known ones in their order here, then the others by name."""
    known = list(_KNOWN)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def listed(parts: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
