"""Inputs that are replaced or removed while they are read: the rows that were there, or an error; nothing gets another recipe."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import zarr
from tiny_experiment import LAYER, NAME, Laboratory
from zarr.codecs import ZstdCodec

import saeens_models as sm
from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.declarations import Declaration, Input, Op, RunContext, Task
from saeens_pipeline.assets.materialise import ReplacedInputError, materialise
from saeens_pipeline.assets.readers import open_reader
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.storage import shards
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.names import Address, Kind, Partition
from saeens_pipeline.storage.recipes import Recipe, Store

WHERE = Address("s", "source", "activations"), Partition(1)
N_ROWS, CHUNK_ROWS = 1500, 32  # three shards of 16 chunks


def _write(store: Store, value: float) -> Path:
    """Write activations that are all `value`, of documents all numbered `value`."""
    with (
        store.write_folder(*WHERE, Recipe("activations", 1, {"value": value}), {}) as folder,
        ActivationWriter(folder, 4, "float16", {"train": N_ROWS}, name="x", chunk_rows=CHUNK_ROWS) as writer,
    ):
        numbers = torch.full((N_ROWS,), value)
        writer.append("train", torch.full((N_ROWS, 4), value), document=numbers, position=numbers)
    return store.path(*WHERE)


def _with_compressed_rows(folder: Path) -> None:
    """Store the rows again in a layout that only Zarr can read."""
    group: Any = zarr.open_group(folder / "train", mode="a")
    rows = group["activations"][:]
    group.create_array("activations", data=rows, chunks=(CHUNK_ROWS, 4), compressors=[ZstdCodec()], overwrite=True)


def _replace(store: Store) -> None:
    _write(store, 5.0)


def _remove(store: Store) -> None:
    for name in ("activations", "document"):
        for entry in sorted((store.path(*WHERE) / "train" / name / "c").iterdir(), key=lambda path: int(path.name))[1:]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _drop(store: Store) -> None:
    store.drop_bytes(store.require(*WHERE))


CHANGES = {"replaced": _replace, "files removed": _remove, "bytes dropped": _drop}


def _values(store: ActivationStore, change: Callable[[], object]) -> set[float]:
    found = set()
    for index, chunk in enumerate(store.chunks("train")):
        found.add(float(chunk.mean()))
        if index == 1:
            change()
    return found


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_all_rows_come_from_the_store_that_was_opened(tmp_path: Path, change: Callable[[Store], None]):
    store = Store(tmp_path)
    assert _values(ActivationStore(_write(store, 1.0)), lambda: change(store)) == {1.0}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_rows_beyond_the_shards_that_are_held_are_an_error(
    tmp_path: Path, change: Callable[[Store], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "_MOST_HELD", 1)
    store = Store(tmp_path)
    with pytest.raises(SaeensError, match="was removed or replaced"):
        _values(ActivationStore(_write(store, 1.0)), lambda: change(store))


@pytest.mark.parametrize("change", [_replace, _remove])
def test_rows_that_zarr_reads_are_those_of_the_store_that_was_opened_or_an_error(tmp_path: Path, change: Callable[[Store], None]):
    store = Store(tmp_path)
    folder = _write(store, 1.0)
    (folder / "recipe.json").unlink()
    _with_compressed_rows(folder)
    with pytest.raises(SaeensError, match=r"was removed or replaced|was replaced while it was read"):
        _values(ActivationStore(folder), lambda: change(store))


def test_many_shards_are_held_within_the_limit_of_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (16, 16))
    reader = ActivationStore(_write(Store(tmp_path), 1.0))
    before = len(list(Path("/dev/fd").iterdir()))
    again = ActivationStore(reader.path)
    assert len(list(Path("/dev/fd").iterdir())) == before + 3  # the folder, and an eighth of 16 files
    assert _values(again, lambda: None) == {1.0}
    del again
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_documents_are_those_of_the_store_that_was_opened_or_an_error(tmp_path: Path, change: Callable[[Store], None]):
    store = Store(tmp_path)
    reader = ActivationStore(_write(store, 1.0))
    blocks = reader.document_blocks("train")
    assert set(next(blocks)) == {1}
    change(store)
    with pytest.raises(SaeensError, match=r"was removed or replaced|was replaced while it was read"):
        list(blocks)


def test_rows_that_were_never_written_still_have_the_fill_value(tmp_path: Path):
    assert _values(ActivationStore(_write(Store(tmp_path), 0.0)), lambda: None) == {0.0}  # zarr stores no chunk of zeros


def test_tokens_that_are_replaced_while_they_are_read_are_an_error(finished: Laboratory):
    path = finished.artefact("tokens", layer=None).path
    tokens = open_tokens(path)
    batches = tokens.batches("train", 1)
    next(batches)
    path.rename(path.with_name("was.zarr"))
    shutil.copytree(path.with_name("was.zarr"), path)
    with pytest.raises(SaeensError, match="was replaced while it was read"):
        list(tokens.batches("test", 1))


# before an artefact gets its name


def _declaration(kind: Kind, name: str, *inputs: Declaration, optional: bool = False) -> Declaration:
    return Declaration(
        Address("e", kind, name),
        "layer_and_seed",
        builder=name,
        version=1,
        settings={},
        inputs=tuple(Input(each.address.name, each, optional=optional) for each in inputs),
        description="",
        source="s",
        seeds=(1,),
    )


SAE = _declaration("bagging", "member_1")
ENSEMBLE = _declaration("bagging", "bagging_ensemble", SAE)
PARTITION = Partition(1, 1)


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(Store(tmp_path), Compute("cpu"), "run", tuple, lambda *_: None)


def _make_input(store: Store, declaration: Declaration, content: str) -> None:
    with store.write_folder(declaration.address, PARTITION, declaration.recipe(store, PARTITION), {}) as folder:
        (folder / "file").write_text(content)


def _op(output: Declaration, meanwhile: Callable[[Store], object]) -> Op:
    """Make an artefact, a table if its kind is `eval`; `meanwhile` is done by another process."""

    def make(context: RunContext, tasks: Any) -> None:
        (task,) = tasks
        assert isinstance(task, Task)
        meanwhile(Store(context.store.root))
        if output.address.is_table:
            context.store.write_table(*task.where, task.recipe, {}, pl.DataFrame({"a": [1]}))
        else:
            with context.store.write_folder(*task.where, task.recipe, {}) as folder:
                (folder / "made").write_text("made")

    return Op("op", (output,), make)


OUTPUTS = {
    "a folder": _declaration("bagging", "other_ensemble", SAE),
    "a table": _declaration("eval", "members", SAE),
    "an input of an input": _declaration("eval", "cost", ENSEMBLE),
    "an optional input": _declaration("eval", "features", ENSEMBLE, optional=True),
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_artefacts_computed_from_a_replaced_input_are_discarded(context: RunContext, output: Declaration, how: str):
    store = context.store
    _make_input(store, SAE, "one")
    _make_input(store, ENSEMBLE, "ensemble")
    changed = ENSEMBLE if output.address.name == "features" else SAE

    def meanwhile(store: Store) -> None:
        if how == "replaced":
            _make_input(store, changed, "another")
        else:
            shutil.rmtree(store.path(changed.address, PARTITION))

    with pytest.raises(ReplacedInputError, match=rf"{changed.address}, layer 1, seed 1 was replaced or removed while e: .* run again"):
        materialise(_op(output, meanwhile), [output.address], PARTITION, context)
    assert not store.path(output.address, PARTITION).exists()
    assert not list(store.root.rglob("*.partial"))


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_input_rebuilt_with_the_same_bytes_does_not_discard_the_output(context: RunContext, output: Declaration):
    _make_input(context.store, SAE, "one")
    _make_input(context.store, ENSEMBLE, "ensemble")
    made = materialise(_op(output, lambda store: _make_input(store, SAE, "one")), [output.address], PARTITION, context)
    assert [each.is_hit for each in made] == [False]


def test_an_sae_trained_while_its_activations_were_replaced_is_discarded(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(finished.root / "experiments")
    activations, train = finished.artefact("activations"), sm.train

    def replaced_meanwhile(*arguments: Any, **options: Any) -> Any:
        recipe = Recipe(**activations.recipe | {"settings": activations.recipe["settings"] | {"hook": "mlp_out"}})
        other = activations.path.with_name("other.zarr")
        shutil.copytree(activations.path, other)
        address = Address(NAME, "source", "activations")
        with finished.store.write_folder(address, Partition(LAYER), recipe, activations.provenance) as folder:
            shutil.copytree(other, folder, dirs_exist_ok=True)
            (folder / "recipe.json").unlink()
        return train(*arguments, **options)

    monkeypatch.setattr(sm, "train", replaced_meanwhile)
    with pytest.raises(Exception, match="activations, layer 1 was replaced or removed") as error:
        finished.materialise([f"{NAME}/bagging/member_1"], Partition(LAYER, 1))
    assert isinstance(error.value, ReplacedInputError)
    assert not (finished.root / "experiments" / NAME / f"layer={LAYER}" / "seed=1" / "bagging" / "member_1").exists()


# inputs of inputs that were replaced before


def test_a_residual_without_bytes_is_not_read_from_other_activations(finished: Laboratory):
    residual = finished.declarations()[f"{NAME}/boosting/residual_1"]
    where = Partition(LAYER, 1)
    assert not finished.store.require(residual.address, where).files
    assert open_reader(finished.store, residual, where).n_rows("train")
    _change(finished, "boosting", "round_1")
    with pytest.raises(SaeensError, match="round_1 has changed since tiny/boosting/residual_1, layer 1, seed 1 was computed"):
        open_reader(finished.store, residual, where)


def test_an_ensemble_is_not_measured_with_other_members(finished: Laboratory):
    _change(finished, "bagging", "member_2")
    shutil.rmtree(finished.root / "tables")
    with pytest.raises(SaeensError, match="member_2 has changed since tiny/bagging/bagging_ensemble was computed from it"):
        finished.materialise([f"{NAME}/eval/cost"], Partition(LAYER, 1))


def _change(laboratory: Laboratory, kind: Kind, name: str) -> None:
    """Write an SAE again, with the same recipe and another data version."""
    made = laboratory.artefact(f"{kind}/{name}", seed=1)
    with laboratory.store.write_folder(Address(NAME, kind, name), Partition(LAYER, 1), Recipe(**made.recipe), made.provenance) as folder:
        shutil.copytree(made.path, folder, dirs_exist_ok=True)
        (folder / "recipe.json").unlink()
        (folder / "note").write_text("other bytes")
