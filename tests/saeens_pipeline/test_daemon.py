"""The real webserver and daemon: a layer added in the UI is trained and evaluated, and "Materialize all" makes few runs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from live_server import DAGSTER, Server
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.instance import prepare_home
from saeens_pipeline.storage.names import Address, Partition

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


@pytest.fixture
def serve(finished_laboratory: Laboratory, empty: Laboratory) -> Iterator[Callable[[], Server]]:
    """Start a server on the experiment file that the test has written, with the data of the finished laboratory."""
    shutil.copytree(finished_laboratory.root, empty.root)
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(prepare_home(), DAGSTER, LOCATION.format(folder=str(empty.folder))))
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
    while not (nodes := server.query(LOADED)["assetNodes"]):
        server.pause()
    keys = [node["assetKey"] for node in nodes if node["assetKey"]["path"][0] == NAME and node["isMaterializable"]]  # as the UI does
    while len(prepared := _layers(server)) < 2:
        server.pause()
    assert prepared == ["0", "2"]
    launched = server.query(LAUNCH, backfill={"assetSelection": keys, "allPartitions": True})
    backfill = launched["launchPartitionBackfill"]["backfillId"]
    while (status := server.query(BACKFILL, id=backfill)["partitionBackfillOrError"]["status"]) in ("REQUESTED", "COMPLETING"):
        server.pause()
    assert status == "COMPLETED_SUCCESS"
    assert all(empty.store.find(Address(NAME, "report", "report"), Partition(layer)) for layer in (0, 2))
    everything = server.query(RUNS)["runsOrError"]["results"]
    launched_runs = [run for run in everything if "dagster/backfill" in {tag["key"] for tag in run["tags"]}]
    runs = [[asset["path"][-1] for asset in run["assetSelection"]] for run in launched_runs]
    # Tokens, activations of both layers, two layers x two seeds, stability of each layer. A report has a run of its own where another
    # layer ends at the same time: Dagster groups assets that want the same partitions at that moment.
    assert len([assets for assets in runs if assets != ["report"]]) == 8
    assert len(runs) <= 10


def _layers(server: Server) -> list[str]:
    """The layers of the source that the daemon has added as partitions."""
    query = "query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { partitionKeys } } }"
    found = server.query(query, key={"path": [NAME, "activations"]})
    return found["assetNodeOrError"].get("partitionKeys", [])


@pytest.mark.slow
def test_a_layer_added_in_the_ui_is_trained_and_evaluated(serve: Callable[[], Server], empty: Laboratory):
    empty.declare(automation=True)
    server = serve()
    before = {key: empty.store.require(d.address, d.narrow(Partition(LAYER, SEEDS[0]))) for key, d in empty.declarations().items()}
    repository = {"repositoryLocationName": "saeens", "repositoryName": "__repository__"}
    wanted = {"name": f"{NAME}_layers", "key": str(NEW_LAYER), "repository": repository}
    assert server.query(ADD_PARTITION, **wanted)["addDynamicPartition"]["__typename"] == "AddDynamicPartitionSuccess"

    last = Address(NAME, "report", "report")  # of all tables
    while empty.store.find(last, Partition(NEW_LAYER)) is None:
        server.pause()
    rows = [empty.store.find(Address(NAME, "eval", "reconstruction"), Partition(NEW_LAYER, seed)) for seed in SEEDS]
    assert all(rows)
    after = {key: empty.store.require(d.address, d.narrow(Partition(LAYER, SEEDS[0]))) for key, d in empty.declarations().items()}
    assert after == before  # provenance, too: nothing of the other layer was made again

    made = Counter()
    for run in server.query(RUNS)["runsOrError"]["results"]:
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
