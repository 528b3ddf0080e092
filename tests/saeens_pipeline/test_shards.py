"""Memory-mapped shards: equal to the bytes that zarr-python reads, or left to zarr-python, or an error that names the damaged file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore, ZipStore

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.shards import MappedShards, map_shards


def _create(
    store: Any,
    shape: tuple[int, int] = (20, 3),
    chunk_rows: int = 2,
    chunks_per_shard: int = 4,
    *,
    dtype: str = "float32",
    index_at: str = "end",
    checksum: bool = True,
    **other: Any,
) -> zarr.Array:
    sharding = ShardingCodec(
        chunk_shape=(chunk_rows, shape[1]),
        codecs=[BytesCodec()],
        index_codecs=[BytesCodec(), Crc32cCodec()] if checksum else [BytesCodec()],
        index_location=index_at,
    )
    layout = {"chunks": (chunk_rows * chunks_per_shard, shape[1]), "serializer": sharding, "compressors": None, "filters": None}
    return zarr.create_array(store, shape=shape, dtype=dtype, **(layout | other))


def _random_bytes(array: zarr.Array, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8).view(array.dtype).reshape(array.shape)


def _fill(array: zarr.Array) -> np.ndarray:
    values = _random_bytes(array)
    array[:] = values
    return values


def _mapped(array: zarr.Array) -> MappedShards:
    shards = map_shards(array)
    assert shards is not None
    return shards


def _file(array: zarr.Array, shard: int = 0) -> Path:
    assert isinstance(array.store, LocalStore)
    return array.store.root / array.path / "c" / str(shard) / "0"


def _assert_same_bytes(array: zarr.Array) -> None:
    shards, rows = _mapped(array), array.chunks[0]
    for index in range(-(-array.shape[0] // rows)):
        expected, found = np.asarray(array[index * rows : (index + 1) * rows]), shards.chunk(index)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()  # NaNs with their bits


LAYOUTS = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 40), st.integers(1, 5)),
        "chunk_rows": st.integers(1, 8),
        "chunks_per_shard": st.integers(1, 5),
        "index_at": st.sampled_from(["start", "end"]),
        "checksum": st.booleans(),
    }
)
DTYPES = {"float16": [0, 1.5, np.nan, -np.inf], "float32": [0, 1.5, np.nan, -np.inf], "uint16": [0, 7]}  # uint16: bits of bfloat16
KINDS = st.sampled_from([{"dtype": dtype, "fill_value": value} for dtype, values in DTYPES.items() for value in values])
SMALL = {"shape": (7, 3), "chunk_rows": 2, "chunks_per_shard": 2, "index_at": "end", "checksum": True}


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS, kind=KINDS, missing=st.sets(st.integers(0, 39)), seed=st.integers(0, 2**32 - 1))
@example(layout=SMALL, kind={"dtype": "float16", "fill_value": 1.5}, missing={0}, seed=0)  # one row in the last chunk
@example(layout=SMALL, kind={"dtype": "float16", "fill_value": 1.5}, missing={2, 3}, seed=0)  # a shard without a file
def test_chunks_have_the_bytes_that_zarr_reads(layout, kind, missing, seed):
    with tempfile.TemporaryDirectory() as folder:
        array = _create(LocalStore(folder), **layout, **kind)
        values, rows = _random_bytes(array, seed), layout["chunk_rows"]
        for index in range(-(-array.shape[0] // rows)):
            if index not in missing:
                array[index * rows : (index + 1) * rows] = values[index * rows : (index + 1) * rows]
        _assert_same_bytes(array)


def test_chunks_that_were_never_written_and_shards_without_a_file_have_the_fill_value(tmp_path):
    array = _create(tmp_path, fill_value=2.5)
    array[2:6] = 1.0
    assert not _file(array, 1).exists()
    shards = _mapped(array)
    assert [float(shards.chunk(index).mean()) for index in range(10)] == [2.5, 1.0, 1.0] + [2.5] * 7


def test_chunks_can_be_at_any_offset_of_a_shard_and_in_any_order(tmp_path):
    array = _create(tmp_path, (4, 3), checksum=False, chunks_per_shard=2)
    values = np.arange(12, dtype="<f4").reshape(4, 3)
    index = np.array([[24 + 5, 24], [1, 24]], dtype="<u8")  # the second chunk first, neither at a multiple of four bytes
    _file(array).parent.mkdir(parents=True)
    _file(array).write_bytes(b"\0" + values[2:].tobytes() + b"\0" * 4 + values[:2].tobytes() + index.tobytes())
    assert np.array_equal(np.asarray(array[:]), values)
    _assert_same_bytes(array)


def test_writing_to_a_returned_chunk_does_not_change_the_file(tmp_path):
    array = _create(tmp_path)
    values = _fill(array)
    _mapped(array).chunk(0)[:] = 0
    assert np.asarray(array[:]).tobytes() == values.tobytes()


def test_more_shards_than_stay_open_can_be_read_repeatedly(tmp_path):
    array = _create(tmp_path, (40, 3), chunk_rows=1, chunks_per_shard=1)
    values, shards = _fill(array), _mapped(array)
    held = [shards.chunk(index) for index in [*range(40), *range(40)]]
    assert np.concatenate(held).tobytes() == values.tobytes() * 2


def test_a_missing_chunk_is_an_error(tmp_path):
    shards = _mapped(_create(tmp_path))
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"has 10 chunks: there is no chunk {index}"):
            shards.chunk(index)


@pytest.mark.parametrize("index_at", ["start", "end"])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_shard_truncated_at_any_point_is_an_error_that_names_it(tmp_path, index_at, checksum):
    array = _create(tmp_path, (8, 2), index_at=index_at, checksum=checksum)
    array[:] = np.arange(16).reshape(8, 2)
    whole = _file(array).read_bytes()
    for size in range(len(whole)):
        _file(array).write_bytes(whole[:size])
        for index in range(4):
            with pytest.raises(SaeensError, match="truncated or damaged") as error:
                _mapped(array).chunk(index)
            assert str(_file(array)) in str(error.value)
            assert "`saeens run` computes it again" in str(error.value)


def test_a_shard_truncated_while_it_is_open_is_an_error(tmp_path):
    array = _create(tmp_path)
    _fill(array)
    shards = _mapped(array)
    shards.chunk(0)
    with _file(array).open("r+b") as shard:
        shard.truncate(10)
    with pytest.raises(SaeensError, match="cut to 10 bytes while it was read"):
        shards.chunk(1)


@pytest.mark.parametrize("byte", [0, 8, 40, 64])  # an offset, a length, another chunk's length, the checksum itself
def test_a_changed_index_is_an_error(tmp_path, byte):
    array = _create(tmp_path, index_at="start")
    _fill(array)
    content = bytearray(_file(array).read_bytes())
    content[byte] ^= 1
    _file(array).write_bytes(content)
    with pytest.raises(SaeensError, match="the checksum of its index is wrong"):
        _mapped(array).chunk(0)


OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed chunks": {"serializer": ShardingCodec(chunk_shape=(2, 3), codecs=[BytesCodec(), ZstdCodec()])},
    "compressed shards": {"compressors": [GzipCodec()]},
    "big-endian": {"serializer": ShardingCodec(chunk_shape=(2, 3), codecs=[BytesCodec(endian="big")])},
    "a big-endian index": {"serializer": ShardingCodec(chunk_shape=(2, 3), index_codecs=[BytesCodec(endian="big"), Crc32cCodec()])},
    "chunks with a checksum": {"serializer": ShardingCodec(chunk_shape=(2, 3), codecs=[BytesCodec(), Crc32cCodec()])},
    "transposed chunks": {"serializer": ShardingCodec(chunk_shape=(2, 3), codecs=[TransposeCodec(order=(1, 0)), BytesCodec()])},
    "chunks of some columns": {"serializer": ShardingCodec(chunk_shape=(2, 1)), "chunks": (8, 3)},
    "chunks wider than the rows": {"serializer": ShardingCodec(chunk_shape=(2, 4)), "chunks": (8, 4)},
    "shards of some columns": {"serializer": ShardingCodec(chunk_shape=(2, 1)), "chunks": (8, 1)},
    "shards in shards": {"serializer": ShardingCodec(chunk_shape=(4, 3), codecs=[ShardingCodec(chunk_shape=(2, 3))])},
    "no shards": {"serializer": BytesCodec()},
    "complex numbers": {"dtype": "complex64"},
}


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS.keys())
def test_other_layouts_are_left_to_zarr(tmp_path, layout):
    assert map_shards(_create(tmp_path, **layout)) is None


def test_other_formats_and_stores_are_left_to_zarr(tmp_path):
    assert map_shards(_create(MemoryStore())) is None
    assert map_shards(_create(ZipStore(tmp_path / "a.zip", mode="w"))) is None
    assert map_shards(zarr.create_array(tmp_path / "v2", shape=(20, 3), chunks=(2, 3), dtype="float32", zarr_format=2)) is None
    assert map_shards(_create(tmp_path / "v3")) is not None


@pytest.mark.parametrize("separator", ["/", "."])
def test_any_chunk_key_is_found(tmp_path, separator):
    array = _create(tmp_path, chunk_key_encoding={"name": "default", "separator": separator})
    _fill(array)
    _assert_same_bytes(array)
