"""Read-only folders for tests, also where they run as the superuser, whom permissions do not stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_VERSION = 0x20080522  # of the structures of capget and capset
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away the permission to write a folder and all below it, on this thread and those that it starts."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(modes[path] & ~0o222)
    try:
        with _obeying_permissions():
            if os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                pytest.skip("permissions do not stop this process")
            yield
    finally:
        for path in paths:
            path.chmod(modes[path])


@contextlib.contextmanager
def _obeying_permissions() -> Iterator[None]:
    """Do without the superuser's capabilities to ignore permissions. Linux only; elsewhere, and for other users, nothing happens."""
    if os.geteuid() or not os.path.exists("/proc/self/status"):  # noqa: PTH110
        yield
        return
    libc, header, before = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~_OVERRIDES  # the effective ones; the permitted ones stay, so that these can be taken back
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
