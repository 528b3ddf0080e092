"""The quickstart as a whole, in a process of its own and an empty data root. It has no peer."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Contender, Effort, Stopwatch, measure_alone

TITLE = "Quickstart"
_COMMAND = "from saeens_pipeline.cli import main; main()"
_ONCE = Effort(rounds=1, budget_seconds=0)


def run(options: Options) -> Section:
    """From the corpus to the tables, both seeds."""
    peaks: list[int] = []
    numbers = count()

    def quickstart() -> float:
        stopwatch = Stopwatch()
        with stopwatch:
            peaks.append(_run_command(["run", "quickstart"], options.scratch / f"data_{next(numbers)}"))
        return stopwatch.seconds

    row = measure_alone("saeens run quickstart", Contender("saeens", "as shipped", quickstart), _ONCE if options.quick else options.effort)
    notes = [f"Peak resident memory of the command's largest process: {max(peaks) / 1e9:.2f} GB."]
    return Section(TITLE, "`saeens run quickstart` in an empty data root, start-up and Dagster included.", [row], notes=notes)


def _run_command(arguments: list[str], data: Path) -> int:
    """Run the command line; returns the peak resident memory in bytes."""
    data.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"} | {"SAEENS_DATA": str(data)}
    with (data / "output.txt").open("w+") as output:
        process = subprocess.Popen([sys.executable, "-c", _COMMAND, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            output.seek(0)
            raise RuntimeError(f"saeens {' '.join(arguments)} failed:\n{output.read()[-4000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
