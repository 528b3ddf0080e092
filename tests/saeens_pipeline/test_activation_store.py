"""The activation store: rows are read as written, in order or shuffled, stored or computed while reading."""

from __future__ import annotations

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.activation_writer import ActivationWriter, default_chunk_rows, stored_bytes
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore, StoredDtype
from saeens_pipeline.storage.residuals import ResidualView, write_residual

D_IN = 6
DTYPES: tuple[StoredDtype, ...] = ("float16", "bfloat16", "float32")


def _rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def _write(path: Path, rows: torch.Tensor, dtype: StoredDtype = "float32", batch: int = 7, chunk_rows: int = 4) -> ActivationStore:
    with ActivationWriter(path, D_IN, dtype, {"train": len(rows), "test": 2}, name="layer 1", chunk_rows=chunk_rows) as writer:
        for start in range(0, len(rows), batch):
            numbers = torch.arange(start, min(start + batch, len(rows)))
            writer.append("train", rows[start : start + batch], document=numbers // 3, position=numbers % 3)
        writer.append("test", torch.zeros(2, D_IN), document=torch.zeros(2), position=torch.arange(2))
    return ActivationStore(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 4, 64, 150])  # less than a chunk, one chunk, one shard, two shards and a bit
def test_rows_are_read_in_order_and_rounded_to_the_dtype(tmp_path, dtype, n_rows):
    rows = _rows(n_rows)
    store = _write(tmp_path / "a.zarr", rows, dtype)
    chunks = list(store.chunks("train"))
    assert all(chunk.dtype == torch.float32 for chunk in chunks)
    assert [len(chunk) for chunk in chunks] == [4] * (n_rows // 4) + [n_rows % 4] * (n_rows % 4 > 0)
    assert torch.equal(torch.cat(chunks), rows.to(getattr(torch, dtype)).float())
    assert (store.n_rows("train"), store.n_rows("test"), store.d_in, store.dtype) == (n_rows, 2, D_IN, dtype)


def test_the_document_and_position_of_every_row_are_stored(tmp_path):
    store = _write(tmp_path / "a.zarr", _rows(150))
    assert np.array_equal(store.document("train"), np.arange(150) // 3)
    assert np.array_equal(store.position("train"), np.arange(150) % 3)


def test_layout_is_plain_zarr_with_uncompressed_chunks_in_shards(tmp_path):
    rows = _rows(150)
    _write(tmp_path / "a.zarr", rows, "float16")
    array = zarr.open_array(tmp_path / "a.zarr" / "train" / "activations", mode="r")
    assert (array.metadata.zarr_format, array.shape, array.chunks, array.shards) == (3, (150, D_IN), (4, D_IN), (64, D_IN))
    assert (array.compressors, array.filters) == ((), ())
    assert np.array_equal(np.asarray(array[:]), rows.half().numpy())
    shard = (tmp_path / "a.zarr" / "train" / "activations" / "c" / "0" / "0").read_bytes()
    assert shard.startswith(rows[:64].half().numpy().tobytes())


def test_bfloat16_is_stored_as_its_bits(tmp_path):
    rows = _rows(5)
    _write(tmp_path / "a.zarr", rows, "bfloat16")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert group.attrs["dtype"] == "bfloat16"
    bits = np.asarray(zarr.open_array(tmp_path / "a.zarr" / "train" / "activations", mode="r")[:])
    assert np.array_equal((bits.astype(np.uint32) << 16).view(np.float32), rows.bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_stored_rows(tmp_path, dtype):
    rows = _rows(150)
    found = _write(tmp_path / "a.zarr", rows, dtype).statistics("train")
    stored = rows.to(getattr(torch, dtype)).double().numpy()
    assert found.rows == 150
    np.testing.assert_allclose(found.mean, stored.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, stored.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(stored, axis=1).mean(), rtol=1e-12)


def test_statistics_do_not_depend_on_how_rows_were_appended(tmp_path):
    one, other = (_write(tmp_path / f"{batch}.zarr", _rows(150), batch=batch).statistics("train") for batch in (1, 150))
    assert one.to_json() == other.to_json()


def test_statistics_keep_their_precision_far_from_zero(tmp_path):
    rows = _rows(150) + 1e4
    found = _write(tmp_path / "a.zarr", rows).statistics("train")
    np.testing.assert_allclose(found.variance, rows.double().numpy().var(axis=0), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    n_rows=st.integers(1, 60),
    batch_tokens=st.integers(1, 70),
    how=st.fixed_dictionaries({"mixing_chunks": st.integers(1, 20), "epochs": st.integers(1, 3), "seed": st.integers(0, 2**40)}),
)
def test_batches_hold_every_row_once_per_epoch(n_rows, batch_tokens, how):
    rows = torch.arange(n_rows).float()[:, None].expand(-1, D_IN)
    with tempfile.TemporaryDirectory() as folder:
        batches = list(_write(Path(folder) / "a.zarr", rows).batches("train", batch_tokens, **how))
    assert all(batch.dtype == torch.float32 and len(batch) == batch_tokens for batch in batches[:-1])
    assert 0 < len(batches[-1]) <= batch_tokens
    order = torch.cat(batches)[:, 0].long()
    for epoch in order.view(how["epochs"], n_rows):
        assert torch.equal(epoch.sort().values, torch.arange(n_rows))


def _order(store: ActivationReader, **how) -> list[float]:
    return torch.cat(list(store.batches("train", 10, **how)))[:, 0].tolist()


def test_order_is_reproducible_and_differs_by_seed_and_epoch(tmp_path):
    store = _write(tmp_path / "a.zarr", _rows(150))
    first = _order(store, seed=1, epochs=2)
    assert first == _order(store, seed=1, epochs=2)
    assert first[:150] == _order(store, seed=1)
    assert first[:150] != first[150:]
    assert first[:150] != _order(store, seed=2)


def test_order_does_not_depend_on_the_batch_size(tmp_path):
    store = _write(tmp_path / "a.zarr", _rows(150))
    one, other = (torch.cat(list(store.batches("train", size, seed=3, mixing_chunks=5))) for size in (7, 64))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_as_stored_hold_the_same_numbers_in_the_stored_dtype(tmp_path, dtype):
    store = _write(tmp_path / "a.zarr", _rows(150), dtype)
    stored = list(store.batches("train", 11, seed=5, as_stored=True))
    assert {batch.dtype for batch in stored} == {getattr(torch, dtype)}
    assert torch.equal(torch.cat(stored).float(), torch.cat(list(store.batches("train", 11, seed=5))))


def test_rows_of_distant_chunks_are_mixed(tmp_path):
    rows = torch.arange(400).float()[:, None].expand(-1, D_IN)
    first_batch = next(_write(tmp_path / "a.zarr", rows).batches("train", 40, seed=0, mixing_chunks=50))
    assert len({int(row) // 4 for row in first_batch[:, 0]}) > 20  # of the 50 chunks of 4 rows that are mixed; 10 if they were not


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_batches_do_not_depend_on_the_chunk_layout(tmp_path, dtype):
    plain, other = (_write(tmp_path / name, _rows(150), dtype) for name in ("plain.zarr", "other.zarr"))
    train = zarr.open_group(other.path / "train", mode="a")
    bits = np.asarray(zarr.open_array(other.path / "train" / "activations", mode="r")[:])
    train.create_array("activations", data=bits, chunks=(4, D_IN), shards=(64, D_IN), compressors=ZstdCodec(), overwrite=True)
    other = ActivationStore(other.path)
    assert torch.equal(torch.cat(list(other.chunks("train"))), torch.cat(list(plain.chunks("train"))))
    for one, another in zip(plain.batches("train", 11, seed=5), other.batches("train", 11, seed=5), strict=True):
        assert torch.equal(one, another)


def test_splits_may_be_chunked_differently(tmp_path):
    rows = _rows(150)
    store = _write(tmp_path / "a.zarr", rows)
    other = zarr.open_group(store.path / "test", mode="a")
    other.create_array("activations", data=rows.numpy(), chunks=(6, D_IN), shards=(12, D_IN), compressors=None, overwrite=True)
    store = ActivationStore(store.path)
    assert torch.equal(torch.cat(list(store.chunks("test"))), rows)
    assert torch.equal(torch.cat(list(store.chunks("train"))), rows)


def test_a_truncated_shard_stops_the_batches_with_an_error_that_names_it(tmp_path):
    store = _write(tmp_path / "a.zarr", _rows(150))
    shard = store.path / "train" / "activations" / "c" / "1" / "0"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SaeensError, match="truncated or damaged") as error:
        list(store.batches("train", 10, seed=0))
    assert str(shard) in str(error.value)


def test_float16_overflow_names_the_layer_its_largest_value_and_bfloat16(tmp_path):
    rows = _rows(5)
    rows[3, 2] = -70_000.0
    with pytest.raises(SaeensError, match=r"layer 1 has values up to 70,000, and float16 ends at 65,504: set dtype: bfloat16"):
        _write(tmp_path / "a.zarr", rows, "float16")
    assert _write(tmp_path / "b.zarr", rows, "bfloat16").statistics("train").rows == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    rows = _rows(5)
    rows[0, 0] = bad
    with pytest.raises(SaeensError, match="layer 1 has values that are NaN or infinite"):
        _write(tmp_path / "a.zarr", rows)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10_000, 9_000, 1_000))
    with pytest.raises(SaeensError, match=r"layer 1 needs 3,200 bytes in .*a\.zarr, where 1,000 bytes are free") as error:
        _write(tmp_path / "a.zarr", _rows(98))  # 100 rows of 6 x 4 bytes, and 8 for document and position
    assert "SAEENS_DATA" in str(error.value)
    assert not (tmp_path / "a.zarr").exists()


def test_a_store_is_no_larger_than_its_forecast(tmp_path):
    _write(tmp_path / "a.zarr", _rows(1000), "float16", batch=100)
    arrays = [file for file in (tmp_path / "a.zarr").rglob("*") if file.is_file() and file.name != "zarr.json"]
    index_bytes = 16 * 16 + 4  # per shard, of which the tiny chunks here need many
    assert (
        sum(file.stat().st_size for file in arrays) <= stored_bytes(D_IN, "float16", {"train": 1000, "test": 2}) + 17 * index_bytes + 4 * 12
    )


@pytest.mark.parametrize(("announced", "message"), [(6, "expected 6 rows, got 5"), (4, "expected 4 rows, got 5")])
def test_a_wrong_number_of_rows_is_refused(tmp_path, announced, message):
    with (
        pytest.raises(SaeensError, match=f"layer 1, train split: {message}"),
        ActivationWriter(tmp_path / "a.zarr", D_IN, "float32", {"train": announced}, name="layer 1", with_origin=False) as writer,
    ):
        writer.append("train", _rows(5))


def test_an_unfinished_store_cannot_be_opened(tmp_path):
    writer = ActivationWriter(tmp_path / "a.zarr", D_IN, "float32", {"train": 5}, name="layer 1", with_origin=False)
    writer.append("train", _rows(5))
    with pytest.raises(SaeensError, match="only a part"):
        ActivationStore(tmp_path / "a.zarr")
    with pytest.raises(SaeensError, match="holds no activations"):
        ActivationStore(tmp_path / "nothing.zarr")


def test_a_missing_split_is_refused_with_the_available_ones(tmp_path):
    with pytest.raises(SaeensError, match=r"has no dev/activations; it has .*train/activations"):
        _write(tmp_path / "a.zarr", _rows(5)).n_rows("dev")


@pytest.mark.parametrize(
    ("d_in", "dtype", "rows"), [(192, "float16", 4096), (192, "float32", 2048), (2304, "bfloat16", 256), (2**22, "float32", 1)]
)
def test_chunks_are_one_to_two_mebibytes(d_in, dtype, rows):
    assert default_chunk_rows(d_in, dtype) == rows


def _round(seed: int):
    weight = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(seed)) / D_IN
    return lambda r: r - torch.relu(r @ weight) @ weight.T


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_computed_while_reading_has_the_bits_of_the_stored_one(tmp_path, dtype):
    origin = _write(tmp_path / "a.zarr", _rows(150), dtype)
    rounds = [_round(1), _round(2), _round(3)]
    stored: ActivationReader = origin
    for number, apply_round in enumerate(rounds, start=1):
        path = tmp_path / f"residual_{number}.zarr"
        write_residual(path, ResidualView(stored, [apply_round]), name=f"residual_{number}")
        stored = ActivationStore(path)
    view = ResidualView(origin, rounds)
    assert torch.equal(torch.cat(list(view.chunks("train"))), torch.cat(list(stored.chunks("train"))))
    how: dict[str, Any] = {"seed": 5, "epochs": 2, "mixing_chunks": 3}
    for computed, read in zip(view.batches("train", 11, **how), stored.batches("train", 11, **how), strict=True):
        assert torch.equal(computed, read)
    assert view.statistics("train").to_json() == stored.statistics("train").to_json()
    from_second = ResidualView(ActivationStore(tmp_path / "residual_2.zarr"), rounds[2:])
    assert torch.equal(torch.cat(list(from_second.chunks("train"))), torch.cat(list(stored.chunks("train"))))


def test_residual_is_rounded_after_every_round(tmp_path):
    rows = _rows(4)
    view = ResidualView(_write(tmp_path / "a.zarr", rows, "bfloat16"), [lambda r: r / 3, lambda r: r * 3])
    expected = ((rows.bfloat16().float() / 3).bfloat16().float() * 3).bfloat16().float()
    assert torch.equal(next(view.chunks("train")), expected)
    assert not torch.equal(expected, rows.bfloat16().float())


def test_overflowing_residual_names_the_round(tmp_path):
    view = ResidualView(_write(tmp_path / "a.zarr", _rows(4), "float16"), [lambda r: r, lambda r: r * 1e6], name="residual_2")
    with pytest.raises(SaeensError, match="residual_2, round 2 of 2 on the fly, has values up to"):
        next(view.chunks("train"))
