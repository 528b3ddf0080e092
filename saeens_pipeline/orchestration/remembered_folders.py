"""Which folders of one's own made what lies below a data root: without them, all that belongs to their experiments looks unused.

experiment_folders.json: their absolute paths
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings.files import FOLDERS_VARIABLE, own_folders
from saeens_pipeline.storage.locks import holding_one_of

FILE = "experiment_folders.json"


def remember_own_folders(root: Path) -> None:
    """Note the folders that SAEENS_EXPERIMENTS names now beside those that were noted before."""
    if new := _own() - remembered_folders(root):
        _change(root, add=new)


def remembered_folders(root: Path) -> set[Path]:
    """All that were noted. Raises ConfigurationError where the file cannot be read."""
    file = root / FILE
    try:
        return {Path(folder) for folder in json.loads(file.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}): mend it, or remove it if all experiment files are read") from error


def unread_folders(root: Path) -> list[Path]:
    """Those that were noted and are not read now, whether they are still there or not."""
    return sorted(remembered_folders(root) - _own())


def forget_folders(root: Path, folders: Iterable[Path]) -> None:
    """Let what belongs to these count as unused. Raises ConfigurationError, and forgets none, for one that was not noted or is read."""
    known, gone = unread_folders(root), {folder.expanduser().resolve() for folder in folders}
    for folder in sorted(gone.difference(known)):
        raise ConfigurationError(
            f"--forget-folder {folder}: no such folder was read before and is not read now; "
            f"there are: {', '.join(map(str, known)) or 'none'}"
        )
    if gone:
        _change(root, remove=gone)


def explain_unread(folders: Iterable[Path]) -> str:
    """What to do about folders that are not read: one line for each."""
    return "\n".join(
        f"{folder}: its experiment files were read before and are not read now: set {FOLDERS_VARIABLE}={folder}, "
        f"or give up what belongs to them with `saeens gc --forget-folder {folder}`"
        for folder in folders
    )


def _own() -> set[Path]:
    return {folder.resolve() for folder in own_folders()}


def _change(root: Path, *, add: Iterable[Path] = (), remove: Iterable[Path] = ()) -> None:
    with holding_one_of(root, [FILE.removesuffix(".json")]):
        folders = remembered_folders(root).union(add).difference(remove)
        aside = root / f".{FILE}.{os.getpid()}.partial"
        aside.write_text(json.dumps(sorted(map(str, folders)), indent=1) + "\n", encoding="utf-8")
        aside.replace(root / FILE)
