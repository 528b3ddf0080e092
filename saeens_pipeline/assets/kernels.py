"""Compiled CPU kernels: compiled once for all processes, and in a separate process while tokens and activations are computed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from saeens_pipeline.storage.locks import holding


def load_kernels(root: Path, architectures: Iterable[str]) -> None:
    """Compile the training kernels of these architectures or read them from disk. One process below `root` compiles at a time."""
    from saeens_models import training

    with holding(root, "kernels"):
        for architecture in sorted(set(architectures)):
            training.load_kernels(architecture)


@contextlib.contextmanager
def compiled_meanwhile(root: Path, architectures: Iterable[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Load the kernels of these architectures in another process, which ends with this context at the latest.

    Nothing depends on that process: missing kernels are compiled when needed. It has its own session, so that Ctrl-C in a terminal
    interrupts this process only.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(root), *sorted(set(architectures))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    load_kernels(Path(sys.argv[1]), sys.argv[2:])
