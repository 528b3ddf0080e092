"""``python -m benchmarks [NAME ...] [--quick] [--output DIR]``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

from benchmarks.environment import available_cores, describe, set_allocator, set_threads

BENCHMARKS = (
    "training",
    "training_large",
    "boosting",
    "reading",
    "evaluation",
    "caching",
    "quickstart",
    "growth",
    "end_to_end",
    "on_demand",
    "gpu",
)
_QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory compared with peers, in turns, in one process."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all but gpu if none is given")
    parser.add_argument("--quick", action="store_true", help="one round on small shapes, to test that everything runs")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for results.json and results.md, which keep results of earlier runs"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="for every library of either side (default: all cores)")
    parser.add_argument(
        "--allocator",
        choices=("retain", "system"),
        default="retain",
        help="retain (default): freed memory stays with the process, which speeds up both sides, peers most; system: malloc's defaults",
    )
    parser.add_argument("--tokens", type=int, help="training tokens of end_to_end, rounded to whole batches of windows")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if not 1 <= arguments.threads <= available_cores():
        parser.error(f"--threads {arguments.threads}: this machine has {available_cores()} cores for it")
    if arguments.tokens is not None and arguments.tokens < 1:
        parser.error(f"--tokens {arguments.tokens}: expected at least 1")
    if arguments.output:
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output {arguments.output}: {error.strerror}")
    set_threads(arguments.threads)
    set_allocator(arguments.allocator)
    os.environ |= _QUIET
    warnings.filterwarnings("ignore")  # of the peers, and their dependencies

    from benchmarks.options import Options
    from benchmarks.report import Report

    report = Report(arguments.output)
    for name in arguments.names or [name for name in BENCHMARKS if name != "gpu"]:
        print(f"{name} ...", file=sys.stderr)
        environment = describe(arguments.allocator)
        with tempfile.TemporaryDirectory(prefix="saeens_bench_") as scratch:
            section = import_module(f"benchmarks.{name}").run(
                Options(arguments.quick, Path(scratch), arguments.allocator, arguments.tokens)
            )
        report.add(name, section, environment, arguments.quick)
    print(report.markdown())


if __name__ == "__main__":
    main()
