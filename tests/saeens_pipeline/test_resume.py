"""Killed and interrupted steps resume, writers of the same artefact wait, and temporary errors are retried."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child_process
import dagster as dg
import pytest
import torch
from tiny_experiment import LAYER, NAME, Laboratory

import saeens_models as sm
from saeens_models.training import NonFiniteLossError
from saeens_pipeline.assets import training
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.caching import cache_activations
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens
from saeens_pipeline.orchestration import retries
from saeens_pipeline.orchestration.instance import command_line_instance, register_layers
from saeens_pipeline.storage import activation_writer
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore
from saeens_pipeline.storage.checkpoints import SECONDS_VARIABLE, checkpoint_seconds
from saeens_pipeline.storage.locks import writing_alone, writing_if_free
from saeens_pipeline.storage.names import CURVE_FILE, Address, Partition
from saeens_pipeline.storage.recipes import Recipe, Store
from saeens_pipeline.storage.residuals import ResidualView, write_residual

SEED = 1
WHERE = Partition(LAYER, SEED)
MEMBERS = [f"bagging/member_{j}" for j in (1, 2, 3)]
TRAIN_ROWS, BATCH_TOKENS = 600, 64


class PowerCutError(Exception):
    """Stands for the end of a process in tests that continue after it."""


def _weights(laboratory: Laboratory, key: str) -> bytes:
    return (laboratory.artefact(key, SEED).path / "sae_weights.safetensors").read_bytes()


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _checkpoints(laboratory: Laboratory) -> list[Path]:
    return [file for file in (laboratory.root / "checkpoints").rglob("*") if file.is_file()]


@pytest.fixture
def untrained(finished: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """Activations are there and no SAE is; every step of training is kept."""
    shutil.rmtree(finished.root / "experiments")
    monkeypatch.setenv(SECONDS_VARIABLE, "0")
    return finished


# trainings


def _interrupt_at_batch(monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[], None]) -> None:
    batches = ActivationReader.batches

    def interrupted(self: ActivationReader, split: str, *arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for i, batch in enumerate(batches(self, split, *arguments, **options)):
            if i == number:
                what()
            yield batch

    monkeypatch.setattr(ActivationReader, "batches", interrupted)


def _power_cut() -> None:
    raise PowerCutError


@pytest.mark.parametrize("boosting", ["sequential", "concurrent"])
def test_an_interrupted_training_resumes_and_writes_the_same_files(
    untrained: Laboratory, boosting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = Laboratory(untrained.model, untrained.folder, tmp_path / "undisturbed")
    shutil.copytree(untrained.root / "sources", undisturbed.root / "sources")
    size = {"members": 3, "seeds": [1, 2], "boosting": boosting}
    keys = MEMBERS if boosting == "sequential" else [f"boosting/round_{j}" for j in (1, 2, 3)]
    untrained.declare(ensemble=size)
    with monkeypatch.context() as patch:
        patch.setenv("SAEENS_DATA", str(undisturbed.root))
        undisturbed.run(seeds=[SEED], select=keys)
    if boosting == "concurrent":
        untrained.run(seeds=[SEED], select=MEMBERS)
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=keys)
    assert len(_checkpoints(untrained)) == 1
    untrained.run(seeds=[SEED], select=keys)
    assert _checkpoints(untrained) == []
    for key in keys:
        made, expected = (each.artefact(key, SEED) for each in (untrained, undisturbed))
        assert made.data_version == expected.data_version
        assert (made.path / CURVE_FILE).read_bytes() == (expected.path / CURVE_FILE).read_bytes()
    resumed = untrained.artefact(keys[-1], SEED).provenance["resumed_at_tokens"]
    assert resumed == [6 * BATCH_TOKENS]
    assert "resumed_at_tokens" not in undisturbed.artefact(keys[-1], SEED).provenance


def test_seconds_of_training_add_up_over_the_attempts(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    _pass_before_the_first_checkpoint(monkeypatch, 1000.0)
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=["baseline/expanded"])
    untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert 1000 < untrained.artefact("baseline/expanded", SEED).provenance["train_seconds"] < 1500


def _pass_before_the_first_checkpoint(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    passed, save = [0.0], sm.Checkpoints.save

    def late(self: sm.Checkpoints, *state: Any) -> None:
        passed[0] = seconds
        save(self, *state)

    monkeypatch.setattr("saeens_models.training.checkpoints.time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0]))
    monkeypatch.setattr(sm.Checkpoints, "save", late)


def train_until_interrupted(model: str, folder: str, root: str) -> None:
    """Press Ctrl-C in the middle of a training; called in a child process."""
    laboratory = Laboratory(Path(model), Path(folder), Path(root))
    with pytest.MonkeyPatch.context() as patch:
        laboratory.activate(patch, keep_events=True)
        _interrupt_at_batch(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        try:
            laboratory.run(seeds=[SEED], select=["baseline/expanded"])
        except KeyboardInterrupt:
            with command_line_instance() as instance:
                (run, *_) = instance.get_runs(limit=1)
            child_process.tell(interrupted=True, status=run.status.value, retried=run.tags.get("dagster/will_retry"))


@pytest.mark.slow
def test_ctrl_c_during_a_run_writes_a_checkpoint_and_the_next_run_resumes(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(SECONDS_VARIABLE)
    child = child_process.start(train_until_interrupted, untrained.model, untrained.folder, untrained.root)
    assert child_process.finish(child) == {"interrupted": True, "status": "CANCELED", "retried": None}
    assert [file.name for file in _checkpoints(untrained)] == [f"seed={SEED}.safetensors"]
    untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert untrained.artefact("baseline/expanded", SEED).provenance["resumed_at_tokens"] == [5 * BATCH_TOKENS]
    shown = untrained.materialise([f"{NAME}/baseline/expanded"], WHERE)[f"{NAME}/baseline/expanded"].metadata
    assert shown["resumed from a checkpoint at [tokens]"].value == "320"


def test_changed_settings_do_not_resume_from_an_earlier_checkpoint(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=["baseline/expanded"])
    untrained.declare(training={"learning_rate": 0.02, "batch_tokens": 64})
    untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert "resumed_at_tokens" not in untrained.artefact("baseline/expanded", SEED).provenance
    assert _checkpoints(untrained) == []


@pytest.mark.parametrize("first", [["bagging/member_2"], ["bagging/member_3", "bagging/member_1"]])
def test_resuming_some_saes_keeps_the_checkpoint_for_the_others(
    untrained: Laboratory, finished_laboratory: Laboratory, first: list[str], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=MEMBERS)
    (file,) = _checkpoints(untrained)
    before = file.read_bytes()
    untrained.run(seeds=[SEED], select=first)
    assert file.read_bytes() == before
    untrained.run(seeds=[SEED], select=MEMBERS)
    assert _checkpoints(untrained) == []
    for key in MEMBERS:
        assert untrained.artefact(key, SEED).provenance["resumed_at_tokens"] == [6 * BATCH_TOKENS]
        assert _weights(untrained, key) == _weights(finished_laboratory, key)


def test_training_an_sae_outside_the_checkpoint_keeps_it_for_the_others(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=MEMBERS[:2])
    untrained.run(seeds=[SEED], select=MEMBERS[2:])
    assert len(_checkpoints(untrained)) == 1
    untrained.run(seeds=[SEED], select=MEMBERS)
    resumed = [untrained.artefact(key, SEED).provenance.get("resumed_at_tokens") for key in MEMBERS]
    assert resumed == [[6 * BATCH_TOKENS], [6 * BATCH_TOKENS], None]
    assert _checkpoints(untrained) == []


def test_a_resumed_run_prints_its_start_and_counts_only_its_own_tokens(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=["baseline/expanded"])
    (file,) = _checkpoints(untrained)
    printed = untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert f"training resumes from {file}, after step 6 and 384 tokens\n" in printed
    assert f"{NAME}/baseline/expanded, layer {LAYER}, seed {SEED}: {TRAIN_ROWS - 384} tokens in" in printed
    assert "; 384 were done before\n" in printed


def test_a_run_reports_a_damaged_checkpoint_in_one_line(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        _interrupt_at_batch(patch, 6, _power_cut)
        with pytest.raises(PowerCutError):
            untrained.run(seeds=[SEED], select=["baseline/expanded"])
    (file,) = _checkpoints(untrained)
    file.write_bytes(file.read_bytes()[:-9])
    printed = untrained.run(seeds=[SEED], select=["baseline/expanded"])
    (line,) = [line for line in printed.splitlines() if "is damaged" in line]
    assert line.startswith(f"{file} is damaged: it is removed, and training starts from the beginning (")
    assert "Traceback" not in printed


def test_a_full_disk_while_saes_are_written_loses_no_training(
    untrained: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    save_sae, saved = sm.save_sae, []

    def fills_up(sae: sm.SAE, folder: Path, metadata: Any) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_sae(sae, folder, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(sm, "save_sae", fills_up)
        with pytest.raises(SaeensError, match=rf"the disk below .* is full.*seed={SEED}.safetensors, after 600 tokens, is kept"):
            untrained.run(seeds=[SEED], select=MEMBERS)
    with monkeypatch.context() as patch:
        patch.setattr(ActivationReader, "batches", lambda *_, **__: pytest.fail("rows are read again"))
        untrained.run(seeds=[SEED], select=MEMBERS)
    for key in MEMBERS:
        assert _weights(untrained, key) == _weights(finished_laboratory, key)
    assert untrained.artefact(MEMBERS[1], SEED).provenance["resumed_at_tokens"] == [TRAIN_ROWS]


def test_too_small_a_disk_is_refused_before_training_with_the_required_bytes(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**6, 0, 1000))
    monkeypatch.setattr(ActivationReader, "batches", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(
        SaeensError, match=r"training tiny/bagging/member_1 to member_3, layer 1, seed 1 needs [\d,]+ bytes.*1,000 bytes are free"
    ):
        untrained.run(seeds=[SEED], select=MEMBERS)


def test_without_checkpoints_none_is_written(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SECONDS_VARIABLE, "off")
    _interrupt_at_batch(monkeypatch, 6, _power_cut)
    with pytest.raises(PowerCutError):
        untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert _checkpoints(untrained) == []


@pytest.mark.parametrize(("value", "seconds"), [("", 300), ("0", 0), ("12.5", 12.5), ("off", None)])
def test_an_environment_variable_sets_the_checkpoint_interval(value: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SECONDS_VARIABLE, value)
    assert checkpoint_seconds() == seconds


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "often"])
def test_a_wrong_interval_is_refused_with_the_allowed_values(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SECONDS_VARIABLE, value)
    with pytest.raises(ConfigurationError, match=f"{SECONDS_VARIABLE}={value}: expected a number of seconds"):
        checkpoint_seconds()


@pytest.mark.parametrize("skipped", [0, 1, 5, 9, 12, 30])
@pytest.mark.parametrize("mixing_chunks", [1, 3, 40])
def test_a_stream_started_in_the_middle_gives_the_same_batches(
    small_shards: None, skipped: int, mixing_chunks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = ActivationStore(_write_rows(tmp_path / "a.zarr", torch.randn(150, 4)))
    how: dict[str, Any] = {"seed": 5, "epochs": 2, "mixing_chunks": mixing_chunks}
    expected = list(store.batches("train", 11, **how))[skipped:]
    read: list[int] = []
    stored_chunk = ActivationStore.stored_chunk
    monkeypatch.setattr(ActivationStore, "stored_chunk", lambda self, split, i: (read.append(i), stored_chunk(self, split, i))[1])
    found = list(store.batches("train", 11, skipped_batches=skipped, **how))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in expected]
    rows_left = max(2 * 150 - skipped * 11, 0)
    assert len(read) <= rows_left / CHUNK_ROWS + mixing_chunks + 2


# rows that are written shard by shard

CHUNK_ROWS, SHARD_ROWS = 16, 64


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_writer, "_CHUNKS_PER_SHARD", SHARD_ROWS // CHUNK_ROWS)
    monkeypatch.setattr(activation_writer, "default_chunk_rows", lambda d_in, dtype: CHUNK_ROWS)


def _write_rows(path: Path, rows: torch.Tensor) -> Path:
    with ActivationWriter(path, rows.shape[1], "float32", {"train": len(rows)}, name="rows", with_origin=False) as writer:
        writer.append("train", rows)
    return path


@pytest.fixture
def model(finished_laboratory: Laboratory) -> LanguageModel:
    return load_language_model(describe_language_model(str(finished_laboratory.model)))


@pytest.fixture
def tokens(finished_laboratory: Laboratory) -> TokenStore:
    return open_tokens(finished_laboratory.root / "sources" / NAME / "tokens.zarr")


@contextmanager
def _model_that_fails(model: LanguageModel, at_call: int) -> Iterator[list[int]]:
    calls: list[int] = []

    def forward(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at_call:
            raise PowerCutError

    handle = model.model.get_submodule("gpt_neox.embed_in").register_forward_hook(forward)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("at_call", [2, 5, 20, 30])
def test_caching_resumes_at_the_last_complete_shard_with_the_same_bytes(
    small_shards: None, model: LanguageModel, tokens: TokenStore, at_call: int, tmp_path: Path
):
    def cache(*names: str) -> None:
        outputs = {layer: tmp_path / name / str(layer) for name in names for layer in (0, 2)}
        cache_activations(model, tokens, "resid_post", outputs, "float16", batch_tokens=32, group_tokens=256)

    with _model_that_fails(model, -1) as calls:
        cache("undisturbed")
    with _model_that_fails(model, at_call), pytest.raises(PowerCutError):
        cache("interrupted")
    with _model_that_fails(model, -1) as calls_again:
        cache("interrupted")
    assert _contents(tmp_path / "interrupted") == _contents(tmp_path / "undisturbed")
    rows_of_a_call = TRAIN_ROWS / len(calls)
    again = SHARD_ROWS / rows_of_a_call + 256 / 32 + 5  # a shard, a group, what train lacks of a shard, and what tells the width
    assert len(calls_again) <= len(calls) - at_call + again


def test_a_new_layer_is_cached_together_with_a_resumed_one(small_shards: None, model: LanguageModel, tokens: TokenStore, tmp_path: Path):
    with _model_that_fails(model, 20), pytest.raises(PowerCutError):
        cache_activations(model, tokens, "resid_post", {1: tmp_path / "1"}, "float16", batch_tokens=32, group_tokens=256)
    cache_activations(model, tokens, "resid_post", {1: tmp_path / "1", 2: tmp_path / "2"}, "float16", batch_tokens=32, group_tokens=256)
    cache_activations(model, tokens, "resid_post", {1: tmp_path / "x1", 2: tmp_path / "x2"}, "float16", batch_tokens=32, group_tokens=256)
    for layer in ("1", "2"):
        assert _contents(tmp_path / layer) == _contents(tmp_path / f"x{layer}")


def test_a_run_resumes_the_activations_of_an_interrupted_one(
    small_shards: None, finished: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    whole = finished.artefact("activations")
    shutil.rmtree(whole.path)
    with monkeypatch.context() as patch:
        patch.setattr(ActivationWriter, "close", lambda _: _power_cut())
        with pytest.raises(PowerCutError):
            finished.run(select=["activations"])
    (left,) = whole.path.parent.glob(".activations.zarr.*.partial")
    assert (left / ".progress.json").exists()
    appended: Counter[str] = Counter()
    append = ActivationWriter.append

    def counted(self: ActivationWriter, split: str, rows: torch.Tensor, *origin: torch.Tensor) -> None:
        appended[split] += len(rows)
        append(self, split, rows, *origin)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationWriter, "append", counted)
        finished.run(select=["activations"])
    assert appended == {"train": TRAIN_ROWS % SHARD_ROWS, "test": 200 % SHARD_ROWS}
    assert [path.name for path in whole.path.parent.iterdir()] == ["activations.zarr"]
    rows = [torch.cat(list(ActivationStore(each.artefact("activations").path).chunks("train"))) for each in (finished, finished_laboratory)]
    assert torch.equal(*rows)


def test_partial_writes_of_another_recipe_are_not_resumed(tmp_path: Path):
    store, address = Store(tmp_path), Address("tiny", "source", "activations")
    for version, expected in ((1, []), (1, ["begun"]), (2, [])):
        with (
            pytest.raises(PowerCutError),
            store.write_folder(address, Partition(1), Recipe("activations", version, {}), {}, resumable=True) as folder,
        ):
            assert [path.name for path in folder.iterdir()] == expected
            (folder / "begun").write_text("")
            raise PowerCutError
    with (
        pytest.raises(SaeensError, match="will come again"),
        store.write_folder(address, Partition(1), Recipe("activations", 2, {}), {}, resumable=True),
    ):
        raise SaeensError("it will come again")
    assert not list((tmp_path / "sources/tiny/layer=1").iterdir())


def test_a_residual_resumes_at_the_last_complete_shard(small_shards: None, tmp_path: Path):
    rows = torch.randn(100, 6)
    origin = ActivationStore(_write_rows(tmp_path / "origin", rows))

    def halve(power_cut_at: int) -> ResidualView:
        calls: list[int] = []

        def half(chunk: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == power_cut_at:
                raise PowerCutError
            return chunk / 2

        return ResidualView(origin, [half])

    with pytest.raises(PowerCutError):
        write_residual(tmp_path / "a", halve(6), name="a")
    statistics = write_residual(tmp_path / "a", halve(4), name="a")  # 4 of 7 chunks are there
    assert statistics.mean_norm == write_residual(tmp_path / "b", halve(99), name="b").mean_norm
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


KILLS = 12  # of trainings, and of stores
SERVER = """
import random, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # no thread is running when children are forked
sys.path[:0] = sys.argv[1:3]
import polars, pyarrow.parquet, pytest, zarr  # what the work imports, so that it is not imported for every kill
import saeens_models
import saeens_pipeline.orchestration.assets
from killed_process import count_calls, run_and_kill
from saeens_models.training import load_kernels
import test_resume as t
load_kernels("topk")
chosen = random.Random(3)
laboratory = t.Laboratory(*map(Path, sys.argv[3:6]))

def kill_and_retry(work, finished):
    n_calls, kills, whole, died = count_calls(work), 0, 0, None
    finished()
    while kills < t.KILLS or died != 0:
        died = run_and_kill(work, chosen.randrange(n_calls * 4 // 5))
        assert died in (0, -9), died
        kills += died == -9
        if died == 0:
            whole += 1
            finished()
    print(kills, whole)

with pytest.MonkeyPatch.context() as monkeypatch:
    laboratory.activate(monkeypatch)
    monkeypatch.setenv(t.SECONDS_VARIABLE, "0")
    t.kill_members(laboratory, kill_and_retry)
    t.kill_a_writer(laboratory.root.parent / "rows", monkeypatch, kill_and_retry)
"""
KillAndRetry = Callable[[Callable[[], None], Callable[[], None]], None]


def kill_members(laboratory: Laboratory, kill_and_retry: KillAndRetry) -> None:
    """Train the members of a bag as their op does, in processes that are killed; called in the server."""
    from saeens_pipeline.assets.compute import Compute
    from saeens_pipeline.assets.declarations import RunContext
    from saeens_pipeline.assets.materialise import materialise

    catalogue = laboratory.catalogue
    op = next(op for op in catalogue.ops(catalogue.experiment(NAME)) if op.name.endswith("members"))
    context = RunContext(laboratory.store, Compute(device="cpu"), "run", lambda: [], lambda *_: None)
    folder = laboratory.root / "experiments" / NAME / f"layer={LAYER}" / f"seed={SEED}" / "bagging"
    expected: list[dict[str, bytes]] = []

    def finished() -> None:
        made = {key: _weights(laboratory, key) for key in MEMBERS}
        expected.append(made)
        assert made == expected[0]
        assert _checkpoints(laboratory) == []
        assert sorted(path.name for path in folder.iterdir()) == ["member_1", "member_2", "member_3"]
        shutil.rmtree(folder)

    def train() -> None:
        materialise(op, [each.address for each in op.outputs], WHERE, context)

    kill_and_retry(train, finished)


def kill_a_writer(folder: Path, monkeypatch: pytest.MonkeyPatch, kill_and_retry: KillAndRetry) -> None:
    """Write a store of rows in processes that are killed; called in the server."""
    monkeypatch.setattr(activation_writer, "_CHUNKS_PER_SHARD", 2)
    monkeypatch.setattr(activation_writer, "default_chunk_rows", lambda d_in, dtype: CHUNK_ROWS)
    rows = torch.arange(200 * 3).view(200, 3).float()
    numbers = torch.arange(200, dtype=torch.int32)
    expected: list[dict[str, bytes]] = []

    def write() -> None:
        with ActivationWriter(folder, 3, "float32", {"train": 200}, name="rows", resume=True) as writer:
            for start in range(writer.resumed_rows["train"], 200, 5):
                new = slice(start, start + 5)
                writer.append("train", rows[new], numbers[new], numbers[new])

    def finished() -> None:
        expected.append(_contents(folder))
        assert expected[-1] == expected[0]
        shutil.rmtree(folder)

    kill_and_retry(write, finished)


@pytest.mark.slow
def test_runs_killed_at_random_points_and_retried_write_the_bytes_of_undisturbed_ones(
    finished: Laboratory, finished_laboratory: Laboratory, tmp_path: Path
):
    """SIGKILL at 24 seeded points of the op that trains the members, and of a store that is written; what is left is whole."""
    shutil.rmtree(finished.root / "experiments")
    here = Path(__file__).parent
    arguments = [str(here), str(here.parent / "saeens_models"), str(finished.model), str(finished.folder), str(finished.root)]
    done = subprocess.run([sys.executable, "-c", SERVER, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 2
    assert all(kills >= KILLS and whole >= 1 for kills, whole in counts)


# two at once


def test_a_second_writer_waits_and_reuses_the_artefact_of_the_first(
    untrained: Laboratory, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    key = f"{NAME}/baseline/expanded"
    place = Address(NAME, "baseline", "expanded"), WHERE
    untrained.run(seeds=[SEED], select=["baseline/expanded"])
    made = untrained.store.require(*place)
    aside = made.path.rename(tmp_path / "made")
    waits, events = threading.Event(), []
    handler = logging.Handler()
    handler.emit = lambda record: waits.set()
    logger = logging.getLogger("saeens_pipeline.storage.locks")
    logger.addHandler(handler)
    try:
        second = threading.Thread(target=lambda: events.append(untrained.materialise([key], WHERE)))
        with writing_alone(untrained.root, [place]):
            second.start()
            assert waits.wait(60)
            aside.rename(made.path)
        second.join()
    finally:
        logger.removeHandler(handler)
    assert events[0][key].metadata["cache_hit"].value is True
    assert f"{key}, layer {LAYER}, seed {SEED} is being computed by process {os.getpid()} on" in caplog.text
    assert not list((untrained.root / "locks").iterdir())


@pytest.mark.slow
def test_a_killed_process_holds_no_lock(tmp_path: Path):
    script = """
import os, signal, sys
from pathlib import Path
from saeens_pipeline.storage.locks import writing_alone
from saeens_pipeline.storage.names import Address, Partition
with writing_alone(Path(sys.argv[1]), [(Address("a", "bagging", "member_1"), Partition(1, 1))]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "locks").iterdir())) == 1
    place = Address("a", "bagging", "member_1"), Partition(1, 1)
    with writing_alone(tmp_path, [place]), writing_if_free(tmp_path, *place) as is_free:
        assert not is_free
    with writing_if_free(tmp_path, *place) as is_free:
        assert is_free
    assert not list((tmp_path / "locks").iterdir())


# what is tried again


@pytest.mark.parametrize("error", [ConnectionError("the hub is away"), TimeoutError()])
def test_temporary_errors_of_a_step_are_retried(untrained: Laboratory, error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "DELAY_SECONDS", 0)
    attempts: list[int] = []
    train = training.train_saes

    def fails_twice(*arguments: Any) -> None:
        attempts.append(1)
        if len(attempts) <= 2:
            raise error
        train(*arguments)

    monkeypatch.setattr(training, "train_saes", fails_twice)
    untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert len(attempts) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), r"memory ran out: free some, or set SAEENS_MEMORY_GB"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"memory ran out \(CUDA out of memory\): free"),
        (ConnectionError("the hub is away"), "ConnectionError: the hub is away$"),
    ],
)
def test_an_error_that_stays_is_answered_in_one_line(untrained: Laboratory, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "DELAY_SECONDS", 0)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(training, "train_saes", fails)
    with pytest.raises(SaeensError, match=said) as caught:
        untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [ConfigurationError("k is too large"), NonFiniteLossError("nan"), ValueError("wrong")])
def test_permanent_errors_of_a_step_fail_at_once(untrained: Laboratory, error: Exception, monkeypatch: pytest.MonkeyPatch):
    attempts: list[int] = []

    def fails(*_: Any) -> None:
        attempts.append(1)
        raise error

    monkeypatch.setattr(training, "train_saes", fails)
    with pytest.raises(type(error), match=str(error)):
        untrained.run(seeds=[SEED], select=["baseline/expanded"])
    assert len(attempts) == 1


def test_errors_caused_by_the_hub_are_temporary_unless_they_are_configuration_errors():
    def raised(error: Exception) -> Exception:
        try:
            raise error from TimeoutError("hub")
        except Exception as chained:
            return chained

    assert retries.can_pass(raised(SaeensError("the model cannot be read")))
    assert not retries.can_pass(SaeensError("evaluation_memory_gb is too little"))
    assert not retries.can_pass(raised(ConfigurationError("there is no such model")))


def test_killed_steps_with_their_own_process_are_retried(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    def policies() -> set[dg.RetryPolicy | None]:
        assets = (each for each in empty.catalogue.definitions().assets or () if isinstance(each, dg.AssetsDefinition))
        return {each.op.retry_policy for each in assets if each.is_materializable}

    assert policies() == {None}
    monkeypatch.setenv("SAEENS_EXECUTOR", "multiprocess")
    (policy,) = policies()
    assert policy is not None
    assert policy.max_retries == 2
    with pytest.raises(dg.Failure, match="ValueError: wrong") as failed, retries.retried(0, policy):
        raise ValueError("wrong")
    assert failed.value.allow_retries is False


# What the processes of steps load: the laboratory, a kill in the middle of the first training, and a job that has a name.
LOCATION = """\
import os, signal
from pathlib import Path
import dagster as dg
from saeens_pipeline import defs as files
from saeens_pipeline.orchestration import retries
from saeens_pipeline.storage.activations import ActivationReader

os.environ.update({environment!r})  # the server that steps are forked from may be older than this test
files.__path__ = [{folder!r}]
retries.DELAY_SECONDS = 0
batches, killed = ActivationReader.batches, Path(__file__).with_name("killed")

def kill_once(self, *arguments, **options):
    for number, batch in enumerate(batches(self, *arguments, **options)):
        if number == 6 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

ActivationReader.batches = kill_once
from saeens_pipeline.orchestration.catalogue import Catalogue

def training():
    job = dg.define_asset_job("training", [dg.AssetKey({key!r})])
    return dg.Definitions.merge(Catalogue.load().definitions(), dg.Definitions(jobs=[job])).resolve_job_def("training")
"""


@pytest.mark.slow
def test_a_killed_step_is_retried_and_resumes(
    untrained: Laboratory, finished_laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environment = {"SAEENS_DATA": str(untrained.root), "SAEENS_EXECUTOR": "multiprocess", SECONDS_VARIABLE: "0"}
    location = LOCATION.format(folder=str(untrained.folder), key=[NAME, "baseline", "expanded"], environment=environment)
    (tmp_path / "killed_training.py").write_text(location)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # not first: Dagster drops what is
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    batches = ActivationReader.batches
    monkeypatch.setattr(ActivationReader, "batches", batches)  # the module changes both in this process, too
    monkeypatch.setattr(retries, "DELAY_SECONDS", retries.DELAY_SECONDS)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        register_layers(instance, NAME, [LAYER])
        job = dg.reconstructable(importlib.import_module("killed_training").training)
        monkeypatch.setattr(ActivationReader, "batches", batches)
        partition = {"dagster/partition": f"{LAYER}|{SEED}", "dagster/partition/layer": str(LAYER), "dagster/partition/seed": str(SEED)}
        with dg.execute_job(job, instance, tags=partition) as result:
            assert result.success
            retried = [event for event in result.all_events if event.event_type_value == "STEP_UP_FOR_RETRY"]
    assert len(retried) == 1
    assert (tmp_path / "killed").exists()
    assert _weights(untrained, "baseline/expanded") == _weights(finished_laboratory, "baseline/expanded")
    assert untrained.artefact("baseline/expanded", SEED).provenance["resumed_at_tokens"] == [6 * BATCH_TOKENS]
