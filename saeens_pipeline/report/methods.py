"""How each method is called, drawn and explained, the same on every page and in every picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method as a reader meets it.

    Colours are those of Okabe and Ito, which colour-blind readers can tell apart; symbols say the same to who sees none.
    `sizes`: whether it exists with 1 .. J members, which are drawn as a line.
    """

    name: str
    label: str
    description: str
    colour: str
    symbol: str  # in plotly's names
    marker: str  # the same in matplotlib's
    glyph: str  # the same as text
    sizes: bool = False


_KNOWN = {
    method.name: method
    for method in (
        Method("single", "single", "One SAE: member 1 of the bag.", "#7f7f7f", "circle", "o", "●"),
        Method(
            "bagging",
            "bagging",
            "The mean of SAEs that differ only in their initial weights.",
            "#0072b2",
            "square",
            "s",
            "■",
            sizes=True,
        ),
        Method(
            "boosting",
            "boosting",
            "The sum of SAEs of which each is trained on what those before it leave over.",
            "#d55e00",
            "diamond",
            "D",
            "◆",
            sizes=True,
        ),
        Method(
            "expanded",
            "expanded",
            "One SAE as wide as the whole ensemble, with a single SAE's sparsity.",
            "#e69f00",
            "triangle-up",
            "^",
            "▲",
        ),
        Method(
            "expanded_l0_matched",
            "expanded (L0 matched)",
            "One SAE as wide as the whole ensemble, of which as many features fire per token as of the ensemble.",
            "#009e73",
            "triangle-down",
            "v",
            "▼",
        ),
        Method(
            "compute_matched",
            "compute matched",
            "One SAE of a member's width, trained for as many steps as all members together.",
            "#cc79a7",
            "cross",
            "P",
            "✚",
        ),
        Method(
            "matching_pursuit",
            "matching pursuit",
            "One SAE whose single dictionary is applied again and again to what is left over.",
            "#56b4e9",
            "star",
            "*",
            "★",
        ),
    )
}
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
