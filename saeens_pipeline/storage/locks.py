"""Locks among the processes of one data root: one writer per artefact, one process per GPU.

A lock is a file that a process holds with `flock`. The system releases it when the process ends, even after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from saeens_pipeline.storage.names import Address, Partition, place

logger = logging.getLogger(__name__)

FOLDER = "locks"
_locked: set[Path] = set()  # lock files that this process holds, without those on file systems without locks
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def writing_alone(root: Path, places: Iterable[tuple[Address, Partition]]) -> Iterator[None]:
    """Lock these artefacts for writing, and wait for other writers; the log names the process that is waited for.

    On a file system without locks nothing is locked: two writers may do the same work, each into a folder of its own.
    """
    with contextlib.ExitStack() as stack:
        for each in sorted(places, key=lambda each: (str(each[0]), str(each[1]))):  # one order for all avoids deadlocks
            stack.enter_context(_first_free([_file(root, *each)], f"{place(*each)} is being computed by %s: waiting for it"))
        yield


def writing_if_free(root: Path, address: Address, partition: Partition) -> contextlib.AbstractContextManager[bool]:
    """Return a context manager that locks an artefact for writing, if it is free, and yields True if it is locked. Does not wait."""
    return _held(_file(root, address, partition), wait=False)


def is_locked(root: Path, address: Address, partition: Partition) -> bool:
    """Return whether this process holds this artefact's lock, so that no other process writes it. False on a file system without locks."""
    return _file(root, address, partition) in _locked


def may_be_written(root: Path, address: Address, partition: Partition) -> bool:
    """Return whether a process holds this artefact's lock, on any machine that shares the locks. Creates no file.

    True also where a lock file cannot be opened, and on a file system without locks as long as there is a lock file.
    """
    return _may_be_held(_file(root, address, partition))


def may_be_training(root: Path) -> bool:
    """Return whether a process holds the lock of any SAE or residual, as `may_be_written`."""
    return any(_may_be_held(file) for file in (root / FOLDER).glob("experiments__*.lock"))


def may_be_held(root: Path, name: str) -> bool:
    """Return whether a process holds the lock of this name, as `may_be_written`."""
    return _may_be_held(root / FOLDER / f"{name}.lock")


def _may_be_held(file: Path) -> bool:
    try:
        with file.open("rb") as opened:  # a shared lock needs no permission to write
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def holding_one_of(root: Path, names: Sequence[str]) -> Iterator[str]:
    """Lock the first free name and give it. If no name is free, wait for the first; the log names its holder."""
    files = [root / FOLDER / f"{name}.lock" for name in names]
    with _first_free(files, f"{', '.join(names)}: all in use by other processes; waiting for {names[0]}, held by %s") as file:
        yield file.stem


def holding(root: Path, name: str) -> contextlib.AbstractContextManager[bool]:
    """Lock a name, and wait for its holder without a log message."""
    return _held(root / FOLDER / f"{name}.lock", wait=True)


def _file(root: Path, address: Address, partition: Partition) -> Path:
    return root / FOLDER / f"{str(address.path(partition)).replace('/', '__')}.lock"


@contextlib.contextmanager
def _first_free(files: Sequence[Path], message: str) -> Iterator[Path]:
    """Lock the first free file and give it. If no file is free, log the message with the holder of the first, and wait for it."""
    with contextlib.ExitStack() as stack:
        file = next((file for file in files if stack.enter_context(_held(file, wait=False))), None)
        if file is None:
            file, holder = files[0], ""
            with contextlib.suppress(OSError):
                holder = file.read_text()
            logger.warning(message, holder or "another process")
            stack.enter_context(_held(file, wait=True))
        yield file


@contextlib.contextmanager
def _held(file: Path, *, wait: bool) -> Iterator[bool]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock, is_held = FileLock(file, fallback_to_soft=False), True
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        is_held = False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    try:
        if is_held:
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        if lock.is_locked:
            _locked.add(file)
        yield is_held
    finally:
        if is_held:
            _locked.discard(file)
            file.unlink(missing_ok=True)  # while it is locked: a process that waits notices, and locks the file that has its name then
            lock.release()
