"""Reports on the server of the UI: pages below /reports, without requests of their own, and the links that lead to them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.orchestration.guard import Guard
from saeens_pipeline.orchestration.metadata import describe_artefact
from saeens_pipeline.orchestration.report_pages import REPORTS, ReportPages, report_url
from saeens_pipeline.storage.names import Address, Partition


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


def _get(folder: Path, url: str, **headers: str) -> Answer:
    """Ask the server of the UI, guard included."""
    path = unquote(url)
    pairs = [(name.encode(), value.encode()) for name, value in ({"host": "127.0.0.1:3000"} | headers).items()]
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": pairs}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return await asyncio.Event().wait()  # the client stays

    asyncio.run(Guard(Starlette(routes=[Mount(REPORTS, ReportPages(folder))]), [])(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]).decode())


def test_pages_are_served_and_cannot_send_requests(tmp_path: Path):
    page = tmp_path / "reports" / "mine" / "layer=1" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>a report</p>")
    for address in ("/reports/mine/layer=1/index.html", "/reports/mine/layer%3D1/"):
        found = _get(tmp_path / "reports", address)
        assert (found.status, found.text) == (200, "<p>a report</p>")
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy.split("; ")
        assert "connect-src" not in policy


def test_nothing_outside_of_the_folder_is_served(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "link.txt").symlink_to(tmp_path / "secret.txt")
    for address in ("/reports/../secret.txt", "/reports/%2e%2e/secret.txt", "/reports/..%2fsecret.txt", "/reports/link.txt"):
        assert "secret" not in _get(tmp_path / "reports", address).text


@pytest.mark.parametrize("there_is_a_folder", [True, False])
def test_a_missing_report_is_answered_with_what_makes_it(tmp_path: Path, there_is_a_folder: bool):
    if there_is_a_folder:
        (tmp_path / "reports").mkdir()
    found = _get(tmp_path / "reports", "/reports/mine/layer=1/index.html")
    assert found.status == 404
    assert "`saeens report EXPERIMENT`" in found.text


def test_the_folder_itself_leads_to_the_page_over_all_experiments(tmp_path: Path):
    reports = tmp_path / "reports"
    found = _get(reports, "/reports/")
    assert found.status == 404
    assert "saeens report EXPERIMENT" in found.text
    page = reports / "leaderboard" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>all</p>")
    found = _get(reports, "/reports/")
    assert (found.status, found.headers["location"]) == (307, "/reports/leaderboard/index.html")
    assert _get(reports, found.headers["location"]).text == "<p>all</p>"


def test_foreign_pages_do_not_get_reports(tmp_path: Path):
    assert _get(tmp_path, "/reports/mine/", host="evil.example").status == 403
    assert _get(tmp_path, "/reports/mine/", origin="https://evil.example").status == 403


@pytest.mark.parametrize(
    ("address", "partition", "url"),
    [
        (Address("mine", "report", "report"), Partition(3), "/reports/mine/layer%3D3/index.html"),
        (Address("mine", "bagging", "member_1"), Partition(3, 42), "/reports/mine/layer%3D3/index.html"),
        (Address("mine", "eval", "stability"), Partition(3), "/reports/mine/layer%3D3/index.html"),
        (Address("mine", "report", "pareto"), Partition(), "/reports/mine/pareto/index.html"),
        (Address("leaderboard", "leaderboard", "leaderboard"), Partition(), "/reports/leaderboard/index.html"),
        (Address("texts", "source", "tokens"), Partition(), None),
        (Address("texts", "source", "activations"), Partition(3), None),
    ],
)
def test_artefacts_lead_to_the_report_that_shows_them(address: Address, partition: Partition, url: str | None):
    assert report_url(address, partition) == url


def test_the_metadata_of_sae_table_and_report_have_the_link(finished: Laboratory):
    for name, partition in (
        ("bagging/member_1", Partition(LAYER, SEEDS[0])),
        ("eval/stability", Partition(LAYER)),
        ("report", Partition(LAYER)),
    ):
        declaration = finished.declarations()[f"{NAME}/{name}"]
        artefact = finished.store.require(declaration.address, partition)
        metadata = describe_artefact(finished.store, declaration, partition, artefact, is_hit=False)
        label = "open in a browser" if name == "report" else "report"
        assert f"<h1>{NAME}" in _get(finished.root / "reports", metadata[label].url).text
