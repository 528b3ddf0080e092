"""A real `saeens ui` in Chromium: what is stale says why, a failed run says its sentence, the report opens and leads back, jobs mark.

SAEENS_TEST_COMMAND is the command `saeens` of the tested environment. `make browser-test` sets it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

COMMAND = os.environ.get("SAEENS_TEST_COMMAND", "")
DEADLINE_SECONDS = 180.0
PARTITION = "?view=partitions&partition=2%7C42"
EXPERIMENT = """\
type: saeens_pipeline.components.ActivationSource
attributes:
  name: small
  language_model: builtin/reference
  corpus: builtin/installed_packages
  layers: [2]
  context_length: 64
  packing: document
  drop: [first]
  train_tokens: 8000
  test_tokens: 2000
---
type: saeens_pipeline.components.EnsembleExperiment
attributes:
  name: small
  source: small
  sae: {architecture: topk, expansion: 2, k: 8}
  training: {learning_rate: 5.0e-3, batch_tokens: 256}
  ensemble: {members: 2, seeds: [42]}
  baselines: [expanded]
  evaluations: [reconstruction, members]
  ce_loss_tokens: 0
"""


@dataclass
class UI:
    """A running UI, and the file of its experiment."""

    address: str
    file: Path

    def query(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.address}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def reload(self) -> None:
        """As the button "Reload definitions"."""
        self.query('mutation { reloadRepositoryLocation(repositoryLocationName: "saeens") { __typename } }')

    def launch(self, job: str, tags: Sequence[dict[str, str]] = (), **selected: Any) -> str:
        """Launch a run and give its id."""
        selector = {"repositoryLocationName": "saeens", "repositoryName": "__repository__", "jobName": job, **selected}
        answer = self.query(
            "mutation ($p: ExecutionParams!) { launchRun(executionParams: $p) { ... on LaunchRunSuccess { run { id } } } }",
            p={"selector": selector, "runConfigData": "{}", "executionMetadata": {"tags": list(tags)}},
        )
        return answer["launchRun"]["run"]["id"]


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UI]:
    """A UI after `saeens run` of a small experiment."""
    assert COMMAND, "SAEENS_TEST_COMMAND names no command: use `make browser-test`"
    folder = tmp_path_factory.mktemp("ui")
    file = folder / "experiments" / "small.yaml"
    file.parent.mkdir()
    file.write_text(EXPERIMENT)
    environment = os.environ | {"SAEENS_DATA": str(folder / "data"), "SAEENS_EXPERIMENTS": str(file.parent)}
    subprocess.run([COMMAND, "run", "small"], env=environment, check=True, stdout=subprocess.DEVNULL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([COMMAND, "ui", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL) as process:
        running = UI(f"http://127.0.0.1:{port}", file)
        try:
            _wait_until(lambda: bool(running.query("{ version }")), process)
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_until(is_reached: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, "the UI has ended"
        try:
            if is_reached():
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(1)
    pytest.fail(f"waited {DEADLINE_SECONDS:.0f} s in vain")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(60_000)
    yield opened
    opened.close()


def test_a_member_leads_with_held_out_figures_and_links_to_its_table_and_its_report(ui: UI, page: Page):
    page.goto(f"{ui.address}/assets/small/bagging/member_2{PARTITION}")
    expect(page.get_by_text("held-out explained variance of its own input")).to_be_visible(timeout=60_000)
    table = page.get_by_role("link", name="small/eval/members")
    assert (table.first.get_attribute("href") or "").endswith(f"/assets/small/eval/members{PARTITION}")
    report = page.get_by_role("link", name="/reports/small/layer%3D2/index.html")
    page.goto(ui.address + (report.first.get_attribute("href") or "").removeprefix(ui.address))
    expect(page.locator("h1").first).to_contain_text("small")
    back = [
        link for link in page.locator("a").evaluate_all("links => links.map(each => each.href)") if "/assets/small/bagging/member_2" in link
    ]
    assert back
    assert all(link == f"{ui.address}/assets/small/bagging/member_2{PARTITION}" for link in back)


def test_the_overview_has_held_out_figures_and_plots_them_by_partition(ui: UI, page: Page):
    page.goto(f"{ui.address}/assets/small/bagging/member_2")
    title = page.get_by_text("held-out explained variance of its own input", exact=True)
    expect(title).to_be_visible(timeout=60_000)
    page.get_by_text("Plots", exact=True).click()
    expect(title).to_be_visible()
    plot = title.locator("xpath=ancestor::*[.//canvas][1]").locator("canvas").first
    expect(plot).to_be_visible()


def test_a_failed_layer_says_its_sentence(ui: UI, page: Page):
    repository = {"repositoryLocationName": "saeens", "repositoryName": "__repository__"}
    ui.query(
        """mutation ($repository: RepositorySelector!) {
          addDynamicPartition(partitionsDefName: "small_layers", partitionKey: "99", repositorySelector: $repository) { __typename }
        }""",
        repository=repository,
    )
    run = ui.launch(
        "__ASSET_JOB", assetSelection=[{"path": ["small", "activations"]}], tags=[{"key": "dagster/partition", "value": "99"}]
    )  # fmt: skip
    page.goto(f"{ui.address}/runs/{run}")
    expect(page.get_by_text("has no layer 99").first).to_be_visible(timeout=120_000)
    expect(page.get_by_text("small/activations").first).to_be_visible()
    expect(page.get_by_text("reload the definitions, and materialise").first).to_be_visible()


def test_a_changed_setting_is_stale_with_its_reason_until_the_job_has_trained_it(ui: UI, page: Page):
    ui.file.write_text(EXPERIMENT.replace("k: 8", "k: 6"))
    ui.reload()
    address = f"{ui.address}/assets/small/bagging/member_2{PARTITION}"

    def says(text: str) -> Callable[[], bool]:
        def look() -> bool:
            page.goto(address)
            page.wait_for_timeout(5_000)
            return page.get_by_text(text, exact=True).count() > 0

        return look

    _wait_until(says("setting sae.k: 8 -> 6"))
    page.goto(f"{ui.address}/assets/small/bagging/member_2?view=checks&checkDetail=recipe")
    expect(page.get_by_text("layer 2, seed 42: stale: setting sae.k: 8").first).to_be_visible(timeout=60_000)
    ui.launch("small")
    _wait_until(says("architecture topk, expansion 2, k 6"))


def test_the_first_view_has_no_experiment_that_cannot_run_here(ui: UI, page: Page):
    groups = {each["groupName"] for each in ui.query("{ assetNodes { groupName } }")["assetNodes"]}
    assert {"small", "quickstart", "sources", "leaderboard"} <= groups
    assert not [group for group in groups if group and group.startswith(("gemma", "pythia", "gelu"))]
    page.goto(f"{ui.address}/overview/activity/timeline")
    expect(page.get_by_text("saeens").first).to_be_visible()  # the code location of the command line's runs


def test_requests_of_foreign_pages_are_refused(ui: UI):
    body = json.dumps({"query": "{ version }"}).encode()
    for header in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Content-Type": "text/plain"}):
        request = urllib.request.Request(f"{ui.address}/graphql", body, {"Content-Type": "application/json", **header})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 403
