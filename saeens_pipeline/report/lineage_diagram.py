"""The diagram from corpus to tables: what the page draws as boxes, each with its data versions and its page in the Dagster UI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from saeens_pipeline.report.record import Found, Record, asset_link
from saeens_pipeline.storage.recipes import digest


@dataclass(frozen=True)
class Node:
    """A box: an asset, with the data version of each seed, or what lies outside, with a hash of what it is known by."""

    title: str
    versions: Sequence[tuple[str, str]]  # seed, or empty, and data version
    link: str = ""
    about: str = ""


@dataclass(frozen=True)
class Lane:
    """One way from activations to a dictionary: SAEs, in a chain or side by side, and what they become."""

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
    """What there is on disk; boxes of what is missing are left out."""
    lanes = [
        Lane("Bagging", "members differ in their initial weights only", *_ensemble(record, "bagging")),
        Lane("Boosting", "each round is trained on what those before it leave over", *_ensemble(record, "boosting"), chained=True),
        Lane("Baselines", "single SAEs to compare with", _nodes(record.of("baseline")), None),
    ]
    return Diagram(
        list(_outside(record)),
        [node for found in (record.tokens, record.activations) if found for node in _nodes([found])],
        [lane for lane in lanes if lane.nodes],
        _nodes(record.of("eval")),
    )


def _outside(record: Record) -> Iterator[Node]:
    if record.tokens:
        corpus = record.tokens.artefact.recipe["settings"]["corpus"]
        name = str(corpus.get("corpus") or corpus.get("name")) if isinstance(corpus, Mapping) else str(corpus)
        yield Node("corpus", [("", digest(corpus))], about=name)
    if record.activations:
        identity = record.setting("language_model")
        yield Node("language model", [("", digest(identity))], about=f"{record.language_model}, {record.setting('weights')}")


def _ensemble(record: Record, kind: str) -> tuple[list[Node], Node | None]:
    found = record.of(kind)
    whole = _nodes([each for each in found if each.artefact.recipe["builder"] == "ensemble"])
    return _nodes([each for each in found if each.artefact.recipe["builder"] != "ensemble"]), whole[0] if whole else None


def _nodes(found: Sequence[Found]) -> list[Node]:
    """One for each asset, rounds followed by what they leave over."""
    by_asset: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: (*_place(each.address.name), each.partition.seed or 0)):
        by_asset.setdefault(each.address.name, []).append(each)
    return [
        Node(
            of_asset[0].title,
            [("" if each.partition.seed is None else f"seed {each.partition.seed}", each.version) for each in of_asset],
            asset_link(of_asset[0].address),
        )
        for name, of_asset in by_asset.items()
    ]


def _place(name: str) -> tuple[str, int, str]:
    number = re.search(r"^(?:member|round|residual)_(\d+)$", name)
    return ("", int(number[1]), "0" if name.startswith("round") else "1") if number else (name, 0, "")
