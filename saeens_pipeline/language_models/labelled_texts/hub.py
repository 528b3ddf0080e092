"""SAEBench's data sets on the Hugging Face hub, read with `datasets` (the extra `hub`).

Code of data sets is not run. `datasets` keeps downloaded data in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import polars as pl

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.hub import resolve_commit
from saeens_pipeline.language_models.labelled_texts.drawing import SPLITS, Labelled, select_fields
from saeens_pipeline.settings.labelled_data_sets import EUROPARL, EUROPARL_PAIRS, GITHUB_CODE, HUB_SETS, STREAMED, TextCount

READER_VERSION = 2  # increased with every change of the drawn texts
COUNT = TextCount(4000, 1000)
_SPARE = 1.25  # texts that are read from a stream, per text that is drawn from them
_GIVE_UP_AFTER = 2_000_000  # rows of a stream

_CODE_SUFFIXES = {
    ".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".htm": "HTML", ".xht": "HTML", ".xhtml": "HTML", ".java": "Java",
    ".php": "PHP", ".php3": "PHP", ".php4": "PHP", ".php5": "PHP", ".phps": "PHP", ".phpt": "PHP",
}  # fmt: skip
_SKIPPED_CHARACTERS, _CODE_CHARACTERS = 150, 384  # of a file: skipped as licence header, and needed after it


def commit(name: str, revision: str) -> str:
    """Return the commit of the repository of a labelled data set.

    Raises ConfigurationError without the package datasets, and as `resolve_commit`.
    """
    _load_dataset(name)
    return resolve_commit(HUB_SETS[name].path if name in HUB_SETS else name, revision, "dataset")


def _load_dataset(name: str) -> Callable[..., Any]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{name} is read with the package datasets: pip install 'saeens[hub]'") from error
    return load_dataset


@dataclass(frozen=True)
class HubReader:
    """Reader of one revision or of `path`, a local copy: a folder of files with the same columns that `datasets` can load."""

    revision: str = "main"
    path: str | None = None

    def labelled(self, name: str, count: TextCount) -> Labelled:
        """Return the texts of a data set, with its labels or pairs of labels. Raises SaeensError if it cannot be read.

        Memory: the texts and labels; of a data set that is read as a stream, `count` texts and some more.
        """
        if name in STREAMED:
            return Labelled(name, self._stream(name, count), labels=STREAMED[name])
        hub_set = HUB_SETS[name]
        fields = {"text": hub_set.text, "label": hub_set.label} | ({"other": hub_set.other} if hub_set.other else {})
        names = {"label": hub_set.names, "other": hub_set.other_names}
        frames, n_incomplete = [], 0
        for split in SPLITS:
            frame = pl.from_arrow(self._load(name, hub_set.path, split=split).with_format("arrow")[:])
            assert isinstance(frame, pl.DataFrame)
            selected = select_fields(f"{name}, {split} split,", frame.lazy(), fields)
            frames.append(selected.with_columns(pl.col(column).replace(names[column]) for column in names if column in fields).collect())
            n_incomplete += len(frame) - len(frames[-1])
        pairs = {f"{name}: {pair[0]} or {pair[1]}": (pair, hub_set.spurious) for pair in hub_set.pairs}
        return Labelled(name, *frames, labels=hub_set.labels, pairs=pairs, n_incomplete=n_incomplete)

    def _stream(self, name: str, count: TextCount) -> pl.DataFrame:
        """Return the first texts of each label. Memory: these texts."""
        wanted = int(sum(count) / 2 * _SPARE)
        found: dict[str, dict[str, None]] = {label: {} for label in STREAMED[name]}  # in order, none twice
        with self._explained(name, name):  # a stream is read during iteration
            texts_of = self._github_code() if name == GITHUB_CODE else self._europarl(lambda label: len(found[label]) == wanted)
            for label, text in texts_of:
                if label in found and len(found[label]) < wanted and text.strip():
                    found[label][text] = None
                    if all(len(texts) == wanted for texts in found.values()):
                        break
        rows = [(text, label) for label, texts in found.items() for text in texts]
        return pl.DataFrame(rows, schema={"text": pl.String, "label": pl.String}, orient="row")

    def _github_code(self) -> Iterator[tuple[str, str]]:
        """Yield language and text of source files, without their first characters, as in SAEBench.

        Reads the Parquet files of the data set: its own reader is a script, which `datasets` no longer runs.
        """
        files = {} if self.path else {"data_files": f"hf://datasets/{GITHUB_CODE}@{commit(GITHUB_CODE, self.revision)}/data/*.parquet"}
        loaded = self._load(GITHUB_CODE, GITHUB_CODE if self.path else "parquet", split="train", streaming=True, **files)
        for number, row in enumerate(loaded):
            code = _field(GITHUB_CODE, row, "code", "content")
            language = row.get("language") or _CODE_SUFFIXES.get(PurePosixPath(_field(GITHUB_CODE, row, "path")).suffix.lower())
            if language and len(code) > _SKIPPED_CHARACTERS + _CODE_CHARACTERS:
                yield language, code[_SKIPPED_CHARACTERS:]
            if number == _GIVE_UP_AFTER:
                return

    def _europarl(self, has_enough: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
        """Yield sentences of each language, one language after another, until it `has_enough`."""
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
        except (OSError, ValueError, RuntimeError) as error:  # bases of all errors of datasets and of the hub
            where = self.path or f"{on_hub} at revision {self.revision} of the hub"
            raise SaeensError(
                f"{name} cannot be read from {where}: {error}. Without a connection give `path: FOLDER`, a local copy; where the hub asks "
                "for a login, `hf auth login`"
            ) from error


def _field(name: str, row: Mapping[str, Any], *columns: str) -> Any:
    """Return the value of the first existing column. Raises ConfigurationError, with the existing columns, if there is none of these."""
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    raise ConfigurationError(f"{name} has no column {' or '.join(map(repr, columns))}; its columns are {', '.join(map(repr, row))}")
