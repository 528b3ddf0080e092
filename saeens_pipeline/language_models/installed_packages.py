"""`corpus: builtin/installed_packages`: source code and prose of the installed, pinned packages."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path

from saeens_pipeline.language_models.documents import Document, Split, rank
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS

# The project installs and pins these packages. Their files are the same on every platform and Python version, except for compiled parts,
# version stamps and generated configuration, which `_is_platform_dependent` leaves out.
PACKAGES = (
    "alembic", "anyio", "click", "dagster", "dagster-graphql", "dagster-pipes", "dagster-shared", "dagster-webserver",
    "filelock", "fsspec", "gql", "graphene", "graphql-core", "huggingface-hub", "humanfriendly", "jinja2", "mako",
    "markdown-it-py", "mpmath", "networkx", "numpy", "packaging", "polars", "protobuf", "pyarrow", "pydantic", "pygments",
    "python-dateutil", "regex", "requests", "rich", "sqlalchemy", "starlette", "structlog", "sympy", "tokenizers", "torch",
    "tqdm", "transformers", "typer", "universal-pathlib", "urllib3", "uvicorn", "watchdog", "yarl", "zarr",
)  # fmt: skip
LANGUAGES = {
    ".py": "python", ".pyi": "python", ".pyx": "cython", ".pxd": "cython", ".h": "cpp_header", ".hpp": "cpp_header", ".cuh": "cpp_header",
    ".ts": "typescript", ".tsx": "typescript", ".js": "javascript", ".mjs": "javascript", ".md": "prose", ".rst": "prose",
}  # fmt: skip

READER_VERSION = 1  # increased with every change of the documents
MAX_PACKAGE_BYTES = 8_000_000  # per package and language, so that no package dominates
MAX_DOCUMENT_CHARACTERS = 24_000
MIN_DOCUMENT_CHARACTERS = 200
TEST_SHARE = 0.05
MAX_SHARED_LINES = 0.2  # test documents with a larger share of lines in training documents are left out
_DISTINCTIVE_LINE = 24  # characters; shorter lines (`else:`, `return x`) occur in unrelated texts


class InstalledPackages:
    """Source code and prose of the installed, pinned packages.

    Documents have the order of a hash of their names, which mixes packages and languages. Exact duplicates, licence headers, and test
    documents that share lines with training documents are left out.
    """

    name = BUILTIN_CORPUS
    label = "language"
    """Field of the documents' label."""

    @property
    def reader(self) -> int:
        """Version of the documents."""
        return READER_VERSION

    @property
    def packages(self) -> tuple[str, ...]:
        return PACKAGES

    @property
    def identity(self) -> dict[str, object]:
        return {"corpus": self.name, "reader": self.reader, "packages": {p: metadata.version(p).split("+")[0] for p in self.packages}}

    def require_readable(self) -> None:
        """Do nothing: the packages are dependencies of this one and therefore installed."""

    def documents(self, split: Split) -> Iterator[Document]:
        return iter(self._splits[split])

    def summary(self) -> dict[str, object]:
        """Return documents, bytes, a hash of all text and bytes per language, for each split."""
        return {split: _summarise(documents, self.label) for split, documents in self._splits.items()}

    @cached_property
    def _splits(self) -> dict[Split, list[Document]]:
        documents = list(_without_duplicates(d for package in self.packages for d in self.package_documents(package)))
        documents.sort(key=lambda d: rank(d.name))
        train = [d for d in documents if rank(d.name) >= TEST_SHARE]
        held_out = [d for d in documents if rank(d.name) < TEST_SHARE]
        return {"train": train, "test": _without_near_duplicates(held_out, of=train)}

    def package_documents(self, package: str) -> Iterator[Document]:
        """Yield the documents of one installed package, at most MAX_PACKAGE_BYTES of each language."""
        distribution = metadata.distribution(package)
        files = sorted(distribution.files or [], key=lambda f: rank(f"{package}/{f.as_posix()}"))
        taken = Counter[str | None]()
        for file in files:
            name = f"{package}/{file.as_posix()}"
            if _is_platform_dependent(name) or taken[LANGUAGES.get(file.suffix)] >= MAX_PACKAGE_BYTES:
                continue
            for document in _file_documents(name, Path(str(distribution.locate_file(file)))):
                language = document.labels["language"]
                if taken[language] < MAX_PACKAGE_BYTES:
                    taken[language] += len(document.text)
                    yield document


def _file_documents(name: str, path: Path) -> Iterator[Document]:
    if path.name == "METADATA" and path.is_file():
        _, _, readme = path.read_text(encoding="utf-8").partition("\n\n")
        yield from _document(name, readme, "prose")
    elif path.suffix == ".map" and path.is_file():
        yield from _source_map_documents(name, path)
    elif path.suffix in LANGUAGES and path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return
        yield from _document(name, text, LANGUAGES[path.suffix])


def _source_map_documents(name: str, path: Path) -> Iterator[Document]:
    """Yield the TypeScript and JavaScript sources in the source map of a JavaScript bundle."""
    source_map = json.loads(path.read_text(encoding="utf-8"))
    for source, text in zip(source_map.get("sources", []), source_map.get("sourcesContent") or [], strict=False):
        language = LANGUAGES.get(Path(source.split("?")[0]).suffix)
        if text and language:
            yield from _document(f"{name.split('/', maxsplit=1)[0]}/{source}", text, language)


def _document(name: str, text: str, language: str) -> Iterator[Document]:
    text = _without_licence_header(text.replace("\r\n", "\n")).strip()
    if len(text) < MIN_DOCUMENT_CHARACTERS or _is_machine_made(text):
        return
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        text = text[: text.rfind("\n", 0, MAX_DOCUMENT_CHARACTERS) + 1] or text[:MAX_DOCUMENT_CHARACTERS]
    yield Document(name, text, {"language": language})


def _is_platform_dependent(name: str) -> bool:
    parts = name.split("/")
    if parts[0] == "torch" and "include" in parts:  # only headers that are written by hand and part of every build
        return not any(f"/include/{kept}/" in name for kept in ("c10", "ATen/core", "ATen/native", "torch/csrc")) or "cuda" in name.lower()
    return "__pycache__" in parts or bool(re.search(r"(^|/)_*(version|config|generated\w*|distributor_init)_*\.\w+$", name))


def _is_machine_made(text: str) -> bool:
    """Return whether a text has the long lines or few letters of minified code, tables of numbers and encoded data."""
    lines = text.split("\n")
    sample = text[:4000]
    other = "".join(sample.split()).translate(_WITHOUT_LETTERS)
    return len(text) / len(lines) > 150 or max(map(len, lines)) > 1000 or len(other) > 0.45 * len(sample)


_WITHOUT_LETTERS = str.maketrans("", "", string.ascii_letters)
_LICENCE_HEADERS = (re.compile(r"\A(?:#.*\n)+\n*"), re.compile(r"\A\s*/\*.*?\*/\s*", re.S), re.compile(r"\A(?://.*\n)+\n*"))


def _without_licence_header(text: str) -> str:
    for header in _LICENCE_HEADERS:
        found = header.match(text)
        if found and re.search("licen[cs]e|copyright", found.group(), re.I):
            return text[found.end() :]
    return text


def _without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[bytes | str] = set()
    for document in documents:
        marks = {hashlib.sha256("".join(document.text.split()).encode()).digest(), document.name}
        if seen.isdisjoint(marks):
            seen |= marks
            yield document


def _lines(text: str) -> Iterator[str]:
    return map(str.strip, text.split("\n"))


def _without_near_duplicates(documents: list[Document], of: list[Document]) -> list[Document]:
    """Return the documents with at most a share of MAX_SHARED_LINES distinctive lines that occur in `of`."""
    distinctive = [{line for line in _lines(document.text) if len(line) >= _DISTINCTIVE_LINE} for document in documents]
    asked: set[str] = set().union(*distinctive)
    known: set[str] = set()
    for document in of:
        known |= asked.intersection(_lines(document.text))
    return [d for d, lines in zip(documents, distinctive, strict=True) if lines and len(lines & known) <= MAX_SHARED_LINES * len(lines)]


def _summarise(documents: list[Document], label: str) -> dict[str, object]:
    digest, languages = hashlib.sha256(), Counter[str]()
    for document in documents:
        encoded = document.text.encode()
        digest.update(document.name.encode() + b"\0" + encoded + b"\0")
        languages[str(document.labels[label])] += len(encoded)
    return {
        "documents": len(documents),
        "bytes": languages.total(),
        "sha256": digest.hexdigest(),
        f"bytes_by_{label}": dict(sorted(languages.items())),
    }
