"""Functions of test modules in processes of their own, which may be interrupted: no signal is ever sent to the process of the tests."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 300
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
sys.path.insert(0, sys.argv[1])
import {module}
{module}.{function}(*sys.argv[2:])
"""


def start(function: Callable[..., None], *arguments: object) -> subprocess.Popen[str]:
    """Call a function of a module in this folder with strings as arguments. It says what it observes with :func:`tell`."""
    script = START.format(module=Path(inspect.getfile(function)).stem, function=function.__name__)
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tell(**observations: Any) -> None:
    """Print what was observed; called in the child."""
    print(json.dumps(observations), flush=True)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end of a child and return its last observations."""
    try:
        out, err = child.communicate(timeout=DEADLINE_SECONDS)
    finally:
        child.kill()
    assert child.returncode == 0, out + err
    return json.loads(out.splitlines()[-1])
