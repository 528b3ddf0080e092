"""Alerts about failed runs: what is posted, by whom, once, and what a webhook that does not answer does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dagster as dg
import pytest
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.orchestration import alerts
from saeens_pipeline.orchestration.alerts import ADDRESS_VARIABLE, VARIABLE, alerts_sensor, webhook
from saeens_pipeline.orchestration.instance import process_tag, register_layers

SECRET = "T000/B000/do-not-show"


@dataclass
class Hook:
    """A webhook on this machine: what was posted, and the status that it answers with."""

    posted: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    url: str = ""


@contextmanager
def _serving() -> Iterator[Hook]:
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if hook.status == 200:
                assert self.headers["Content-Type"] == "application/json"
                hook.posted.append(json.loads(content))
            self.send_response(hook.status)
            if 300 <= hook.status < 400:
                self.send_header("Location", f"{hook.url}/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        hook.url = f"http://127.0.0.1:{server.server_port}/services/{SECRET}"
        yield hook
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    with _serving() as hook:
        monkeypatch.setenv(VARIABLE, hook.url)
        monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
        yield hook


class Ticks:
    """Ticks of the sensor, each with the cursor of the one before."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance, self.cursor = instance, None

    def tick(self) -> str:
        """Return the message of the tick."""
        with dg.build_sensor_context(self.instance, cursor=self.cursor) as context:
            result = alerts_sensor()(context)
            self.cursor = context.cursor
        assert isinstance(result, dg.SkipReason)
        return str(result.skip_message)


@pytest.fixture
def ticks() -> Iterator[Ticks]:
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        ticks = Ticks(instance)
        ticks.tick()
        yield ticks


def _fail(laboratory: Laboratory, instance: dg.DagsterInstance, key: str = "bagging/member_1", **tags: str) -> str:
    """Run an asset whose inputs are missing; return the run's id."""
    job = laboratory.catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def()
    run = job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey([NAME, *key.split("/")])],
        partition_key=f"{LAYER}|{SEEDS[0]}",
        tags=tags,
        raise_on_error=False,
    )
    assert not run.success
    return run.run_id


def test_a_failed_run_is_posted_once_with_its_sentence_and_a_link(
    empty: Laboratory, hook: Hook, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(ADDRESS_VARIABLE, "https://lab.example.org/")
    run = _fail(empty, ticks.instance)
    assert ticks.tick() == f"Posted: {run[:8]}."
    (posted,) = hook.posted
    text, link = posted.pop("text").split("\n")
    error = posted.pop("error")
    assert error.startswith("MissingInputError: tiny/activations (layer 1) is needed first")
    assert posted == {
        "experiment": NAME,
        "assets": ["bagging/member_1"],
        "partition": f"{LAYER}|{SEEDS[0]}",
        "run_id": run,
        "url": f"https://lab.example.org/runs/{run}",
    }
    assert text == f"tiny failed (bagging/member_1, partition {LAYER}|{SEEDS[0]}): {error}"
    assert link == posted["url"]
    assert ticks.tick() == "No run has failed since the last tick."


def test_failures_before_the_first_tick_and_those_of_the_command_line_are_not_posted(empty: Laboratory, hook: Hook):
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        _fail(empty, instance)
        ticks = Ticks(instance)
        assert ticks.tick() == "Runs that fail from now on are posted."
        _fail(empty, instance, **process_tag())
        assert ticks.tick() == "No run has failed since the last tick."
    assert not hook.posted


@pytest.mark.parametrize("status", [404, 500, 302, 307])
def test_an_alert_that_is_not_taken_is_one_line_and_is_posted_again_later(empty: Laboratory, hook: Hook, ticks: Ticks, status: int):
    first, second = _fail(empty, ticks.instance), _fail(empty, ticks.instance)
    hook.status = status
    for _ in range(2):
        assert ticks.tick() == f"The alert about run {first[:8]} was not taken: it answered with status {status}. It is posted again later."
    hook.status = 200
    assert ticks.tick() == f"Posted: {first[:8]}, {second[:8]}."
    assert [each["run_id"] for each in hook.posted] == [first, second]


def test_a_webhook_that_is_down_is_one_line_without_its_address(empty: Laboratory, ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{unused.getsockname()[1]}/services/{SECRET}")
        _fail(empty, ticks.instance)
        line = ticks.tick()
    assert "ConnectionRefusedError" in line
    assert "\n" not in line
    assert SECRET not in line


def test_a_webhook_that_is_silent_is_left_after_a_time(empty: Laboratory, ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(alerts, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{silent.getsockname()[1]}/services/{SECRET}")
        _fail(empty, ticks.instance)
        assert "TimeoutError: timed out" in ticks.tick()


def test_old_failures_are_left_out(empty: Laboratory, hook: Hook, ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    _fail(empty, ticks.instance)
    monkeypatch.setattr(alerts, "OLDEST_SECONDS", -1)
    assert ticks.tick() == "No run has failed since the last tick."
    assert not hook.posted


def test_secrets_and_markup_in_an_error_are_not_posted(empty: Laboratory, hook: Hook, ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_LLM_API_KEY", "sk-12345")

    def fail(*_: Any) -> None:
        raise SaeensError("key sk-12345 <!channel> & https://me:pw@host\x1b[2J")

    monkeypatch.setattr("saeens_pipeline.orchestration.assets.materialise", fail)
    _fail(empty, ticks.instance)
    ticks.tick()
    (posted,) = hook.posted
    assert posted["error"] == "SaeensError: key *** <!channel> & https://***host"
    assert posted["text"].endswith("SaeensError: key *** &lt;!channel&gt; &amp; https://***host")


def test_a_command_posts_its_own_failure_and_raises_it(empty: Laboratory, hook: Hook, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise SaeensError("the disk is full")

    monkeypatch.setattr("saeens_pipeline.orchestration.assets.materialise", fail)
    with pytest.raises(SaeensError, match="the disk is full"):
        empty.run()
    (posted,) = hook.posted
    assert (posted["experiment"], posted["assets"], posted["partition"]) == (NAME, ["tokens"], None)
    assert posted["error"] == "SaeensError: the disk is full"
    assert posted["url"] is None


def test_a_command_without_a_webhook_that_answers_fails_with_its_own_error(
    empty: Laboratory, hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any) -> None:
        raise SaeensError("the disk is full")

    hook.status = 500
    monkeypatch.setattr("saeens_pipeline.orchestration.assets.materialise", fail)
    with pytest.raises(SaeensError, match="the disk is full"):
        empty.run()
    assert "the alert about this run was not taken: it answered with status 500" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "address", ["https://hooks.slack.com/services/x", "http://127.0.0.1:8000", "http://localhost/x", "http://[::1]:80/", " "]
)
def test_addresses_with_tls_and_on_this_machine_are_accepted(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, address)
    assert webhook() == address.strip()


@pytest.mark.parametrize(
    "address",
    [
        "http://hooks.slack.com/s3cret",
        "http://127.0.0.1.example.org/s3cret",
        "ftp://127.0.0.1/s3cret",
        "file:///s3cret",
        "s3cret",
        "https:///s3cret",
        "https://me:pw@host/s3cret",
        "https://host:port/s3cret",
        "https://host:99999/s3cret",
        "https://host/s3 cret",
        "https://host/s3cret\r\nX: y",
        "https://[::1/s3cret",
    ],
)
def test_other_addresses_are_refused_and_not_shown(address: str, empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, address)
    with pytest.raises(ConfigurationError, match=VARIABLE) as refused:
        empty.catalogue.definitions()
    assert "cret" not in str(refused.value).replace("is a secret", "")


def test_without_a_webhook_there_is_no_sensor_and_with_one_it_runs(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "alerts" not in {sensor.name for sensor in empty.catalogue.definitions().sensors or ()}
    monkeypatch.setenv(VARIABLE, "https://hooks.slack.com/services/x")
    assert empty.catalogue.definitions().resolve_sensor_def("alerts").default_status == dg.DefaultSensorStatus.RUNNING
