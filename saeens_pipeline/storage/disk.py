"""What is asked of the disk itself: that it has written, and whether it is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error or what caused it is ENOSPC; safetensors and polars raise it under names of their own."""
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
