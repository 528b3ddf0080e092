"""Folders in repositories of the Hugging Face hub: pushed in one commit, and pulled whole, with hashes that are compared.

`lineage.json` of a pushed folder lists its files. `huggingface_hub` reads and sends the access token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import HfApi, RepoFile

from saeens_models.interop.hub import Place, explained
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.disk import free_bytes
from saeens_pipeline.storage.recipes import file_sha256

LINEAGE_FILE, CARD_FILE = "lineage.json", "README.md"
LINEAGE_VERSION = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MOST_LINEAGE_BYTES = 2**28


class Content(NamedTuple):
    """A file to push: its bytes or, for a large one, its path, with size and SHA-256."""

    content: bytes | Path
    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Content:
        """Return a file with these bytes."""
        return cls(content, len(content), hashlib.sha256(content).hexdigest())


class Pushed(NamedTuple):
    """A commit with a pushed folder. `is_new`: False if the repository had the same files already."""

    place: Place
    url: str
    is_new: bool


@dataclass(frozen=True)
class _Manifest:
    """The part of a `lineage.json` that says what was pushed."""

    asset: str
    files: Mapping[str, tuple[int, str]]
    """Size and SHA-256 by relative path; not of `lineage.json` itself."""

    @classmethod
    def read(cls, file: Path, where: Place) -> _Manifest:
        """Read a `lineage.json`. Raises ConfigurationError for one that `saeens push` did not write, or whose paths leave the folder."""
        try:
            if file.stat().st_size > _MOST_LINEAGE_BYTES:
                raise ValueError(f"it has {file.stat().st_size:,} bytes")
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["format_version"] != LINEAGE_VERSION:
                raise ValueError(f"format_version is {found['format_version']!r}, expected {LINEAGE_VERSION}")
            files = {name: (size, sha256) for name, (size, sha256) in found["files"].items()}
            for name, (size, sha256) in files.items():
                if not _NAME.fullmatch(name) or type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
                    raise ValueError(f"files has {str(name)[:80]!r}: expected a path inside the folder, with size and SHA-256")
            return cls(str(found["subject"]["asset"]), files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigurationError(f"{where}: {LINEAGE_FILE} is not one that `saeens push` writes: {reason}") from error


def require_target(where: str) -> Place:
    """Return the place of a push. Raises ConfigurationError for one that is not written so, or that names a commit. Sends no request."""
    place = _parsed(where)
    if place.path and not _NAME.fullmatch(place.path):
        raise ConfigurationError(f"{where}: the folder {place.path!r} may have letters, digits, _, - and . in its names")
    if place.revision and _COMMIT.fullmatch(place.revision):
        raise ConfigurationError(f"{where}: a commit cannot be pushed to: name a branch after @, or nothing for the default branch")
    return place


def push(files: Mapping[str, Content], place: Place, asset: str, message: str, *, private: bool = False, overwrite: bool = False) -> Pushed:
    """Push files, one of them `lineage.json`, into a folder of a repository in one commit. Missing repositories and branches are created.

    Files of an earlier push of the same asset are replaced, and those that are no longer among the files removed. The commit fails if
    another commit comes in between.

    Raises ConfigurationError, and commits nothing, without an access token, for what the hub refuses, for a public repository with
    `private`, and, unless `overwrite`, for files in the way: of another push, not of a push, or a model card that was edited.
    Raises SaeensError for failed transfers, and for local files that are replaced meanwhile.
    """
    with _refusals(place):
        if not huggingface_hub.get_token():
            raise ConfigurationError(f"{place}: there is no access token: log in with `hf auth login`, or set HF_TOKEN")
        api = HfApi()
        head = _head(api, place, private=private)
        there = _files_there(api, place, head)
        obsolete = _obsolete(place, head, there, files, asset, overwrite=overwrite)
        additions = [CommitOperationAdd(_inside(place, name), each.content) for name, each in files.items()]
        deletions = [CommitOperationDelete(_inside(place, name), is_folder=False) for name in sorted(obsolete)]
        branch: dict[str, Any] = {"revision": place.revision} if place.revision else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            api.preupload_lfs_files(place.repo, additions, free_memory=False, **branch)
            for addition, each in zip(additions, files.values(), strict=True):
                if addition.upload_info.sha256.hex() != each.sha256:
                    raise SaeensError(f"{each.content} was replaced while it was pushed; nothing is committed: push again")
            operations = [*additions, *deletions]
            made = api.create_commit(place.repo, operations, commit_message=message, parent_commit=head, **branch)
    return Pushed(place._replace(revision=made.oid), made.commit_url, made.oid != head)


def pull(where: str, folder: Path) -> Place:
    """Download a pushed folder at one commit into a new folder, and compare every file with its hash. Return the place with the commit.

    The folder appears whole or not at all. A folder that has exactly these files is left as it is.

    Raises ConfigurationError for a folder with other content, a place without a `lineage.json` of `saeens push`, and what the hub does not
    have or refuses. Raises SaeensError if the hub cannot be reached, and for files that differ from their hashes: a model card that was
    edited on the hub is taken as it is.
    """
    place, target = _parsed(where), folder.absolute()
    is_taken = target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir())))
    aside = target.parent / f".{target.name}.{hashlib.sha256(where.encode()).hexdigest()[:8]}.pull"
    with _refusals(place), _removed_after(aside, target.parent):
        commit = HfApi().repo_info(place.repo, revision=place.revision).sha
        assert commit is not None
        at = place._replace(revision=commit)
        manifest = _Manifest.read(_lineage_there(at, aside), at)
        names = {name: _inside(place, name) for name in (*manifest.files, LINEAGE_FILE)}
        if is_taken:
            if target.is_dir() and _same(target, aside / _inside(place, LINEAGE_FILE), manifest):
                return at
            raise ConfigurationError(f"{folder} exists with other content than {at}: name a new folder")
        needed, free = sum(size for size, _ in manifest.files.values()), free_bytes(target.parent)
        if free < needed:
            raise SaeensError(f"{at} has {needed:,} bytes, and {target.parent} has {free:,} bytes free")
        huggingface_hub.snapshot_download(place.repo, revision=commit, allow_patterns=list(names.values()), local_dir=aside)
        downloaded = aside / place.path
        for name, (size, sha256) in manifest.files.items():
            file = downloaded / name
            if not file.is_file():
                raise SaeensError(f"{at}: {name} is missing, and {LINEAGE_FILE} lists it: the repository was changed after the push")
            if name != CARD_FILE and (file.stat().st_size != size or file_sha256(file) != sha256):
                raise SaeensError(f"{at}: {name} is not the file that was pushed: its hash is not that in {LINEAGE_FILE}")
        shutil.rmtree(aside / ".cache", ignore_errors=True)  # what huggingface_hub notes of its downloads
        if target.is_dir():
            target.rmdir()
        downloaded.rename(target)
    return at


def _parsed(where: str) -> Place:
    try:
        return Place.parse(where)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


@contextlib.contextmanager
def _refusals(place: Place) -> Iterator[None]:
    """Turn refusals of the hub into ConfigurationError, and failures into SaeensError, without the access token."""
    try:
        with explained(place):
            yield
    except ConnectionError as error:
        raise SaeensError(str(error)) from error.__cause__
    except OSError as error:  # of a file here
        raise SaeensError(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        message, token = str(error), huggingface_hub.get_token()
        raise ConfigurationError(message.replace(token, "***") if token else message) from error.__cause__


def _head(api: HfApi, place: Place, *, private: bool) -> str:
    """Return the last commit of the branch. A missing repository or branch is created."""
    try:
        found = api.repo_info(place.repo)
    except RepositoryNotFoundError:
        api.create_repo(place.repo, private=private or None)
        found = api.repo_info(place.repo)
    if private and not found.private:
        raise ConfigurationError(f"{place}: the repository is public already: make it private in its settings, or leave --private out")
    if place.revision is None:
        return str(found.sha)
    try:
        return str(api.repo_info(place.repo, revision=place.revision).sha)
    except RevisionNotFoundError:
        api.create_branch(place.repo, branch=place.revision)
        return str(api.repo_info(place.repo, revision=place.revision).sha)


def _files_there(api: HfApi, place: Place, commit: str) -> set[str]:
    """Return the files of the folder, by their paths in it."""
    try:
        entries = [*api.list_repo_tree(place.repo, place.path or None, recursive=True, revision=commit)]
    except EntryNotFoundError:
        return set()
    prefix = f"{place.path}/" if place.path else ""
    return {entry.path.removeprefix(prefix) for entry in entries if isinstance(entry, RepoFile)}


def _obsolete(place: Place, commit: str, there: set[str], files: Mapping[str, Content], asset: str, *, overwrite: bool) -> set[str]:
    """Return the files of an earlier push that the new one lacks. Raises ConfigurationError for files in the way, unless `overwrite`."""
    at = place._replace(revision=commit)
    pushed, problem = set[str](), ""
    if LINEAGE_FILE in there:
        try:
            before = _Manifest.read(_cached(at, LINEAGE_FILE), at)
        except ConfigurationError as error:
            problem = str(error)
        else:
            pushed = {*before.files, LINEAGE_FILE}
            if before.asset != asset:
                problem = f"{place} has {before.asset}, not {asset}"
            elif CARD_FILE in there & before.files.keys() and file_sha256(_cached(at, CARD_FILE)) != before.files[CARD_FILE][1]:
                problem = f"{place}: {CARD_FILE} was edited after it was pushed"
    if not problem and (foreign := sorted(there & files.keys() - pushed)):
        problem = f"{place} has files that were not pushed from here: {', '.join(foreign[:5])}"
    if problem and not overwrite:
        raise ConfigurationError(f"{problem}. Name another folder of the repository, hub:{place.repo}/FOLDER, or push with --overwrite")
    return (pushed & there) - files.keys()


def _lineage_there(at: Place, aside: Path) -> Path:
    """Download `lineage.json`."""
    try:
        return Path(huggingface_hub.hf_hub_download(at.repo, _inside(at, LINEAGE_FILE), revision=at.revision, local_dir=aside))
    except EntryNotFoundError as error:
        if not isinstance(error, HfHubHTTPError):  # it was not found in the cache, and there is no network
            raise
        raise ConfigurationError(
            f"{at}: there is no {LINEAGE_FILE}, so that `saeens push` has not pushed it. SAEs of other tools: "
            "`saeens_models.interop.load` opens a place of the hub"
        ) from error


def _cached(at: Place, name: str) -> Path:
    return Path(huggingface_hub.hf_hub_download(at.repo, _inside(at, name), revision=at.revision))


@contextlib.contextmanager
def _removed_after(aside: Path, parent: Path) -> Iterator[None]:
    """Make the folder `aside`, and remove it in the end, with new folders above it that are empty."""
    above = [each for each in (parent, *parent.parents) if not each.exists()]
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            for each in above:
                each.rmdir()


def _same(folder: Path, lineage: Path, manifest: _Manifest) -> bool:
    """Return whether a folder has the files of a push, and no others."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    if found != {*manifest.files, LINEAGE_FILE} or (folder / LINEAGE_FILE).read_bytes() != lineage.read_bytes():
        return False
    return all(file_sha256(folder / name) == sha256 for name, (_, sha256) in manifest.files.items() if name != CARD_FILE)


def _inside(place: Place, name: str) -> str:
    return str(PurePosixPath(place.path) / name)
