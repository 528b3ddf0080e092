"""Recipes and the store: cache hits, failed writes, and damage."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage import recipes
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import RECIPE_FILE, Artefact, DamagedArtefactError, MissingInputError, Recipe, Store, digest

MEMBER = Address("quickstart", "bagging", "member_1")
ROUND = Address("quickstart", "boosting", "round_1")
TABLE = Address("quickstart", "eval", "cost")
WHERE = Partition(layer=1, seed=42)
RECIPE = Recipe("sae", 1, {"sae": {"architecture": "topk", "k": 4}, "training": {"learning_rate": 0.01}, "width": 1}, {"activations": "a1"})
FILES = {"cfg.json": b'{"k": 4}', "nested/deeper/weights.bin": bytes(range(256)) * 40}
ROWS = pl.DataFrame({"method": ["single", "bagging"] * 50, "mse": [0.125 * i for i in range(100)], "tokens": list(range(100))})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def _write(
    store: Store, address: Address = MEMBER, recipe: Recipe = RECIPE, files: Mapping[str, bytes] = FILES, **options: Any
) -> Artefact:
    with store.write_folder(address, WHERE, recipe, options.pop("provenance", {"run_id": "r"}), **options) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return store.require(address, WHERE)


def _write_table(store: Store, recipe: Recipe = RECIPE, rows: pl.DataFrame = ROWS, **provenance: Any) -> Artefact:
    store.write_table(TABLE, WHERE, recipe, provenance, rows)
    return store.require(TABLE, WHERE)


def _everything(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


# what is a hit


def test_the_digest_is_computed_from_canonical_json():
    expected = hashlib.sha256('{"a":[1,2.5,null],"b":"é"}'.encode()).hexdigest()[:16]
    assert digest({"b": "é", "a": [1, 2.5, None]}) == expected


def test_an_artefact_of_the_same_recipe_is_a_cache_hit(store: Store):
    assert store.hit(MEMBER, WHERE, RECIPE) is None
    _write(store)
    reordered = Recipe("sae", 1, dict(reversed([*RECIPE.settings.items()])), dict(RECIPE.inputs))
    for recipe in (RECIPE, reordered):
        found = store.hit(MEMBER, WHERE, recipe)
        assert found
        assert found.recipe == RECIPE.to_json()
    assert store.hit(MEMBER, Partition(1, 43), RECIPE) is None
    assert store.hit(ROUND, WHERE, RECIPE) is None


CHANGES = {
    "a setting": (replace(RECIPE, settings={**RECIPE.settings, "sae": {"architecture": "topk", "k": 8}}), "setting sae.k: 4 -> 8"),
    "a new setting": (replace(RECIPE, settings={**RECIPE.settings, "l0": 2}), "setting l0: not given -> 2"),
    "a setting less": (
        replace(RECIPE, settings={"sae": RECIPE.settings["sae"], "width": 1}),
        "setting training.learning_rate: 0.01 -> not given",
    ),
    "the builder's version": (replace(RECIPE, version=2), "the code of sae changed"),
    "an input": (replace(RECIPE, inputs={"activations": "a2"}), "input activations: a1 -> a2"),
    "a new input": (replace(RECIPE, inputs={"activations": "a1", "tokens": "t"}), "input tokens: not given -> t"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_is_a_miss_that_names_the_change(store: Store, change: str):
    recipe, expected = CHANGES[change]
    artefact = _write(store)
    assert artefact.differences(RECIPE) == []
    assert store.hit(MEMBER, WHERE, recipe) is None
    assert artefact.differences(recipe) == [expected]


@pytest.mark.parametrize(
    "recipe",
    [
        replace(RECIPE, builder="table cost"),
        replace(RECIPE, settings={**RECIPE.settings, "width": 1.0}),
        replace(RECIPE, settings={**RECIPE.settings, "width": True}),
        replace(RECIPE, settings={**RECIPE.settings, "training": {"learning_rate": 0.01, "gradient_clip_norm": None}}),
        replace(RECIPE, settings={**RECIPE.settings, "extra": {}}),
    ],
    ids=["another builder", "1.0 for 1", "true for 1", "an explicit null", "an empty mapping"],
)
def test_a_recipe_is_a_hit_exactly_if_no_difference_is_named(store: Store, recipe: Recipe):
    artefact = _write(store)
    assert (store.hit(MEMBER, WHERE, recipe) is None) == bool(artefact.differences(recipe))


def test_tables_are_hits_and_misses_like_folders(store: Store):
    _write_table(store)
    assert store.hit(TABLE, WHERE, RECIPE)
    assert store.hit(TABLE, WHERE, replace(RECIPE, version=2)) is None
    assert pl.read_parquet(store.path(TABLE, WHERE), hive_partitioning=False).equals(ROWS)


def test_a_required_missing_artefact_is_named_with_its_partition(store: Store):
    with pytest.raises(MissingInputError, match=r"quickstart/bagging/member_1 \(layer 1, seed 42\) is needed first.*saeens run"):
        store.require(MEMBER, WHERE)


# data versions


def test_data_version_depends_on_recipe_and_content_and_not_on_provenance(store: Store):
    version = _write(store).data_version
    assert _write(store, provenance={"run_id": "another", "seconds": 12.5}).data_version == version
    assert _write(store, address=ROUND).data_version == version
    assert _write(store, files=FILES | {"cfg.json": b'{"k": 5}'}).data_version != version
    assert _write(store, files={"renamed.json": FILES["cfg.json"]}).data_version != version
    assert _write(store, recipe=replace(RECIPE, version=2)).data_version != version


def test_data_version_of_a_table_depends_on_recipe_and_rows_and_not_on_provenance(store: Store):
    version = _write_table(store).data_version
    assert _write_table(store, run_id="another").data_version == version
    assert _write_table(store, rows=ROWS.with_columns(mse=pl.col("mse") + 1e-15)).data_version != version
    assert _write_table(store, rows=ROWS.reverse()).data_version != version
    assert _write_table(store, recipe=replace(RECIPE, version=2)).data_version != version


def test_data_version_can_be_computed_from_the_recipe_alone(store: Store):
    version = _write(store, versioned_content=False).data_version
    assert _write(store, files={}, versioned_content=False).data_version == version
    assert _write(store, recipe=replace(RECIPE, inputs={"activations": "a2"}), versioned_content=False).data_version != version


def test_provenance_can_be_filled_while_the_artefact_is_written(store: Store):
    provenance: dict[str, Any] = {"run_id": "r"}
    with store.write_folder(MEMBER, WHERE, RECIPE, provenance):
        provenance["seconds"] = 3.5
    assert store.require(MEMBER, WHERE).provenance == {"run_id": "r", "seconds": 3.5}


def test_recipe_files_separate_recipe_and_provenance(store: Store):
    record = json.loads((_write(store).path / RECIPE_FILE).read_text())
    assert record["recipe"] == {"builder": "sae", "version": 1, "settings": RECIPE.settings, "inputs": {"activations": "a1"}}
    assert record["provenance"] == {"run_id": "r"}
    assert record["files"] == {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in FILES.items()}


# failures


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_an_exception_keeps_the_earlier_artefact_and_leaves_no_temporary_files(store: Store, error: BaseException):
    def fail():
        with store.write_folder(MEMBER, WHERE, replace(RECIPE, version=2), {}) as folder:
            (folder / "cfg.json").write_text("half of it")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert _everything(store.root) == {}
    _write(store)
    before = _everything(store.root)
    with pytest.raises(type(error)):
        fail()
    assert _everything(store.root) == before


def test_a_failed_write_of_a_table_keeps_the_earlier_one(store: Store, monkeypatch: pytest.MonkeyPatch):
    _write_table(store)
    before = _everything(store.root)

    def write_half(self: Path, contents: bytes) -> None:
        with self.open("wb") as file:
            file.write(contents[: len(contents) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        _write_table(store, rows=ROWS.reverse())
    assert _everything(store.root) == before


DEATHS = {
    "while files are written": "",
    "before the recipe is written": "\n".join(
        [
            "write_text = Path.write_text",
            "def once(self, *given):",
            "    if self.name == recipes.RECIPE_FILE: die()",
            "    return write_text(self, *given)",
            "Path.write_text = once",
        ]
    ),
    "before the final name": "Path.rename = die",
    "between the two renames": "\n".join(
        [
            "rename = Path.rename",
            "def once(self, target):",
            "    if self.name.endswith('.partial'): die()",
            "    return rename(self, target)",
            "Path.rename = once",
        ]
    ),
}
SCRIPT = """
import os, signal, sys
from pathlib import Path
from saeens_pipeline.storage import recipes
from saeens_pipeline.storage.names import Address, Partition

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

{death}
store = recipes.Store(Path(sys.argv[1]))
with store.write_folder(Address("quickstart", "bagging", "member_1"), Partition(1, 42), recipes.Recipe("sae", 2, {{}}), {{}}) as folder:
    (folder / "cfg.json").write_text("new")
    {dies_inside}
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing there", "replacing"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_process_leaves_only_whole_artefacts_and_the_next_write_cleans_up(store: Store, death: str, before: str):
    if before == "replacing":
        _write(store)
    script = SCRIPT.format(death=DEATHS[death], dies_inside="" if DEATHS[death] else "die()")
    killed = subprocess.run([sys.executable, "-c", script, str(store.root)], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = store.find(MEMBER, WHERE)
    if before == "nothing there" or death == "between the two renames":
        assert found is None
    else:
        assert found
        assert found.verify() == []
        assert {name: (found.path / name).read_bytes() for name in FILES} == FILES
    written = _write(store, files={"cfg.json": b"newer"})
    assert written.verify() == []
    assert [path.name for path in written.path.parent.iterdir()] == ["member_1"]
    assert sorted(path.name for path in written.path.iterdir()) == ["cfg.json", RECIPE_FILE]


def test_a_failed_write_after_a_kill_between_the_renames_brings_the_old_artefact_back(store: Store):
    artefact = _write(store)
    artefact.path.rename(artefact.path.parent / f".member_1.{digest('member_1')[:8]}.retired")
    with pytest.raises(ValueError, match="broken"), store.write_folder(MEMBER, WHERE, RECIPE, {}):
        raise ValueError("broken")
    assert store.require(MEMBER, WHERE).verify() == []


def test_partial_artefacts_of_other_living_processes_are_kept(store: Store):
    others = _write(store).path.parent / f".member_1.{recipes.this_machine()}-{os.getppid()}.partial"
    others.mkdir()
    _write(store)
    assert others.is_dir()


def test_a_read_only_root_is_named_with_a_remedy(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    store = Store(tmp_path / "file" / "data")
    for write in (_write, _write_table):
        with pytest.raises(SaeensError, match=r"cannot be written.*SAEENS_DATA"):
            write(store)
    with pytest.raises(SaeensError, match=r"file/data cannot be written.*SAEENS_DATA"):
        store.require_writable()


def test_checking_whether_a_root_is_writable_leaves_no_file(store: Store):
    store.require_writable()
    assert not store.root.exists()
    store.root.mkdir()
    store.require_writable()
    assert not list(store.root.iterdir())


# damage


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_an_error_with_both_sizes(store: Store, name: str):
    file = _write(store).path / name
    size = len(FILES[name])
    file.write_bytes(FILES[name][:-3])
    for look in (store.find, store.require):
        with pytest.raises(DamagedArtefactError) as error:
            look(MEMBER, WHERE)
        assert str(file) in str(error.value)
        assert f"has {size - 3} bytes" in str(error.value)
        assert f"says {size} bytes" in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error_with_its_name_and_size(store: Store, name: str):
    file = _write(store).path / name
    file.unlink()
    with pytest.raises(DamagedArtefactError, match=f"{file} is missing.*{len(FILES[name])} bytes"):
        store.find(MEMBER, WHERE)


PARTS: dict[str, Any] = {"provenance": {}, "files": {}, "data_version": "v"}  # of a record, without the recipe


@pytest.mark.parametrize("content", ["", '{"recipe": {', "[]", '{"recipe": {}}', json.dumps({"recipe": {"builder": "sae"}} | PARTS)])
def test_an_unreadable_recipe_is_named_with_a_remedy(store: Store, content: str):
    file = _write(store).path / RECIPE_FILE
    file.write_text(content)
    with pytest.raises(DamagedArtefactError, match=f"{file} cannot be read.*The next `saeens run` computes it again"):
        store.find(MEMBER, WHERE)


@pytest.mark.parametrize("damaged", [*FILES, RECIPE_FILE])
def test_a_damaged_artefact_is_no_hit_and_can_be_rewritten(store: Store, damaged: str):
    file = _write(store).path / damaged
    file.write_bytes(file.read_bytes()[:-3])
    assert store.hit(MEMBER, WHERE, RECIPE) is None
    assert _write(store).verify() == []
    assert store.hit(MEMBER, WHERE, RECIPE)


def test_a_modified_artefact_is_no_hit(store: Store):
    file = _write(store).path / min(FILES)
    contents = bytearray(file.read_bytes())
    contents[0] ^= 1
    file.write_bytes(contents)
    os.utime(file, ns=(2**62, 2**62))
    assert store.hit(MEMBER, WHERE, RECIPE) is None
    with pytest.raises(DamagedArtefactError, match="was changed after it was written"):
        store.require(MEMBER, WHERE)


def test_bytes_changed_at_the_same_size_and_time_are_no_hit_once_invalidated(store: Store):
    artefact = _write(store)
    file = artefact.path / min(FILES)
    times = file.stat()
    file.write_bytes(bytes(len(FILES[min(FILES)])))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.hit(MEMBER, WHERE, RECIPE)
    artefact.invalidate()
    assert store.hit(MEMBER, WHERE, RECIPE) is None


def test_an_invalidated_artefact_with_intact_files_is_a_hit(store: Store):
    _write(store).invalidate()
    assert store.hit(MEMBER, WHERE, RECIPE)


def _changed(record: dict[str, Any], part: str) -> dict[str, Any]:
    others = {
        "data_version": "0" * 16,
        "recipe": record["recipe"] | {"settings": {"k": 99}},
        "files": record["files"] | {min(FILES): [len(FILES[min(FILES)]), "0" * 64]},
        "provenance": {"run_id": "s"},
    }
    return record | {part: others[part]}


@pytest.mark.parametrize("part", ["data_version", "recipe", "files", "provenance"])
def test_a_modified_recipe_file_is_damaged(store: Store, part: str):
    file = _write(store).path / RECIPE_FILE
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), part)))
    with pytest.raises(DamagedArtefactError, match="the record is not the one that was written"):
        store.find(MEMBER, WHERE)


@pytest.mark.parametrize("part", ["data_version", "recipe", "files"])
def test_a_record_with_a_digest_of_its_own_still_needs_the_data_version_of_its_recipe(store: Store, part: str):
    file = _write(store).path / RECIPE_FILE
    record = _changed(json.loads(file.read_text()), part)
    del record["record_digest"]
    file.write_text(json.dumps(record | {"record_digest": digest(record)}))
    with pytest.raises(DamagedArtefactError, match="its data version does not follow"):
        store.find(MEMBER, WHERE)


def test_a_copied_artefact_is_a_hit_and_its_bytes_are_read_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    file = _write(store).path / min(FILES)
    os.utime(file, ns=(2**62, 2**62))
    read: list[str] = []
    hash_file = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, algorithm: (read.append(stream.name), hash_file(stream, algorithm))[1])
    assert store.hit(MEMBER, WHERE, RECIPE)
    assert read == [str(file)]
    assert store.hit(MEMBER, WHERE, RECIPE)
    assert read == [str(file)]


def test_a_damaged_table_is_no_hit_and_can_be_rewritten(store: Store):
    path = _write_table(store).path
    path.write_bytes(path.read_bytes()[:-3])
    assert store.hit(TABLE, WHERE, RECIPE) is None
    assert _write_table(store).verify() == []
    assert store.hit(TABLE, WHERE, RECIPE)


@pytest.mark.parametrize("n_bytes", [0, 100, -1])
def test_a_truncated_table_is_named_with_a_remedy(store: Store, n_bytes: int):
    path = _write_table(store).path
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(DamagedArtefactError, match=f"{path} cannot be read.*The next `saeens run` computes it again"):
        store.find(TABLE, WHERE)


def test_a_table_without_a_recipe_is_named_with_a_remedy(store: Store):
    path = _write_table(store).path
    ROWS.write_parquet(path)
    with pytest.raises(DamagedArtefactError, match=f"{path} cannot be read"):
        store.find(TABLE, WHERE)


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_flipped_byte_that_keeps_the_size(store: Store, name: str):
    artefact = _write(store)
    assert artefact.verify() == []
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    before = (artefact.path / name).stat()
    (artefact.path / name).write_bytes(content)
    os.utime(artefact.path / name, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk does it
    found = store.require(MEMBER, WHERE)
    (message,) = found.verify()
    assert str(found.path / name) in message


def _value_bytes(path: Path) -> list[int]:
    """Positions in a Parquet file that hold values: the last bytes of every column."""
    columns = [pq.read_metadata(path).row_group(0).column(i) for i in range(ROWS.width)]
    starts = [column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset for column in columns]
    ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
    return [position for end in ends for position in range(end - 8, end)]


def test_a_flipped_byte_in_the_values_of_a_table_is_found(store: Store):
    artefact = _write_table(store)
    assert artefact.verify() == []
    whole = artefact.path.read_bytes()
    for position in _value_bytes(artefact.path):
        content = bytearray(whole)
        content[position] ^= 1
        artefact.path.write_bytes(content)
        (message,) = recipes.read_artefact(artefact.path).verify()
        assert str(artefact.path) in message, position
        assert store.hit(TABLE, WHERE, RECIPE) is None, position


def test_a_flipped_bit_anywhere_in_the_footer_of_a_table_is_found(store: Store):
    artefact = _write_table(store)
    whole = artefact.path.read_bytes()
    positions, n_found = range(artefact.files["rows"][0], len(whole), 7), 0
    for position in positions:
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        artefact.path.write_bytes(content)
        n_found += store.hit(TABLE, WHERE, RECIPE) is None
    assert n_found == len(positions) > 150
    artefact.path.write_bytes(whole)
    assert store.hit(TABLE, WHERE, RECIPE)


def test_a_table_has_the_hash_of_its_whole_file_with_zeros_in_its_place(store: Store):
    whole = _write_table(store).path.read_bytes()
    recorded = json.loads(pq.read_metadata(store.path(TABLE, WHERE)).metadata[recipes.FOOTER_KEY.encode()])["file_sha256"]
    assert whole.count(recorded.encode()) == 1
    assert hashlib.sha256(whole.replace(recorded.encode(), b"0" * 64)).hexdigest() == recorded


def test_rows_written_by_another_program_are_found(store: Store):
    artefact = _write_table(store)
    footer = pq.read_metadata(artefact.path).metadata[recipes.FOOTER_KEY.encode()].decode()
    ROWS.with_columns(tokens=pl.col("tokens") + 1).write_parquet(artefact.path, metadata={recipes.FOOTER_KEY: footer})
    assert recipes.read_artefact(artefact.path).verify()
    with pytest.raises(DamagedArtefactError, match="the rows are not those that were written"):
        store.find(TABLE, WHERE)


# sharing and dropping bytes


def test_linking_an_equal_artefact_shares_its_files(store: Store):
    member = _write(store)
    store.link(ROUND, WHERE, RECIPE, member, {"same_as": str(MEMBER)})
    adopted = store.require(ROUND, WHERE)
    assert all((adopted.path / name).samefile(member.path / name) for name in FILES)
    assert adopted.data_version == member.data_version
    assert adopted.files == member.files
    assert adopted.provenance == {"same_as": "quickstart/bagging/member_1"}
    assert adopted.verify() == []


def test_linking_copies_files_if_hard_links_are_unavailable(store: Store, monkeypatch: pytest.MonkeyPatch):
    def no_links(*_: object) -> None:
        raise OSError("no hard links here")

    member = _write(store)
    monkeypatch.setattr(os, "link", no_links)
    store.link(ROUND, WHERE, RECIPE, member, {})
    adopted = store.require(ROUND, WHERE)
    assert {name: (adopted.path / name).read_bytes() for name in FILES} == FILES
    assert adopted.data_version == member.data_version


def test_a_linked_artefact_whose_data_version_follows_from_its_recipe_keeps_it(store: Store):
    first = _write(store, versioned_content=False)
    store.link(ROUND, WHERE, RECIPE, first, {})
    assert store.require(ROUND, WHERE).data_version == first.data_version
    store.drop_bytes(first)
    assert store.require(ROUND, WHERE).verify() == []
    assert store.made_alike(Address("other", "bagging", "member_1"), WHERE, RECIPE) == (ROUND, store.require(ROUND, WHERE))
    store.drop_bytes(store.require(ROUND, WHERE))
    assert store.made_alike(Address("other", "bagging", "member_1"), WHERE, RECIPE)[1] is not None


def test_replacing_an_artefact_does_not_change_a_linked_one(store: Store):
    member = _write(store)
    store.link(ROUND, WHERE, RECIPE, member, {})
    _write(store, recipe=replace(RECIPE, version=2), files={"cfg.json": b"{}"})
    assert store.require(ROUND, WHERE).verify() == []


def test_dropping_bytes_keeps_recipe_provenance_and_data_version(store: Store):
    before = _write(store, versioned_content=False)
    store.drop_bytes(before)
    after = store.hit(MEMBER, WHERE, RECIPE)
    assert after
    assert (after.data_version, after.recipe, after.provenance) == (before.data_version, before.recipe, before.provenance)
    assert after.files == {}
    assert [path.name for path in after.path.iterdir()] == [RECIPE_FILE]
    store.drop_bytes(after)
    assert store.hit(MEMBER, WHERE, RECIPE) == after


def test_this_machine_is_another_after_a_restart_and_in_another_container(monkeypatch: pytest.MonkeyPatch):
    this_machine = recipes.this_machine.__wrapped__  # not cached
    read, readlink, here = Path.read_text, os.readlink, recipes.this_machine()
    assert here == this_machine()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", lambda path, *a, **k: "another\n" if path.name == "boot_id" else read(path, *a, **k))
        assert this_machine() != here
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]" if str(path) == "/proc/self/ns/pid" else readlink(path))
    assert this_machine() != here
