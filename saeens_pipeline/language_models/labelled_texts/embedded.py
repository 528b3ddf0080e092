"""Embedded tasks with labels of the builtin corpus: the language of a text, and its kind, code or documentation.

Training texts are from documents in the corpus' train split, test texts from held-out documents.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator

import polars as pl

from saeens_pipeline.language_models.documents import Corpus, Split
from saeens_pipeline.language_models.labelled_texts.drawing import Labelled
from saeens_pipeline.settings.labelled_data_sets import CODE_OR_PROSE, DOCSTRING_OR_CODE, LANGUAGE, LANGUAGE_AND_DOCUMENTATION, TextCount

READER_VERSION = 2  # increased with every change of the drawn texts
PIECE_CHARACTERS, MIN_PIECE_CHARACTERS = 200, 100
MAX_DOCUMENTS = 400  # of each language and split, the first ones of the corpus; enough for the counts

CONCEPT_COUNT, CORRELATION_COUNT = TextCount(200, 100), TextCount(960, 480)  # the latter: four balanced groups of 240 and 120

_LANGUAGES = ("python", "typescript", "javascript", "cpp_header")
_COMMENT = re.compile(r"/\*.*?\*/|(?:^[ \t]*//.*\n?)+", re.S | re.M)
_COMMENT_MARKS = re.compile(r"^[ \t]*(?://+!?|/?\*+[/!]?)[ \t]?", re.M)


class EmbeddedTasks:
    """The embedded tasks of a corpus. Reads the corpus once. Memory: a few million characters of pieces."""

    def __init__(self, corpus: Corpus) -> None:
        self._pieces = {split: _pieces(corpus, split) for split in ("train", "test")}

    def labelled(self, name: str) -> Labelled:
        """Return the pieces of a task in EMBEDDED_CONCEPTS or EMBEDDED_CORRELATIONS."""
        language, kind = pl.col("language"), pl.col("kind")
        chosen, columns = {
            LANGUAGE: ((kind == "any") & language.is_in(_LANGUAGES), [language.alias("label")]),
            CODE_OR_PROSE: (
                (kind == "any") & language.is_in([*_LANGUAGES, "prose"]),
                [pl.when(language == "prose").then(language).otherwise(pl.lit("code")).alias("label")],
            ),
            DOCSTRING_OR_CODE: ((kind != "any") & (language == "python"), [kind.replace("documentation", "docstring").alias("label")]),
            LANGUAGE_AND_DOCUMENTATION: (kind != "any", [language.alias("label"), kind.alias("other")]),
        }[name]
        train, test = (pieces.filter(chosen).with_columns(columns) for pieces in self._pieces.values())
        return Labelled(name, train, test, pairs={name: (("python", "cpp_header"), ("documentation", "code"))})


def _pieces(corpus: Corpus, split: Split) -> pl.DataFrame:
    """Return text, language and kind of each piece: `code`, `documentation`, or `any` for pieces of whole texts."""
    taken = Counter[str]()
    rows: list[tuple[str, str, str]] = []
    for document in corpus.documents(split):
        language = str(document.labels["language"])
        taken[language] += 1
        if taken[language] <= MAX_DOCUMENTS:
            parts = _PARTS[language](document.text) if language in _PARTS else ()
            rows += [(piece, language, kind) for kind, part in [("any", document.text), *parts] for piece in cut(part)]
    return pl.DataFrame(rows, schema=dict.fromkeys(("text", "language", "kind"), pl.String), orient="row")


def cut(text: str) -> Iterator[str]:
    """Yield pieces of whole lines, about PIECE_CHARACTERS long each. A rest shorter than MIN_PIECE_CHARACTERS is left out."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if len(piece) >= MIN_PIECE_CHARACTERS and len(piece) + len(line) > PIECE_CHARACTERS:
            yield piece
            piece = ""
        piece += line
    if len(piece.strip()) >= MIN_PIECE_CHARACTERS:
        yield piece


def _python_parts(text: str) -> Iterator[tuple[str, str]]:
    """Yield docstrings, and bodies of functions without docstring and comments; nothing for a truncated document or invalid Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield "documentation", docstring
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if docstring else node.body
                code = "".join(lines[body[0].lineno - 1 : node.end_lineno]) if body else ""
                if '"""' not in code and "'''" not in code:
                    yield "code", textwrap.dedent(re.sub(r"^\s*#.*\n", "", code, flags=re.M))


def _cpp_parts(text: str) -> Iterator[tuple[str, str]]:
    """Yield the comments of a header, without their marks, and the header without its comments."""
    yield "documentation", "".join(_COMMENT_MARKS.sub("", comment).rstrip() + "\n" for comment in _COMMENT.findall(text))
    yield "code", re.sub(r"\n\s*\n+", "\n", re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S))


_PARTS = {"python": _python_parts, "cpp_header": _cpp_parts}
