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

from saeens_pipeline.storage.names import Address, Partition, place

logger = logging.getLogger(__name__)

FOLDER = "locks"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def writing_alone(root: Path, places: Iterable[tuple[Address, Partition]]) -> Iterator[None]:
    """Lock these artefacts for writing, and wait for other writers; the log names the process that is waited for.

    On a file system without locks nothing is locked: two writers may do the same work, each into a folder of its own.
    """
    with contextlib.ExitStack() as stack:
        for address, partition in sorted(places, key=lambda each: (str(each[0]), str(each[1]))):  # one order for all avoids deadlocks
            file = _file(root, address, partition)
            if not stack.enter_context(_held(file, wait=False)):
                logger.warning("%s is being made by %s: waiting for it", place(address, partition), _holder(file))
                stack.enter_context(_held(file, wait=True))
        yield


@contextlib.contextmanager
def writing_if_free(root: Path, address: Address, partition: Partition) -> Iterator[bool]:
    """Lock this artefact for writing unless another process holds it, and give whether it is locked. Does not wait."""
    with _held(_file(root, address, partition), wait=False) as is_held:
        yield is_held


@contextlib.contextmanager
def holding_one_of(root: Path, names: Sequence[str]) -> Iterator[str]:
    """Lock the first free name and give it. If no name is free, wait for the first; the log names its holder."""
    files = {name: root / FOLDER / f"{name}.lock" for name in names}
    with contextlib.ExitStack() as stack:
        name = next((name for name, file in files.items() if stack.enter_context(_held(file, wait=False))), None)
        if name is None:
            name = names[0]
            logger.warning("%s: all in use by other processes; waiting for %s, held by %s", ", ".join(names), name, _holder(files[name]))
            stack.enter_context(_held(files[name], wait=True))
        yield name


@contextlib.contextmanager
def holding(root: Path, name: str) -> Iterator[None]:
    """Lock a name, and wait for its holder without a log message."""
    with _held(root / FOLDER / f"{name}.lock", wait=True):
        yield


def _file(root: Path, address: Address, partition: Partition) -> Path:
    return root / FOLDER / f"{str(address.path(partition)).replace('/', '__')}.lock"


@contextlib.contextmanager
def _held(file: Path, *, wait: bool) -> Iterator[bool]:
    descriptor = _take(file, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _take(file: Path, *, wait: bool) -> int | None:
    """Return the descriptor of a locked file; None if another process holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)  # the previous holder has removed this file: lock the one that has its name now


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text() or "another process"
    return "another process"
