"""The data root: the folder that holds all artefacts."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).parents[2]
"""The checkout; of an installed package, the folder that holds its packages."""


def data_root() -> Path:
    """Return the folder in `SAEENS_DATA`; without it, `data` in the checkout, or in the current folder for an installed package."""
    chosen = os.environ.get("SAEENS_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return (PROJECT_ROOT if (PROJECT_ROOT / "pyproject.toml").exists() else Path.cwd()) / "data"
