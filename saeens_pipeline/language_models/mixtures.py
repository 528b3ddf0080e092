"""`corpus: [{corpus: builtin/prose, weight: 3}, {corpus: data/my.jsonl, weight: 1}]`: several corpora with weights.

Weights are shares of the activation rows of each split. `write_tokens` cuts the documents of each corpus into windows of their own. The
next window is from the corpus with the fewest rows in relation to its share: no corpus ever exceeds its share by more than one window.
A text that was read before, of any corpus and split, is left out, so that no text is in both splits.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from saeens_pipeline.language_models.documents import Corpus, Document, RecordCorpus, Split
from saeens_pipeline.settings.corpora import CORPUS_LABEL
from saeens_pipeline.storage.recipes import digest

MIXING_VERSION = 1  # increased with every change of the order of windows and of the documents that are left out


class Part(NamedTuple):
    """One corpus of a mixed one. Shares add up to 1."""

    name: str
    share: float
    corpus: Corpus


@dataclass(frozen=True)
class MixedCorpus:
    """Several corpora, each with a share of the activation rows."""

    name: str
    parts: Sequence[Part]
    repeated: Counter[tuple[Split, str]] = field(default_factory=Counter, compare=False)
    """Numbers of documents that were left out, by split and name of the corpus."""
    counts: dict[Split, list[dict[str, int]]] = field(default_factory=dict, compare=False)
    """Rows and documents of each part that are used, by split."""

    @property
    def identity(self) -> dict[str, object]:
        parts = [{"name": part.name, "share": part.share, "identity": part.corpus.identity} for part in self.parts]
        return {"corpus": self.name, "mixing": MIXING_VERSION, "parts": parts}

    @property
    def shares(self) -> list[float]:
        return [part.share for part in self.parts]

    def require_readable(self) -> None:
        """Raise the errors of all corpora early."""
        for part in self.parts:
            part.corpus.require_readable()

    def reader(self) -> Callable[[Split], list[Iterator[Document]]]:
        """Return a function that gives the documents of each corpus of a split, with the name of the corpus as a label.

        The training split has to be read first: held-out documents whose text was read for it are left out.
        """
        seen = set[bytes]()

        def documents(part: Part, split: Split) -> Iterator[Document]:
            for document in part.corpus.documents(split):
                mark = hashlib.sha256(document.text.encode()).digest()[:16]
                if mark in seen:
                    self.repeated[split, part.name] += 1
                    continue
                seen.add(mark)
                yield replace(document, labels={CORPUS_LABEL: part.name, **document.labels})

        return lambda split: [documents(part, split) for part in self.parts]

    def count(self, split: Split, rows: Sequence[int], documents: Sequence[Document]) -> None:
        """Record the activation rows of each part of a split, and count its documents among the used ones."""
        by_part = Counter(document.labels[CORPUS_LABEL] for document in documents)
        self.counts[split] = [{"rows": n, "documents": by_part[part.name]} for part, n in zip(self.parts, rows, strict=True)]

    def composition(self) -> dict[str, dict[str, Any]]:
        """Return `counts` by split and name, with share, hash of the identity, and numbers of documents that were left out."""
        found: dict[str, dict[str, Any]] = {}
        for split, of_split in self.counts.items():
            found[split] = {}
            for part, counted in zip(self.parts, of_split, strict=True):
                skipped = part.corpus.skipped[split] if isinstance(part.corpus, RecordCorpus) else 0
                left_out = {"records_without_text": skipped, "repeated_texts": self.repeated[split, part.name]}
                known = {"share": part.share, "hash": digest(part.corpus.identity)}
                found[split][part.name] = known | counted | {name: n for name, n in left_out.items() if n}
        return found

    def shortage(self, part: int, split: Split, rows: Sequence[int], wanted: int) -> str:
        """Return the message for a corpus that has fewer rows than its share of the wanted ones."""
        name, share, _ = self.parts[part]
        enough = int(rows[part] / share)
        lower = f"lower `{split}_tokens` to at most {enough:,}, " if enough else ""
        repeated = self.repeated[split, name]
        without = f", without {repeated:,} texts that were read before" if repeated else ""
        return (
            f"corpus: {name} ends before its share of the {split} split is reached: it has {rows[part]:,} activation rows{without}, and "
            f"{share:.3g} of {wanted:,} rows are {math.ceil(share * wanted):,}: {lower}lower its weight, or give it more texts"
        )
