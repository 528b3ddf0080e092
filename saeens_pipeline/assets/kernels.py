"""Kernels for the CPU, compiled once for all processes; and by one of their own while tokens and activations are made."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from saeens_pipeline.storage.locks import holding


def load_kernels(root: Path, architectures: Iterable[str]) -> None:
    """Compile what training of these architectures calls, or read it from disk. Of the processes below `root` one compiles at a time."""
    from saeens_models import training

    with holding(root, "kernels"):
        for architecture in sorted(set(architectures)):
            training.load_kernels(architecture)


@contextlib.contextmanager
def compiled_meanwhile(root: Path, architectures: Iterable[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process load the kernels of these architectures; it ends with this context at the latest.

    Nothing depends on it: what it has not compiled is compiled where it is needed. An interrupt in a terminal goes to this process
    alone.
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
