"""The UI is guarded against requests that other web pages can make. The real server is slow; the guard alone is not."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saeens_pipeline import cli
from saeens_pipeline.orchestration import webserver
from saeens_pipeline.orchestration.guard import Guard

UI = "127.0.0.1:3000"
OWN = f"http://{UI}"
PROXY = "https://lab.example.org"
JSON = "application/json"
LAUNCH = "query=mutation%7BlaunchRun%7D"
DEADLINE_SECONDS = 300  # it takes fifteen on two idle cores


def _answer(method: str, url: str, **headers: str | list[str]) -> int:
    """Status of a request; 200 and 101 if the guard gave it to the application."""
    path, _, query = url.partition("?")
    pairs = [(name.replace("_", "-").encode(), each.encode()) for name, v in headers.items() for each in ([v] if isinstance(v, str) else v)]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": pairs}
    if method == "WEBSOCKET":
        scope = {"type": "websocket", "path": path, "query_string": query.encode(), "headers": pairs}
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        sent.append({"status": 101 if method == "WEBSOCKET" else 200})

    async def send(message: Any) -> None:
        sent.append({"status": 403} if message["type"] == "websocket.close" else message)

    async def receive() -> Any:
        raise AssertionError("the guard reads no body")

    asyncio.run(Guard(app, [PROXY])(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("method", "url", "headers"),
    [
        ("GET", "/", {}),
        ("GET", "/runs?q=status%3Afailure", {}),
        ("GET", "/graphql", {}),
        ("GET", "/_next/main.js", {"origin": OWN}),
        ("HEAD", "/", {}),
        ("POST", "/graphql", {"content_type": JSON}),
        ("POST", "/graphql?op=Runs", {"content_type": "Application/JSON; charset=utf-8", "origin": OWN}),
        ("POST", "/graphql", {"content_type": JSON, "host": "localhost:8080", "origin": "http://localhost:8080"}),  # a forwarded port
        ("POST", "/graphql", {"content_type": JSON, "host": "lab.example.org", "origin": PROXY}),
        ("POST", "/report_asset_materialization/a", {"content_type": JSON}),
    ],
)
def test_requests_of_the_uis_own_pages_and_of_programs_pass(method: str, url: str, headers: dict[str, str]):
    assert _answer(method, url, **{"host": UI} | headers) == 200


@pytest.mark.parametrize(
    ("method", "url", "headers"),
    [
        ("GET", f"/graphql?{LAUNCH}", {}),
        ("GET", f"/graphql/?{LAUNCH}", {}),
        ("GET", "/graphql?query=%7Bversion%7D", {"accept": "text/html"}),
        ("HEAD", f"/graphql?{LAUNCH}", {}),
        ("POST", f"/graphql?{LAUNCH}", {}),
        ("POST", "/graphql", {"content_type": "application/x-www-form-urlencoded"}),
        ("POST", "/graphql", {"content_type": "multipart/form-data; boundary=a"}),
        ("POST", "/graphql", {"content_type": "text/plain"}),
        ("POST", "/graphql", {"content_type": "text/plain; application/json"}),  # Dagster takes it for JSON, a browser asks nobody
        ("POST", "/graphql", {"content_type": "application/graphql"}),
        ("POST", "/graphql", {"content_type": [JSON, "text/plain"]}),
        ("POST", "/graphql", {"content_type": JSON, "origin": "https://evil.example"}),
        ("POST", "/graphql", {"content_type": JSON, "origin": "null"}),
        ("POST", "/graphql", {"content_type": JSON, "origin": ""}),
        ("POST", "/graphql", {"content_type": JSON, "origin": [OWN, "https://evil.example"]}),
        ("POST", "/graphql", {"content_type": JSON, "origin": "http://127.0.0.1:4000"}),  # another program of this machine
        ("POST", "/graphql", {"content_type": JSON, "origin": "http://localhost:3000"}),  # another site to a browser
        ("POST", "/graphql", {"content_type": JSON, "host": "lab.example.org", "origin": "http://lab.example.org"}),
        ("POST", "/graphql", {"content_type": JSON, "host": "evil.example"}),
        ("POST", "/graphql", {"content_type": JSON, "host": "127.0.0.1.evil.example:3000"}),
        ("POST", "/graphql", {"content_type": JSON, "host": "evil.example", "origin": "http://evil.example"}),  # DNS rebinding
        ("GET", "/", {"host": "evil.example:3000"}),
        ("GET", "/logs/run/step.out", {"host": "evil.example"}),
        ("GET", "/", {"host": []}),
        ("GET", "/", {"host": [UI, "evil.example"]}),
        ("GET", "/download_debug/run", {"origin": "https://evil.example"}),
        ("OPTIONS", "/graphql", {"origin": "https://evil.example", "access_control_request_method": "POST"}),
        ("PUT", "/graphql", {"content_type": JSON}),
        ("POST", "/report_asset_materialization/a", {}),
        ("POST", "/report_asset_materialization/a", {"content_type": "application/x-www-form-urlencoded"}),
    ],
)
def test_requests_that_other_pages_can_make_are_refused(method: str, url: str, headers: dict[str, Any]):
    assert _answer(method, url, **{"host": UI} | headers) == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": OWN}, 101),
        ({"host": "lab.example.org", "origin": PROXY}, 101),
        ({}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
    ],
)
def test_websockets_need_the_origin_of_the_ui(headers: dict[str, str], status: int):
    assert _answer("WEBSOCKET", "/graphql", **{"host": UI} | headers) == status


@pytest.mark.parametrize("url", ["lab.example.org", "https://lab.example.org/", "https://lab.example.org/a", "ftp://lab", "https://a@lab"])
def test_an_address_that_no_browser_sends_is_refused(url: str):
    outcome = CliRunner().invoke(cli.app, ["ui", "--url", url])
    assert "an address without a path is needed, such as https://lab.example.org" in str(outcome.exception)


def _real(port: int, method: str, path: str, body: str | None = None, **headers: str) -> int:
    """Status of a real request. The Host is the server's unless another is given."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse().status


def _websocket(port: int, origin: str) -> int:
    key = base64.b64encode(os.urandom(16)).decode()
    wants = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13"}
    return _real(port, "GET", "/graphql", Sec_WebSocket_Protocol="graphql-ws", Origin=origin, **wants)


def _group(process: int) -> list[str]:
    """The command lines of the processes that descend from one, itself left out; those that nobody has waited for are gone, too."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (fields := (entry / "stat").read_text().rpartition(")")[2].split())[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
        except OSError:
            continue
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return [str(each) for each in found[1:]]


@pytest.mark.slow
def test_the_real_server_refuses_forged_requests_and_leaves_no_process_behind(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a shell starts a program in the background
        f"sys.argv = ['saeens', 'ui', '--port', '{port}', '--url', '{PROXY}']\n"
        "from saeens_pipeline.cli import main; main()"
    )
    log = tmp_path / "log"
    environment = os.environ | {"SAEENS_DATA": str(tmp_path / "data"), "DAGSTER_HOME": ""}
    with log.open("w") as file:
        ui = subprocess.Popen([sys.executable, "-c", start], env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            assert ui.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        own, query = f"http://127.0.0.1:{port}", json.dumps({"query": "{ version }"})
        assert _real(port, "GET", "/") == 200
        assert _real(port, "GET", "/reports/mine/layer=1/index.html") == 404
        page = tmp_path / "data" / "reports" / "mine" / "layer=1" / "index.html"
        page.parent.mkdir(parents=True)
        page.write_text("a report")
        assert _real(port, "GET", "/reports/mine/layer=1/index.html") == 200
        assert _real(port, "POST", "/graphql", query, Content_Type=JSON, Origin=own) == 200
        assert _real(port, "POST", "/graphql", query, Content_Type=JSON, Host="lab.example.org", Origin=PROXY) == 200
        forged = [
            _real(port, "GET", f"/graphql?{LAUNCH}"),
            _real(port, "POST", f"/graphql?{LAUNCH}", "a=b", Content_Type="application/x-www-form-urlencoded"),
            _real(port, "POST", "/graphql", query, Content_Type=JSON, Origin="https://evil.example"),
            _real(port, "POST", "/graphql", query, Content_Type=JSON, Origin="null"),
            _real(port, "POST", "/graphql", query, Content_Type=JSON, Host="evil.example"),
            _websocket(port, "https://evil.example"),
        ]
        assert forged == [403] * len(forged)
        assert _websocket(port, own) == 101
        started = _group(ui.pid)
        commands = " ".join((Path("/proc") / each / "cmdline").read_text().replace("\0", " ") for each in started)
        assert "code-server" in commands
        assert "dagster._daemon" in commands
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(DEADLINE_SECONDS) == 0, log.read_text()
        left = [each for each in started if (Path("/proc") / each / "stat").exists()]
        assert [each for each in left if ") Z " not in (Path("/proc") / each / "stat").read_text()] == []
        told = log.read_text().splitlines()
        assert [line.split()[0] for line in told] == ["The", "Runs"], told  # where, and where the rest goes
        assert (tmp_path / "data" / "dagster" / f"ui_{port}.log").is_file()
    finally:
        ui.kill()


def test_a_proxy_on_this_machine_may_be_named():
    guard, headers = Guard(_unreachable, ["https://localhost:8443"]), [(b"host", b"localhost:8443")]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [*headers, (b"origin", b"https://localhost:8443")],
    }
    assert guard.refusal(scope) is None
    assert guard.refusal(scope | {"headers": [*headers, (b"origin", b"http://localhost:8443")]}) == "the Origin is another site"


async def _unreachable(*_: Any) -> None:
    raise AssertionError("only the answer is asked for")


@pytest.mark.parametrize(
    ("code", "said"),
    [(None, "webserver ended by itself"), (3, "daemon ended with exit code 3"), (-9, "daemon ended by the signal SIGKILL")],
)
def test_the_server_that_ended_is_named(code: int | None, said: str):
    assert said in webserver._end(code)
    assert "None" not in webserver._end(code)
