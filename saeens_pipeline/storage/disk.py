"""Durable writes, free space, and the detection of full disks."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from saeens_pipeline.errors import SaeensError

_writes_nothing = ContextVar("writes_nothing", default=False)


@contextlib.contextmanager
def writing_nothing() -> Iterator[None]:
    """Mark this context as one in which checks write nothing, not even what the first use of an input keeps: see `writes_nothing`."""
    token = _writes_nothing.set(True)
    try:
        yield
    finally:
        _writes_nothing.reset(token)


def writes_nothing() -> bool:
    """Return whether this is inside `writing_nothing`."""
    return _writes_nothing.get()


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is ENOSPC, which safetensors and polars raise as errors of their own."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str, aside: str) -> None:
    """Write a UTF-8 file that appears complete or not at all: write it as `aside` in the same folder, flush it, and rename it."""
    beside = path.with_name(aside)
    beside.write_text(text, "utf-8")
    flush(beside)
    beside.replace(path)


def nearest_folder(path: Path) -> Path:
    """Return a path or, before it exists, its nearest existing parent."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, which need not exist."""
    return shutil.disk_usage(nearest_folder(path)).free


def require_free_disk(path: Path, n_bytes: int, name: str) -> None:
    """Raise SaeensError unless the disk of `path`, which need not exist, has `n_bytes` free."""
    free = free_bytes(path)
    if free < n_bytes:
        raise SaeensError(
            f"{name} needs {n_bytes:,} bytes in {path}, where {free:,} bytes are free: "
            "make room, ask for fewer tokens or layers, or set SAEENS_DATA to a larger disk"
        )
