"""The servers of the UI in one process group: Dagster's webserver behind the guard, its daemon, and its code servers.

`python -m saeens_pipeline.orchestration.webserver PORT LOG [ADDRESS]...` starts them and ends them on SIGINT, on SIGTERM, and when standard
input is closed, which happens when the process that started it ends. With a log file, everything that they and their runs print goes there,
and standard output has a line for each start and end of a run. `dagster dev` cannot be used: it has no place for a guard.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from saeens_pipeline.errors import printable

HOST = "127.0.0.1"
_DAEMON_SECONDS = 10.0  # that the daemon has to end
_CHECK_SECONDS = 2.0  # between two looks if the daemon runs
_GRACE_SECONDS = 3  # that open connections of browsers have to end
_LEADER_SECONDS = 10.0  # that the servers have to end by themselves
# Then to the group. A terminal's Ctrl-C does the same: runs are interrupted, and keep their checkpoints. With seconds until the next.
_SIGNALS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))


def serve(port: int, addresses: Sequence[str], say: Callable[[str], None] | None = None) -> None:
    """Serve the UI of DAGSTER_HOME until a signal comes; `say` gets a line for each start and end of a run.

    Raises SystemExit if the daemon or the webserver ends before.
    """
    import uvicorn
    from dagster import DagsterInstance
    from dagster_webserver.app import create_app_from_workspace_process_context
    from starlette.routing import Mount

    from saeens_pipeline.orchestration.dagster_internals import code_servers, webserver_context
    from saeens_pipeline.orchestration.guard import Guard
    from saeens_pipeline.orchestration.instance import servers_prefix
    from saeens_pipeline.orchestration.report_pages import REPORTS, ReportPages
    from saeens_pipeline.orchestration.run_lines import tell_runs
    from saeens_pipeline.storage.root import data_root

    workspace = Path(os.environ["DAGSTER_HOME"]) / "workspace.yaml"
    with (
        DagsterInstance.get() as instance,
        code_servers(instance, workspace, servers_prefix()) as sockets,
        _daemon(sockets, "warning" if say else "info") as daemon,
        webserver_context(instance, sockets) as context,
        _in_thread(partial(tell_runs, instance, say) if say else lambda _: None),
    ):
        app = create_app_from_workspace_process_context(context)
        app.routes.insert(0, Mount(REPORTS, ReportPages(data_root() / "reports")))
        config = uvicorn.Config(Guard(app, addresses), HOST, port, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS)
        server = uvicorn.Server(config)

        def watch_daemon() -> None:
            while daemon.poll() is None:
                time.sleep(_CHECK_SECONDS)
            server.should_exit = True

        threading.Thread(target=watch_daemon, daemon=True).start()
        server.run()
        raise SystemExit(_end(daemon.poll()))


def _end(of_daemon: int | None) -> str:
    """Return which server ended by itself, and how, from the exit code of the daemon; None: it is running."""
    if of_daemon is None:
        return "Dagster's webserver ended by itself: the lines above say why, such as a port that another program took"
    return f"Dagster's daemon ended {in_words(of_daemon)}"


def in_words(code: int) -> str:
    """Return how a process with this exit code ended."""
    return f"with exit code {code}" if code >= 0 else f"by the signal {signal.Signals(-code).name}"


@contextlib.contextmanager
def _in_thread(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread inside; it ends when its event is set."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_GRACE_SECONDS)


@contextlib.contextmanager
def _daemon(workspace: Path, log_level: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "dagster._daemon", "run", "--workspace", str(workspace), "--log-level", log_level]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as daemon:
        try:
            yield daemon
        finally:
            daemon.send_signal(signal.SIGINT)
            try:
                daemon.wait(_DAEMON_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()


def run_servers(port: int, addresses: Sequence[str], log: Path | None = None) -> int | None:
    """Run the servers in a process group of their own until they end, and return their exit code, or None after a signal to this process.

    `log`: the file for what they print; without one, they print it here.
    Ends on SIGINT, SIGTERM and SIGHUP, also where a shell started this process with SIGINT ignored, and then leaves no process behind.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    stops = [signal.SIGINT, signal.SIGTERM]
    stops += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []  # `nohup` ignores it
    for each in stops:
        signal.signal(each, stop)
    command = [sys.executable, "-m", __name__, str(port), str(log or ""), *addresses]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as servers:
        try:
            return servers.wait()
        except KeyboardInterrupt:
            return None
        finally:
            for each in stops:
                signal.signal(each, signal.SIG_IGN)
            _end_group(servers)


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """End all processes of a group, the runs in it too: first its leader, which ends the others in order."""
    leader.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(_LEADER_SECONDS)
    for sent, seconds in _SIGNALS:
        deadline = time.monotonic() + seconds
        try:
            os.killpg(leader.pid, sent)
            while time.monotonic() < deadline:
                leader.poll()
                os.killpg(leader.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _print_into(log: Path) -> Callable[[str], None]:
    """Send what this process and its children print into a file, and return a function that prints lines where they went before."""
    terminal = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")  # children do not inherit it
    with log.open("w", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            print(f"{datetime.now():%H:%M:%S} {printable(line)}", file=terminal)

    return say


def _interrupt_at_end_of_input() -> None:
    os.read(0, 1)  # nothing is written; not by `sys.stdin`, whose lock would be held at exit
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_interrupt_at_end_of_input, daemon=True).start()
    _port, _log, *_addresses = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        serve(int(_port), _addresses, _print_into(Path(_log)) if _log else None)
