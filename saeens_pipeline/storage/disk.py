"""Durable writes, and the detection of full disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is ENOSPC, which safetensors and polars raise as errors of their own."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, have reached the disk."""
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
