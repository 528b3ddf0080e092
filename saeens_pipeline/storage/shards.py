"""Memory-mapped chunks of uncompressed Zarr v3 shards.

A shard is a file of chunks with an index at its end or start: `[n_chunks, 2]` little-endian uint64, the offset and length of every chunk
in bytes. Both are 2**64 - 1 for a chunk that was never written; such a chunk, and a shard without a file, has the array's fill value.
With the `crc32c` codec the checksum of the index follows the index.
Source: the sharding codec of Zarr v3, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import mmap
import os
import resource
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.held_folders import HeldFolder

_MISSING = 2**64 - 1
_ENTRY_BYTES = 16
_CHECKSUM_BYTES = 4
_MAPPED_SHARDS = 16
_MOST_HELD = 4096


class MappedShards:
    """Chunks of an array `[n_rows, d_in]` whose layout can be memory-mapped; `map_shards` creates it.

    All shards are opened at once and held, so that their rows can be read although the folder is replaced meanwhile. An array holds at
    most an eighth of the files that the process may open (`ulimit -n`), and 4,096. The shards after these are opened when they are read,
    in the folder that is held: if another one has replaced it, they are missing, which is an error.

    Up to 16 shards, the last used ones, stay mapped. Most tools count the pages read from them as memory of this process (up to 512 MiB),
    but they belong to the page cache, and the kernel frees them when it needs memory.
    """

    def __init__(self, array: zarr.Array, folder: HeldFolder, layout: _ShardLayout) -> None:
        (self._n_rows, self._d_in), self._dtype, self._fill_value = array.shape, array.dtype, array.fill_value
        self._chunk_rows, self._chunks_per_shard = array.chunks[0], layout.n_chunks
        self._files = _ShardFiles(array, folder, -(-self._n_rows // (self._chunk_rows * self._chunks_per_shard)))
        self._shard = lru_cache(_MAPPED_SHARDS)(layout.map)

    def chunk(self, index: int) -> np.ndarray:
        """Return rows `[index * chunk_rows, (index + 1) * chunk_rows)`, `[<= chunk_rows, d_in]`; the last chunk may be shorter.

        The array is a private mapping of its shard: pages are read on first access, and writes never reach the file.
        Raises IndexError for a chunk that does not exist, SaeensError for a truncated shard and for an index that does not fit it.
        """
        n_chunks = -(-self._n_rows // self._chunk_rows)
        if not 0 <= index < n_chunks:
            raise IndexError(f"{self._files} has {n_chunks} chunks: there is no chunk {index}")
        rows = min(self._chunk_rows, self._n_rows - index * self._chunk_rows)
        shard_index, chunk_index = divmod(index, self._chunks_per_shard)
        mapping, offsets = self._shard(self._files, shard_index)
        if mapping is None or offsets[chunk_index] == _MISSING:
            return np.full((rows, self._d_in), self._fill_value, self._dtype)
        if mapping.size() < len(mapping):  # access to a mapping beyond the end of the file kills the process
            raise _damaged(self._files.path(shard_index), f"it has been cut to {mapping.size():,} bytes while it was read")
        values = np.frombuffer(mapping, self._dtype, rows * self._d_in, offsets[chunk_index]).reshape(rows, self._d_in)
        return np.require(values, requirements="A")  # torch requires alignment, which an offset need not have


class _ShardFiles:
    """The files of an array's shards, the first ones open."""

    def __init__(self, array: zarr.Array, folder: HeldFolder, n_shards: int) -> None:
        self._folder, self._array, self._chunk_key = folder, array.path, array.metadata.encode_chunk_key
        n_held = min(n_shards, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8, _MOST_HELD)
        self._held: list[int | None] = []
        weakref.finalize(self, _close, self._held)
        for index in range(n_held):
            self._held.append(self._open(index))

    def __str__(self) -> str:
        return str(self._folder.root / self._array)

    def path(self, index: int) -> Path:
        return self._folder.root / self._name(index)

    def open(self, index: int) -> int | None:
        """Return a new descriptor of a shard, or None for one that was never written. Raises SaeensError for one that was removed."""
        if index >= len(self._held):
            return self._open(index)
        held = self._held[index]
        return None if held is None else os.dup(held)

    def _name(self, index: int) -> str:
        return "/".join(filter(None, (self._array, self._chunk_key((index, 0)))))

    def _open(self, index: int) -> int | None:
        try:
            return os.open(self._name(index), os.O_RDONLY, dir_fd=self._folder.descriptor)
        except FileNotFoundError:
            self._folder.require_unwritten(self._name(index))
            return None


def _close(descriptors: list[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


class _ShardLayout(NamedTuple):
    n_chunks: int
    chunk_bytes: int
    index_at: Literal["start", "end"]
    has_checksum: bool

    @property
    def index_bytes(self) -> int:
        return self.n_chunks * _ENTRY_BYTES + (_CHECKSUM_BYTES if self.has_checksum else 0)

    def map(self, files: _ShardFiles, number: int) -> tuple[mmap.mmap | None, list[int]]:
        """Map a shard, and return its chunks' offsets, _MISSING for those that were never written; None and [] without a file.

        Checks every entry of the index, since single entries of a truncated shard may look valid.
        """
        file, descriptor = files.path(number), files.open(number)
        if descriptor is None:
            return None, []
        with open(descriptor, "rb", buffering=0):  # noqa: PTH123 (a descriptor)
            size = os.fstat(descriptor).st_size
            if size < self.index_bytes:
                raise _damaged(file, f"it has {size:,} bytes, its index alone takes {self.index_bytes:,}")
            mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
        start = 0 if self.index_at == "start" else size - self.index_bytes
        index = mapping[start : start + self.index_bytes]
        if self.has_checksum and google_crc32c.value(index[:-_CHECKSUM_BYTES]) != int.from_bytes(index[-_CHECKSUM_BYTES:], "little"):
            raise _damaged(file, "the checksum of its index is wrong")
        entries = np.frombuffer(mapping, "<u8", 2 * self.n_chunks, start).reshape(-1, 2).tolist()
        first, end = (self.index_bytes, size) if self.index_at == "start" else (0, start)
        for offset, length in entries:
            is_missing = offset == length == _MISSING
            if not is_missing and (length != self.chunk_bytes or not first <= offset <= end - length):
                whole = self.index_bytes + self.n_chunks * self.chunk_bytes
                raise _damaged(file, f"its index does not fit its {size:,} bytes ({whole:,} if it has all its chunks)")
        return mapping, [offset for offset, _ in entries]


def map_shards(array: zarr.Array) -> MappedShards | None:
    """Return the memory-mapped chunks of `array`, or None for an array that has to be read through Zarr.

    An array can be mapped if it is a two-dimensional array of numbers in Zarr v3 in a local folder, with shards of chunks of whole rows,
    no codec except little-endian `bytes`, and at most `crc32c` for the index.
    """

    def is_plain(codec: object) -> bool:
        return isinstance(codec, BytesCodec) and codec.endian is not None and codec.endian.value == "little"

    store, metadata = array.store, array.metadata
    if not isinstance(store, LocalStore) or metadata.zarr_format != 3 or metadata.storage_transformers:
        return None
    if array.ndim != 2 or array.chunks[1] != array.shape[1] or array.shards is None or array.dtype.kind not in "iuf":
        return None
    match metadata.codecs:
        case (ShardingCodec(codecs=(values,), index_codecs=(index, *checksum)) as sharding,) if is_plain(values) and is_plain(index):
            if checksum and checksum != [Crc32cCodec()]:
                return None
            n_chunks, chunk_bytes = array.shards[0] // array.chunks[0], array.chunks[0] * array.chunks[1] * array.dtype.itemsize
            layout = _ShardLayout(n_chunks, chunk_bytes, sharding.index_location.value, bool(checksum))
            return MappedShards(array, store if isinstance(store, HeldFolder) else HeldFolder(store.root), layout)
        case _:
            return None


def _damaged(file: Path, what: str) -> SaeensError:
    return SaeensError(f"{file} is truncated or damaged: {what}. `saeens run` computes it again; or restore the file")
