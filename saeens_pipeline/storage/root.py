"""The data root: the folder below which all artefacts lie."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).parents[2]
"""The checkout; of an installed package, the folder that holds its packages."""


def data_root() -> Path:
    """`SAEENS_DATA`, or `data` in the checkout, or `data` in the current folder where the package is not a checkout."""
    chosen = os.environ.get("SAEENS_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return (PROJECT_ROOT if (PROJECT_ROOT / "pyproject.toml").exists() else Path.cwd()) / "data"
