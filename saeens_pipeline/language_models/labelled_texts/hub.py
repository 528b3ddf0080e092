"""SAEBench's data sets on the Hugging Face hub, read with `datasets` (the extra `hub`): their columns, labels and pairs.

No code of a data set is run. What is read is kept in the cache of `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.hub import resolve_commit
from saeens_pipeline.language_models.labelled_texts.drawing import (
    SPLITS,
    ConceptTexts,
    CorrelationTexts,
    Labelled,
    draw_concepts,
    draw_quadrants,
)
from saeens_pipeline.language_models.labelled_texts.files import select_fields
from saeens_pipeline.settings.labelled_data_sets import (
    EUROPARL,
    EUROPARL_PAIRS,
    GITHUB_CODE,
    PAIRED,
    STREAMED,
    WHOLE,
    HubSet,
    TextCount,
)

if TYPE_CHECKING:
    import polars as pl

READER_VERSION = 1  # raised whenever other texts would be drawn
COUNT = TextCount(4000, 1000)
_SPARE = 1.25  # of a stream so many times what is needed is read, and drawn from
_GIVE_UP_AFTER = 2_000_000  # rows of a stream

_HasEnough = Callable[[str], bool]
"""Whether no more texts of a label are asked for."""

_CODE_SUFFIXES = {
    ".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".htm": "HTML", ".xht": "HTML", ".xhtml": "HTML", ".java": "Java",
    ".php": "PHP", ".php3": "PHP", ".php4": "PHP", ".php5": "PHP", ".phps": "PHP", ".phpt": "PHP",
}  # fmt: skip
_SKIPPED_CHARACTERS, _CODE_CHARACTERS = 150, 384  # a file's licence header, and what has to follow


def commit(name: str, revision: str) -> str:
    """The commit of the repository that a data set with labels is read from.

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
    known = WHOLE.get(name) or PAIRED.get(name)
    return known.path if known else name


@dataclass(frozen=True)
class HubReader:
    """Reads at one revision, or from `path`, a local copy that `datasets` can load: a folder with files of the same columns."""

    revision: str = "main"
    path: str | None = None

    def concepts(self, name: str, count: TextCount | None, seed: int, labels: Sequence[str] = ()) -> ConceptTexts:
        """The texts of a data set for concept detection. Raises SaeensError where it cannot be read, or has too few texts."""
        count = count or COUNT
        if name in STREAMED:
            streamed = Labelled(name, self._stream(name, count))
            return draw_concepts(streamed, labels or STREAMED[name], count, balance=False, seed=seed)
        hub_set = WHOLE[name]
        return draw_concepts(self._whole(name, hub_set), labels or hub_set.labels, count, balance=hub_set.other is not None, seed=seed)

    def correlations(self, name: str, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
        """The texts of every pair of a data set for spurious correlation. Raises as `concepts`."""
        hub_set = PAIRED[name]
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
        found: dict[str, dict[str, None]] = {label: {} for label in STREAMED[name]}  # in order, none twice
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
        for language, pair in EUROPARL_PAIRS.items():
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
