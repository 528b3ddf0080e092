"""`saeens gc`: unreferenced artefacts are listed, and removed on request; all other files are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import dagster as dg
import pytest
import torch
from tiny_experiment import EXPERIMENT, LAYER, NAME, Laboratory, experiment_file, source_settings

import saeens_models as sm
from saeens_models.training import Checkpoints, SAETrainer
from saeens_pipeline import cli
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration import garbage
from saeens_pipeline.orchestration.garbage import Inventory, by_folder, declared, find_garbage, remove_garbage
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.settings.files import FOLDERS_VARIABLE
from saeens_pipeline.storage import recipes
from saeens_pipeline.storage.checkpoints import checkpoint_file
from saeens_pipeline.storage.locks import writing_alone
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import digest

HERE, ELSEWHERE = recipes.this_machine(), "0123abcd"
SEED_1 = f"experiments/{NAME}/layer={LAYER}/seed=1"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Layers that were added while it runs, by source; to be filled."""
    layers: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def instance() -> Iterator[dg.DagsterInstance]:
        with dg.DagsterInstance.ephemeral() as instance:
            for source, added in layers.items():
                register_layers(instance, source, added)
            yield instance

    monkeypatch.setattr(garbage, "recorded_instance", instance)
    return layers


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _look(laboratory: Laboratory) -> Inventory:
    return find_garbage(laboratory.root, declared(laboratory.catalogue))


def _listed(laboratory: Laboratory) -> dict[str, str]:
    """Why each path is unused."""
    return {path.relative_to(laboratory.root).as_posix(): reason for path, _, reason in _look(laboratory).garbage}


def _unknown(laboratory: Laboratory) -> dict[str, str]:
    return {path.relative_to(laboratory.root).as_posix(): reason for path, _, reason in _look(laboratory).unknown}


def _files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def _declare_only_source(laboratory: Laboratory) -> None:
    laboratory.write(experiment_file(("ActivationSource", source_settings(laboratory.model))))


# what is unused


def test_declared_artefacts_are_never_unused(finished: Laboratory):
    (finished.root / "dagster" / "storage").mkdir(parents=True)
    (finished.root / "dagster" / "storage" / "runs.db").write_text("events")
    inventory = _look(finished)
    assert inventory == Inventory()
    assert inventory.freed_bytes == 0


def test_artefacts_of_a_removed_experiment_are_unused_but_those_of_its_source_are_not(finished: Laboratory):
    _declare_only_source(finished)
    listed = _listed(finished)
    artefacts = {path.parent for path in (finished.root / "experiments").rglob("recipe.json")}
    artefacts |= set((finished.root / "tables").rglob("part.parquet"))
    artefacts |= {path.parent for path in (finished.root / "reports").rglob("recipe.json")}
    assert listed.keys() == {path.relative_to(finished.root).as_posix() for path in artefacts}
    assert set(listed.values()) == {f"there is no experiment {owner} any more" for owner in (NAME, "leaderboard")}


def test_tokens_and_activations_of_a_removed_source_are_unused(finished: Laboratory):
    finished.write(experiment_file(("ActivationSource", source_settings(finished.model, name="another"))))
    listed = _listed(finished)
    for artefact in (f"sources/{NAME}/tokens.zarr", f"sources/{NAME}/layer={LAYER}/activations.zarr"):
        assert listed[artefact] == f"there is no source {NAME} any more"


CHANGES: Mapping[str, tuple[dict, Sequence[str], str]] = {  # of the experiment, what is unused for each seed, why
    "fewer members": (
        {"ensemble": EXPERIMENT["ensemble"] | {"members": 2}},
        ["bagging/member_3", "boosting/round_3", "boosting/residual_2.zarr"],
        "is not declared any more",
    ),
    "another boosting": (
        {"ensemble": EXPERIMENT["ensemble"] | {"boosting": "concurrent"}},
        ["boosting/residual_1.zarr", "boosting/residual_2.zarr"],
        "is not declared any more",
    ),
    "no baselines": ({"baselines": []}, ["baseline/expanded", "baseline/expanded_l0_matched"], "is not declared any more"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_undeclared_artefacts_are_unused(finished: Laboratory, case: str):
    experiment, unused, why = CHANGES[case]
    finished.declare(**experiment)
    listed = _listed(finished)
    assert listed.keys() == {f"experiments/{NAME}/layer={LAYER}/seed={seed}/{name}" for seed in (1, 2) for name in unused}
    assert all(why in reason for reason in listed.values())


def test_an_undeclared_table_is_unused(finished: Laboratory):
    finished.declare(
        evaluations=["reconstruction", "differences", "members", "coactivation", "token_curves", "stability", "marginal_gain", "cost"]
    )
    assert _listed(finished).keys() == {f"tables/{NAME}/training_curves/layer={LAYER}/seed={seed}/part.parquet" for seed in (1, 2)}


def test_saes_and_tables_of_an_undeclared_seed_are_unused(finished: Laboratory):
    finished.declare(ensemble=EXPERIMENT["ensemble"] | {"seeds": [1]})
    listed = _listed(finished)
    assert listed
    assert all("/seed=2/" in path for path in listed)
    assert {path.split("/")[0] for path in listed} == {"experiments", "tables"}
    assert set(listed.values()) == {"seed 2 is not declared any more"}


def test_a_layer_is_unused_when_it_is_neither_in_the_file_nor_registered(finished: Laboratory, registered: dict[str, list[int]]):
    assert _listed(finished) == {}
    finished.declare(source={"layers": [0]})
    listed = _listed(finished)
    assert all(f"/layer={LAYER}/" in f"{path}/" for path in listed)
    assert {path.split("/")[0] for path in listed} == {"sources", "experiments", "tables", "reports"}
    assert set(listed.values()) == {f"layer {LAYER} is neither in the file of source {NAME} nor registered"}
    registered[NAME] = [LAYER]
    assert _listed(finished) == {}


def test_the_leaderboard_is_kept_as_long_as_there_are_experiments(finished: Laboratory):
    path = finished.root / "tables" / "leaderboard" / "part.parquet"
    path.parent.mkdir()
    shutil.copy(finished.root / "tables" / NAME / "cost" / f"layer={LAYER}" / "seed=1" / "part.parquet", path)
    assert _listed(finished) == {}
    _declare_only_source(finished)
    assert "tables/leaderboard/part.parquet" in _listed(finished)


# what killed processes left


def test_partial_artefacts_of_killed_processes_are_unused_and_of_living_ones_are_not(finished: Laboratory, dead_pid: int):
    names = {pid: finished.root / SEED_1 / "bagging" / f".member_1.{HERE}-{pid}.partial" for pid in (dead_pid, os.getpid())}
    for folder in names.values():
        folder.mkdir()
    table = finished.root / "tables" / NAME / "cost" / f"layer={LAYER}" / "seed=1" / f".part.parquet.{HERE}-{dead_pid}.partial"
    table.write_text("half")
    left = [names[dead_pid], table]
    assert set(_listed(finished)) == {path.relative_to(finished.root).as_posix() for path in left}
    assert set(_listed(finished).values()) == {"left behind by a process that was killed"}


def test_partial_artefacts_of_another_machine_are_kept_while_it_holds_the_lock(finished: Laboratory, dead_pid: int):
    left = finished.root / SEED_1 / "bagging" / f".member_1.{ELSEWHERE}-{dead_pid}.partial"
    left.mkdir()
    relative = left.relative_to(finished.root).as_posix()
    inventory = _look(finished)
    assert [finding.path for finding in inventory.garbage] == [left]
    with writing_alone(finished.root, [(Address(NAME, "bagging", "member_1"), Partition(LAYER, 1))]):
        assert _listed(finished) == {}
        remove_garbage(finished.catalogue, inventory, finished.root)  # the other machine began after the listing
        assert left.exists()
    assert list(_listed(finished)) == [relative]
    remove_garbage(finished.catalogue, inventory, finished.root)
    assert not left.exists()


def test_an_artefact_in_writing_is_not_removed(finished: Laboratory):
    _declare_only_source(finished)
    inventory = _look(finished)
    with writing_alone(finished.root, [(Address(NAME, "bagging", "member_1"), Partition(LAYER, 1))]):
        remove_garbage(finished.catalogue, inventory, finished.root)
    assert [path.parent.name for path in (finished.root / "experiments").rglob("recipe.json")] == ["member_1"]


@pytest.mark.parametrize(
    "name", [".thesis.999999.partial", ".member_1.999999.partial", ".thesis.retired", ".member_1.retired", ".thesis.tmp"]
)
def test_foreign_files_of_similar_names_are_never_removed(finished: Laboratory, name: str, monkeypatch: pytest.MonkeyPatch):
    in_two_hours = time.time() + 7200
    monkeypatch.setattr(recipes.time, "time", lambda: in_two_hours)
    for folder in ("", f"{SEED_1}/bagging", f"tables/{NAME}", f"sources/{NAME}", "checkpoints"):
        (finished.root / folder).mkdir(exist_ok=True)
        (finished.root / folder / name).write_text("mine")
    assert _listed(finished) == {}
    assert len(_unknown(finished)) == 5


def test_partial_writes_are_kept_until_their_artefact_is_complete_or_undeclared(
    finished: Laboratory, dead_pid: int, registered: dict[str, list[int]]
):
    artefact = finished.artefact("activations")
    left = artefact.path.parent / f".activations.zarr.{'0123456789abcdef'}.{HERE}-{dead_pid}.partial"
    left.mkdir()
    relative = left.relative_to(finished.root).as_posix()
    assert _listed(finished) == {}
    left.rename(left.with_name(f".activations.zarr.{artefact.recipe_hash}.{HERE}-{dead_pid}.partial"))
    assert list(_listed(finished)) == [relative.replace("0123456789abcdef", artefact.recipe_hash)]
    left.with_name(f".activations.zarr.{artefact.recipe_hash}.{HERE}-{dead_pid}.partial").rename(left)
    finished.declare(source={"layers": [0]})
    assert relative in _listed(finished)


def test_a_replaced_artefact_is_unused_after_an_hour_unless_it_is_the_only_copy(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    folder = finished.root / SEED_1 / "bagging"
    retired = f".member_1.{digest('member_1')[:8]}.retired"
    shutil.copytree(folder / "member_1", folder / retired)
    assert _listed(finished) == {}
    in_two_hours = time.time() + 7200
    monkeypatch.setattr(recipes.time, "time", lambda: in_two_hours)
    assert list(_listed(finished)) == [f"{SEED_1}/bagging/{retired}"]
    shutil.rmtree(folder / "member_1")
    assert _listed(finished) == {}


def test_checkpoints_are_kept_while_their_training_is_incomplete(finished: Laboratory, registered: dict[str, list[int]]):
    op = f"{NAME}__bagging__members"
    files = {
        name: checkpoint_file(finished.root, op_name, Partition(layer, seed))
        for name, op_name, layer, seed in (
            ("needed", op, LAYER, 1),
            ("of no op", "gone__bagging__members", LAYER, 1),
            ("of no seed", op, LAYER, 9),
            ("of no layer", op, 2, 1),
        )
    }
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"state")
    aside = files["of no op"].with_name(f".{files['of no op'].name}.partial")
    aside.write_bytes(b"half")
    shutil.rmtree(finished.root / SEED_1 / "bagging" / "member_2")
    unused = [file for name, file in files.items() if name != "needed"] + [aside]
    assert set(_listed(finished)) == {file.relative_to(finished.root).as_posix() for file in unused}
    assert _unknown(finished) == {}


def _checkpoint(laboratory: Laboratory, recipes: Sequence[str]) -> Path:
    """Write a checkpoint of the members of seed 1."""
    file = checkpoint_file(laboratory.root, f"{NAME}__bagging__members", Partition(LAYER, 1))
    config, training = sm.SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2), sm.TrainingConfig()
    checkpoints = Checkpoints(file, recipes=recipes)
    checkpoints.load([[config]] * len(recipes), [training] * len(recipes))
    trainers = [SAETrainer(config, training) for _ in recipes]
    for trainer in trainers:
        trainer.step(torch.ones(8, 4))
    checkpoints.save(trainers, 8, [])
    return file


def test_a_checkpoint_is_unused_once_all_its_saes_are_finished(finished: Laboratory):
    members = [finished.artefact(f"bagging/member_{j}", 1) for j in (1, 2, 3)]
    file = _checkpoint(finished, [each.recipe_hash for each in members])
    relative = file.relative_to(finished.root).as_posix()
    inventory = _look(finished)
    assert [(finding.path, finding.reason) for finding in inventory.garbage] == [(file, "its SAEs are finished")]
    with writing_alone(finished.root, [(Address(NAME, "bagging", "member_2"), Partition(LAYER, 1))]):
        assert _listed(finished) == {}
    shutil.rmtree(members[2].path)
    assert _listed(finished) == {}
    _checkpoint(finished, [each.recipe_hash for each in members[:2]])
    assert list(_listed(finished)) == [relative]
    _checkpoint(finished, [members[0].recipe_hash, "of other settings"])
    assert _listed(finished) == {}
    remove_garbage(finished.catalogue, inventory, finished.root)
    assert not (finished.root / "checkpoints").exists()


def test_what_safetensors_had_begun_when_it_was_killed_is_unused(finished: Laboratory):
    folder = finished.root / "checkpoints" / f"{NAME}__bagging__members" / f"layer={LAYER}"
    folder.mkdir(parents=True)
    left, own = folder / ".tmps4Pbu2", folder / "notes.tmp"
    left.write_bytes(b"half")
    own.write_text("mine")
    with writing_alone(finished.root, [(Address(NAME, "bagging", "member_2"), Partition(LAYER, 1))]):
        assert _listed(finished) == {}
    inventory = _look(finished)
    assert [finding.path for finding in inventory.garbage] == [left]
    remove_garbage(finished.catalogue, inventory, finished.root)
    assert list(folder.iterdir()) == [own]


# what is not known


def test_foreign_files_are_listed_as_unknown_and_kept(finished: Laboratory):
    _declare_only_source(finished)
    strangers = [
        "notes.txt",
        "sources/README.md",
        f"experiments/{NAME}/plots/loss.png",
        f"experiments/{NAME}/layer=one/seed=1/file",
        f"{SEED_1}/bagging/my_sae/weights.safetensors",  # where an artefact would lie, but without a recipe
        f"tables/{NAME}/cost/layer={LAYER}/seed=1/copy.parquet",
        f"tables/{NAME}/mine/layer={LAYER}/part.parquet",
    ]
    for name in strangers:
        file = finished.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    unknown = _unknown(finished)
    assert all(any(name == path or name.startswith(f"{path}/") for path in unknown) for name in strangers)
    assert len(unknown) == len(strangers)
    remove_garbage(finished.catalogue, _look(finished), finished.root)
    assert all((finished.root / name).exists() for name in strangers)
    assert not (finished.root / SEED_1 / "bagging" / "member_1").exists()


def test_an_artefact_with_a_foreign_file_is_kept(finished: Laboratory):
    _declare_only_source(finished)
    (finished.root / SEED_1 / "bagging" / "member_1" / "notes.txt").write_text("the best one")
    assert "it holds notes.txt, which saeens did not write" in _unknown(finished)[f"{SEED_1}/bagging/member_1"]
    remove_garbage(finished.catalogue, _look(finished), finished.root)
    assert (finished.root / SEED_1 / "bagging" / "member_1" / "notes.txt").exists()


def test_an_artefact_whose_recipe_cannot_be_read_is_kept(finished: Laboratory):
    _declare_only_source(finished)
    (finished.root / SEED_1 / "bagging" / "member_1" / "recipe.json").write_text("{")
    assert "no recipe that can be read" in _unknown(finished)[f"{SEED_1}/bagging/member_1"]


def test_symbolic_links_are_not_followed_and_their_targets_are_kept(finished: Laboratory, tmp_path: Path):
    outside = tmp_path / "outside"
    shutil.copytree(finished.root / SEED_1, outside / "seed=7")
    _declare_only_source(finished)
    links = {f"experiments/{NAME}/layer={LAYER}/seed=7": outside / "seed=7", "experiments/linked": outside}
    for name, target in links.items():
        (finished.root / name).symlink_to(target)
    before = _files(outside)
    assert _unknown(finished) == dict.fromkeys(links, "a link: it is not followed")
    remove_garbage(finished.catalogue, _look(finished), finished.root)
    assert _files(outside) == before
    assert all((finished.root / name).is_symlink() for name in links)


def test_a_missing_root_has_no_garbage(empty: Laboratory):
    assert _look(empty) == Inventory()
    assert not empty.root.exists()


# removing


def test_garbage_is_listed_by_the_largest_folders_without_other_files(finished: Laboratory):
    def shown() -> dict[str, int]:
        findings = by_folder(_look(finished).garbage, finished.root)
        return {finding.path.relative_to(finished.root).as_posix(): finding.n_bytes for finding in findings}

    assert shown() == {}
    finished.declare(ensemble=EXPERIMENT["ensemble"] | {"seeds": [1]})
    tables = ("coactivation", "cost", "differences", "members", "reconstruction", "token_curves", "training_curves")
    assert list(shown()) == [
        f"experiments/{NAME}/layer={LAYER}/seed=2",
        *(f"tables/{NAME}/{table}/layer={LAYER}/seed=2" for table in tables),
    ]
    _declare_only_source(finished)
    assert list(shown()) == [f"experiments/{NAME}", "reports/leaderboard", f"reports/{NAME}", f"tables/{NAME}"]
    assert sum(shown().values()) == sum(finding.n_bytes for finding in _look(finished).garbage)
    (finished.root / "tables" / NAME / "notes.txt").write_text("mine")
    assert f"tables/{NAME}" not in shown()
    assert f"tables/{NAME}/cost" in shown()


def test_gc_removes_exactly_the_listed_paths_and_empty_folders(finished: Laboratory):
    finished.declare(ensemble=EXPERIMENT["ensemble"] | {"seeds": [1]})
    before = _files(finished.root)
    listed = _listed(finished)
    remove_garbage(finished.catalogue, _look(finished), finished.root)
    expected = {file for file in before if not any(file == path or file.startswith(f"{path}/") for path in listed)}
    assert _files(finished.root) == expected
    assert not (finished.root / "experiments" / NAME / f"layer={LAYER}" / "seed=2").exists()
    assert _look(finished) == Inventory()
    assert "nothing to do" not in finished.run()  # stability compared both seeds


def test_dagster_events_of_removed_partitions_alone_are_wiped(finished: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    keys = {"members": [NAME, "bagging", "member_1"], "tokens": [NAME, "tokens"]}
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        monkeypatch.setattr(garbage, "recorded_instance", lambda: contextlib.nullcontext(instance))
        register_layers(instance, NAME, [LAYER])
        for seed in (1, 2):
            instance.report_runless_asset_event(dg.AssetMaterialization(keys["members"], partition=f"{LAYER}|{seed}"))
        instance.report_runless_asset_event(dg.AssetMaterialization(keys["tokens"]))
        finished.declare(ensemble=EXPERIMENT["ensemble"] | {"seeds": [1]})
        remove_garbage(finished.catalogue, _look(finished), finished.root)
        assert instance.get_materialized_partitions(dg.AssetKey(keys["members"])) == {f"{LAYER}|1"}
        assert instance.get_latest_materialization_event(dg.AssetKey(keys["tokens"]))
        finished.write(experiment_file(("ActivationSource", source_settings(finished.model, name="another"))))
        remove_garbage(finished.catalogue, _look(finished), finished.root)
        assert not instance.get_latest_materialization_event(dg.AssetKey(keys["tokens"]))


def test_files_are_removed_even_if_wiping_dagster_events_fails(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("database is locked")

    _declare_only_source(finished)
    inventory = _look(finished)
    monkeypatch.setattr(garbage, "recorded_instance", lambda: contextlib.nullcontext(dg.DagsterInstance.ephemeral()))
    monkeypatch.setattr(garbage, "forget_partitions", fail)
    remove_garbage(finished.catalogue, inventory, finished.root)
    assert not any(finding.path.exists() for finding in inventory.garbage)


def test_freed_bytes_count_linked_files_once_and_only_if_all_links_are_removed(finished: Laboratory):
    member, round_1 = (finished.root / SEED_1 / name for name in ("bagging/member_1", "boosting/round_1"))
    weights = [folder / "sae_weights.safetensors" for folder in (member, round_1)]
    n_bytes = weights[0].stat().st_size
    weights[1].unlink()
    weights[1].hardlink_to(weights[0])  # as a run links them
    _declare_only_source(finished)
    both = _look(finished)
    alone = Inventory([finding for finding in both.garbage if finding.path == round_1])
    assert both.freed_bytes == sum(finding.n_bytes for finding in both.garbage) - n_bytes
    assert alone.freed_bytes == alone.garbage[0].n_bytes - n_bytes


def test_no_file_is_removed_while_an_experiment_file_is_broken(finished: Laboratory):
    file = finished.declare(keep_residuals="some")
    before = _files(finished.root)
    inventory = _look(finished)
    assert inventory.garbage
    with pytest.raises(ConfigurationError, match=f"{file}:.*keep_residuals.*\nnothing is removed"):
        remove_garbage(finished.catalogue, inventory, finished.root)
    assert _files(finished.root) == before


@pytest.fixture
def own_folder(finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment's file lies in a folder of SAEENS_EXPERIMENTS, and something was made with it."""
    folder = tmp_path / "own"
    (finished.folder / NAME).rename(folder)
    monkeypatch.setenv(FOLDERS_VARIABLE, str(folder))
    shutil.rmtree(finished.root / SEED_1 / "baseline" / "expanded")
    finished.run(seeds=[1], select=["baseline/expanded"])
    return folder


@pytest.mark.parametrize("is_there", [True, False])
def test_artefacts_of_unread_experiment_folders_are_kept(
    finished: Laboratory, own_folder: Path, is_there: bool, monkeypatch: pytest.MonkeyPatch
):
    assert _look(finished) == Inventory()
    monkeypatch.delenv(FOLDERS_VARIABLE)
    if not is_there:
        shutil.rmtree(own_folder)
    inventory = _look(finished)
    assert inventory.unread_folders == [own_folder]
    (kept,) = [finding for finding in inventory.unknown if finding.path.name == "expanded"]
    assert str(own_folder) in kept.reason and "not read now" in kept.reason
    remove_garbage(finished.catalogue, inventory, finished.root)
    left = {path.relative_to(finished.root).as_posix() for path in finished.root.rglob("recipe.json")}
    assert left == {f"{SEED_1}/baseline/expanded/recipe.json"}


def test_removal_is_atomic_and_the_rest_of_an_interrupted_one_is_unused(
    finished: Laboratory, monkeypatch: pytest.MonkeyPatch, dead_pid: int
):
    def interrupted(path: Path) -> None:
        (path / "recipe.json").unlink()
        raise KeyboardInterrupt

    _declare_only_source(finished)
    inventory = _look(finished)
    inventory.garbage = [finding for finding in inventory.garbage if finding.path.name == "member_1"][:1]
    monkeypatch.setattr(recipes.shutil, "rmtree", interrupted)
    monkeypatch.setattr(recipes.os, "getpid", lambda: dead_pid)
    with pytest.raises(KeyboardInterrupt):
        remove_garbage(finished.catalogue, inventory, finished.root)
    assert not inventory.garbage[0].path.exists()
    left = inventory.garbage[0].path.with_name(f".member_1.{HERE}-{dead_pid}.partial")
    assert _listed(finished)[left.relative_to(finished.root).as_posix()] == "left behind by a process that was killed"


# the command


def _saeens(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["saeens", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_gc_command_lists_sizes_and_removes_only_with_its_option(
    finished: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    finished.declare(baselines=[])
    before = _files(finished.root)
    assert _saeens(monkeypatch, "gc") == 0
    printed = capsys.readouterr().out
    assert _files(finished.root) == before
    assert f"{SEED_1}/baseline/expanded " in printed
    assert "kB" in printed
    assert "would be freed by `saeens gc --delete`; nothing was changed" in printed
    assert _saeens(monkeypatch, "gc", "--delete") == 0
    assert "kB freed" in capsys.readouterr().out
    assert not (finished.root / SEED_1 / "baseline").exists()
    assert _saeens(monkeypatch, "gc") == 0
    assert "is unused" in capsys.readouterr().out


def test_the_gc_command_refuses_to_remove_while_a_file_is_broken(
    finished: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = finished.declare(keep_residuals="some")
    before = _files(finished.root)
    assert _saeens(monkeypatch, "gc", "--delete") == 2
    assert str(file) in capsys.readouterr().err.replace("\n", "")
    assert _saeens(monkeypatch, "gc") == 0
    assert str(file) in capsys.readouterr().err.replace("\n", "")
    assert _files(finished.root) == before


@pytest.mark.parametrize("is_above", [False, True])
def test_the_gc_command_removes_artefacts_of_a_folder_only_after_it_is_given_up(
    finished: Laboratory, own_folder: Path, is_above: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(FOLDERS_VARIABLE, "")
    before = _files(finished.root)
    assert _saeens(monkeypatch, "gc") == 0
    assert f"saeens gc --forget-folder {own_folder}" in capsys.readouterr().err
    assert _saeens(monkeypatch, "gc", "--forget-folder", str(own_folder / "other")) == 2
    assert f"there are: {own_folder}" in capsys.readouterr().err
    assert _files(finished.root) == before
    assert _saeens(monkeypatch, "gc", "--delete") == 0
    assert (finished.root / SEED_1 / "baseline" / "expanded").exists()
    assert _saeens(monkeypatch, "gc", "--delete", "--forget-folder", str(own_folder.parent if is_above else own_folder)) == 0
    assert not (finished.root / "experiments").exists()


def test_a_folder_that_is_read_is_not_given_up(
    finished: Laboratory, own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert _saeens(monkeypatch, "gc", "--forget-folder", str(own_folder)) == 2
    assert "there are: none" in capsys.readouterr().err
