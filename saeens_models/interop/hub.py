"""SAEs on the Hugging Face hub: only the files of a format are downloaded, into the hub's cache, at one commit."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn, Self, cast

from saeens_models.architectures.weight_files import read_json
from saeens_models.ensembles import ENSEMBLE_FILE

PREFIX = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLACE = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+?))?/?(?:@(?P<revision>[^@]+))?")
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+")  # of signed addresses


class Place(NamedTuple):
    """A folder or file ``path`` of a repository, "" for all of it, at a branch, tag or commit, None for the default branch."""

    repo: str
    path: str
    revision: str | None

    @classmethod
    def parse(cls, where: str) -> Self:
        """Read ``hub:OWNER/REPO``, with ``/PATH`` and ``@REVISION``. Raises ``ValueError`` for a place that is not written so."""
        found = _PLACE.fullmatch(where)
        path = (found and found["path"]) or ""
        if found is None or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{where!r}: write hub:OWNER/REPO, with /PATH for a folder in it and @REVISION for a branch, tag or commit")
        return cls(found["repo"], path, found["revision"])

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}{f'/{self.path}' if self.path else ''}{f'@{self.revision}' if self.revision else ''}"


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
    place = Place.parse(where)
    wanted = _Wanted(place.repo, place.path, tuple(names))
    with explained(place, f"{where} is not in the hub's cache, and the hub cannot be reached"):
        snapshot = wanted.download(place.revision)
        at = snapshot / place.path
        if not (at.is_file() or (at.is_dir() and any(each.is_file() for each in at.iterdir()))):
            wanted.complain(snapshot.name)
    return Downloaded(snapshot / place.path, wanted.place(snapshot.name))


def pin(where: str) -> str:
    """Return a place with the commit of its revision: the commit in the hub's cache, otherwise that on the hub. Raises as `download`."""
    place = Place.parse(where)
    if place.revision and _COMMIT.fullmatch(place.revision):
        return where
    with explained(place, f"{where} is not in the hub's cache, and the hub cannot be reached"):
        import huggingface_hub

        api = huggingface_hub.HfApi()
        with contextlib.suppress(huggingface_hub.errors.RevisionResolutionError):
            found = api.resolve_revision(place.repo, revision=place.revision, local_files_only=True)
            return str(place._replace(revision=found.resolved))
        return str(place._replace(revision=api.resolve_revision(place.repo, revision=place.revision).resolved))


@contextlib.contextmanager
def explained(place: Place, unreachable: str = "") -> Iterator[None]:
    """Turn errors of ``huggingface_hub`` inside this context into one line with the reason and a remedy, without the access token.

    Raises ``ValueError`` for what the hub does not have or refuses, ``ModuleNotFoundError`` without ``huggingface_hub``, and
    ``ConnectionError``, whose message begins with ``unreachable``, if the hub cannot be reached or a transfer fails.
    """
    try:
        from huggingface_hub import errors, get_token
    except ModuleNotFoundError as error:
        message = f"{place}: the package huggingface_hub is missing: pip install 'saeens[hub]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    bases = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)  # HTTPError of its HTTP library, and OSError
    try:
        yield
    except (RuntimeError, errors.RevisionResolutionError, *bases) as error:
        if isinstance(error, OSError) and error.filename is not None:  # of a file here
            raise
        reported = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # uploads wrap the answer
        message, token = " ".join(str(reported).split()), get_token()
        hides = bool(token) and token in f"{error} {reported}"  # a server that repeats it
        message = _QUERY.sub(r"\1", message.replace(token, "***") if token else message)
        found = _explanation(place, reported, message) or ConnectionError(
            f"{unreachable or f'{place}: the hub cannot be reached, or the transfer failed'}: {message}"
        )
        raise found from None if hides else error


def _explanation(place: Place, error: BaseException, message: str) -> ValueError | None:
    """Return the error for an answer of the hub; None if there was none."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return ValueError(f"{place}: the repository is gated: accept its terms on the hub and log in with `hf auth login`")
        case errors.RevisionNotFoundError():
            return ValueError(f"{place}: {place.repo} has no revision {place.revision!r}")
        case errors.RepositoryNotFoundError():
            return ValueError(f"{place}: the hub has no such repository, or it is private: `hf auth login`")
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            return ValueError(f"{place}: the hub refuses the access token: {message}. `hf auth login` or HF_TOKEN gives another")
        case errors.HfHubHTTPError(response=response) if response.status_code < 500:  # others are failures of the server
            return ValueError(f"{place}: the hub refuses it: {message}")
    return None


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
