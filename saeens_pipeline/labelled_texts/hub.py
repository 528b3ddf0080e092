"""SAEBench's data sets on the Hugging Face hub, read with `datasets` (the extra `hub`): their columns, labels and pairs.

No code of a data set is run. What is read is kept in the cache of `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.labelled_texts.drawing import (
    SPLITS,
    ConceptTexts,
    CorrelationTexts,
    Labelled,
    TextCount,
    draw_concepts,
    draw_quadrants,
)
from saeens_pipeline.labelled_texts.files import select_fields
from saeens_pipeline.language_models.hub import resolve_commit

if TYPE_CHECKING:
    import polars as pl

READER_VERSION = 1  # raised whenever other texts would be drawn
COUNT = TextCount(4000, 1000)
_SPARE = 1.25  # of a stream so many times what is needed is read, and drawn from
_GIVE_UP_AFTER = 2_000_000  # rows of a stream

_HasEnough = Callable[[str], bool]
"""Whether no more texts of a label are asked for."""

_BIOS, _AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
Values = Mapping[str, str]
"""What a label is called, by what is in the column; others keep their number."""

_PROFESSIONS: Values = {
    "0": "accountant", "1": "architect", "2": "attorney", "6": "dentist", "9": "filmmaker", "11": "journalist", "13": "nurse",
    "14": "painter", "18": "photographer", "19": "physician", "20": "poet", "21": "professor", "22": "psychologist", "25": "surgeon",
    "26": "teacher",
}  # fmt: skip
_GENDERS: Values = {"0": "male", "1": "female"}
_CATEGORIES: Values = {
    "1": "Toys_and_Games", "2": "Cell_Phones_and_Accessories", "3": "Industrial_and_Scientific", "5": "Musical_Instruments",
    "6": "Electronics", "11": "Office_Products", "18": "Pet_Supplies", "24": "Books", "26": "CDs_and_Vinyl", "30": "Software",
}  # fmt: skip
_RATINGS: Values = {"1": "1.0", "5": "5.0"}
_NEWS: Values = {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}
_CODE_SUFFIXES = {
    ".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".htm": "HTML", ".xht": "HTML", ".xhtml": "HTML", ".java": "Java",
    ".php": "PHP", ".php3": "PHP", ".php4": "PHP", ".php5": "PHP", ".phps": "PHP", ".phpt": "PHP",
}  # fmt: skip
_SKIPPED_CHARACTERS, _CODE_CHARACTERS = 150, 384  # a file's licence header, and what has to follow


@dataclass(frozen=True)
class HubSet:
    """One data set on the hub, or a part of it: `labels` are probed, balanced by the column `other` where there is one."""

    path: str
    text: str
    label: str
    names: Values
    labels: tuple[str, ...] = ()
    other: str | None = None
    other_names: Values = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    """target attributes of spurious correlation removal; `other` is the spurious one"""
    spurious: tuple[str, str] = ("", "")


def _bios(*labels: str) -> HubSet:
    pairs = (("professor", "nurse"), ("architect", "journalist"), ("surgeon", "psychologist"), ("attorney", "teacher"))
    return HubSet(_BIOS, "hard_text", "profession", _PROFESSIONS, labels, "gender", _GENDERS, pairs, ("male", "female"))


def _amazon(*labels: str) -> HubSet:
    pairs = (
        ("Books", "CDs_and_Vinyl"),
        ("Software", "Electronics"),
        ("Pet_Supplies", "Office_Products"),
        ("Industrial_and_Scientific", "Toys_and_Games"),
    )
    return HubSet(_AMAZON, "text", "category", _CATEGORIES, labels, "rating", _RATINGS, pairs, ("1.0", "5.0"))


GITHUB_CODE, EUROPARL = "codeparrot/github-code", "Helsinki-NLP/europarl"
_STREAMED = {GITHUB_CODE: ("C", "Python", "HTML", "Java", "PHP"), EUROPARL: ("en", "fr", "de", "es", "nl")}
_EUROPARL_PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
_WHOLE = {
    "LabHC/bias_in_bios_class_set1": _bios("accountant", "architect", "attorney", "dentist", "filmmaker"),
    "LabHC/bias_in_bios_class_set2": _bios("journalist", "nurse", "painter", "photographer", "physician"),
    "LabHC/bias_in_bios_class_set3": _bios("poet", "professor", "psychologist", "surgeon", "teacher"),
    _AMAZON: _amazon(*(_CATEGORIES[number] for number in "12356")),
    f"{_AMAZON}_sentiment": HubSet(_AMAZON, "text", "rating", _RATINGS, ("1.0", "5.0")),
    "fancyzhx/ag_news": HubSet("fancyzhx/ag_news", "text", "label", _NEWS, tuple(_NEWS.values())),
}
_PAIRED = {_BIOS: _bios(), _AMAZON: _amazon()}
CONCEPTS = (*_WHOLE, *_STREAMED)
CORRELATIONS = tuple(_PAIRED)


def commit(name: str, revision: str) -> str:
    """The commit of the repository that a data set in `CONCEPTS` or `CORRELATIONS` is read from.

    Raises ConfigurationError without the package datasets, and as `resolve_commit`.
    """
    _load_dataset(name)
    return resolve_commit(_repository(name), revision, "dataset")


def _load_dataset(name: str) -> Callable[..., Any]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{name} is read with the package datasets: pip install 'saeens[hub]'") from error
    return load_dataset


def _repository(name: str) -> str:
    known = _WHOLE.get(name) or _PAIRED.get(name)
    return known.path if known else name


@dataclass(frozen=True)
class HubReader:
    """Reads at one revision, or from `path`, a local copy that `datasets` can load: a folder with files of the same columns."""

    revision: str = "main"
    path: str | None = None

    def concepts(self, name: str, count: TextCount | None, seed: int, labels: Sequence[str] = ()) -> ConceptTexts:
        """The texts of a data set in `CONCEPTS`. Raises SaeensError where it cannot be read, or has too few texts."""
        count = count or COUNT
        if name in _STREAMED:
            streamed = Labelled(name, self._stream(name, count))
            return draw_concepts(streamed, labels or _STREAMED[name], count, balance=False, seed=seed)
        hub_set = _WHOLE[name]
        return draw_concepts(self._whole(name, hub_set), labels or hub_set.labels, count, balance=hub_set.other is not None, seed=seed)

    def correlations(self, name: str, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
        """The texts of every pair of a data set in `CORRELATIONS`. Raises as `concepts`."""
        hub_set = _PAIRED[name]
        data = self._whole(name, hub_set)
        return [
            draw_quadrants(data, f"{name}: {pair[0]} or {pair[1]}", pair, hub_set.spurious, count or COUNT, seed=seed)
            for pair in hub_set.pairs
        ]

    def _whole(self, name: str, hub_set: HubSet) -> Labelled:
        """Both splits, each held in memory with its texts and labels alone."""
        import polars as pl

        fields = {"text": hub_set.text, "label": hub_set.label} | ({"other": hub_set.other} if hub_set.other else {})
        frames = []
        for split in SPLITS:
            loaded = self._load(name, hub_set.path, split=split)
            frame = pl.from_arrow(loaded.with_format("arrow")[:])
            assert isinstance(frame, pl.DataFrame)
            selected = select_fields(f"{name}, {split} split,", frame.lazy(), fields)
            named = {"label": hub_set.names} | ({"other": hub_set.other_names} if hub_set.other else {})
            frames.append(selected.with_columns(pl.col(column).replace(values) for column, values in named.items()).collect())
        return Labelled(name, *frames)

    def _stream(self, name: str, count: TextCount) -> pl.DataFrame:
        """The first texts of each label; memory: those alone."""
        import polars as pl

        wanted = int(sum(count) / 2 * _SPARE)
        found: dict[str, dict[str, None]] = {label: {} for label in _STREAMED[name]}  # in order, none twice
        with self._explained(name, name):  # a stream is read as it is asked for
            for label, text in _STREAMS[name](self, lambda label: len(found[label]) == wanted):
                if label in found and len(found[label]) < wanted and text.strip():
                    found[label][text] = None
                    if all(len(texts) == wanted for texts in found.values()):
                        break
        rows = [(text, label) for label, texts in found.items() for text in texts]
        return pl.DataFrame(rows, schema={"text": pl.String, "label": pl.String}, orient="row")

    def _github_code(self, _has_enough: _HasEnough) -> Iterator[tuple[str, str]]:
        """Files without their first characters, as SAEBench takes them: the Parquet files themselves, since the hub's reader is code."""
        files = {} if self.path else {"data_files": f"hf://datasets/{GITHUB_CODE}@{commit(GITHUB_CODE, self.revision)}/data/*.parquet"}
        loaded = self._load(GITHUB_CODE, GITHUB_CODE if self.path else "parquet", split="train", streaming=True, **files)
        for number, row in enumerate(loaded):
            code = _field(GITHUB_CODE, row, "code", "content")
            language = row.get("language") or _CODE_SUFFIXES.get(PurePosixPath(_field(GITHUB_CODE, row, "path")).suffix.lower())
            if language and len(code) > _SKIPPED_CHARACTERS + _CODE_CHARACTERS:
                yield language, code[_SKIPPED_CHARACTERS:]
            if number == _GIVE_UP_AFTER:
                return

    def _europarl(self, has_enough: _HasEnough) -> Iterator[tuple[str, str]]:
        """Sentences of each language, one language after another."""
        for language, pair in _EUROPARL_PAIRS.items():
            for number, row in enumerate(self._load(EUROPARL, EUROPARL, config=pair, split="train", streaming=True)):
                translation = _field(EUROPARL, row, "translation")
                yield language, _field(EUROPARL, translation, language)
                if has_enough(language) or number == _GIVE_UP_AFTER:
                    break

    def _load(self, name: str, on_hub: str, config: str | None = None, **arguments: Any) -> Any:
        load_dataset = _load_dataset(name)
        with self._explained(name, on_hub):
            if self.path:
                return load_dataset(self.path, config, **arguments)
            pinned = {} if on_hub == "parquet" else {"revision": resolve_commit(on_hub, self.revision, "dataset")}
            return load_dataset(on_hub, config, **pinned, **arguments)

    @contextmanager
    def _explained(self, name: str, on_hub: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # of which all errors of datasets and of the hub are
            where = self.path or f"{on_hub} at revision {self.revision} of the hub"
            raise SaeensError(
                f"{name} cannot be read from {where}: {error}. Without a connection give `path: FOLDER`, a local copy; where the hub asks "
                "for a login, `hf auth login`"
            ) from error


_STREAMS: Mapping[str, Callable[[HubReader, _HasEnough], Iterator[tuple[str, str]]]] = {
    GITHUB_CODE: HubReader._github_code,
    EUROPARL: HubReader._europarl,
}


def _field(name: str, row: Mapping[str, Any], *columns: str) -> Any:
    """The first of these columns that there is. Raises ConfigurationError where there is none, with those that there are."""
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    raise ConfigurationError(f"{name} has no column {' or '.join(map(repr, columns))}; its columns are {', '.join(map(repr, row))}")
