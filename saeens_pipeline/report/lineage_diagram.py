"""The lineage diagram: boxes from corpus to tables, each with its data versions and its page in the Dagster UI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saeens_pipeline.report.record import Found, Record, named
from saeens_pipeline.storage.recipes import digest


@dataclass(frozen=True)
class Node:
    """A box: an asset with the data version of each seed, or an input from outside with the hash of its name or settings."""

    title: str
    versions: Sequence[tuple[str, str]]  # seed, or empty, and data version
    link: str = ""
    about: str = ""


@dataclass(frozen=True)
class Lane:
    """One way from activations to a dictionary: SAEs, in a chain or side by side, and their ensemble."""

    title: str
    about: str
    nodes: Sequence[Node]
    becomes: Node | None
    chained: bool = False


@dataclass(frozen=True)
class Diagram:
    """All boxes, from top to bottom."""

    outside: Sequence[Node]
    source: Sequence[Node]
    lanes: Sequence[Lane]
    tables: Sequence[Node]


def diagram(record: Record) -> Diagram:
    """Return the boxes of artefacts on disk."""
    lanes = [
        Lane("Bagging", "members differ in their initial weights only", *_ensemble(record, "bagging")),
        Lane("Boosting", "each round is trained on the residual of those before it", *_ensemble(record, "boosting"), chained=True),
        Lane("Baselines", "single SAEs to compare with", *_ensemble(record, "baseline")),
    ]
    source = [node for found in (record.tokens, record.activations) if found for node in _nodes([found])]
    return Diagram(list(_outside(record)), source, [lane for lane in lanes if lane.nodes], _nodes(record.of("eval")))


def _outside(record: Record) -> Iterator[Node]:
    if record.tokens:
        corpus = record.tokens.artefact.recipe["settings"]["corpus"]
        yield Node("corpus", [("", digest(corpus))], about=named(corpus))
    if record.activations:
        identity = record.setting("language_model")
        yield Node("language model", [("", digest(identity))], about=f"{record.language_model}, {record.setting('weights')}")


def _ensemble(record: Record, kind: str) -> tuple[list[Node], Node | None]:
    found = record.of(kind)
    whole = _nodes([each for each in found if each.artefact.recipe["builder"] == "ensemble"])
    return _nodes([each for each in found if each.artefact.recipe["builder"] != "ensemble"]), whole[0] if whole else None


def _nodes(found: Sequence[Found]) -> list[Node]:
    """Return one box for each asset; a round is followed by its residual."""
    by_asset: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: (*_place(each.address.name), each.partition.seed or 0)):
        by_asset.setdefault(each.address.name, []).append(each)
    return [
        Node(
            first.title,
            [("" if each.partition.seed is None else f"seed {each.partition.seed}", each.version) for each in (first, *others)],
            first.link,
        )
        for first, *others in by_asset.values()
    ]


def _place(name: str) -> tuple[str, int, str]:
    number = re.search(r"^(?:member|round|residual)_(\d+)$", name)
    return ("", int(number[1]), "0" if name.startswith("round") else "1") if number else (name, 0, "")
