"""Commands that compute run in a child process: if the system ends it, the command can say why.

Nothing in a process can answer an abort of a library that gets no memory (LLVM, C++), or the system's choice of a process to kill.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence

from saeens_pipeline.errors import SaeensError

_COMMANDS = ("run", "report", "reference-model")
_FROM_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl
_KEPT = "Finished artefacts are kept, and the next run resumes from there."
_MEMORY = f"Free some memory, or set SAEENS_MEMORY_GB, SAEENS_THREADS or smaller sizes. {_KEPT}"
_ENDS = {
    signal.SIGKILL: f"it was killed (SIGKILL), as the system does when memory runs out, or by a user. {_MEMORY}",
    signal.SIGABRT: f"a library aborted it (SIGABRT), mostly because it got no memory; lines above may say why. {_MEMORY}",
    signal.SIGBUS: f"a file was cut while it was read, or a disk failed (SIGBUS). {_KEPT} `saeens doctor --verify` looks for damage.",
}


def continue_in_child(arguments: Sequence[str]) -> None:
    """Continue in a child process if these arguments are of a command that computes.

    The parent passes signals on, waits, and exits as the child does. Raises SaeensError there if the child was killed, aborted or crashed.
    The child ends with the parent. Does nothing where a fork is not safe: on systems other than Linux, in a process with threads, and once
    torch is loaded.
    """
    command = next((each for each in arguments if not each.startswith("-")), "")
    is_safe = sys.platform == "linux" and threading.active_count() == 1 and "torch" not in sys.modules
    if command not in _COMMANDS or not is_safe or "--help" in arguments:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_FROM_PARENT})
    parent, child = os.getpid(), os.fork()
    if child:
        _exit_as(_wait(child))
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(child: int) -> int:
    """Wait for the end of the child and return its exit code, that of a signal negative. Pass on signals of other processes.

    Signals of a terminal reach the child without it.
    """
    while True:
        received = signal.sigwaitinfo({signal.SIGCHLD, *_FROM_PARENT})
        if received.si_signo != signal.SIGCHLD:
            if received.si_code <= 0:  # sent by a process
                os.kill(child, received.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


def _exit_as(code: int) -> None:
    """Exit with this code. Raises SaeensError for a signal that nobody sends in order to end a command."""
    if code >= 0:
        sys.exit(code)
    ended_by = signal.Signals(-code)
    if ended_by in _FROM_PARENT:
        print(f"stopped by {ended_by.name}: {_KEPT[0].lower()}{_KEPT[1:]}", file=sys.stderr)
        signal.signal(ended_by, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ended_by})
        os.kill(os.getpid(), ended_by)
    raise SaeensError(f"the process ended: {_ENDS.get(ended_by, f'a library crashed it ({ended_by.name}). {_KEPT}')}")
