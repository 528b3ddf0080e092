"""Paths of training checkpoints, and the interval between two of them. Neither changes a trained SAE.

checkpoints/OP/layer=8/seed=42.safetensors
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.names import Partition

FOLDER = "checkpoints"
SECONDS_VARIABLE = "SAEENS_CHECKPOINT_SECONDS"
_DEFAULT_SECONDS = 300.0
_FILE = re.compile(rf"{FOLDER}/(?P<op>\w+)/(?:layer=(?P<layer>\d+)/)?\.?seed=(?P<seed>\d+)\.safetensors(?:\.partial)?")
_UNFINISHED = re.compile(rf"{FOLDER}/\w+/(layer=\d+/)?\.tmp\w{{6}}")  # safetensors writes it before the file has a name


def checkpoint_file(root: Path, op_name: str, partition: Partition) -> Path:
    """Return the checkpoint file of the SAEs that one op trains together; `root` is the data root."""
    *folders, name = [f"{name}={value}" for name, value in partition._asdict().items() if value is not None]
    return root.joinpath(FOLDER, op_name, *folders, f"{name}.safetensors")


def locate_checkpoint(path: PurePosixPath) -> tuple[str, Partition] | None:
    """Return the op and the partition of a complete or partial checkpoint, given its path relative to the data root; None for others."""
    found = _FILE.fullmatch(str(path))
    if found is None:
        return None
    layer, seed = (int(number) if number else None for number in found.group("layer", "seed"))
    return found["op"], Partition(layer, seed)


def is_unfinished_checkpoint(path: PurePosixPath) -> bool:
    """Return whether a path relative to the data root is that of a checkpoint while safetensors writes it."""
    return _UNFINISHED.fullmatch(str(path)) is not None


def checkpoint_seconds() -> float | None:
    """Return the seconds between two checkpoints: SAEENS_CHECKPOINT_SECONDS, by default 300; None (no checkpoints) if it is `off`.

    Raises ConfigurationError for other values than `off` and numbers of at least 0.
    """
    chosen = os.environ.get(SECONDS_VARIABLE, "").strip()
    if chosen == "off":
        return None
    try:
        seconds = float(chosen) if chosen else _DEFAULT_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(f"{SECONDS_VARIABLE}={chosen}: expected a number of seconds, 0 or more, or off")
    return seconds
