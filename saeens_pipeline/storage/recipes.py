"""The cache of artefacts: each artefact on disk carries its recipe.

A recipe holds everything that decides the content of an artefact: the builder and its version, the settings, and the data versions of
the inputs. An artefact whose stored recipe has the hash of the requested recipe is a cache hit, for every experiment. Facts that do not
decide the content (run, seconds, device, versions) are its provenance.

A folder keeps recipe and provenance in `recipe.json`, a Parquet table in its footer. An artefact is written under a temporary name in the
same folder, flushed to disk, and renamed, so that its final name never shows an incomplete artefact.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.disk import flush, nearest_folder, write_atomically
from saeens_pipeline.storage.locks import is_locked
from saeens_pipeline.storage.names import OWNER_FOLDERS, Address, Partition, locate, place

if TYPE_CHECKING:
    import polars as pl

RECIPE_FILE = "recipe.json"
FOOTER_KEY = "saeens"
_DIGEST = "record_digest"  # of the record of a folder, without this entry
# final name, recipe hash of a resumable write, machine, process
_PARTIAL = re.compile(r"\.(.+?)(?:\.([0-9a-f]{16}))?\.([0-9a-f]{8})-(\d+)\.partial")
_REPLACED = re.compile(r"\.(.+)\.([0-9a-f]{8})\.retired")  # final name, first digits of its hash
_FILE_HASH = re.compile(rb'"file_sha256": "([0-9a-f]{64})"')  # in the footer of a table
_NO_HASH = "0" * 64
_REPLACING_SECONDS = 3600
_MENDING = "The next `saeens run` computes it again"


def digest(value: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the content of an artefact. `inputs` maps the name of each input to its data version."""

    builder: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return {"builder": self.builder, "version": self.version, "settings": dict(self.settings), "inputs": dict(self.inputs)}

    @property
    def hash(self) -> str:
        """The digest of the recipe; equal hashes mean a cache hit."""
        return digest(self.to_json())


@dataclass(frozen=True)
class Artefact:
    """An artefact on disk, as its record describes it.

    `files` maps relative names to (bytes, SHA-256); for a table, `rows` to size and hash of the file without its footer. The footer
    has the hash of the whole file, which `verify` reads there.
    """

    path: Path
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    files: dict[str, tuple[int, str]]
    data_version: str

    @property
    def recipe_hash(self) -> str:
        """The hash of the stored recipe, as `Recipe.hash`."""
        return digest(self.recipe)

    def root(self, address: Address, partition: Partition) -> Path:
        """Return the data root of an artefact with this address."""
        return self.path.parents[len(address.path(partition).parts) - 1]

    def differences(self, wanted: Recipe, names: Mapping[str, str] | None = None) -> list[str]:
        """Return the differences between the stored recipe and `wanted`, in words; `names` maps names of inputs to names to show."""
        other = wanted.to_json()
        found = [f"builder: {self.recipe['builder']} -> {other['builder']}"] if self.recipe["builder"] != other["builder"] else []
        found += [f"the code of {other['builder']} changed"] if self.recipe["version"] != other["version"] else []
        for part, label in (("settings", "setting"), ("inputs", "input")):
            before, after = _flat(self.recipe[part]), _flat(other[part])
            for name in sorted({*before, *after}):
                was, is_now = (_shown(side[name]) if name in side else "not given" for side in (before, after))
                found += [f"{label} {(names or {}).get(name, name)}: {was} -> {is_now}"] if was != is_now else []
        return found

    def verify(self) -> list[str]:
        """Return the differences between the bytes on disk and the recorded hashes, in words; empty if all agree."""
        if self.path.suffix == ".parquet":
            contents, (size, sha256) = self.path.read_bytes(), self.files["rows"]
            if hashlib.sha256(contents[:size]).hexdigest() != sha256:
                return [f"{self.path}: the rows are not those that were written"]
            return [] if _has_its_hash(contents) else [f"{self.path}: the footer is not the one that was written"]
        wrong = []
        for name, (_, sha256) in self.files.items():
            file = self.path / name
            if not file.is_file():
                wrong.append(f"{file}: missing")
            elif file_sha256(file) != sha256:
                wrong.append(f"{file}: the bytes are not those that were written")
        return wrong

    def invalidate(self) -> None:
        """Make the next `Store.find` compare the bytes of every file with its hash, as if the files were newer than the record."""
        if self.path.suffix != ".parquet":  # the bytes of a table are always compared
            for name in self.files:
                with contextlib.suppress(OSError):
                    os.utime(self.path / name)


class MissingInputError(SaeensError):
    """An input does not exist yet."""


class DamagedArtefactError(SaeensError):
    """The files of an artefact differ from those in its record, or the record cannot be read. The artefact has to be computed again."""


@dataclass(frozen=True)
class Store:
    """The artefacts below a data root.

    `before_commit` is called when an artefact is complete and before it appears under its final name: an error discards it.
    """

    root: Path
    before_commit: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    def path(self, address: Address, partition: Partition) -> Path:
        """Return the path of an artefact, which need not exist."""
        return self.root / address.path(partition)

    def require_writable(self) -> None:
        """Raise SaeensError unless files can be created in it, and read again by all libraries. Leaves no file behind."""
        if any("\ud800" <= character <= "\udfff" for character in str(self.root)):
            raise SaeensError(
                f"{self.root} is not UTF-8, and safetensors and polars read no such paths: choose another root with SAEENS_DATA"
            )
        try:
            with tempfile.TemporaryFile(dir=nearest_folder(self.root)):
                pass
        except OSError as error:
            raise _unwritable(self.root, error) from error

    def find(self, address: Address, partition: Partition) -> Artefact | None:
        """Return the artefact at an address, or None. Takes milliseconds: compares sizes, and bytes of tables and of modified files.

        Raises DamagedArtefactError for missing files and for files that differ from the record.
        """
        path = self.path(address, partition)
        artefact = read_artefact(path) if _record_file(path).exists() else None
        if artefact and path.suffix == ".parquet":
            for difference in artefact.verify():
                raise DamagedArtefactError(f"{address} is damaged: {difference}. {_MENDING}")
        elif artefact:
            recorded_ns = _record_file(path).stat().st_mtime_ns
            for name, (size, sha256) in artefact.files.items():
                file = path / name
                found = file.stat() if file.is_file() else None
                if found is None or found.st_size != size:
                    state = "is missing" if found is None else f"has {found.st_size} bytes"
                    raise DamagedArtefactError(f"{address} is damaged: {file} {state}, its recipe says {size} bytes. {_MENDING}")
                if found.st_mtime_ns > recorded_ns:
                    if file_sha256(file) != sha256:
                        raise DamagedArtefactError(f"{address} is damaged: {file} was changed after it was written. {_MENDING}")
                    with contextlib.suppress(OSError):  # files of a copied folder may be newer: the next check need not read them again
                        os.utime(file, ns=(found.st_atime_ns, recorded_ns))
        return artefact

    def data_version(self, address: Address, partition: Partition) -> str | None:
        """Return the data version in the record at an address; None without a record that can be read. The files are not looked at."""
        try:
            return read_artefact(self.path(address, partition)).data_version
        except DamagedArtefactError:
            return None

    def partitions(self, address: Address, *dimensions: str) -> list[Partition]:
        """Return the partitions on disk of an address, in numeric order; `dimensions` are the names of its partition dimensions."""
        paths = [PurePosixPath(path.relative_to(self.root).as_posix()) for path in self.root.glob(address.glob(*dimensions))]
        return sorted(found[1] for path in paths if (found := locate(path)))

    def has_any_of(self, owner: str) -> bool:
        """Return whether anything of a source or an experiment is on disk."""
        return any((self.root / folder / owner).is_dir() for folder in OWNER_FOLDERS)

    def hit(self, address: Address, partition: Partition, recipe: Recipe) -> Artefact | None:
        """Return the artefact at an address if it has this recipe and is not damaged, otherwise None."""
        try:
            artefact = self.find(address, partition)
        except DamagedArtefactError:
            return None
        return artefact if artefact and artefact.recipe_hash == recipe.hash else None

    def made_alike(self, address: Address, partition: Partition, recipe: Recipe) -> tuple[Address, Artefact] | tuple[None, None]:
        """Return an undamaged artefact of any experiment with this partition and recipe, and its address; (None, None) without one.

        One whose bytes were dropped is returned only if there is no other.
        """
        folders, without_bytes = address.path(partition).parts, (None, None)
        for file in sorted(self.root.glob("/".join([folders[0], "*", *folders[2:-2], "*", "*", RECIPE_FILE]))):
            found = locate(PurePosixPath(file.parent.relative_to(self.root).as_posix()))
            with contextlib.suppress(OSError, ValueError, KeyError):  # an unreadable record is no match
                if found and digest(json.loads(file.read_text())["recipe"]) == recipe.hash:
                    artefact = self.hit(found[0], partition, recipe)
                    if artefact and artefact.files:
                        return found[0], artefact
                    without_bytes = (found[0], artefact) if artefact else without_bytes
        return without_bytes

    def require(self, address: Address, partition: Partition) -> Artefact:
        """Return the artefact at an address. Raises MissingInputError if it does not exist."""
        artefact = self.find(address, partition)
        if artefact is None:
            where = f" ({partition})" if str(partition) else ""
            raise MissingInputError(
                f"{address}{where} is needed first: materialise it, or run `saeens run`, which computes all missing inputs"
            )
        return artefact

    @contextlib.contextmanager
    def write_folder(
        self,
        address: Address,
        partition: Partition,
        recipe: Recipe,
        provenance: dict[str, Any],
        *,
        versioned_content: bool = True,
        resumable: bool = False,
    ) -> Iterator[Path]:
        """Yield an empty folder to write into; on leaving the context it becomes the artefact and replaces an earlier one.

        `provenance` is read on leaving, so that the caller can fill it meanwhile. An exception leaves the earlier artefact unchanged.
        `versioned_content=False`: the data version follows from the recipe alone, as for residuals, whose bytes may be dropped.
        `resumable`: the files of an interrupted or killed write are kept, and the next write of the same recipe gets them; a SaeensError,
        which would occur again, removes them.
        """
        final = self.path(address, partition)
        is_alone = is_locked(self.root, address, partition)
        with _staging(final, kept_for=recipe.hash if resumable else None, is_alone=is_alone) as staging:
            staging.mkdir(exist_ok=resumable)
            yield staging
            files = {name: (file.stat().st_size, file_sha256(file)) for name, file in _files_below(staging)}
            version = digest([recipe.to_json(), {name: sha256 for name, (_, sha256) in files.items()} if versioned_content else None])
            (staging / RECIPE_FILE).write_text(_with_digest(_record(recipe, provenance, files, version)))
            for _, file in _files_below(staging):
                flush(file)
            self.before_commit()
            _replace_folder(staging, final)

    def write_table(
        self, address: Address, partition: Partition, recipe: Recipe, provenance: Mapping[str, Any], table: pl.DataFrame
    ) -> None:
        """Write a Parquet table with its record in the footer.

        The record has the hash of the whole file, computed with zeros in its own place.
        """
        import pyarrow.parquet as pq

        final, rows = self.path(address, partition), table.to_arrow()
        with _staging(final, is_alone=is_locked(self.root, address, partition)) as staging:
            contents = io.BytesIO()
            with pq.ParquetWriter(contents, rows.schema) as writer:
                writer.write_table(rows)
                content = hashlib.sha256(contents.getvalue()).hexdigest()  # without the footer, which holds this hash
                files = {"rows": (contents.tell(), content)}
                record = _record(recipe, provenance, files, digest([recipe.to_json(), content])) | {"file_sha256": _NO_HASH}
                writer.add_key_value_metadata({FOOTER_KEY: json.dumps(record)})
            staging.write_bytes(_with_its_hash(contents.getvalue()))
            flush(staging)
            self.before_commit()
            staging.replace(final)
            flush(final.parent)

    def link(self, address: Address, partition: Partition, recipe: Recipe, other: Artefact, provenance: dict[str, Any]) -> None:
        """Make an artefact from another one with an equal recipe by hard links to its files, or copies where links are impossible."""
        versioned = other.data_version != digest([recipe.to_json(), None])
        with self.write_folder(address, partition, recipe, provenance, versioned_content=versioned) as folder:
            for name in other.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(other.path / name, folder / name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(other.path / name, folder / name)

    def drop_bytes(self, artefact: Artefact) -> None:
        """Remove the files of an artefact and keep its record: for residuals, which can be computed while they are read."""
        record = _read_record(artefact.path) | {"files": {}}
        write_atomically(artefact.path / RECIPE_FILE, _with_digest(record), aside=f".{RECIPE_FILE}")
        for entry in artefact.path.iterdir():
            if entry.name != RECIPE_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@dataclass(frozen=True)
class Snapshot(Store):
    """A store that looks at each artefact once, for plans: they ask for an input as often as something is computed from it."""

    _found: dict[tuple[Address, Partition], Artefact | DamagedArtefactError | None] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def find(self, address: Address, partition: Partition) -> Artefact | None:
        """Return the artefact at an address, or None, as it was at the first call. Raises as `Store.find`."""
        where = address, partition
        if where not in self._found:
            try:
                self._found[where] = super().find(address, partition)
            except DamagedArtefactError as error:
                self._found[where] = error
        found = self._found[where]
        if isinstance(found, DamagedArtefactError):
            raise found
        return found


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) and item else {f"{prefix}{name}": item}
    return flat


def _record(recipe: Recipe, provenance: Mapping[str, Any], files: Mapping[str, tuple[int, str]], data_version: str) -> dict[str, Any]:
    return {"recipe": recipe.to_json(), "data_version": data_version, "provenance": dict(provenance), "files": dict(files)}


def _with_digest(record: Mapping[str, Any]) -> str:
    """Return the text of a folder's record with the digest of the record, which also covers the provenance."""
    plain = json.loads(json.dumps(record))
    return json.dumps(plain | {_DIGEST: digest(plain)}, indent=1) + "\n"


def read_artefact(path: Path) -> Artefact:
    """Return the artefact at a path, as its record describes it. Raises DamagedArtefactError for a record that cannot be read."""
    try:
        record = _read_record(path)
        files = {name: (size, sha256) for name, (size, sha256) in record["files"].items()}
        recipe = Recipe(**record["recipe"]).to_json()
        contents = [files["rows"][1]] if path.suffix == ".parquet" else [{name: sha256 for name, (_, sha256) in files.items()}, None]
        if record["data_version"] not in [digest([recipe, content]) for content in contents]:
            raise ValueError("its data version does not follow from its recipe and files: it was changed after it was written")
        return Artefact(path, recipe, record["provenance"], files, record["data_version"])
    except Exception as error:
        raise DamagedArtefactError(f"{_record_file(path)} cannot be read ({error}). {_MENDING}") from error


class Stored(NamedTuple):
    """An artefact on disk, with its address and partition."""

    address: Address
    partition: Partition
    artefact: Artefact

    @property
    def place(self) -> str:
        return place(self.address, self.partition)


def all_artefacts(root: Path) -> Iterator[Stored | DamagedArtefactError]:
    """Yield every artefact below a data root, in the order of paths, or the error of a record that cannot be read."""
    recipes = [path.parent for folder in ("sources", "experiments", "reports") for path in (root / folder).rglob(RECIPE_FILE)]
    for path in sorted([*recipes, *(root / "tables").rglob("part.parquet")]):
        found = locate(PurePosixPath(path.relative_to(root).as_posix()))
        if found is None:
            continue
        try:
            yield Stored(*found, read_artefact(path))
        except DamagedArtefactError as error:
            yield error


def _record_file(path: Path) -> Path:
    return path if path.suffix == ".parquet" else path / RECIPE_FILE


def _read_record(path: Path) -> dict[str, Any]:
    if path.suffix != ".parquet":
        record = json.loads(_record_file(path).read_text())
        if record.pop(_DIGEST, None) != digest(record):
            raise ValueError("the record is not the one that was written")
        return record
    import pyarrow.parquet as pq

    return json.loads(pq.read_metadata(path).metadata[FOOTER_KEY.encode()])


def _files_below(folder: Path) -> list[tuple[str, Path]]:
    return sorted((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file())


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _with_its_hash(table: bytes) -> bytes:
    """Return a table with the hash of the whole file in its record, which has zeros there."""
    start = table.rindex(b'"file_sha256": "') + len(b'"file_sha256": "')
    return table[:start] + hashlib.sha256(table).hexdigest().encode() + table[start + len(_NO_HASH) :]


def _has_its_hash(table: bytes) -> bool:
    found = list(_FILE_HASH.finditer(table))
    if not found:
        return False
    start, end = found[-1].span(1)  # the footer is at the end
    return hashlib.sha256(table[:start] + _NO_HASH.encode() + table[end:]).hexdigest().encode() == found[-1][1]


@contextlib.contextmanager
def _staging(final: Path, kept_for: str | None = None, *, is_alone: bool) -> Iterator[Path]:
    """Yield a temporary path in the folder of `final`. Remove leftovers of killed processes first, and those of this write if it fails.

    With `kept_for`, a recipe's hash, a leftover for this hash is given instead of a free path. `is_alone`: this process holds the lock of
    the artefact, so that no leftover is in use, even if a process has its number. Without it, a path of another machine may be in use.
    """
    staging = _temporary_name(final, kept_for)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f".{final.name}.*.partial"):
            found = read_temporary(leftover)
            if found is None or found.final != final:
                continue
            is_mine = leftover.match(f"*.{_process()}.partial")
            if not (is_alone or is_mine or (found.is_here and not found.in_use)):
                continue
            if kept_for and found.recipe_hash == kept_for and not staging.exists():
                leftover.rename(staging)
            elif not kept_for or leftover != staging:
                _remove(leftover)
        if _retired(final).exists():  # a process was killed between the two renames of `_replace_folder`
            _remove(_retired(final)) if final.exists() else _retired(final).rename(final)
    except OSError as error:
        raise _unwritable(final.parent, error) from error
    try:
        yield staging
    except SaeensError:
        _remove(staging)
        raise
    except BaseException:
        if kept_for is None:
            _remove(staging)
        raise


@contextlib.contextmanager
def write_plain_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; on leaving the context it becomes `final`, flushed. For folders without a record."""
    with _staging(final, is_alone=False) as staging:
        staging.mkdir()
        yield staging
        for _, file in _files_below(staging):
            flush(file)
        _replace_folder(staging, final)


def _unwritable(folder: Path, error: OSError) -> SaeensError:
    return SaeensError(f"{folder} cannot be written ({error.strerror}): choose another root with SAEENS_DATA, or fix its permissions")


class Temporary(NamedTuple):
    """A file or folder that is being written, or that was replaced."""

    final: Path
    recipe_hash: str | None  # of a resumable write
    in_use: bool  # its process is alive on this machine, or it was replaced within the last hour
    is_here: bool  # of a process of this machine

    @property
    def is_needed(self) -> bool:
        """True if the next write of the artefact uses it: to resume, or as the only copy."""
        if self.recipe_hash is None:
            return not self.final.exists()
        with contextlib.suppress(DamagedArtefactError):
            return not _record_file(self.final).exists() or read_artefact(self.final).recipe_hash != self.recipe_hash
        return True


def read_temporary(path: Path) -> Temporary | None:
    """Return the description of a temporary file or folder; None for paths that no writer has named."""
    if partial := _PARTIAL.fullmatch(path.name):
        final, recipe_hash, machine, pid = partial.groups()
        is_here = machine == this_machine()
        return Temporary(path.with_name(final), recipe_hash, is_here and is_alive(int(pid)), is_here)
    if (replaced := _REPLACED.fullmatch(path.name)) and path == _retired(path.with_name(replaced[1])):
        return Temporary(path.with_name(replaced[1]), None, time.time() - path.lstat().st_ctime < _REPLACING_SECONDS, is_here=False)
    return None


def foreign_files(artefact: Artefact) -> list[str]:
    """Return the files in an artefact's folder that its record does not list."""
    if artefact.path.suffix == ".parquet":
        return []
    own = {*artefact.files, RECIPE_FILE, f".{RECIPE_FILE}"}
    return [name for name, _ in _files_below(artefact.path) if name not in own]


def remove_whole(path: Path) -> None:
    """Remove a file, an artefact or a temporary path. A folder is renamed first, so that an interruption leaves a temporary path only."""
    try:
        if path.is_dir():
            shutil.rmtree(path if read_temporary(path) else path.rename(_temporary_name(path)))
        else:
            path.unlink()
    except OSError as error:
        raise SaeensError(f"{path} cannot be removed ({error.strerror}): fix its permissions") from error


@functools.cache
def this_machine() -> str:
    """Return 8 hexadecimal digits of the host, its boot, and the namespace of process numbers, which a container has of its own."""
    identity = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux only
        identity += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return digest(identity)[:8]


def _process() -> str:
    return f"{this_machine()}-{os.getpid()}"


def _temporary_name(final: Path, kept_for: str | None = None) -> Path:
    return final.with_name(f".{'.'.join(filter(None, (final.name, kept_for, _process(), 'partial')))}")


def is_alive(pid: int, start: str = "") -> bool:
    """Return whether a process with this number, and with this start if it is known, runs on this machine."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return has_start(pid, start)


def start_of(pid: int) -> str:
    """Return the start of a process in ticks since the start of the machine: numbers are used again. Empty where it is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):  # there is no such process, or no /proc
        return ""


def has_start(pid: int, start: str) -> bool:
    """Return False if a process with this number has another start."""
    return not start or start_of(pid) in ("", start)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(staging: Path, final: Path) -> None:
    if final.exists():
        final.rename(_retired(final))
    staging.rename(final)
    if _retired(final).exists():
        shutil.rmtree(_retired(final))
    flush(final.parent)


def _retired(final: Path) -> Path:
    return final.with_name(f".{final.name}.{digest(final.name)[:8]}.retired")
