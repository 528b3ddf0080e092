"""Dagster on many experiments: loading of the code location, a tick of each sensor, memory, and answers for pages of the UI.

`python -m benchmarks.deep_tree FOLDER` writes experiment files, and for some experiments every artefact: a complete record with a file of a
few bytes, which is all that sensors read. Nothing is trained. Then it measures in new processes, and starts `saeens ui` for the pages.
Times are processor seconds, which other programs disturb little; those of the pages are seconds until the answer.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

_SOURCE = {
    "language_model": "builtin/reference",
    "corpus": "builtin/prose",
    "hook": "resid_post",
    "context_length": 128,
    "train_tokens": 100_000,
    "test_tokens": 10_000,
}
_EXPERIMENT = {
    "sae": {"architecture": "topk", "expansion": 4, "k": 8},
    "training": {"learning_rate": 1e-3, "batch_tokens": 512},
    "baselines": ["expanded", "matching_pursuit"],
    "evaluations": ["reconstruction", "differences", "members", "coactivation", "stability", "marginal_gain", "cost", "training_curves"],
}
_GROUP = 10  # experiments of one source
_START_SECONDS = 300


def main() -> None:
    """Write the tree, unless it is there, measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep_tree", description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("experiments", 40), ("members", 8), ("seeds", 4), ("layers", 20), ("made", 2), ("automated", 4), ("port", 3750)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--measure", choices=("load", "ticks"), help=argparse.SUPPRESS)
    parser.add_argument("--without-ui", action="store_true")
    arguments = parser.parse_args()
    os.environ |= environment(arguments.folder)
    if arguments.measure:
        {"load": measure_load, "ticks": measure_ticks}[arguments.measure]()
        return
    if not (arguments.folder / "experiments").exists():
        write_experiments(arguments)
        make_records(arguments.made)
    rows: dict[str, str] = {}
    for what in ("load", "ticks"):
        command = [sys.executable, "-m", "benchmarks.deep_tree", str(arguments.folder), "--measure", what]
        rows |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    if not arguments.without_ui:
        rows |= measure_pages(arguments.port)
    print("| what | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def environment(folder: Path) -> dict[str, str]:
    """Return the variables that point `saeens` to the tree."""
    home = folder.absolute()
    return {"SAEENS_DATA": str(home / "data"), "SAEENS_EXPERIMENTS": str(home / "experiments"), "DAGSTER_HOME": str(home / "dagster")}


def write_experiments(size: argparse.Namespace) -> None:
    """Write one file for each source with ten experiments."""
    folder = Path(os.environ["SAEENS_EXPERIMENTS"])
    folder.mkdir(parents=True)
    for first in range(0, size.experiments, _GROUP):
        source = f"source_{first // _GROUP}"
        documents = [{"type": "ActivationSource", "attributes": {"name": source, "layers": list(range(size.layers))} | _SOURCE}]
        for i in range(first, min(first + _GROUP, size.experiments)):
            own = {
                "name": f"experiment_{i}",
                "source": source,
                "ensemble": {"members": size.members, "seeds": list(range(size.seeds))},
                "automation": "on" if i < size.automated else "off",
            }
            documents.append({"type": "EnsembleExperiment", "attributes": own | _EXPERIMENT})
        for each in documents:
            each["type"] = f"saeens_pipeline.components.{each['type']}"
        (folder / f"{source}.yaml").write_text("---\n".join(yaml.safe_dump(each, sort_keys=False) for each in documents))


def make_records(n_experiments: int) -> None:
    """Write a complete record, with a file of a few bytes or a table of one row, for each artefact of some experiments."""
    import polars as pl

    from saeens_pipeline.assets.staleness import plan
    from saeens_pipeline.orchestration.ops import Ops
    from saeens_pipeline.storage import recipes
    from saeens_pipeline.storage.recipes import Store
    from saeens_pipeline.storage.root import data_root

    recipes.flush = lambda _: None  # speed, not safety
    store, catalogue = Store(data_root()), Ops.load()
    provenance: dict[str, Any] = {"device": "none", "versions": {}, "seconds": 0.0, "experiment_file": ""}
    for name in sorted(each for each in catalogue.experiments if each.startswith("experiment_"))[:n_experiments]:
        experiment = catalogue.experiments[name]
        layers = catalogue.sources[experiment.source].layers
        for stage in plan(Store(data_root() / "nothing"), catalogue.ops(experiment), layers, experiment.ensemble.seeds):
            for status in stage.statuses:
                declaration, partition = status.declaration, status.partition
                recipe = declaration.recipe(store, partition)
                if store.hit(declaration.address, partition, recipe):
                    continue
                if declaration.address.is_table:
                    store.write_table(declaration.address, partition, recipe, provenance, pl.DataFrame({"value": [1.0]}))
                else:
                    with store.write_folder(declaration.address, partition, recipe, dict(provenance)) as folder:
                        (folder / "contents").write_text(f"{declaration.address} {partition}")
        print(f"{name}: every artefact has a record", file=sys.stderr)


def measure_load() -> None:
    """Print the time of the code location: definitions, and the description that the code server sends to the daemon and the webserver."""
    began = time.process_time()
    from dagster._core.remote_representation.external_data import RepositorySnap
    from dagster._serdes import serialize_value

    from saeens_pipeline.definitions import defs

    imported = time.process_time()
    repository = defs.get_repository_def()
    sent = serialize_value(RepositorySnap.from_def(repository, defer_snapshots=True))
    ended = time.process_time()
    n_assets = len(repository.asset_graph.get_all_asset_keys())
    _print(
        {
            "assets": f"{n_assets:,}",
            "code location": f"{ended - began:.1f} s, of it definitions {imported - began:.1f} s",
            "description of the code location": f"{len(sent) / 1e6:.1f} MB",
            "memory of the code server": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB",
        }
    )


def measure_ticks() -> None:
    """Print the time of the first tick of each sensor, of later ones, and of the automation's conditions."""
    import dagster as dg

    from saeens_pipeline.definitions import catalogue, defs
    from saeens_pipeline.orchestration.instance import command_line_instance, declare_layers

    rows: dict[str, str] = {}
    with command_line_instance() as instance:
        for source in catalogue.sources.values():
            declare_layers(instance, source.name, source.layers)
        for sensor in defs.sensors or ():
            if sensor.name == "automation":
                continue
            cursor, seconds = None, []
            for _ in range(8):
                with dg.build_sensor_context(instance, cursor=cursor, definitions=defs) as context:
                    began = time.process_time()
                    result = sensor.evaluate_tick(context)
                    seconds.append(time.process_time() - began)
                    cursor = result.cursor
            rows[f"tick of {sensor.name}"] = f"first {seconds[0]:.2f} s, longest of the next seven {max(seconds[1:]):.2f} s"
        for name in ("get_dynamic_partitions", "has_dynamic_partition"):  # which the daemon also asks once a tick
            setattr(instance, name, functools.cache(getattr(instance, name)))
        cursor, seconds = None, []
        for _ in range(3):
            began = time.process_time()
            cursor = dg.evaluate_automation_conditions(defs, instance, cursor=cursor).cursor
            seconds.append(time.process_time() - began)
        rows["evaluation of automation"] = f"first {seconds[0]:.2f} s, later {seconds[-1]:.2f} s"
        rows["memory after the ticks"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    _print(rows)


_ASSET = """query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  description staleStatus partitionKeysByDimension { name partitionKeys }
  assetPartitionStatuses { ... on MultiPartitionStatuses { primaryDimensionName } }
  assetMaterializations(limit: 5) { runId partition } dependencyKeys { path } dependedByKeys { path } } } }"""
_GRAPH = "{ assetNodes { id groupName assetKey { path } dependencyKeys { path } kinds isPartitioned isObservable } }"
_GROUP_GRAPH = """{ assetNodes(group: {groupName: "experiment_0_saes", repositoryName: "__repository__", repositoryLocationName: "saeens"})
  { id assetKey { path } staleStatus dependencyKeys { path } } }"""
_WORKSPACE = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus } } } }"


def measure_pages(port: int) -> dict[str, str]:
    """Return the time until the UI knows all assets, and of queries as its pages send them."""
    with _ui(port) as ask:
        began = time.perf_counter()
        while not (answer := ask(_WORKSPACE)) or not all(
            e["loadStatus"] == "LOADED" for e in answer["workspaceOrError"]["locationEntries"]
        ):
            if time.perf_counter() - began > _START_SECONDS:
                raise TimeoutError("the UI does not answer")
            time.sleep(0.2)
        rows = {"`saeens ui`, until the assets are there": f"{time.perf_counter() - began:.0f} s"}
        key = {"key": {"path": ["experiment_0", "bagging", "member_1"]}}
        for name, query, variables in (
            ("page of an asset", _ASSET, key),
            ("graph of a group", _GROUP_GRAPH, {}),
            ("graph of all assets", _GRAPH, {}),
        ):
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                if ask(query, **variables) is None:
                    raise RuntimeError(f"no answer to the query of the {name}")
                seconds.append(time.perf_counter() - began)
            rows[name] = f"first {seconds[0]:.2f} s, later {min(seconds[1:]):.2f} s"
        return rows


@contextmanager
def _ui(port: int) -> Iterator[Callable[..., dict[str, Any] | None]]:
    """Start `saeens ui` and give a function that sends a query."""
    log = Path(os.environ["SAEENS_DATA"]) / "ui.log"
    with log.open("w") as output:
        command = [sys.executable, "-c", "from saeens_pipeline.cli import main; main()", "ui", "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def ask(query: str, **variables: Any) -> dict[str, Any] | None:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_START_SECONDS) as answer:
                return json.load(answer)["data"]
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-4000:]) from None
            return None

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(60)


def _print(rows: dict[str, str]) -> None:
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
