"""Reproducible drawing of balanced texts, in two splits, from labelled ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import NamedTuple

import polars as pl

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.settings.labelled_data_sets import TextCount

SPLITS: tuple[Split, ...] = ("train", "test")
_LABEL_CHARACTERS = 60  # longest label in an error message


@dataclass(frozen=True)
class ConceptTexts:
    """A data set for concept detection: texts by label, for each split."""

    name: str
    train: Mapping[str, Sequence[str]]
    test: Mapping[str, Sequence[str]]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """numbers of rows of the data set that cannot be drawn, by reason"""


class QuadrantTexts(NamedTuple):
    """Texts by the pair (target attribute, spurious attribute): q texts per pair, 2 q for pairs that agree."""

    both: Sequence[str]
    only_target: Sequence[str]
    only_spurious: Sequence[str]
    neither: Sequence[str]


@dataclass(frozen=True)
class CorrelationTexts:
    """A task of spurious correlation removal. The first value of an attribute is the positive one."""

    name: str
    target: tuple[str, str]
    spurious: tuple[str, str]
    train: QuadrantTexts
    test: QuadrantTexts
    left_out: Mapping[str, int] = field(default_factory=dict)
    """as of ConceptTexts"""


class Labelled(NamedTuple):
    """Texts of a data set: frames with the string columns `text`, `label` and, for a second attribute, `other`.

    Without a `test` frame, test texts are drawn from `train`, without overlap.
    """

    name: str
    train: pl.DataFrame
    test: pl.DataFrame | None = None
    labels: Sequence[str] = ()
    """labels to draw if the settings name none; empty: all labels"""
    pairs: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {}
    """tasks of spurious correlation removal: target and spurious values by name"""
    n_incomplete: int = 0
    """number of rows that the frames lack because of a null"""


def select_fields(what: str, frame: pl.LazyFrame, fields: Mapping[str, str]) -> pl.LazyFrame:
    """Return columns of a frame as strings, without rows that have a null. `fields` maps new names to columns of the frame.

    Raises ConfigurationError for a missing column, with the existing ones.
    """
    there_are = frame.collect_schema().names()
    missing = [column for column in fields.values() if column not in there_are]
    if missing:
        raise ConfigurationError(f"{what} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, there_are))}")
    return frame.select(pl.col(column).cast(pl.String).alias(new) for new, column in fields.items()).drop_nulls()


def draw_concepts(data: Labelled, labels: Sequence[str], count: TextCount, *, balance: bool, seed: int) -> ConceptTexts:
    """Draw half of `count` for each label (for all labels if `labels` is empty), with `balance` evenly from each value of `other`.

    Texts that have several labels anywhere in the data set are left out. Raises ConfigurationError for a single label, a label without
    texts, or too few texts.
    """
    there_are = sorted(data.train["label"].unique())
    labels = labels or there_are
    data, left_out = _drawable(data, ["label", "other"] if balance else ["label"])
    if len(labels) < 2:
        there_is = f"the only label is {labels[0]!r}" if labels else "no text has a label"
        raise ConfigurationError(f"{data.name}: {there_is}; a probe needs texts of at least two labels")
    others: list[str | None] = [*sorted(data.train["other"].unique())] if balance else [None]
    each = TextCount(*(n // 2 // len(others) for n in count))
    drawn = {label: [_draw(data, (label, other), each, seed) for other in others] for label in labels}
    train, test = ({label: [text for part in parts for text in part[i]] for label, parts in drawn.items()} for i in (0, 1))
    return ConceptTexts(data.name, train, test, left_out)


def draw_quadrants(
    data: Labelled, name: str, target: tuple[str, str], spurious: tuple[str, str], count: TextCount, *, seed: int
) -> CorrelationTexts:
    """Draw a quarter of `count` for each pair of target (`label`) and spurious (`other`) attribute, half if both agree.

    Raises ConfigurationError as `draw_concepts`.
    """
    data, left_out = _drawable(data, ["label", "other"])
    quarter = TextCount(*(n // 4 for n in count))
    half = TextCount(*(2 * n for n in quarter))
    drawn = [
        _draw(data, (label, other), half if (label == target[0]) == (other == spurious[0]) else quarter, seed)
        for label in target
        for other in spurious
    ]
    train, test = (QuadrantTexts(*(parts[i] for parts in drawn)) for i in (0, 1))
    return CorrelationTexts(name, target, spurious, train, test, left_out)


def _drawable(data: Labelled, columns: Sequence[str]) -> tuple[Labelled, Mapping[str, int]]:
    """Leave out texts with several labels, and empty ones; return the numbers of rows that are left out, by reason.

    A text with several labels would be a positive and a negative text of a probe, or in train and in test.
    """
    frames = [frame for frame in (data.train, data.test) if frame is not None]
    with_text = [frame.filter(pl.col("text").str.strip_chars() != "") for frame in frames]
    labels = pl.concat([frame.select("text", *columns) for frame in with_text]).unique()
    several = labels.group_by("text").len().filter(pl.col("len") > 1)
    left = [frame.join(several, on="text", how="anti", maintain_order="left") for frame in with_text]
    n_read, n_with_text, n_left = (sum(map(len, each)) for each in (frames, with_text, left))
    n_left_out = {"without a text or a label": data.n_incomplete + n_read - n_with_text, "with several labels": n_with_text - n_left}
    return data._replace(train=left[0], test=left[1] if len(left) > 1 else None), {why: n for why, n in n_left_out.items() if n}


def _draw(data: Labelled, labels: tuple[str, str | None], wanted: TextCount, seed: int) -> tuple[list[str], list[str]]:
    """Return train and test texts of a label and, unless None, a value of the other attribute, in an order that seed and text decide."""
    pool = _pool(data, "train", labels, seed)
    train = dict.fromkeys(pool[: wanted.train])
    test = [text for text in (pool if data.test is None else _pool(data, "test", labels, seed)) if text not in train]
    found = [*train], test[: wanted.test]
    for split, texts, asked in zip(SPLITS, found, wanted, strict=True):
        if len(texts) < asked:
            what = " and ".join(repr(shorten(label, _LABEL_CHARACTERS, placeholder=" ...")) for label in labels if label is not None)
            there_are = "is 1 different one" if len(texts) == 1 else f"are {len(texts)} different ones"
            are_left = f" and {wanted.train} train texts" if data.test is None and split == "test" else ""
            raise ConfigurationError(
                f"{data.name}: {asked} {split} texts of {what} are needed{are_left}, and there {there_are}: lower {split}_texts"
            )
    return found


def _pool(data: Labelled, split: Split, labels: tuple[str, str | None], seed: int) -> list[str]:
    frame = data.test if split == "test" and data.test is not None else data.train
    for column, value in zip(("label", "other"), labels, strict=True):
        if value is None:
            continue
        if value not in frame[column]:
            there_are = ", ".join(map(repr, sorted(frame[column].unique())[:20])) or "none"
            raise ConfigurationError(f"{data.name}, {split} split: no text has the label {value!r}; the labels are {there_are}")
        frame = frame.filter(pl.col(column) == value)
    texts = {text for text in frame["text"] if text.strip()}
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
