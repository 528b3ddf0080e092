"""SAEs on the Hugging Face hub: only the files of a format are downloaded, into the hub's cache, at one commit."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from saeens_models.architectures.weight_files import read_json
from saeens_models.ensembles import ENSEMBLE_FILE

PREFIX = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLACE = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+?))?/?(?:@(?P<revision>[^@]+))?")


class Downloaded(NamedTuple):
    """A folder or file in the hub's cache, and its place with the commit."""

    path: Path
    source: str


def download(where: str, names: Iterable[str]) -> Downloaded:
    """Download the files called ``names`` (patterns) at ``hub:OWNER/REPO``, ``/PATH`` of a folder or file in it, ``@REVISION``.

    Files that are in the cache are not asked for again if the revision is a commit. ``huggingface_hub`` reads and sends the access token.

    Raises ``ValueError`` for a place that is not written so, or that the hub does not have or refuses; ``ModuleNotFoundError`` without
    ``huggingface_hub``; ``ConnectionError`` if the hub cannot be reached.
    """
    repo, path, revision = parse(where)
    wanted = _Wanted(repo, path, tuple(names))
    with _explained(where, repo, revision):
        snapshot = wanted.download(revision)
        at = snapshot / path
        if not (at.is_file() or (at.is_dir() and any(each.is_file() for each in at.iterdir()))):
            wanted.complain(snapshot.name)
    return Downloaded(snapshot / path, wanted.place(snapshot.name))


def pin(where: str) -> str:
    """Return a place with the commit of its revision: the commit in the hub's cache, otherwise that on the hub. Raises as `download`."""
    repo, path, revision = parse(where)
    if revision and _COMMIT.fullmatch(revision):
        return where
    with _explained(where, repo, revision):
        import huggingface_hub

        api = huggingface_hub.HfApi()
        with contextlib.suppress(huggingface_hub.errors.RevisionResolutionError):
            return _Wanted(repo, path, ()).place(api.resolve_revision(repo, revision=revision, local_files_only=True).resolved)
        return _Wanted(repo, path, ()).place(api.resolve_revision(repo, revision=revision).resolved)


def parse(where: str) -> tuple[str, str, str | None]:
    """Return repository, path in it (empty for all of it) and revision of a place. Raises ``ValueError`` for another text."""
    found = _PLACE.fullmatch(where)
    path = (found and found["path"]) or ""
    if found is None or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{where!r}: write hub:OWNER/REPO, with /PATH for a folder in it and @REVISION for a branch, tag or commit")
    return found["repo"], path, found["revision"]


@contextlib.contextmanager
def _explained(where: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub into those of `download`, with the place and the remedy."""
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        message = f"{where}: the package huggingface_hub is missing: pip install 'saeens[hub]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{where}: the repository is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{where}: {repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{where}: the hub has no such repository, or it is private: `hf auth login`") from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{where}: the hub refuses it: {' '.join(str(error).split())}") from error
    except (OSError, errors.RevisionResolutionError) as error:
        raise ConnectionError(
            f"{where} is not in the hub's cache, and the hub cannot be reached: {' '.join(str(error).split())}"
        ) from error


class _Wanted(NamedTuple):
    """Files called ``names`` in a folder of a repository, or beside a file in it."""

    repo: str
    path: str
    names: tuple[str, ...]

    def place(self, commit: str) -> str:
        return f"{PREFIX}{self.repo}{f'/{self.path}' if self.path else ''}@{commit}"

    def download(self, revision: str | None) -> Path:
        """Download the files, of an ensemble with those of its members. Return the folder of the commit."""
        import huggingface_hub

        folders = [PurePosixPath(self.path), *([PurePosixPath(self.path).parent] if self.path else [])]  # the path may be that of a file
        patterns = [self.path] * bool(self.path) + [str(folder / name) for folder in folders for name in self.names]
        snapshot = Path(huggingface_hub.snapshot_download(self.repo, revision=revision, allow_patterns=patterns))
        if (manifest := snapshot / self.path / ENSEMBLE_FILE).is_file():
            members = [name for name in read_json(manifest).get("members") or [] if isinstance(name, str) and ".." not in name]
            of_members = [str(folders[0] / member / name) for member in members for name in self.names]
            huggingface_hub.snapshot_download(self.repo, revision=snapshot.name, allow_patterns=[*patterns, *of_members])
        return snapshot

    def complain(self, commit: str) -> NoReturn:
        """Raise ``ValueError``: the folder has no SAE. It names folders of the repository that have one."""
        import huggingface_hub

        files = map(PurePosixPath, huggingface_hub.HfApi().list_repo_files(self.repo, revision=commit))
        weights = [name for name in self.names if not name.endswith(".json")]
        folders = sorted({str(file.parent) for file in files if any(file.match(name) for name in weights)})
        hint = (
            f". There are SAEs in {', '.join(folders[:5])}{f' and {len(folders) - 5} more' if len(folders) > 5 else ''}" if folders else ""
        )
        raise ValueError(f"{self.place(commit)}: the repository has no SAE there, none of {', '.join(self.names)}{hint}")
