"""The base install: `saeens_models` without Dagster and the other packages of the pipeline, and a command line that says what it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
MODULES = {
    "google-crc32c": "google_crc32c",
    "pyyaml": "yaml",
    "dagster-webserver": "dagster_webserver",
}  # named otherwise than their packages
BLOCK = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
IMPORT_ALL = """
import saeens_models
for module in pkgutil.walk_packages(saeens_models.__path__, "saeens_models."):
    if module.name not in ("saeens_models.interop.sae_lens", "saeens_models.kernels.triton_topk"):  # of SAELens, and of GPUs
        importlib.import_module(module.name)
"""
RUN = """
import runpy
sys.argv = ["saeens", "experiments"]
runpy.run_module("saeens_pipeline", run_name="__main__")
"""


def without_the_pipeline(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that lacks every package of the extra `pipeline`."""
    needs = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["pipeline"]
    names = {re.split(r"[<>=!~\\[; ]", need)[0] for need in needs}
    blocked = sorted(MODULES.get(name, name.replace("-", "_")) for name in names)
    assert {"dagster", "polars", "transformers", "typer", "yaml"} <= set(blocked)
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + code]
    return subprocess.run(command, cwd=PYPROJECT.parent, capture_output=True, text=True, check=False)


def test_saeens_models_needs_no_package_of_the_pipeline():
    finished = without_the_pipeline(IMPORT_ALL)
    assert finished.returncode == 0, finished.stderr


def test_the_command_names_the_extra_that_it_needs():
    finished = without_the_pipeline(RUN)
    assert finished.returncode == 1
    assert re.fullmatch(r"error: the package \w+ is missing. The command saeens needs: pip install 'saeens\[pipeline\]'\n", finished.stderr)
