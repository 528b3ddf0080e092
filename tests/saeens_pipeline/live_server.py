"""A real webserver and daemon, for tests that wait for what they do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeens_pipeline.orchestration.instance import WORKSPACE

DEADLINE_SECONDS = 900  # the tests take half a minute to four minutes on two idle cores
UI = ("saeens_pipeline", "ui")
DAGSTER = ("dagster", "dev", "--workspace", "workspace.yaml", "--host", "127.0.0.1")
_MODULE = "live_location"
# Runs start at once: the queue is checked every few seconds only. The class has no public module.
_UNQUEUED = "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n"


class Server:
    """A webserver and a daemon in processes of their own, on a free port."""

    def __init__(self, home: Path, command: Sequence[str], location: str, **environment: str) -> None:
        """Start `python -m command` on the instance in `home`, with a code location whose module is `location`."""
        (home / f"{_MODULE}.py").write_text(location)
        (home / "workspace.yaml").write_text(WORKSPACE.replace("saeens_pipeline.definitions", _MODULE))
        with (home / "dagster.yaml").open("a") as settings:
            settings.write(_UNQUEUED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/graphql"
        self.log = home / "server.log"
        folders = [str(home), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, "--port", str(port)],
                cwd=home,
                env={**os.environ, "DAGSTER_HOME": str(home), "PYTHONPATH": os.pathsep.join(folders), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.deadline = time.monotonic() + DEADLINE_SECONDS

    def query(self, query: str, **variables: Any) -> dict[str, Any]:
        """The answer's data. Waits as long as nobody listens; a request that was heard is not sent again."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.load(answer)["data"]
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionRefusedError):
                    raise
                self.pause()

    def pause(self) -> None:
        """Between two looks at what is waited for. Fails when the server has ended or the deadline has passed."""
        log = self.log.read_text()[-4000:]
        assert self.process.poll() is None, f"the server ended:\n{log}"
        assert time.monotonic() < self.deadline, f"waited {DEADLINE_SECONDS} s in vain:\n{log}"
        time.sleep(0.5)

    def stop(self) -> None:
        """End the server and everything that it started."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
