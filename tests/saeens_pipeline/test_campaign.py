"""Kills at random file events and damaged files, seeded: what lies under a final name is whole, and damage is noticed. Prints figures."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import child_process
import pytest
from tiny_experiment import Laboratory, run_and_print

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.recipes import RECIPE_FILE, Artefact, DamagedArtefactError, Store, Stored, all_artefacts

pytestmark = pytest.mark.slow

SEED, KILLS, DAMAGES = 19, 8, 400
FIRST_EVENTS, LAST_EVENTS = 50, 1500  # file events of one process until it is killed
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime"}


def run_until_killed(model: str, home: str, n_events: str) -> None:
    """Run the tiny experiment in this process, which kills itself at its n-th file event below the data root; 0: it runs to the end."""
    laboratory = Laboratory(Path(model), Path(home) / "defs", Path(home) / "data")
    left = int(n_events)

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(laboratory.root)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        sys.addaudithook(count)
        from rich.console import Console

        run_and_print("tiny", console=Console(file=sys.stderr))
    child_process.tell(finished=True)


def _artefacts(root: Path) -> dict[str, Artefact]:
    """Return every artefact by its path below the root. Raises DamagedArtefactError for a record that cannot be read."""
    found = {}
    for stored in all_artefacts(root):
        if isinstance(stored, DamagedArtefactError):
            raise stored
        found[stored.artefact.path.relative_to(root).as_posix()] = stored.artefact
    return found


def test_artefacts_are_whole_after_every_kill_and_a_last_run_makes_the_same(
    empty: Laboratory, finished_laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
):
    generator, ends = random.Random(SEED), Counter[str]()
    for _ in range(KILLS):
        n_events = generator.randrange(FIRST_EVENTS, LAST_EVENTS)
        child = child_process.start(run_until_killed, empty.model, empty.root.parent, n_events)
        child.communicate(timeout=child_process.DEADLINE_SECONDS)
        ends["killed" if child.returncode == -signal.SIGKILL else "finished"] += 1
        assert child.returncode in (0, -signal.SIGKILL)
        damage = [each for artefact in _artefacts(empty.root).values() for each in artefact.verify()]
        assert damage == []
    assert ends["killed"] > 0
    child_process.finish(child_process.start(run_until_killed, empty.model, empty.root.parent, 0))
    timed = ("reports/", "tables/tiny/cost/")  # they hold seconds
    expected = {path: each.data_version for path, each in _artefacts(finished_laboratory.root).items() if not path.startswith(timed)}
    found = {path: each.data_version for path, each in _artefacts(empty.root).items()}
    assert {path: found.get(path) for path in expected} == expected
    with capsys.disabled():
        print(
            f"\n{ends['killed']} kills, {ends['finished']} finished runs: no artefact is torn, {len(expected)} data versions are the same"
        )


def _flip_a_bit(file: Path, generator: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


def _cut_off_the_end(file: Path, generator: random.Random) -> None:
    os.truncate(file, generator.randrange(file.stat().st_size))


def _append_a_byte(file: Path, generator: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(generator.randbytes(1))


def _remove(file: Path, generator: random.Random) -> None:
    file.unlink()


DAMAGE: tuple[Callable[[Path, random.Random], None], ...] = (_flip_a_bit, _cut_off_the_end, _append_a_byte, _remove)


def test_damage_of_any_file_is_noticed(finished: Laboratory, capsys: pytest.CaptureFixture[str]):
    generator, store, counts = random.Random(SEED), Store(finished.root), Counter[str]()
    stored = [each for each in all_artefacts(finished.root) if isinstance(each, Stored)]
    for _ in range(DAMAGES):
        address, partition, artefact = generator.choice(stored)
        files = [artefact.path] if artefact.path.is_file() else [file for file in artefact.path.rglob("*") if file.is_file()]
        file, damage = generator.choice(sorted(files)), generator.choice(DAMAGE)
        if not file.stat().st_size:
            continue
        shutil.copy2(file, kept := finished.root.parent / "kept")
        damage(file, generator)
        try:
            left = store.find(address, partition)
            same_record = file.name == RECIPE_FILE and left == artefact  # white space was appended
            differences = ["none"] if same_record else left.verify() if left else ["gone"]
        except SaeensError as error:
            differences = [str(error)]
        counts[damage.__name__.strip("_").replace("_", " ")] += 1
        shutil.move(kept, file)
        assert differences, f"{damage.__name__} of {file.relative_to(finished.root)} goes unnoticed"
    with capsys.disabled():
        print(f"\n{counts.total()} damaged files, each noticed: {dict(counts)}")
