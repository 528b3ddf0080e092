"""Fingerprints of files for recipes, cheap even for files of many gigabytes."""

from __future__ import annotations

import hashlib
import sys
from functools import lru_cache
from pathlib import Path

SAMPLES = 64


def fingerprint(file: Path, *, whole_bytes: int, sample_bytes: int, head: range = range(0)) -> str:
    """Return the SHA-256 of a file of up to `whole_bytes`, and of samples of a larger one.

    The samples are the size, the bytes at `head`, and 64 pieces of `sample_bytes`, spread evenly: an edit of a few bytes between two
    pieces is not detected.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= whole_bytes:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(head.start)
        digest = hashlib.sha256(str(size).encode() + stream.read(len(head)))
        for sample in range(SAMPLES):
            stream.seek((size - sample_bytes) * sample // (SAMPLES - 1))
            digest.update(stream.read(sample_bytes))
    return f"sampled-{digest.hexdigest()}"


def fingerprint_once(file: Path, whole_bytes: int = sys.maxsize) -> str:
    """Return the fingerprint of a file. It is cached per process until the size or the modification time of the file changes."""
    return _fingerprint_once(file, whole_bytes, file.stat().st_size, file.stat().st_mtime_ns)


@lru_cache(maxsize=100_000)
def _fingerprint_once(file: Path, whole_bytes: int, _size: int, _changed_at: int) -> str:
    return fingerprint(file, whole_bytes=whole_bytes, sample_bytes=max(whole_bytes // 128, 1024))
