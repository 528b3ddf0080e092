"""A cache of arrays in a local folder, of limited size."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.disk import flush

FOLDER = "activation_cache"
VARIABLE = "SAEENS_ACTIVATION_CACHE_GB"
_DEFAULT_GB = 10.0


def activation_cache(root: Path, name: str) -> RollingCache:
    """Return the cache of this name for activations in a data root. Raises as `activation_cache_bytes`."""
    return RollingCache(root / FOLDER / name, activation_cache_bytes())


def activation_cache_bytes() -> float:
    """Return the size of the cache of a data root: SAEENS_ACTIVATION_CACHE_GB, in GB of 10^9 bytes, by default 10.

    Raises ConfigurationError for a value that is not a number of at least 0.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    try:
        gigabytes = float(chosen) if chosen else _DEFAULT_GB
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ConfigurationError(f"{VARIABLE}={chosen}: expected a number of GB, 0 or more")
    return gigabytes * 1e9


class RollingCache:
    """Arrays in `folder`, one in a file each. The folders beside it are caches of other data; all together have at most `most_bytes`.

    What is there stays while its folder is in use: passes in random orders then find the share that fits, and would find less if each array
    pushed out the oldest. Arrays of other folders make room, those first that were not read for longest. Several processes can use one
    cache: a file appears whole, and one that disappears is computed again.
    """

    def __init__(self, folder: Path, most_bytes: float) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def get(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array of this name, or compute it and keep it if there is room. A file that cannot be read or written is left out."""
        file = self.folder / f"{name}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(file, allow_pickle=False)
            os.utime(file)
            return found
        values = compute()
        with contextlib.suppress(OSError):
            if self._make_room(values.nbytes):
                self._keep(file, values)
        return values

    def _keep(self, file: Path, values: np.ndarray) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.stem}.{os.getpid()}")
        try:
            with aside.open("wb") as stream:
                np.save(stream, values, allow_pickle=False)
            flush(aside)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int) -> bool:
        """Remove arrays of other folders until there is room, and return whether there is."""
        sizes = {file: file.stat() for file in self.folder.parent.glob("*/*.npy")}
        too_many = sum(each.st_size for each in sizes.values()) + n_bytes - self.most_bytes
        others = [file for file in sizes if file.parent != self.folder]
        for file in sorted(others, key=lambda file: sizes[file].st_mtime):
            if too_many <= 0:
                break
            file.unlink(missing_ok=True)
            too_many -= sizes[file].st_size
        return too_many <= 0
