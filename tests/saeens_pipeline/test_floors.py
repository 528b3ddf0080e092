"""The floors of the packages, as import-linter checks them: `make check` fails where a module imports one above it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "a floor above": ("storage/locks.py", "from saeens_pipeline.assets import saes"),
    "a circle": ("storage/names.py", "from saeens_pipeline.storage import recipes"),
    "Dagster": ("assets/memory.py", "import dagster"),
}


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of both packages and of the contracts."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in ("saeens_models", "saeens_pipeline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_packages_keep_their_floors(checkout: Path):
    linted = _lint(checkout)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("case", FORBIDDEN)
@pytest.mark.parametrize("place", ["inside a function", "for type checking"])
def test_an_import_across_floors_is_found_at_every_level_of_a_module(checkout: Path, case: str, place: str):
    name, statement = FORBIDDEN[case]
    file = checkout / "saeens_pipeline" / name
    before = file.read_text()
    header = "def _late() -> None:" if place == "inside a function" else "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:"
    try:
        file.write_text(f"{before}\n\n{header}\n    {statement}\n")
        linted = _lint(checkout)
    finally:
        file.write_text(before)
    assert linted.returncode == 1, linted.stdout
