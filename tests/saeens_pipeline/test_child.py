"""Commands whose process is killed, aborted or interrupted answer in one line, and end with their child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, resource, signal, sys, time
import saeens_pipeline.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit that it is ignored
def work():
    {work}
sys.modules["saeens_pipeline.cli.app"].app = work
sys.argv = ["saeens", "--no-debug", *sys.argv[1:]]
saeens_pipeline.cli.main()
"""
NO_MEMORY = "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); bytearray(2**32)"


def _start(work: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT.format(work=work), *(arguments or ("run", "tiny"))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("os.abort()", "a library aborted it (SIGABRT), mostly because it got no memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "it was killed (SIGKILL), as the system does when memory runs out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "a library crashed it (SIGSEGV)"),
        (NO_MEMORY, "memory ran out: free some, or set SAEENS_MEMORY_GB"),
    ],
)
def test_a_command_without_memory_answers_in_one_line(work: str, said: str):
    child = _start(work)
    _, printed = child.communicate(timeout=60)
    assert child.returncode == 1
    assert printed.startswith("error: ")
    assert said in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "code"), [("return", 0), ("sys.exit(3)", 3), ("raise SystemExit(130)", 130), ("os.kill(os.getpid(), signal.SIGTERM)", -15)]
)
def test_a_command_exits_as_its_child(work: str, code: int):
    child = _start(work)
    kept = "finished artefacts are kept, and the next run resumes from there."
    assert child.communicate(timeout=60) == ("", f"stopped by SIGTERM: {kept}\n" if code < 0 else "")
    assert child.returncode == code


@pytest.mark.slow
def test_commands_that_only_read_have_no_child():
    child = _start("os.abort()", "status", "run")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGABRT


SLEEP = """try:
        print(os.getpid(), flush=True)
        time.sleep(60)
    except KeyboardInterrupt: sys.exit(130)"""


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_a_command_ends_its_child(sent: signal.Signals, code: int):
    child = _start(SLEEP)
    assert child.stdout
    pid = int(child.stdout.readline())
    assert pid != child.pid
    child.send_signal(sent)
    child.communicate(timeout=30)
    assert child.returncode == code
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
