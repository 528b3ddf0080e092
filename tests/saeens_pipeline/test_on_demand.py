"""`keep_activations: test`: training rows that are computed when they are read have the bits of stored ones, and so has what they train."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory
from tiny_models import ListedCorpus, write_tiny_model

import saeens_models as sm
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import on_demand
from saeens_pipeline.language_models.caching import cache_activations
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.on_demand import ActivationsOnDemand
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens, write_tokens
from saeens_pipeline.orchestration.metadata import describe_artefact
from saeens_pipeline.storage import activation_writer, rolling_cache
from saeens_pipeline.storage.activations import ActivationStore, _contiguous_blocks
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.rolling_cache import RollingCache, activation_cache_bytes
from saeens_pipeline.storage.selection import SelectedDocuments
from saeens_pipeline.storage.tables import read_table

HOOK, TEXTS = "resid_post", [f"def encode_{i}(self, x):\n    return self.act(x * {i * 37})" + " # words" * (i % 4) for i in range(12)]
GROUP_TOKENS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(describe_language_model(str(write_tiny_model(tmp_path_factory.mktemp("models") / "model"))))


@pytest.fixture(scope="module")
def tokens(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    path = tmp_path_factory.mktemp("tokens") / "tokens.zarr"
    write_tokens(path, ListedCorpus(TEXTS, TEXTS[:2]), model.description, context_length=16, packing="document", drop=["first"],
        train_tokens=300, test_tokens=20)  # fmt: skip
    return open_tokens(path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of some rows, and groups of a few windows: neither ends where the other does."""
    monkeypatch.setattr(activation_writer, "_MAX_CHUNK_BYTES", 1024)
    monkeypatch.setattr(cache_activations, "__kwdefaults__", {**(cache_activations.__kwdefaults__ or {}), "group_tokens": GROUP_TOKENS})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("max_norm", [None, 1.02])
def test_rows_on_demand_have_the_bits_of_stored_rows(model, tokens, tmp_path, dtype, max_norm):
    stores: dict[str, list[Split]] = {"stored": [], "on_demand": ["train"]}
    for name, without_bytes in stores.items():
        outputs = {1: tmp_path / name, 2: tmp_path / f"{name}_2"}
        cache_activations(model, tokens, HOOK, outputs, dtype, max_norm=max_norm, without_bytes=without_bytes)
    stored = ActivationStore(tmp_path / "stored")
    assert stored.n_chunks("train") > 3
    assert len(ActivationStore(tmp_path / "on_demand").groups("train")) > 3
    assert not (tmp_path / "on_demand" / "train" / "activations").exists()
    for most_bytes in (0, 2000, 1e9):
        cache = RollingCache(tmp_path / "cache" / "rows", most_bytes)
        opened = ActivationsOnDemand(tmp_path / "on_demand", tokens, model, (HOOK, 1), cache)
        assert (opened.n_rows("train"), opened.d_in, opened.chunk_rows) == (stored.n_rows("train"), stored.d_in, stored.chunk_rows)
        assert opened.dropped("train").tolist() == stored.dropped("train").tolist()
        assert vars(opened.statistics("train")).keys() == vars(stored.statistics("train")).keys()
        assert opened.statistics("train").mean.tolist() == stored.statistics("train").mean.tolist()
        for index in [*range(stored.n_chunks("train")), 1, 0]:
            assert torch.equal(opened.read_chunk("train", index), stored.read_chunk("train", index))
        assert torch.equal(opened.read_chunk("test", 0), stored.read_chunk("test", 0))
        assert torch.equal(_rows(opened, 0), _rows(stored, 0))
        assert torch.equal(_rows(opened, 3), _rows(stored, 3))  # as a resumed training reads
        documents = np.unique(stored.document("train"))[1::3]
        selected = [torch.cat([*SelectedDocuments(reader, "train", documents).chunks("train")]) for reader in (opened, stored)]
        assert torch.equal(*selected)
    assert max_norm is None or len(stored.dropped("train"))


def _rows(reader: ActivationStore, skipped_batches: int) -> torch.Tensor:
    return torch.cat([*reader.batches("train", 32, seed=1, epochs=2, mixing_chunks=4, contiguous=True, skipped_batches=skipped_batches)])


@pytest.mark.usefixtures("small_chunks")
def test_reading_in_storage_order_computes_each_group_once_and_a_large_cache_none_again(model, tokens, tmp_path, monkeypatch):
    cache_activations(model, tokens, HOOK, {1: tmp_path / "a"}, "float16", without_bytes=["train"])
    passes: list[int] = []
    compute = on_demand.kept_activations
    monkeypatch.setattr(on_demand, "kept_activations", lambda *given: passes.append(1) or compute(*given))
    cache = RollingCache(tmp_path / "cache" / "rows", 1e9)
    opened = ActivationsOnDemand(tmp_path / "a", tokens, model, (HOOK, 1), cache)
    for _ in opened.chunks("train"):
        pass
    assert len(passes) == len(opened.groups("train"))
    again = ActivationsOnDemand(tmp_path / "a", tokens, model, (HOOK, 1), cache)
    for _ in again.chunks("train"):
        pass
    assert len(passes) == len(opened.groups("train"))


@given(n_chunks=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_contiguous_blocks_have_every_chunk_once_and_follow_each_other_inside(n_chunks: int, size: int, seed: int):
    blocks = _contiguous_blocks(n_chunks, size, np.random.default_rng(seed))
    assert sorted(itertools.chain(*blocks)) == list(range(n_chunks))
    for block in blocks:
        assert block == list(range(block[0], block[0] + len(block)))
        assert 1 <= len(block) <= size


def test_blocks_differ_between_epochs_in_order_and_ends():
    first, second = (_contiguous_blocks(40, 7, np.random.default_rng([3, epoch])) for epoch in range(2))
    assert [block[0] for block in first] != [block[0] for block in second]
    assert sorted(block[0] for block in first) != sorted(block[0] for block in second)


def test_the_cache_keeps_what_fits_and_makes_room_from_other_folders_the_oldest_first(tmp_path):
    old, new = RollingCache(tmp_path / "old", 1000), RollingCache(tmp_path / "new", 1000)
    made: list[str] = []

    def get(cache: RollingCache, name: str, size: int) -> bytes:
        def compute() -> np.ndarray:
            made.append(name)
            return np.frombuffer(name.encode() * size, np.uint8)

        return cache.get(name, compute).tobytes()

    for name in "abc":
        assert get(old, name, 150) == name.encode() * 150
    assert get(old, "a", 150) == b"a" * 150
    assert made == ["a", "b", "c"]
    assert get(old, "d", 900) == b"d" * 900  # computed, and not kept: there is no room
    assert sorted(file.stem for file in (tmp_path / "old").iterdir()) == ["a", "b", "c"]
    assert get(new, "e", 300) == b"e" * 300
    assert "e" in {file.stem for file in (tmp_path / "new").iterdir()}
    kept = {file.stem for file in (tmp_path / "old").iterdir()}
    assert "b" not in kept  # the one that was not read for longest
    (tmp_path / "new" / "e.npy").unlink()  # by another process
    assert get(new, "e", 300) == b"e" * 300
    assert made == ["a", "b", "c", "d", "e", "e"]


def test_a_damaged_file_is_computed_again_and_a_full_disk_keeps_nothing(tmp_path, monkeypatch):
    cache, values = RollingCache(tmp_path / "rows", 10_000), np.arange(20)
    cache.get("a", lambda: values)
    (tmp_path / "rows" / "a.npy").write_bytes((tmp_path / "rows" / "a.npy").read_bytes()[:-9])
    assert cache.get("a", lambda: values).tolist() == values.tolist()
    assert cache.get("a", lambda: pytest.fail("it was written again")).tolist() == values.tolist()

    def full(path: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rolling_cache, "flush", full)
    assert cache.get("b", lambda: values).tolist() == values.tolist()
    assert [file.name for file in (tmp_path / "rows").iterdir()] == ["a.npy"]


@pytest.mark.parametrize("value", ["much", "-1", "inf"])
def test_a_wrong_size_of_the_cache_is_refused(value, monkeypatch):
    monkeypatch.setenv("SAEENS_ACTIVATION_CACHE_GB", value)
    with pytest.raises(ConfigurationError, match=f"SAEENS_ACTIVATION_CACHE_GB={value}: expected a number of GB, 0 or more"):
        activation_cache_bytes()


# an experiment


def _declare(laboratory: Laboratory, keep: str, **experiment: Any) -> None:
    laboratory.declare(
        {"keep_activations": keep, "max_norm": 4.0},
        mixing="contiguous", keep_residuals="none", baselines=["expanded", "compute_matched"], evaluations=["reconstruction", "stability"],
        **experiment,
    )  # fmt: skip


def _weights(laboratory: Laboratory) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    names = [f"bagging/member_{j}" for j in range(1, MEMBERS + 1)] + [f"boosting/round_{j}" for j in range(1, MEMBERS + 1)]
    for name, seed in itertools.product([*names, "baseline/expanded", "baseline/compute_matched"], SEEDS):
        yield f"{name} {seed}", sm.load_sae(laboratory.artefact(name, seed).path).state_dict()


@pytest.mark.usefixtures("small_chunks")
def test_an_experiment_on_demand_has_the_weights_and_tables_of_one_on_stored_activations(empty: Laboratory, monkeypatch):
    monkeypatch.setenv("SAEENS_ACTIVATION_CACHE_GB", "1e-5")  # a part of the groups
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    tables: dict[str, Sequence[Any]] = {}
    computed: list[str] = []  # whether a group was computed while rows were read
    compute = on_demand.kept_activations
    monkeypatch.setattr(on_demand, "kept_activations", lambda *given: computed.append(keep) or compute(*given))
    for keep in ("all", "test"):
        monkeypatch.setenv("SAEENS_DATA", str(empty.root / keep))
        laboratory = Laboratory(empty.model, empty.folder, empty.root / keep)
        _declare(laboratory, keep)
        laboratory.run()
        found[keep] = dict(_weights(laboratory))
        tables[keep] = [
            read_table(laboratory.root, NAME, name, LAYER).drop("sae_data_versions") for name in ("reconstruction", "stability")
        ]
        (shards,) = {(laboratory.artefact("activations").path / "train" / "activations").exists()}
        assert shards == (keep == "all")
        artefact = laboratory.artefact("activations")
        metadata = describe_artefact(
            laboratory.store, laboratory.declarations()[f"{NAME}/activations"], Partition(LAYER), artefact, is_hit=True
        )
        assert ("training rows" in metadata) == (keep == "test")
    assert list(found["all"]) == list(found["test"])
    for name, weights in found["all"].items():
        assert weights.keys() == found["test"][name].keys()
        assert all(torch.equal(values, found["test"][name][each]) for each, values in weights.items()), name
    for stored, on_demand_ in zip(tables["all"], tables["test"], strict=True):
        assert stored.equals(on_demand_)
    cached = len(list((empty.root / "test" / "activation_cache").rglob("*.npy")))
    passes = (1 + 1 + MEMBERS + 2 * (MEMBERS - 1)) * len(SEEDS)  # as `saeens plan` counts them
    n_groups = len(ActivationStore(laboratory.artefact("activations").path).groups("train"))
    assert 0 < cached < n_groups
    assert set(computed) == {"test"}
    in_full = (len(computed) - cached) / (n_groups - cached)  # without the ends of blocks and the sample of chance levels
    assert passes <= in_full <= 1.4 * passes
    assert "nothing to do" in Laboratory(empty.model, empty.folder, empty.root / "test").run()


def test_scattered_rows_of_activations_on_demand_are_refused_with_the_line(empty: Laboratory):
    file = empty.declare({"keep_activations": "test"})
    with pytest.raises(ConfigurationError, match=r"mixing: .*keep_activations: test.*write mixing: contiguous") as refused:
        empty.catalogue.experiment(NAME)
    assert str(file) in str(refused.value)


@pytest.mark.usefixtures("small_chunks")
def test_a_changed_language_model_is_an_error_before_training(empty: Laboratory):
    _declare(empty, "test")
    empty.run(select=["activations"])
    weights = empty.model / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\0")
        declared = empty.declarations()[f"{NAME}/bagging/member_1"]
        from saeens_pipeline.assets.readers import open_activations

        with pytest.raises(SaeensError, match="have changed since"):
            open_activations(empty.store, declared.inputs[0].artefact, Partition(LAYER))
    finally:
        weights.write_bytes(kept)
