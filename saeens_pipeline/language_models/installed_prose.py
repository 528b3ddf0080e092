"""`corpus: builtin/prose`: English prose of the installed, pinned packages, from their docstrings and texts."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

from saeens_pipeline.language_models.documents import Document, rank
from saeens_pipeline.language_models.installed_packages import MAX_DOCUMENT_CHARACTERS, MIN_DOCUMENT_CHARACTERS, InstalledPackages
from saeens_pipeline.settings.corpora import BUILTIN_PROSE

# Packages that the project installs and pins, with much documentation in their files.
PACKAGES = (
    "alembic", "anyio", "click", "dagster", "filelock", "fsspec", "graphql-core", "huggingface-hub", "humanfriendly", "jinja2", "joblib",
    "mako", "markdown-it-py", "matplotlib", "mpmath", "networkx", "numba", "numpy", "packaging", "plotly", "polars", "pyarrow", "pydantic",
    "pygments", "regex", "requests", "rich", "scikit-learn", "scipy", "sqlalchemy", "starlette", "structlog", "sympy", "tokenizers",
    "torch", "tqdm", "transformers", "typer", "urllib3", "uvicorn", "websockets", "zarr",
)  # fmt: skip
READER_VERSION = 1  # increased with every change of the documents
MAX_PACKAGE_CHARACTERS = 4_000_000  # so that no package dominates
_MIN_DOCSTRING = 200  # characters
_LONG_STRING = re.compile(rf"(\"{{3}}|'{{3}})(?:(?!\1).){{{_MIN_DOCSTRING}}}", re.DOTALL)
_MIN_WORDS = 8  # of a paragraph
_MIN_LETTERS = 0.8  # share of a paragraph's characters that are not white space
_TEXTS = (".md", ".rst", ".txt")
_NO_PROSE = re.compile(r"licen[cs]e|copying|notice|authors|requirements|entry_points|top_level|vendor|cmakelists", re.I)


class InstalledProse(InstalledPackages):
    """Paragraphs of English prose in docstrings, in texts (md, rst, txt) and in the descriptions of the installed, pinned packages.

    A document is what one file has. Code, tables, lists of names and docstrings of at most 200 characters are left out; so are exact
    duplicates, and test documents that share lines with training documents.
    """

    name = BUILTIN_PROSE
    label = "kind"

    @property
    def reader(self) -> int:
        return READER_VERSION

    @property
    def packages(self) -> tuple[str, ...]:
        return PACKAGES

    def package_documents(self, package: str) -> Iterator[Document]:
        distribution = metadata.distribution(package)
        files = sorted(distribution.files or [], key=lambda f: rank(f"{package}/{f.as_posix()}"))
        taken = 0
        for file in files:
            if taken >= MAX_PACKAGE_CHARACTERS:
                return
            kind, paragraphs = _read(PurePosixPath(file.as_posix()), Path(str(distribution.locate_file(file))))
            text = "\n\n".join(paragraphs)
            if len(text) < MIN_DOCUMENT_CHARACTERS:
                continue
            if len(text) > MAX_DOCUMENT_CHARACTERS:
                text = text[: text.rfind("\n", 0, MAX_DOCUMENT_CHARACTERS) + 1].rstrip() or text[:MAX_DOCUMENT_CHARACTERS]
            taken += len(text)
            yield Document(f"{package}/{file.as_posix()}", text, {"kind": kind})


def _read(name: PurePosixPath, path: Path) -> tuple[str, list[str]]:
    """Return the kind of a file, and its paragraphs of prose; none for files of other kinds."""
    try:
        if name.suffix == ".py" and "__pycache__" not in name.parts:
            return "docstrings", [each for docstring in _docstrings(path.read_text(encoding="utf-8")) for each in prose_of(docstring)]
        if name.name == "METADATA":
            return "description", list(prose_of(path.read_text(encoding="utf-8").partition("\n\n")[2]))
        if name.suffix in _TEXTS and not _NO_PROSE.search(name.name) and "dist-info" not in str(name):
            return "text", list(prose_of(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not UTF-8, or not there
        pass
    return "", []


def _docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module that are longer than 200 characters, in the order of the file."""
    if not _LONG_STRING.search(source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError):
        return
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) > _MIN_DOCSTRING:
            yield docstring


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module, classes and functions, in the order of the file. Expressions, most of a tree, hold none and are not visited."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, field, None)
        for each in inner if isinstance(inner, list) else ():
            yield from _documented(each)


def prose_of(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text that read as English sentences, their lines joined."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [line.strip() for line in paragraph.split("\n")]
        if any(line.startswith((">>>", "...", "```", "|", "$ ", "+--", "@")) for line in lines):
            continue
        joined = " ".join(" ".join(lines).split())
        characters = joined.replace(" ", "")
        ends = joined[-1:] in ".!?:)\"'`"
        if len(joined.split()) >= _MIN_WORDS and ends and _letters(characters) >= _MIN_LETTERS * len(characters):
            yield joined


def _letters(characters: str) -> int:
    return sum(map(str.isalpha, characters))
