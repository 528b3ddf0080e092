"""One writer at a time for each artefact, and one process for each GPU, among all that work below one root.

A lock is a file that a process holds with `flock`: the system lets go of it when the process ends, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
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
    """Wait until no other process writes any of these artefacts, and keep others waiting meanwhile. Who is waited for is logged.

    A file system without locks is taken as it is: there two writers may do the same work, each into a folder of its own.
    """
    with contextlib.ExitStack() as stack:
        for address, partition in sorted(places, key=lambda each: (str(each[0]), str(each[1]))):  # in one order, or two wait for each other
            file = _file(root, address, partition)
            lock = _take(file, wait=False)
            if lock is None:
                logger.warning("%s is being made by %s: waiting for it", place(address, partition), _holder(file))
                lock = _take(file, wait=True)
            if lock is not None:
                stack.callback(_give_back, file, lock)
        yield


@contextlib.contextmanager
def writing_if_free(root: Path, address: Address, partition: Partition) -> Iterator[bool]:
    """Whether no other process writes this artefact; if so, others wait until the context is left."""
    file = _file(root, address, partition)
    lock = _take(file, wait=False)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            _give_back(file, lock)


@contextlib.contextmanager
def holding_one_of(root: Path, names: Sequence[str]) -> Iterator[str]:
    """Hold the first of some things that no other process holds; where all are held, wait for the first. Gives its name."""
    files = {name: root / FOLDER / f"{name}.lock" for name in names}
    name, lock = next(((name, lock) for name, file in files.items() if (lock := _take(file, wait=False)) is not None), (names[0], None))
    if lock is None:
        logger.warning("%s: all in use by other processes; waiting for %s, held by %s", ", ".join(names), name, _holder(files[name]))
        lock = _take(files[name], wait=True)
    try:
        yield name
    finally:
        if lock is not None:
            _give_back(files[name], lock)


@contextlib.contextmanager
def holding(root: Path, name: str) -> Iterator[None]:
    """Wait, without a word, until no other process holds this, and hold it."""
    file = root / FOLDER / f"{name}.lock"
    lock = _take(file, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            _give_back(file, lock)


def _file(root: Path, address: Address, partition: Partition) -> Path:
    return root / FOLDER / f"{str(address.path(partition)).replace('/', '__')}.lock"


def _take(file: Path, *, wait: bool) -> int | None:
    """The descriptor of a file that this process now holds alone; None where another holds it."""
    import fcntl

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
        os.close(descriptor)  # whoever held it has removed the file: take the one that is there now


def _give_back(file: Path, descriptor: int) -> None:
    file.unlink(missing_ok=True)
    os.close(descriptor)


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text() or "another process"
    return "another process"
