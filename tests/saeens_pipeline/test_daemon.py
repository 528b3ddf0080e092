"""The real webserver and daemon: a layer added in the UI is trained and evaluated, and "Materialize all" makes few runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.instance import WORKSPACE, prepare_home
from saeens_pipeline.storage.names import Address, Partition

DEADLINE_SECONDS = 900  # it takes half a minute on two idle cores
NEW_LAYER = 0
# The location of WORKSPACE, on the laboratory's file and corpus, and with a daemon that does not wait between two looks.
LOCATION = """\
from tiny_experiment import CORPUS
from saeens_pipeline import defs as files
from saeens_pipeline.assets import sources
from saeens_pipeline.orchestration import automation, retraining
sources.open_corpus = lambda name: CORPUS
files.__path__ = [{folder!r}]
automation.TICK_SECONDS = retraining.TICK_SECONDS = 1
from saeens_pipeline.definitions import defs
"""
# Runs start at once: the queue is checked every few seconds only. The class has no public module.
UNQUEUED = "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n"
ADD_PARTITION = """
mutation ($name: String!, $key: String!, $repository: RepositorySelector!) {
  addDynamicPartition(partitionsDefName: $name, partitionKey: $key, repositorySelector: $repository) { __typename }
}"""
LAUNCH = """
mutation ($backfill: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $backfill) { __typename ... on LaunchBackfillSuccess { backfillId } }
}"""
BACKFILL = "query ($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"
LOADED = "{ assetNodes { assetKey { path } isMaterializable } }"
RUNS = "{ runsOrError { ... on Runs { results { assetSelection { path } tags { key value } } } } }"


class Server:
    """Dagster's webserver and daemon, as `saeens ui` starts them."""

    def __init__(self, laboratory: Laboratory, home: Path) -> None:
        (home / "tiny_location.py").write_text(LOCATION.format(folder=str(laboratory.folder)))
        (home / "workspace.yaml").write_text(WORKSPACE.replace("saeens_pipeline.definitions", "tiny_location"))
        with (home / "dagster.yaml").open("a") as settings:
            settings.write(UNQUEUED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/graphql"
        self.log = home / "server.log"
        arguments = ["dev", "--workspace", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(home), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dagster", *arguments],
                cwd=home,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.deadline = time.monotonic() + DEADLINE_SECONDS

    def query(self, query: str, **variables: Any) -> dict[str, Any] | None:
        """The answer's data; None as long as nobody answers."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["data"]
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

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


@pytest.fixture
def serve(finished_laboratory: Laboratory, empty: Laboratory) -> Iterator[Callable[[], Server]]:
    """Start a server on the experiment file that the test has written, with the data of the finished laboratory."""
    shutil.copytree(finished_laboratory.root, empty.root)
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(empty, prepare_home()))
        return servers[0]

    try:
        yield start
    finally:
        for server in servers:
            server.stop()


@pytest.mark.slow
def test_materialise_all_over_two_layers_and_seeds_makes_eight_runs(serve: Callable[[], Server], empty: Laboratory):
    empty.declare(source={"layers": [0, 2]}, evaluations=["reconstruction", "stability"])
    server = serve()
    while not (nodes := (server.query(LOADED) or {}).get("assetNodes")):
        server.pause()
    keys = [node["assetKey"] for node in nodes if node["assetKey"]["path"][0] == NAME and node["isMaterializable"]]  # as the UI does
    while len(prepared := _layers(server)) < 2:
        server.pause()
    assert prepared == ["0", "2"]
    launched = server.query(LAUNCH, backfill={"assetSelection": keys, "allPartitions": True})
    assert launched is not None
    while (found := server.query(BACKFILL, id=launched["launchPartitionBackfill"]["backfillId"])) is None or (
        status := found["partitionBackfillOrError"]["status"]
    ) not in ("COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED"):
        server.pause()
    assert status == "COMPLETED_SUCCESS"
    assert all(empty.store.find(Address(NAME, "report", "report"), Partition(layer)) for layer in (0, 2))
    data = server.query(RUNS)
    assert data is not None
    launched_runs = [run for run in data["runsOrError"]["results"] if "dagster/backfill" in {tag["key"] for tag in run["tags"]}]
    runs = [[asset["path"][-1] for asset in run["assetSelection"]] for run in launched_runs]
    # Tokens, activations of both layers, two layers x two seeds, stability of each layer. A report has a run of its own where another
    # layer ends at the same time: Dagster groups assets that want the same partitions at that moment.
    assert len([assets for assets in runs if assets != ["report"]]) == 8
    assert len(runs) <= 10


def _layers(server: Server) -> list[str]:
    """The layers of the source that the daemon has added as partitions."""
    query = "query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { partitionKeys } } }"
    found = server.query(query, key={"path": [NAME, "activations"]})
    return found["assetNodeOrError"].get("partitionKeys", []) if found else []


@pytest.mark.slow
def test_a_layer_added_in_the_ui_is_trained_and_evaluated(serve: Callable[[], Server], empty: Laboratory):
    empty.declare(automation=True)
    server = serve()
    before = {key: empty.store.require(d.address, d.narrow(Partition(LAYER, SEEDS[0]))) for key, d in empty.declarations().items()}
    repository = {"repositoryLocationName": "saeens", "repositoryName": "__repository__"}
    wanted = {"name": f"{NAME}_layers", "key": str(NEW_LAYER), "repository": repository}
    while (answer := server.query(ADD_PARTITION, **wanted)) is None:
        server.pause()
    assert answer["addDynamicPartition"]["__typename"] == "AddDynamicPartitionSuccess"

    last = Address(NAME, "report", "report")  # of all tables
    while empty.store.find(last, Partition(NEW_LAYER)) is None:
        server.pause()
    rows = [empty.store.find(Address(NAME, "eval", "reconstruction"), Partition(NEW_LAYER, seed)) for seed in SEEDS]
    assert all(rows)
    after = {key: empty.store.require(d.address, d.narrow(Partition(LAYER, SEEDS[0]))) for key, d in empty.declarations().items()}
    assert after == before  # provenance, too: nothing of the other layer was made again

    data = server.query(RUNS)
    assert data is not None
    made = Counter()
    for run in data["runsOrError"]["results"]:
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        if tags.get("user") == "automation":
            made.update((tags.get("dagster/partition"), "/".join(asset["path"])) for asset in run["assetSelection"])
    wanted = [
        (partition_key(d, d.narrow(Partition(NEW_LAYER, seed))), str(d.address))
        for d in empty.declarations().values()
        for seed in (SEEDS if d.dimensions == "layer_and_seed" else SEEDS[:1])
        if d.dimensions != "none"
    ]
    assert {what: n for what, n in made.items() if what[1] != "leaderboard"} == dict.fromkeys(wanted, 1)
