"""Token windows of a corpus on disk: the inputs of the language model, and a mask of the positions that become activation rows.

`tokens.zarr` is a Zarr v3 group with these arrays for each split, `train` and `test`, all of shape `[n_windows, context_length]`:

* `tokens`: token ids, with padding at the end of a short window.
* `kept`: true for positions that become activation rows. Row r of an activation store is the r-th kept position, window by window,
  so that the window of any row can be found.
* `document`: index of the token's document in `documents.parquet`; -1 for padding.
* `position`: index of the token in its document, from 0.

`documents.parquet`, in the folder of the group, has a row for every used document: split, document, name, and a column for each label of
the corpus, such as language. Of a mixed corpus, the column `corpus` has the name of the document's corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.documents import Corpus, Document, Split
from saeens_pipeline.language_models.gguf_loading import dequantise
from saeens_pipeline.language_models.mixtures import MixedCorpus
from saeens_pipeline.storage.disk import require_free_disk

if TYPE_CHECKING:
    import torch
    import zarr

Packing = Literal["document", "concatenate"]
Drop = Literal["special", "padding", "first"]

SPLITS: tuple[Split, ...] = get_args(Split)
MIN_WINDOW = 2  # tokens; a single token has no context
_CHUNK_TOKENS = 2**18
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 500, 1_000_000  # limits of a tokenised batch
_PADDING = -1  # in `document`
_SHOWN_LABELS = 20


@dataclass(frozen=True)
class SplitTokens:
    """Counts of one split. `rows` counts the kept positions, `tokens` all positions except padding."""

    rows: int
    tokens: int
    windows: int
    documents: int


@dataclass(frozen=True)
class TokenStatistics:
    """Counts of `tokens.zarr`, by split."""

    train: SplitTokens
    test: SplitTokens


class TokenBatch(NamedTuple):
    """Windows, all `[n_windows, context_length]`, with the arrays that the module documents."""

    tokens: torch.Tensor  # int64
    kept: torch.Tensor  # bool
    document: torch.Tensor  # int32
    position: torch.Tensor  # int32

    @property
    def is_text(self) -> torch.Tensor:
        """bool, false for padding."""
        return self.document != _PADDING

    def by_length(self, needed: torch.Tensor, most_tokens: int) -> Iterator[tuple[torch.Tensor, TokenBatch]]:
        """Yield the windows in batches of similar length, with their numbers `[b]`, from short to long; each ends with its longest window.

        needed: bool `[n_windows, context_length]`. A window ends with its last needed position; one without any is left out.
        most_tokens: largest number of positions of a batch, with padding, unless a single window has more.
        """
        import torch

        lengths = (needed * torch.arange(1, needed.shape[1] + 1)).amax(1)
        order = lengths.argsort(stable=True)
        order = order[lengths[order] > 0]
        first = 0
        for end in range(1, len(order) + 1):
            if end == len(order) or (end + 1 - first) * int(lengths[order[end]]) > most_tokens:
                numbers = order[first:end]
                yield numbers, TokenBatch(*(values[numbers, : int(lengths[numbers[-1]])] for values in self))
                first = end


class Surroundings(NamedTuple):
    """Tokens around central places of a split, from the same window each."""

    tokens: np.ndarray  # int64 [n, 2 * radius + 1], of any value outside of text
    kept: np.ndarray  # bool, the same shape: positions with an activation row
    is_text: np.ndarray  # bool, the same shape: positions inside the window and not padding
    document: np.ndarray  # int32 [n], of the central token
    position: np.ndarray  # int32 [n], of the central token


def write_tokens(
    path: Path,
    corpus: Corpus | MixedCorpus,
    description: LanguageModelDescription,
    *,
    context_length: int,
    packing: Packing,
    drop: Collection[Drop],
    train_tokens: int,
    test_tokens: int,
    windows_per_document: int | None = None,
    prepend_bos: bool = False,
    report: Callable[[int, int], None] = lambda rows, total_rows: None,
) -> TokenStatistics:
    """Tokenise documents until there are exactly `train_tokens` and `test_tokens` kept positions, and write them to `path`.

    packing: `document` cuts each document into its own windows, with padding after a short last one (which is left out if it has less than
    2 tokens); `concatenate` cuts one stream of all documents, each preceded by the end-of-text token.
    drop: positions that do not become activation rows: `special` tokens, `first` (position 0 of every window, which models use as an
    attention sink), `padding` (never a row; allowed for clarity). Documents are encoded with the special tokens that the tokenizer adds.
    windows_per_document: with packing `document`, the largest number of windows per document, evenly spread, so that the rows come from
    more documents; None takes all.
    prepend_bos: the first position of every window is the beginning-of-sequence token, not twice where the text begins with it. It counts
    as position 0 for `drop: first` and is never a row; windows hold one token of text less.

    Of a mixed corpus, the next window is from the corpus with the fewest rows in relation to its share, and holds documents of it alone.

    Memory: about a million characters of documents of each corpus, one chunk of windows, and the names of the documents.
    Raises ConfigurationError as `validate_token_settings`, SaeensError if the disk is too small (before anything is written) or the corpus
    has too few rows, or one of a mixed corpus too few for its share.
    """
    import zarr

    wanted: dict[Split, int] = {"train": train_tokens, "test": test_tokens}
    settings: dict[str, Any] = {"context_length": context_length, "packing": packing, "drop": sorted(drop)}
    settings |= {"prepend_bos": True} if prepend_bos else {}
    validate_token_settings(
        description, **settings, windows_per_document=windows_per_document, train_tokens=train_tokens, test_tokens=test_tokens
    )
    bos = description.begin_of_text if prepend_bos else None
    text_length = context_length - prepend_bos
    require_free_disk(path, (train_tokens + test_tokens) * position_bytes(description.vocab_size), "writing tokens")
    tokenizer = load_tokenizer(description)
    separator = description.end_of_text if packing == "concatenate" else None
    never_kept = special_ids(tokenizer, description) if "special" in drop else np.empty(0, np.int64)
    group = zarr.open_group(path, mode="w", zarr_format=3)
    statistics: dict[Split, SplitTokens] = {}
    documents: list[pl.DataFrame] = []
    shares = corpus.shares if isinstance(corpus, MixedCorpus) else [1.0]
    documents_of = corpus.reader() if isinstance(corpus, MixedCorpus) else lambda split: [corpus.documents(split)]
    is_stream = packing == "concatenate"
    cut = _stream_windows if is_stream else partial(_document_windows, limit=windows_per_document)
    for split in SPLITS:
        used: list[Document] = []
        encoded = [_encode(tokenizer, of_part, description, separator, used) for of_part in documents_of(split)]
        writer = _SplitWriter(group.create_group(split), context_length, description.vocab_size, padding=separator or 0)
        rows = [0] * len(shares)
        for part, text in _mixed([cut(of_part, text_length) for of_part in encoded], shares, rows):
            window = text if bos is None else _after_bos(text, bos)
            kept = ~np.isin(window.tokens, never_kept)
            if "first" in drop or bos is not None:
                kept[0] = False
            missing = wanted[split] - writer.rows
            end = int(np.flatnonzero(kept)[missing - 1]) + 1 if kept.sum() >= missing else len(kept)
            writer.append(_Window(*(values[:end] for values in window)), kept[:end])
            rows[part] += int(kept[:end].sum())
            report(sum(s.rows for s in statistics.values()) + writer.rows, sum(wanted.values()))
            if writer.rows == wanted[split]:
                break
        if writer.rows < wanted[split]:
            if isinstance(corpus, MixedCorpus):
                raise SaeensError(corpus.shortage(_furthest_behind(rows, shares), split, rows, wanted[split]))
            is_limited = windows_per_document is not None
            limit = f", windows_per_document: {windows_per_document}" if is_limited else ""
            raise SaeensError(
                f"the corpus' {split} split has {writer.rows:,} activation rows in {len(used):,} documents with packing: {packing}{limit} "
                f"and drop: [{', '.join(drop)}], but {wanted[split]:,} were asked for: "
                f"lower `{split}_tokens` to at most {writer.rows:,}{', or raise `windows_per_document`' if is_limited else ''}"
            )
        statistics[split] = writer.finish()
        documents.append(_table_of(split, used[: statistics[split].documents]))
        if isinstance(corpus, MixedCorpus):
            corpus.count(split, rows, used[: statistics[split].documents])
    pl.concat(documents, how="diagonal").write_parquet(path / "documents.parquet")
    result = TokenStatistics(**statistics)
    group.attrs.update({**settings, "statistics": asdict(result)})
    return result


def _mixed(windows: Sequence[Iterator[_Window]], shares: Sequence[float], rows: Sequence[int]) -> Iterator[tuple[int, _Window]]:
    """Yield the next window of the corpus that is furthest behind, with its index, until that corpus ends. The caller counts `rows`."""
    while (window := next(windows[part := _furthest_behind(rows, shares)], None)) is not None:
        yield part, window


def _furthest_behind(rows: Sequence[int], shares: Sequence[float]) -> int:
    """Return the index of the corpus with the fewest rows in relation to its share."""
    return min(range(len(rows)), key=lambda part: rows[part] / shares[part])


def _table_of(split: Split, documents: Sequence[Document]) -> pl.DataFrame:
    """Return the rows of documents.parquet of a split. Documents of a mixed corpus have different labels."""
    fields = dict.fromkeys(field for document in documents for field in document.labels)
    labels = {field: [document.labels.get(field) for document in documents] for field in fields}
    schema = {"split": pl.String, "document": pl.Int32, "name": pl.String} | dict.fromkeys(labels, pl.String)
    columns = {"split": [split] * len(documents), "document": range(len(documents)), "name": [document.name for document in documents]}
    return pl.DataFrame(columns | labels, schema)


def _configured(description: LanguageModelDescription) -> Path:
    return description.gguf_file or description.path / "config.json"


def validate_token_settings(
    description: LanguageModelDescription,
    *,
    context_length: int,
    packing: str,
    windows_per_document: int | None,
    drop: Collection[str],
    train_tokens: int,
    test_tokens: int,
    prepend_bos: bool = False,
) -> None:
    """Raise ConfigurationError for settings of `write_tokens` that are invalid, in general or for this language model."""
    if packing not in get_args(Packing):
        raise ConfigurationError(f"packing: {packing!r} is not known; allowed: {', '.join(get_args(Packing))}")
    if packing == "concatenate" and description.end_of_text is None:
        raise ConfigurationError(
            f"packing: concatenate needs an end-of-text token, and {_configured(description)} names none (eos_token_id): "
            "add it there, or use packing: document"
        )
    unknown = sorted(set(drop) - set(get_args(Drop)))
    if unknown:
        raise ConfigurationError(f"drop: {', '.join(map(repr, unknown))} is not known; allowed: {', '.join(get_args(Drop))}")
    if prepend_bos and description.begin_of_text is None:
        raise ConfigurationError(
            f"prepend_bos: true needs a beginning-of-sequence token, and {_configured(description)} names none (bos_token_id): "
            "add it there, or remove prepend_bos"
        )
    least, most = MIN_WINDOW + prepend_bos, description.context_length
    if context_length < least or (most is not None and context_length > most):
        allowed = f"{least} to {most}" if most is not None else f"at least {least}"
        raise ConfigurationError(f"context_length: {context_length} is not possible: {description.name} takes {allowed}")
    if windows_per_document is not None and packing != "document":
        raise ConfigurationError(f"windows_per_document: {windows_per_document} is for packing: document, and packing is {packing}")
    for name, value in (("windows_per_document", windows_per_document), ("train_tokens", train_tokens), ("test_tokens", test_tokens)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name}: {value} is not possible: at least 1")


def open_tokens(path: Path, dropped: Mapping[Split, np.ndarray] | None = None) -> TokenStore:
    """Open the tokens that `write_tokens` wrote. Raises SaeensError if they are missing or incomplete.

    `dropped`: kept positions without an activation row, by their indices among the kept positions of a split, `[n]` ascending. They are
    not `kept` in the read windows.
    """
    import zarr

    from saeens_pipeline.storage.held_folders import HeldFolder

    try:
        group = zarr.open_group(HeldFolder(path), mode="r")
        return TokenStore(path, group, dropped or {})
    except (OSError, KeyError) as error:
        raise SaeensError(f"{path} holds no tokens, or only a part of them ({error}): compute them again") from None


class TokenStore:
    """Token windows on disk, read in storage order."""

    def __init__(self, path: Path, group: zarr.Group, dropped: Mapping[Split, np.ndarray]) -> None:
        attributes = cast("dict[str, Any]", group.attrs.asdict())
        self.path, self._dropped = path, dropped
        self.context_length: int = attributes["context_length"]
        self.statistics = TokenStatistics(**{split: SplitTokens(**attributes["statistics"][split]) for split in SPLITS})
        self._arrays: dict[Split, list[Any]] = {split: [group[f"{split}/{name}"] for name in TokenBatch._fields] for split in SPLITS}

    def n_rows(self, split: Split) -> int:
        """Return the number of activation rows of a split."""
        return getattr(self.statistics, split).rows - len(self._dropped.get(split, ()))

    def batches(self, split: Split, batch_windows: int) -> Iterator[TokenBatch]:
        """Yield all windows in order, at most `batch_windows` at a time. Memory: one chunk of each array, about 5 MB."""
        n_windows, chunk_windows = self._arrays[split][0].shape[0], self._arrays[split][0].chunks[0]
        for start in range(0, n_windows, chunk_windows):
            chunk = self._read(split, slice(start, start + chunk_windows))
            for first in range(0, len(chunk.tokens), batch_windows):
                yield TokenBatch(*(values[first : first + batch_windows] for values in chunk))

    def windows(self, split: Split, first: int, end: int) -> TokenBatch:
        """Return the windows from `first` to `end`, exclusive."""
        return self._read(split, slice(first, end))

    def sample(self, split: Split, n_rows: int, batch_windows: int) -> Iterator[TokenBatch]:
        """Yield evenly spread windows of a split with about `n_rows` activation rows in total, or all windows, in batches as `batches`."""
        statistics: SplitTokens = getattr(self.statistics, split)
        n_windows = min(statistics.windows, -(-n_rows * statistics.windows // statistics.rows))
        chosen = np.linspace(0, statistics.windows - 1, n_windows).round().astype(int)
        for first in range(0, n_windows, batch_windows):
            yield self._read(split, chosen[first : first + batch_windows])

    def _read(self, split: Split, windows: slice | np.ndarray) -> TokenBatch:
        import torch

        tokens, *others = (torch.from_numpy(array.oindex[windows]) for array in self._arrays[split])
        batch = TokenBatch(tokens.long(), *others)
        numbers = np.arange(windows.start, windows.start + len(tokens)) if isinstance(windows, slice) else windows
        if len(dropped := self._dropped_places(split)):
            window, column = np.divmod(dropped, self.context_length)
            read = np.isin(window, numbers)
            batch.kept[np.searchsorted(numbers, window[read]), column[read]] = False
        return batch

    @cache  # noqa: B019  # a store is open for one pass
    def _dropped_places(self, split: Split) -> np.ndarray:
        """Return the places of the dropped positions, `[n]` ascending, as `places`."""
        dropped, kept = self._dropped.get(split, np.empty(0, np.int64)), self._arrays[split][TokenBatch._fields.index("kept")]
        found, n_before = [np.empty(0, np.int64)], 0
        for first in range(0, kept.shape[0], kept.chunks[0]) if len(dropped) else ():
            places = np.flatnonzero(kept[first : first + kept.chunks[0]])
            begin, end = np.searchsorted(dropped, (n_before, n_before + len(places)))
            found.append(first * self.context_length + places[dropped[begin:end] - n_before])
            n_before += len(places)
        return np.concatenate(found)

    def token_ids(self, split: Split, rows: np.ndarray) -> np.ndarray:
        """Return the token id `[n]` of each activation row in `rows` `[n]`, which are in ascending order. Memory: as `batches`."""
        found, first = [np.empty(0, np.int64)], 0
        for batch in self.batches(split, _CHUNK_TOKENS // self.context_length + 1):
            ids = batch.tokens[batch.kept].numpy()
            begin, end = np.searchsorted(rows, (first, first + len(ids)))
            found.append(ids[rows[begin:end] - first])
            first += len(ids)
        return np.concatenate(found)

    def places(self, split: Split, n_rows: int) -> Iterator[np.ndarray]:
        """Yield the places of activation rows, `n_rows` at a time: window * context_length + index in the window. Memory: as `batches`."""
        waiting, first = np.empty(0, np.int64), 0
        for batch in self.batches(split, _CHUNK_TOKENS // self.context_length + 1):
            waiting = np.concatenate([waiting, first + np.flatnonzero(batch.kept.numpy())])
            first += batch.kept.numel()
            while len(waiting) >= n_rows:
                yield waiting[:n_rows]
                waiting = waiting[n_rows:]
        if len(waiting):
            yield waiting

    def around(self, split: Split, places: np.ndarray, radius: int) -> Surroundings:
        """Return the `2 * radius + 1` tokens around each place.

        places: `[n]` ascending, as `places` yields them. Memory: that of `batches`, and the result.
        """
        parts, first = [], 0
        offsets = np.arange(-radius, radius + 1)
        for batch in self.batches(split, _CHUNK_TOKENS // self.context_length + 1):
            tokens, kept, document, position = (values.numpy() for values in batch)
            begin, end = np.searchsorted(places, (first, first + tokens.size))
            window, place = np.divmod(places[begin:end] - first, self.context_length)
            columns = place[:, None] + offsets
            inside = (columns >= 0) & (columns < self.context_length)
            where = window[:, None], columns.clip(0, self.context_length - 1)
            is_text = inside & (document[where] != _PADDING)
            parts.append((tokens[where], kept[where] & inside, is_text, document[window, place], position[window, place]))
            first += tokens.size
        return Surroundings(*map(np.concatenate, zip(*parts, strict=True)))

    def documents(self, split: Split) -> pl.DataFrame:
        """Return the documents of a split: document (as in the `document` array), name, and a column for each label."""
        return pl.scan_parquet(self.path / "documents.parquet", glob=False).filter(pl.col("split") == split).drop("split").collect()

    def documents_with(self, split: Split, labels: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Return the documents of a split, `[n]` int32, that have one of the given values in every field of `labels`.

        Raises ConfigurationError for a field or a value that no document has, with the existing ones, and if no document matches all
        fields.
        """
        documents = self.documents(split)
        fields = [name for name in documents.columns if name not in ("document", "name")]
        chosen = documents
        for field, values in labels.items():
            if field not in fields:
                raise ConfigurationError(f"documents have no label {field!r}; they have: {', '.join(fields) or 'none'}")
            label = pl.col(field).cast(pl.String)
            there = documents.group_by(label).len().drop_nulls().sort(["len", field], descending=[True, False])
            unknown = [value for value in values if value not in there[field]]
            if unknown:
                most = [f"{value} ({n:,})" for value, n in there.head(_SHOWN_LABELS).iter_rows()]
                more = f", and {len(there) - len(most):,} more" if len(there) > len(most) else ""
                asked = " or ".join(map(repr, unknown))
                raise ConfigurationError(f"no {split} document has {field} {asked}; documents by {field}: {', '.join(most)}{more}")
            chosen = chosen.filter(label.is_in(values))
        if chosen.is_empty():
            raise ConfigurationError(f"no {split} document has all of {', '.join(f'{f}: {list(v)}' for f, v in labels.items())} together")
        return chosen["document"].to_numpy()


class _Window(NamedTuple):
    tokens: np.ndarray  # [at most context_length], as all three
    document: np.ndarray
    position: np.ndarray


def _dtypes(vocab_size: int) -> list[np.dtype[Any]]:
    """Return the dtypes of the arrays of TokenBatch on disk."""
    return [np.dtype(dtype) for dtype in (np.uint16 if vocab_size <= 2**16 else np.uint32, np.bool_, np.int32, np.int32)]


def position_bytes(vocab_size: int) -> int:
    """Return the bytes of one position before compression, which saves more than padding and dropped positions add."""
    return sum(dtype.itemsize for dtype in _dtypes(vocab_size))


class _SplitWriter:
    """Buffer of windows that appends whole chunks to the arrays of one split."""

    def __init__(self, group: zarr.Group, context_length: int, vocab_size: int, padding: int) -> None:
        self.rows = self._tokens = self._windows = self._documents = self._filled = 0
        shape = max(1, _CHUNK_TOKENS // context_length), context_length
        self._padding = padding, False, _PADDING, 0
        self._buffers = [np.empty(shape, dtype) for dtype in _dtypes(vocab_size)]
        self._arrays = [
            group.create_array(name, shape=(0, context_length), chunks=shape, dtype=buffer.dtype)
            for name, buffer in zip(TokenBatch._fields, self._buffers, strict=True)
        ]

    def append(self, window: _Window, kept: np.ndarray) -> None:
        values_of = window.tokens, kept, window.document, window.position
        for buffer, padding, values in zip(self._buffers, self._padding, values_of, strict=True):
            buffer[self._filled] = padding
            buffer[self._filled, : len(values)] = values
        self._filled += 1
        self.rows += int(kept.sum())
        self._tokens += len(kept)
        self._documents = max(self._documents, int(window.document[-1]) + 1)
        if self._filled == len(self._buffers[0]):
            self._flush()

    def finish(self) -> SplitTokens:
        self._flush()
        return SplitTokens(self.rows, self._tokens, self._windows, self._documents)

    def _flush(self) -> None:
        for array, buffer in zip(self._arrays, self._buffers, strict=True):
            array.append(buffer[: self._filled])
        self._windows, self._filled = self._windows + self._filled, 0


def _after_bos(text: _Window, bos: int) -> _Window:
    """Return a window with the beginning-of-sequence token first, in the document and at the position of the token after it."""
    if text.tokens[0] == bos:
        return text
    return _Window(
        *(np.concatenate([[first], values]) for first, values in zip((bos, text.document[0], text.position[0]), text, strict=True))
    )


def _document_windows(encoded: Iterator[tuple[int, np.ndarray]], context_length: int, limit: int | None) -> Iterator[_Window]:
    """Cut each document into windows of `context_length` tokens and a shorter last one; yield at most `limit`, evenly spread."""
    for index, ids in encoded:
        starts = np.arange(0, len(ids) - MIN_WINDOW + 1, context_length)
        if limit is not None and len(starts) > limit:
            starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]
        for start in starts:
            tokens = ids[start : start + context_length]
            yield _Window(tokens, np.full(len(tokens), index), start + np.arange(len(tokens)))


def _stream_windows(encoded: Iterator[tuple[int, np.ndarray]], context_length: int) -> Iterator[_Window]:
    """Cut the concatenation of all documents into windows of `context_length` tokens. Only the last window may be shorter."""
    rest = _Window(*(np.empty(0, np.int64) for _ in _Window._fields))
    for index, ids in encoded:
        document = _Window(ids, np.full(len(ids), index), np.arange(len(ids)))
        stream = _Window(*(np.concatenate(pair) for pair in zip(rest, document, strict=True)))
        whole = len(stream.tokens) // context_length * context_length
        for start in range(0, whole, context_length):
            yield _Window(*(values[start : start + context_length] for values in stream))
        rest = _Window(*(values[whole:] for values in stream))
    if len(rest.tokens) >= MIN_WINDOW:
        yield rest


def _encode(
    tokenizer: Tokenizer, documents: Iterator[Document], description: LanguageModelDescription, separator: int | None, used: list[Document]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each document's index in `used` and its token ids, after the separator if there is one.

    The documents are appended to `used`, without text, as they are yielded.
    """
    for batch in batched(documents):
        adds_special = not batch[0].has_special_tokens  # the same for all documents of a corpus
        encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=adds_special)
        for document, encoding in zip(batch, encodings, strict=True):
            ids = np.asarray(encoding.ids, np.int64)
            if separator is not None and (len(ids) == 0 or ids[0] != separator):
                ids = np.concatenate([[separator], ids])
            if ids.max(initial=0) >= description.vocab_size:
                raise ConfigurationError(
                    f"{description.name}: its tokenizer gives token {ids.max()}, but the model has {description.vocab_size} tokens: "
                    "tokenizer.json and config.json are not of one model"
                )
            used.append(Document(document.name, "", document.labels))
            yield len(used) - 1, ids


def batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield batches of consecutive documents, as tokenizers take them."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def load_tokenizer(description: LanguageModelDescription) -> Tokenizer:
    """Return the tokenizer of a language model. Raises ConfigurationError for one that cannot be read, and as `dequantise`."""
    dequantise(description)
    file = description.tokenizer_file
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other class
        raise ConfigurationError(f"{file} is not a tokenizer that this version of tokenizers can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_ids(tokenizer: Tokenizer, description: LanguageModelDescription) -> np.ndarray:
    """Return the ids, ascending, of tokens without text: the special tokens of the tokenizer, and the end-of-text token."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return np.array(sorted(special | ({description.end_of_text} if description.end_of_text is not None else set())), np.int64)
