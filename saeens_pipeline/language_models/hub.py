"""The Hugging Face hub: which commit a revision is, and files of a commit in the hub's own cache.

What is in the cache is not asked for again. A revision such as `main` so keeps the commit that it was when it was first used; `hf download`
moves it on. What the hub refuses is said in its own words, with what to do. Its token stays with `huggingface_hub`, which sends it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from saeens_pipeline.errors import ConfigurationError, SaeensError

Kind = Literal["model", "dataset"]

"""What a repository of the hub may be called: `owner/name`, or for old ones `name`."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_commit(name: str, revision: str, kind: Kind) -> str:
    """The commit that a branch, tag or commit is: as the cache knows it, else as the hub says.

    Raises ConfigurationError for a repository or revision that the hub does not give, SaeensError where it cannot be reached.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    with contextlib.suppress(RevisionResolutionError):
        return HfApi().resolve_revision(name, repo_type=kind, revision=revision, local_files_only=True).resolved
    with explained(name, revision, kind):
        return HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved


def download(name: str, commit: str, files: Sequence[str], kind: Kind = "model") -> Path:
    """The folder of a commit in the hub's cache, with the files that match one of the patterns; subfolders are left out.

    Raises as `resolve_commit`.
    """
    from huggingface_hub import snapshot_download

    with explained(name, commit, kind):
        return Path(snapshot_download(name, repo_type=kind, revision=commit, allow_patterns=list(files), ignore_patterns=["*/*"]))


def sizes(name: str, commit: str, files: Sequence[str]) -> dict[str, int] | None:
    """Bytes of the files of a model that match one of the patterns, without downloading them; None where the hub cannot be asked."""
    from huggingface_hub import DryRunFileInfo, snapshot_download
    from huggingface_hub.errors import DryRunError

    with explained(name, commit, "model"):
        try:
            found = snapshot_download(name, revision=commit, allow_patterns=list(files), ignore_patterns=["*/*"], dry_run=True)
        except DryRunError:
            return None
    return {each.filename: each.file_size or 0 for each in found if isinstance(each, DryRunFileInfo)}


@contextlib.contextmanager
def explained(name: str, revision: str, kind: Kind) -> Iterator[None]:
    """What the hub raises inside becomes one message with its reason and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

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
        raise ConfigurationError(f"{what} {name!r} has no revision {revision!r} on the hub: {page} lists those that it has") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ConfigurationError(f"{what} {name!r} is refused by the hub: {_reason(error)} Log in with `hf auth login`") from error
        raise SaeensError(f"{what} {name!r}: the hub answered with an error: {_reason(error)}") from error
    except (OSError, RevisionResolutionError) as error:
        raise SaeensError(
            f"{what} {name!r}: there is no such folder here, it is not in the hub's cache ({constants.HF_HUB_CACHE}), "
            f"and the hub cannot be reached ({_first_cause(error)}). {_way_out(name, kind)}"
        ) from error


def _way_out(name: str, kind: Kind) -> str:
    if kind == "dataset":
        return (
            "Run this where the hub can be reached, or bring the data set's files here and give them as `corpus: {files: ...}`, "
            "those of labelled texts as their `path`"
        )
    return f"On a machine that reaches it, `hf download {name} --local-dir FOLDER`, bring FOLDER here, and give FOLDER in the name's place"


def _reason(error: Exception) -> str:
    """The hub's own message, in one line."""
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())
    return reason if reason.endswith(".") else f"{reason}."


def _first_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
