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
from rich.console import Console
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory, run_and_print
from typer.testing import CliRunner

from saeens_pipeline import cli
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.recipes import RECIPE_FILE, Artefact, DamagedArtefactError, Store, Stored, all_artefacts

pytestmark = pytest.mark.slow

SEED, KILLS, DAMAGES = 19, 8, 400
FIRST_EVENTS, LAST_EVENTS = 50, 1500  # file events of one process until it is killed
MOST_EVENTS = {"report": 250, "gc": 250}
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime"}


READING = (
    ("status", NAME),
    ("plan", NAME),
    ("table", NAME, "reconstruction"),
    ("lineage", f"{NAME}/bagging/member_1:layer={LAYER},seed={SEEDS[0]}"),
    ("gc",),
    ("leaderboard", "--format", "csv"),
)


def run_until_killed(model: str, home: str, n_events: str, *command: str) -> None:
    """Run the tiny experiment, or a command, in this process, which kills itself at its n-th file event below the data root.

    0: it runs to the end.
    """
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
        if command:
            CliRunner().invoke(cli.app, command, catch_exceptions=False)
        else:
            run_and_print(NAME, console=Console(file=sys.stderr))
    child_process.tell(finished=True)


def _answers(*command: str) -> bool:
    """Return whether a command succeeds in this process. Fails for an error that is not one of ours."""
    result = CliRunner().invoke(cli.app, command)
    if result.exception is not None and not isinstance(result.exception, (SystemExit, SaeensError)):
        raise result.exception
    return result.exit_code == 0


def _kill(laboratory: Laboratory, n_events: int, *command: str) -> str:
    """Run the experiment or a command in a process until it is killed or ends, and return which. Every artefact is whole then."""
    child = child_process.start(run_until_killed, laboratory.model, laboratory.root.parent, n_events, *command)
    _, printed = child.communicate(timeout=child_process.DEADLINE_SECONDS)
    assert child.returncode in (0, -signal.SIGKILL), printed
    assert [each for artefact in _artefacts(laboratory.root).values() for each in artefact.verify()] == []
    return "killed" if child.returncode else "finished"


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
    generator, ends, answered = random.Random(SEED), Counter[str](), Counter[str]()
    for _ in range(KILLS):
        ends[_kill(empty, generator.randrange(FIRST_EVENTS, LAST_EVENTS))] += 1
        answered.update(command[0] for command in READING if _answers(*command))
        assert _answers("gc", "--delete")  # keeps what the next run resumes from
    assert {"status", "plan", "gc"} <= {command for command, n in answered.items() if n == KILLS}
    assert ends["killed"] > 0
    child_process.finish(child_process.start(run_until_killed, empty.model, empty.root.parent, 0))
    timed = ("reports/", "tables/tiny/cost/")  # they hold seconds
    expected = {path: each.data_version for path, each in _artefacts(finished_laboratory.root).items() if not path.startswith(timed)}
    found = {path: each.data_version for path, each in _artefacts(empty.root).items()}
    assert {path: found.get(path) for path in expected} == expected
    with capsys.disabled():
        print(
            f"\n{ends['killed']} kills, {ends['finished']} finished runs: no artefact is torn, {len(expected)} data versions are the same; "
            f"answers after them: {dict(answered)}"
        )


def test_kills_of_reports_and_of_the_removal_of_garbage_leave_whole_artefacts(finished: Laboratory, capsys: pytest.CaptureFixture[str]):
    generator, ends = random.Random(SEED), Counter[str]()
    finished.declare(ensemble={"members": 3, "seeds": [SEEDS[0]]})  # the other seed is garbage
    for command, folder in ((("report", NAME), "reports"), (("gc", "--delete"), "experiments")):
        if folder == "reports":
            shutil.rmtree(finished.root / folder)
        for _ in range(KILLS // 2):
            ends[_kill(finished, generator.randrange(1, MOST_EVENTS[command[0]]), *command)] += 1
            for reading in READING:
                assert _answers(*reading), reading
        assert _kill(finished, 0, *command) == "finished"
    assert ends["killed"] > 1
    assert (finished.root / "reports" / NAME / f"layer={LAYER}" / "index.html").exists()
    assert not list(finished.root.rglob(f"seed={SEEDS[1]}"))
    assert not list(finished.root.rglob("*.partial"))
    with capsys.disabled():
        print(f"\n{dict(ends)} reports and removals of garbage: no artefact is torn, every command answers")


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
