"""Labels, descriptions, colours and symbols of the methods, the same on every page and in every picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from saeens_pipeline.assets.baselines.registry import BASELINES, methods
from saeens_pipeline.assets.baselines.registry import listed as baselines


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
    is_sized: bool = field(default=False, kw_only=True)  # a single SAE with a size of its own

    def at(self, n_members: int, most: int) -> str:
        """Return the size in words, compared with up to `most` members."""
        n = n_members if self.is_sized else most
        return self.baseline.format(n=n) if self.baseline else f"n = {n_members}"


_NO_BASELINES = {
    name: Method(name, *about)
    for name, *about in (
        ("single", "single", "One SAE: the first member of bagging.", "#7f7f7f", "circle", "o", "●", "one SAE"),
        ("bagging", "bagging",
         "An ensemble: the mean of SAEs that are trained on the same activations and differ in their random initial weights only.",
         "#0072b2", "square", "s", "■"),
        ("boosting", "boosting", "An ensemble: the sum of SAEs. Each (a round) is trained on the residual of the rounds before it.",
         "#d55e00", "diamond", "D", "◆"),
        ("raw", "activations", "The activations themselves, without any dictionary.", "#b8a500", "x", "X", "✖"),
    )
}  # fmt: skip
_OF_BASELINES = (  # colour and symbols of the registered baselines, in their order
    ("#e69f00", "triangle-up", "^", "▲"),
    ("#009e73", "triangle-down", "v", "▼"),
    ("#cc79a7", "cross", "P", "✚"),
    ("#56b4e9", "star", "*", "★"),
    ("#8c6d31", "pentagon", "p", "⬟"),
    ("#5254a3", "triangle-left", "<", "◀"),
    ("#637939", "triangle-right", ">", "▶"),
    ("#843c39", "diamond-tall", "d", "♦"),
    ("#17807e", "hexagram", "8", "✶"),
    ("#7b4173", "triangle-ne", "3", "◥"),
    ("#a55194", "triangle-sw", "4", "◣"),
    ("#3d5a80", "bowtie", "1", "⧓"),
)
_OTHER_COLOURS = ("#b8a500", "#8c6d31", "#5254a3", "#637939", "#843c39")


def method(name: str) -> Method:
    """Return the label, colour and symbols of a method. An unknown method gets its name as label and a colour derived from the name."""
    if name in _NO_BASELINES:
        return _NO_BASELINES[name]
    of_name = _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)], "hexagon", "h", "⬢"
    if name not in BASELINES:
        return Method(name, name.replace("_", " "), "", *of_name)
    baseline, place = BASELINES[name], baselines().index(BASELINES[name])
    style = _OF_BASELINES[place] if place < len(_OF_BASELINES) else of_name
    return Method(name, baseline.label, baseline.about, *style, baseline.size, is_sized=baseline.is_sized)


def in_order(names: Iterable[str]) -> list[str]:
    """Return each name once: single SAEs, ensembles, baselines and raw activations in this order, then the others by name."""
    known = [*methods(), "raw"]
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def listed(parts: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
