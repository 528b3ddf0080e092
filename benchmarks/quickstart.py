"""The whole quickstart, in its own process with an empty data root. It has no peer."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Row, Side, Stopwatch

TITLE = "Quickstart"
_COMMAND = "from saeens_pipeline.cli import main; main()"
_ROUNDS = 3


def run(options: Options) -> Section:
    """Measure the quickstart from the corpus to the tables, both seeds."""
    sides = [_run_command(["run", "quickstart"], options.scratch / f"data_{number}") for number in range(1 if options.quick else _ROUNDS)]
    peak = max(side.peak_bytes or 0 for side in sides)
    ours = Side(statistics.median(side.seconds for side in sides), peak)
    row = Row("saeens run quickstart", "", "", ours, theirs=None, ratio=None, ratio_range=None, rounds=len(sides))
    about = "`saeens run quickstart` in an empty data root, start-up and Dagster included. Memory is that of the command's largest process."
    return Section(TITLE, about, [row])


def _run_command(arguments: list[str], data: Path) -> Side:
    """Run the command line with its data in the folder ``data``."""
    data.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"} | {"SAEENS_DATA": str(data)}
    stopwatch = Stopwatch()
    with (data / "output.txt").open("w+") as output, stopwatch:
        process = subprocess.Popen([sys.executable, "-c", _COMMAND, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            output.seek(0)
            raise RuntimeError(f"saeens {' '.join(arguments)} failed:\n{output.read()[-4000:]}")
    return Side(stopwatch.seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
