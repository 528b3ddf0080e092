"""The Hugging Face hub: commits of revisions, and files of a commit in the hub's cache.

The cache is used before the hub. A revision such as `main` therefore keeps the commit of its first use; `hf download` updates it.
Errors quote the message of the hub and name the remedy. `huggingface_hub` reads and sends the access token.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import huggingface_hub  # loads its parts at first use, which takes half a second
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from saeens_pipeline.errors import ConfigurationError, SaeensError


class UnreachableError(SaeensError):
    """The hub cannot be reached, and the cache does not have what is asked for."""


Kind = Literal["model", "dataset"]

_SUBFOLDERS = ["*/*"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_cache_alone = ContextVar("cache_alone", default=False)


@contextlib.contextmanager
def from_cache_alone() -> Iterator[None]:
    """Send no request to the hub inside: what is not in its cache counts as if the hub could not be reached."""
    before = _cache_alone.set(True)
    try:
        yield
    finally:
        _cache_alone.reset(before)


def resolve_commit(name: str, revision: str, kind: Kind) -> str:
    """Return the commit of a branch, tag or commit: from the cache, otherwise from the hub.

    Raises ConfigurationError for a repository or revision that the hub does not have or refuses, SaeensError if it cannot be reached.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    api = huggingface_hub.HfApi()
    with contextlib.suppress(RevisionResolutionError):
        return api.resolve_revision(name, repo_type=kind, revision=revision, local_files_only=True).resolved
    if _cache_alone.get():
        raise SaeensError(f"{name}, revision {revision}, is not in the hub's cache, and the hub is not asked now")
    with explained(name, revision, kind):
        return api.resolve_revision(name, repo_type=kind, revision=revision).resolved


def download(name: str, commit: str, files: Sequence[str], kind: Kind = "model") -> Path:
    """Download the files that match a pattern, except those in subfolders; return the folder of the commit in the hub's cache.

    Raises as `resolve_commit`.
    """
    with explained(name, commit, kind):
        wanted: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": _SUBFOLDERS}
        wanted["local_files_only"] = _cache_alone.get()
        return Path(huggingface_hub.snapshot_download(name, repo_type=kind, revision=commit, **wanted))


def sizes(name: str, commit: str, files: Sequence[str]) -> dict[str, int] | None:
    """Return the bytes of a model's files that match a pattern, without downloading them; None if the hub cannot be reached."""
    if _cache_alone.get():
        return None
    with explained(name, commit, "model"):
        try:
            wanted: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": _SUBFOLDERS}
            found = huggingface_hub.snapshot_download(name, revision=commit, dry_run=True, **wanted)
        except DryRunError:
            return None
    return {each.filename: each.file_size or 0 for each in found if isinstance(each, huggingface_hub.DryRunFileInfo)}


def list_revisions(name: str) -> list[str]:
    """Return the branches and tags that a model has on the hub now. Raises as `resolve_commit`."""
    with explained(name, "main", "model"):
        try:
            found = huggingface_hub.HfApi().list_repo_refs(name)
        except HfHubHTTPError:
            raise
        except Exception as error:  # of its HTTP client, and of its offline mode
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SaeensError(f"language model {name!r}: the hub cannot be reached to list its revisions ({reason})") from error
    return list(dict.fromkeys(each.name for each in (*found.branches, *found.tags)))


@contextlib.contextmanager
def explained(name: str, revision: str, kind: Kind) -> Iterator[None]:
    """Turn errors of the hub inside this context into one message with the reason and a remedy.

    Raises ConfigurationError for requests that the hub refuses, SaeensError for its failures and where it cannot be reached.
    """
    what = "language model" if kind == "model" else "data set"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        yield
    except GatedRepoError as error:
        raise ConfigurationError(
            f"{what} {name!r} is gated: {_reason(error)} Accept its terms at {page} and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigurationError(
            f"{what} {name!r}: there is no such folder here, and no such {what} on the hub ({_reason(error)}). If it is private, "
            "log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{what} {name!r} has no revision {revision!r} on the hub: {page} lists its revisions") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ConfigurationError(f"{what} {name!r} is refused by the hub: {_reason(error)} Log in with `hf auth login`") from error
        raise SaeensError(f"{what} {name!r}: the hub answered with an error: {_reason(error)}") from error
    except (OSError, RevisionResolutionError) as error:
        cause: BaseException = error
        while (before := cause.__cause__ or cause.__context__) is not None:
            cause = before
        ways_out = {
            "model": f"On a machine that reaches it, run `hf download {name} --local-dir FOLDER`; copy FOLDER here and give it instead of "
            "the name",
            "dataset": "Run this where the hub can be reached, or copy the data set's files to this machine and give them as "
            "`corpus: {files: ...}`, or as `path` for labelled texts",
        }
        raise UnreachableError(
            f"{what} {name!r}: there is no such folder here, it is not in the hub's cache ({constants.HF_HUB_CACHE}), "
            f"and the hub cannot be reached ({type(cause).__name__}: {' '.join(str(cause).split())}). {ways_out[kind]}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of the hub, on one line."""
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())
    return reason if reason.endswith(".") else f"{reason}."
