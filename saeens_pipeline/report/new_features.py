"""Features of the ensembles without a partner in their first SAE: how many there are, and which are worth reading.

Text of a corpus is returned as text; the templates escape it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

from saeens_pipeline.assets.over_seeds import Spread
from saeens_pipeline.report.feature_browser import ENSEMBLES, NEAR_DUPLICATE, FeatureBrowser, with_partner
from saeens_pipeline.report.methods import Method, in_order, method
from saeens_pipeline.report.results import Results

LISTED = 20  # features of a list
SHOWN_CONTEXTS = 3  # of a feature
_KEY = ["method", "member", "index"]
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_LINES = re.compile("\\s*[\n\r]\\s*")


class Piece(NamedTuple):
    """A part of a context: the text of the token on which the feature is most active (`fires`), or of the tokens around it."""

    text: str
    fires: bool


class Counts(NamedTuple):
    """Features of one ensemble over seeds. `of_others`: those of members or rounds 2 to J; the rest counts these alone.

    `alone`: features that fire and whose largest cosine to the features of member 1 is below 0.7; `share`: of those that fire.
    """

    method: Method
    features: Spread
    of_others: Spread
    dead: Spread
    alone: Spread
    share: Spread | None


@dataclass(frozen=True)
class Found:
    """A feature of a list. `partner`: index and cosine of the nearest feature of member 1; `seeds`: in how many other seeds it is found."""

    method: Method
    member: int
    index: int
    density: float
    mean_activation: float
    partner: tuple[int, float]
    nearest_cosine: float
    stability: float | None
    seeds: tuple[int, int] | None
    contexts: Sequence[Sequence[Piece]]
    top_tokens: Sequence[str]

    @property
    def place(self) -> str:
        return f"{ENSEMBLES[self.method.name]} {self.member} · {self.index}"

    @property
    def address(self) -> str:
        """Return the part of the address after `features.html`."""
        return f"#{self.method.name}/{self.member}/{self.index}"


class List(NamedTuple):
    title: str
    about: str
    features: Sequence[Found]


@dataclass(frozen=True)
class NewFeatures:
    """The section: counts of the experiment and of its control by method, and the lists of the browser's seed.

    `of_another_seed`: the reference, features of a single SAE without a partner in that of another seed, as a share of those that fire.
    """

    counts: Sequence[Counts]
    of_control: Mapping[str, Counts]
    of_another_seed: Spread | None
    lists: Sequence[List]
    has_contexts: bool

    @classmethod
    def read(cls, results: Results, untrained: Results | None, browser: FeatureBrowser | None) -> NewFeatures | None:
        """Return the section, or None without the table `features` of an ensemble of several SAEs."""
        counts = list(count(results))
        if not counts or browser is None:
            return None
        of_control = {each.method.name: each for each in count(untrained)} if untrained else {}
        return cls(
            counts,
            of_control,
            _of_another_seed(results),
            [each for each in _lists(results, browser) if each.features],
            browser.contexts is not None,
        )


def count(results: Results) -> Iterator[Counts]:
    """Yield the counts of each ensemble of several SAEs, means over seeds."""
    table = results.tables.get("features")
    if table is None or "matches" not in table.columns:
        return
    of_ensembles = table.filter(pl.col("method").is_in(list(ENSEMBLES)))
    others, fires = pl.col("member") > 1, pl.col("density") > 0
    alone = others & fires & (pl.col("first_cosine") < NEAR_DUPLICATE)
    counted = (
        with_partner(of_ensembles.select("method", "seed", "member", "density", "matches"))
        .group_by("method", "seed")
        .agg(features=pl.len(), of_others=others.sum(), dead=(others & ~fires).sum(), alone=alone.sum())
        .with_columns(share=pl.col("alone") / (pl.col("of_others") - pl.col("dead")))
        .sort("method", "seed")
    )
    for name in in_order(counted["method"]):
        rows = counted.filter(method=name)
        if rows["of_others"].sum():
            columns = {column: Spread.of(rows[column].cast(float).to_list()) for column in ("features", "of_others", "dead", "alone")}
            shares = rows["share"].drop_nans().to_list()
            yield Counts(method(name), **columns, share=Spread.of(shares) if shares else None)


def _of_another_seed(results: Results) -> Spread | None:
    table = results.tables.get("feature_stability")
    if table is None:
        return None
    fires = results.tables["features"].filter(pl.col("density") > 0, method="bagging", member=1).select("seed", "index")
    single = table.filter(method="single").drop_nulls("best_cosine").join(fires, on=["seed", "index"], how="semi")
    shares = single.group_by("seed").agg((pl.col("best_cosine") < NEAR_DUPLICATE).mean().alias("share")).sort("seed")["share"].to_list()
    return Spread.of(shares) if shares else None


def _lists(results: Results, browser: FeatureBrowser) -> Iterator[List]:
    """Yield the lists of features without a partner in member 1 that fire, under the browser's seed."""
    rows = with_partner(browser.rows).filter(pl.col("member") > 1, pl.col("density") > 0, pl.col("first_cosine") < NEAR_DUPLICATE)
    rows = rows.with_columns(contribution=pl.col("density") * pl.col("mean_activation"))
    rows = _with_seeds(rows, results, browser.seed)
    reader = _Reader(browser)
    if browser.other_seeds:
        order = ["n_found", "nearest_other_seed_cosine"]
        yield List(
            "The most stable",
            "Found in the most other seeds (a feature of cosine at least 0.7 in any member there), then by the largest cosine.",
            reader.first(rows.drop_nulls("nearest_other_seed_cosine").sort(order, descending=True, nulls_last=True)),
        )
    yield List(
        "The most surprising",
        "Features of later rounds of boosting, by density times mean activation: their mean activation over all test tokens.",
        reader.first(rows.filter(method="boosting").sort("contribution", descending=True)),
    )
    yield List(
        "The most different",
        "Features of a single member of bagging: the smallest largest cosine to the features of any other member, "
        "among those that fire often enough to have all their contexts.",
        reader.first(
            rows.filter(pl.col("nearest_cosine") < NEAR_DUPLICATE, method="bagging").sort("nearest_cosine"), needs_all_contexts=True
        ),
    )


def _with_seeds(rows: pl.DataFrame, results: Results, seed: int) -> pl.DataFrame:
    """Return the rows with `n_found` and `n_runs` of the table `feature_stability`; null without it."""
    table = results.tables.get("feature_stability")
    if table is None:
        return rows.with_columns(n_found=pl.lit(None, pl.Int64), n_runs=pl.lit(None, pl.Int64))
    return rows.join(table.filter(seed=seed).select(*_KEY, "n_found", "n_runs"), on=_KEY, how="left", maintain_order="left")


class _Reader:
    """Reads features and their contexts. Parses the contexts of the features that it returns, and of few others."""

    def __init__(self, browser: FeatureBrowser) -> None:
        self.contexts = None if browser.contexts is None else browser.contexts.select(*_KEY, "contexts")
        self.most = 0
        if self.contexts is not None:
            self.most = max((len(json.loads(text)) for text in self.contexts["contexts"].head(64)), default=0)

    def first(self, rows: pl.DataFrame, *, needs_all_contexts: bool = False) -> list[Found]:
        """Return the first features; near-duplicates of one before them are left out."""
        found: list[Found] = []
        taken: set[tuple[str, int, int]] = set()
        for part in rows.iter_slices(4 * LISTED):
            there = part
            if self.contexts is not None:
                there = part.join(self.contexts, on=_KEY, how="left", maintain_order="left")
            for row in there.iter_rows(named=True):
                near = {(row["method"], member, index) for member, index, cosine in json.loads(row["matches"]) if cosine >= NEAR_DUPLICATE}
                contexts = json.loads(row.get("contexts") or "[]")
                if near & taken or (needs_all_contexts and len(contexts) < self.most):
                    continue
                taken.add((row["method"], row["member"], row["index"]))
                found.append(_found(row, contexts))
                if len(found) == LISTED:
                    return found
        return found


def _found(row: Mapping[str, Any], contexts: Sequence[Mapping[str, Any]]) -> Found:
    seeds = None if row["n_found"] is None else (row["n_found"], row["n_runs"] - 1)
    return Found(
        *(method(row["method"]), row["member"], row["index"], row["density"], row["mean_activation"]),
        (row["first_index"], row["first_cosine"]),
        *(row["nearest_cosine"], row["nearest_other_seed_cosine"], seeds),
        [readable(each["tokens"], each["centre"]) for each in contexts[:SHOWN_CONTEXTS]],
        list(dict.fromkeys(readable([token], 0)[0].text.strip() for token in json.loads(row["top_tokens"]))),
    )


def readable(tokens: Sequence[str], centre: int) -> list[Piece]:
    """Return a context as prose: text before the token at `centre`, its text, and text after it; empty parts are left out.

    Bytes of a character that is several tokens (`<0xE2>`) are joined to the character, which counts to the centre if a byte of it does.
    Line breaks are written as `↵`; invisible characters and those that turn the direction of writing as their code.
    """
    data = [_bytes(token) for token in tokens]
    begin = sum(map(len, data[:centre]))
    end = begin + len(data[centre])
    parts = ["", "", ""]
    for start, character in _characters(b"".join(data)):
        length = len(character.encode())
        place = 0 if start + length <= begin else 1 if start < end else 2
        parts[place] += character
    before, fires, after = map(_visible, parts)
    if word := fires.strip():  # the mark is on the word, not on the space before it
        left, _, right = fires.partition(word)
        before, fires, after = before + left, word, right + after
    pieces = [Piece(before, False), Piece(fires, True), Piece(after, False)]
    return [piece for piece in pieces if piece.text or piece.fires]


def _bytes(token: str) -> bytes:
    parts = _BYTE.split(token)
    return b"".join(bytes([int(part, 16)]) if i % 2 else part.encode(errors="replace") for i, part in enumerate(parts))


def _characters(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield position and character; bytes that are no character, as at the ends of a window, are left out."""
    position = 0
    while position < len(data):
        for length in range(1, 5):
            try:
                character = data[position : position + length].decode()
            except UnicodeDecodeError:
                continue
            yield position, character
            break
        else:
            length = 1
        position += length


def _visible(text: str) -> str:
    text = _LINES.sub(" ↵ ", text)
    return "".join(character if _is_visible(character) else f"U+{ord(character):04X}" for character in text)


def _is_visible(character: str) -> bool:
    return character == "\t" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn")
