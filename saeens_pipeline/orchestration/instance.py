"""The Dagster instance: home folder, settings, dead runs, and the partitions that hold a source's layers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import yaml
from dagster import DagsterError, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from sqlalchemy.exc import DatabaseError

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.orchestration.dagster_internals import LOCAL_COMPUTE_LOGS, NO_COMPUTE_LOGS
from saeens_pipeline.storage.locks import holding_one_of
from saeens_pipeline.storage.recipes import has_start, is_alive, start_of, this_machine
from saeens_pipeline.storage.root import data_root

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)

_SETTINGS_FILE = "dagster.yaml"
_COMMAND_LINE_FILE = "command_line.yaml"
_DATABASE_MARK = ".database_is_set_up"
_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_HAS_NO_TABLES = "SELECT 'it holds no tables' WHERE NOT EXISTS (SELECT 1 FROM sqlite_master)"
_INTEGRITY = "PRAGMA quick_check(1)"
_MESSAGE_CHARACTERS = 300  # of Dagster's own messages
RECENT_RUNS = 300  # older runs are not read, to save time
PROCESS_TAG = "saeens/process"
LOCATION = "saeens"  # name of the code location
_SERVER_TAG = ".dagster/grpc_info"  # Dagster's tag on runs that it launched: the socket of the code server

_SETTINGS = """\
# Where Dagster keeps runs and events, one op at a time on the GPU, runs tried again whose process was killed, and no telemetry.
# `saeens` writes this file into DAGSTER_HOME; the file next to workspace.yaml serves a plain `dagster dev -w workspace.yaml`.
storage:
  sqlite:
    base_dir: {storage}
compute_logs:
  # Dagster's default; the class has no public module, and has to be named to choose its folder
  module: {compute_log_module}
  class: LocalComputeLogManager
  config:
    base_dir: {compute_logs}
concurrency:
  pools:
    default_limit: 1
    granularity: op
run_monitoring:
  enabled: true
  free_slots_after_run_end_seconds: 60
run_retries:
  enabled: true
  max_retries: 2
  retry_on_asset_or_op_failure: false
telemetry:
  enabled: false
nux:
  enabled: false
"""
WORKSPACE = f"""\
load_from:
  - python_module:
      module_name: saeens_pipeline.definitions
      location_name: {LOCATION}
"""


class DamagedInstanceError(SaeensError):
    """Dagster's settings or databases cannot be read. Artefacts do not depend on them."""


def instance_settings(home: str) -> str:
    """Return the content of `dagster.yaml` for an instance in `home`."""
    folders = {name: json.dumps(f"{home}/{name}") for name in ("storage", "compute_logs")}
    return _SETTINGS.format(**folders, compute_log_module=LOCAL_COMPUTE_LOGS)


def home_folder() -> Path:
    """Return DAGSTER_HOME or, if it is not set, `dagster` below the data root."""
    return Path(os.environ.get("DAGSTER_HOME") or data_root() / "dagster").absolute()


def prepare_home() -> Path:
    """Create and set up the home folder if necessary, set DAGSTER_HOME for this process and its children, and return the folder.

    Existing files stay unchanged, except for a `dagster.yaml` written by `saeens` that names another folder, after a copy or a move, or an
    empty one. Raises SaeensError for a folder that cannot be written, and for damaged files;
    ConfigurationError for a path that Dagster cannot use.
    """
    home = home_folder()
    if re.search(r"\?|%[0-9a-fA-F]{2}", str(home)):  # Dagster puts the path into a URL as it is
        raise ConfigurationError(f"{home}: Dagster cannot keep its databases in a path with ? or %20: set DAGSTER_HOME to another")
    settings = home / _SETTINGS_FILE
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not settings.exists() or not (text := _read(settings)).strip() or _is_ours(text):
            _write(settings, instance_settings(home.as_posix()))
        if not (home / "workspace.yaml").exists():
            _write(home / "workspace.yaml", WORKSPACE)
    except OSError as error:
        way_out = "set DAGSTER_HOME or SAEENS_DATA to a folder that can be"
        raise SaeensError(f"{home} cannot be written ({error.strerror}): {way_out}") from error
    os.environ["DAGSTER_HOME"] = str(home)
    if _is_ours(_read(settings)):
        _create_database(home)
        _check_database(home / "storage")
    elif not (home / _DATABASE_MARK).exists():  # two processes that create a database at the same time leave one that cannot be opened
        with holding_one_of(home, ["database"]), open_instance(home):
            (home / _DATABASE_MARK).touch()
    return home


def _create_database(home: Path) -> None:
    """Create the database in a folder aside, which gets its name when it is whole. One that an interruption left half is moved away."""
    storage, mark = home / "storage", home / _DATABASE_MARK
    if mark.exists() and storage.exists():
        return
    with holding_one_of(home, ["database"]):
        if mark.exists() and storage.exists():  # by the process that held the lock
            return
        if storage.exists():
            try:  # it may have been created by `dagster dev`
                _check_database(storage)
                with open_instance(home) as instance:
                    instance.get_dynamic_partitions("any")
            except Exception as error:
                away = _move_away(storage, "storage.unfinished")
                logger.warning("%s was not usable and is now %s (%s)", storage, away, " ".join(str(error).split())[:200])
        if not storage.exists():
            aside = home / "storage.new"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _write(aside / _SETTINGS_FILE, instance_settings(aside.as_posix()))
            with DagsterInstance.from_config(str(aside)):
                pass
            if (aside / "storage").exists():  # not for an instance in memory
                (aside / "storage").rename(storage)
            shutil.rmtree(aside, ignore_errors=True)
        mark.touch()


def _move_away(storage: Path, name: str) -> Path:
    """Rename a folder and return its new path. Nothing is deleted: an earlier one of this name may hold runs."""
    away = storage.with_name(name)
    while away.exists():
        away = away.with_name(f"{away.name}_")
    return storage.rename(away)


def replace_damaged_database() -> None:
    """Move a damaged database of DAGSTER_HOME aside, with a warning; the next `prepare_home` creates another.

    Reads all of it, for commands that compute. Settings of the user's own are left to the user.
    """
    home = home_folder()
    storage, settings = home / "storage", home / _SETTINGS_FILE
    if not settings.exists() or not _is_ours(_read(settings)) or not storage.exists():
        return
    with holding_one_of(home, ["database"]):
        for file in (storage / name for name in _DATABASES if (storage / name).exists()):
            damage = _damage(file, _HAS_NO_TABLES) or _damage(file, _INTEGRITY)
            if damage not in ("", "ok"):
                lost = "Dagster's list of runs starts anew, and layers that were added by hand have to be added again; artefacts are kept"
                away = _move_away(storage, "storage.damaged")
                logger.warning("%s was damaged (%s): %s is now %s. %s", file, damage.splitlines()[-1], storage, away, lost)
                return


def _check_database(storage: Path) -> None:
    """Raise SaeensError for a database file that holds no tables. Damage further inside is found when it is read."""
    for name in _DATABASES:
        if (storage / name).exists() and (damage := _damage(storage / name, _HAS_NO_TABLES)):
            raise _damaged(storage / name, damage, storage)


def _damage(file: Path, question: str) -> str:
    """Return the first answer of a database to a question about itself, or its error; empty for none."""
    try:
        with _reading(file) as connection:
            return str((connection.execute(question).fetchone() or [""])[0])
    except sqlite3.OperationalError:  # locked, or not readable: not damaged
        return ""
    except sqlite3.DatabaseError as error:
        return str(error)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection that only reads."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)))
        try:
            connection.execute("SELECT 1 FROM sqlite_master")
        except sqlite3.OperationalError:  # SQLite creates a file of its own beside the database, which a read-only folder forbids
            connection = sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)
            stack.enter_context(contextlib.closing(connection))
        yield connection


def _copy_databases(storage: Path, copy: Path) -> None:
    """Copy Dagster's databases as they are at one moment, each, without the events of successful and of old runs."""
    for name in _DATABASES:
        _copy_database(storage, copy, name)
    with contextlib.suppress(sqlite3.OperationalError), _reading(copy / _DATABASES[0]) as runs:
        question = f"SELECT run_id FROM runs WHERE status != 'SUCCESS' ORDER BY id DESC LIMIT {RECENT_RUNS}"
        for (run,) in runs.execute(question).fetchall():
            _copy_database(storage, copy, f"history/runs/{run}.db")


def _copy_database(storage: Path, copy: Path, name: str) -> None:
    if not (storage / name).exists():
        return
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        with _reading(storage / name) as source, contextlib.closing(sqlite3.connect(copy / name)) as target:
            source.backup(target)
    except sqlite3.DatabaseError as error:
        raise _damaged(storage / name, str(error), storage) from error


def _damaged(file: Path, damage: str, storage: Path) -> DamagedInstanceError:
    way_out = f"move {storage} away. Dagster's list of runs is lost with it; artefacts are not, and are found again"
    return DamagedInstanceError(f"{file} is damaged ({damage}): {way_out}")


@contextlib.contextmanager
def open_instance(home: Path, settings: str = _SETTINGS_FILE) -> Iterator[DagsterInstance]:
    """Yield the instance with the settings of a file in `home`. Raises SaeensError for wrong settings and a damaged database."""
    try:
        instance = DagsterInstance.from_config(str(home), settings)
    except (DagsterError, yaml.YAMLError, TypeError, ValueError, KeyError) as error:
        raise _wrong_settings(error) from error
    except DatabaseError as error:
        raise _explained(home, error) from error
    with instance:
        try:
            yield instance
        except DatabaseError as error:
            raise _explained(home, error) from error


def _explained(home: Path, error: DatabaseError) -> Exception:
    """Return an error that names the damaged file, also if it was found in a copy; or the error itself if none is damaged."""
    storage = home_folder() / "storage"
    for file in sorted((home / "storage").rglob("*.db")):
        if (damage := _damage(file, _INTEGRITY)) not in ("", "ok"):
            return _damaged(storage / file.relative_to(home / "storage"), damage.splitlines()[-1], storage)
    return error


def _wrong_settings(error: Exception) -> DamagedInstanceError:
    found = " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
    return DamagedInstanceError(
        f"{home_folder() / _SETTINGS_FILE} is wrong ({found}): correct it, or remove it, and `saeens` writes it again"
    )


def _read(settings: Path) -> str:
    try:
        return settings.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _wrong_settings(error) from error


def _write(file: Path, content: str) -> None:
    """Write a file under another name and rename it: no process reads a truncated file, and a killed one leaves none.

    A file that has this content already is not written.
    """
    if file.exists() and file.read_bytes() == content.encode():
        return
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(content, encoding="utf-8")
    aside.replace(file)


def _is_ours(settings: str) -> bool:
    """Return True for a `dagster.yaml` as `saeens` writes it, for any folder."""
    named = re.search(r"^    base_dir: \"?(.*)/storage\"?$", settings, re.MULTILINE)
    return named is not None and settings.replace('"', "") == instance_settings(named[1]).replace('"', "")


@contextlib.contextmanager
def command_line_instance() -> Iterator[DagsterInstance]:
    """Yield the instance of DAGSTER_HOME for runs in this process, without Dagster's capture of the output of steps.

    The capture's helper processes would break progress bars and print tracebacks after Ctrl-C. Raises as `prepare_home`.
    """
    home = prepare_home()
    _write_command_line_settings(home, _read(home / _SETTINGS_FILE))
    with open_instance(home, _COMMAND_LINE_FILE) as instance:
        yield instance


def _write_command_line_settings(home: Path, text: str) -> None:
    try:
        settings = dict(yaml.safe_load(text) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise _wrong_settings(error) from error
    settings["compute_logs"] = {"module": NO_COMPUTE_LOGS, "class": "NoOpComputeLogManager"}
    _write(home / _COMMAND_LINE_FILE, "# Written from dagster.yaml by every `saeens run`.\n" + yaml.safe_dump(settings))


@contextlib.contextmanager
def recorded_instance() -> Iterator[DagsterInstance | None]:
    """Yield the instance of DAGSTER_HOME for commands that only read; None if it does not exist. None is created.

    Where the folder cannot be written, the instance is a copy, because Dagster opens databases for writing only.
    """
    home = home_folder()
    if not (home / _SETTINGS_FILE).exists():
        yield None
    elif _is_writable(home):
        with command_line_instance() as instance:
            yield instance
    else:
        with tempfile.TemporaryDirectory() as folder:
            copy, text = Path(folder), _read(home / _SETTINGS_FILE)
            if is_ours := _is_ours(text):
                _check_database(home / "storage")
                _copy_databases(home / "storage", copy / "storage")
            _write_command_line_settings(copy, instance_settings(copy.as_posix()) if is_ours else text)
            with open_instance(copy, _COMMAND_LINE_FILE) as instance:
                yield instance


def recorded(read: Callable[[DagsterInstance], Answer], otherwise: Answer) -> Answer:
    """Return what `read` finds in the instance of DAGSTER_HOME; `otherwise` without one and, with a warning, for a damaged one."""
    try:
        with recorded_instance() as instance:
            return read(instance) if instance else otherwise
    except DamagedInstanceError as error:
        _warn_once(f"Dagster's records are left out: {error}")
        return otherwise


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def process_tag() -> dict[str, str]:
    """Return the tag with machine, process and its start of a run in this process, by which other processes find out if it is alive."""
    return {PROCESS_TAG: f"{this_machine()}:{os.getpid()}@{start_of(os.getpid())}"}


def servers_prefix() -> str:
    """Return the name's beginning for the folder of the code servers' sockets: machine, process, which leads their group, and its start."""
    start = start_of(os.getpid())
    return f"saeens-{this_machine()}-{os.getpid()}-{start and f'{start}-'}"


def is_of_command_line(run: DagsterRun) -> bool:
    """Return True for a run of the command line."""
    return PROCESS_TAG in run.tags and _SERVER_TAG not in run.tags  # the UI's re-execution of a run copies its tags


def process_is_gone(run: DagsterRun) -> bool:
    """Return True if this process can prove that no process executes a run: it was on this machine since its last start.

    A run of the command line is tagged with its process. One that `saeens ui` started names the process group of the UI in the path of its
    code server's socket. Nothing is known about processes elsewhere, and about those of other code locations.
    """
    if is_of_command_line(run):
        machine, _, process = run.tags[PROCESS_TAG].rpartition(":")
        pid, _, start = process.partition("@")  # tags of earlier versions have no start
        return machine == this_machine() and pid.isdecimal() and not is_alive(int(pid), start)
    origin = run.remote_job_origin
    if origin is None or origin.location_name != LOCATION:
        return False
    server = re.search(r"/saeens-([0-9a-f]{8})-(\d+)-(?:(\d+)-)?", run.tags.get(_SERVER_TAG, ""))
    return server is not None and server[1] == this_machine() and not _group_is_alive(int(server[2]), server[3] or "")


def _group_is_alive(group: int, start: str) -> bool:
    """Return whether a process group exists. Its number is not used again while it exists, so that a leader has the same start."""
    try:
        os.killpg(group, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return has_start(group, start)


def end_dead_runs(instance: DagsterInstance) -> None:
    """Cancel runs whose processes on this host were killed, and free their GPU slots, which they would hold forever.

    They do not count as failed, so that the automation requests their artefacts again. Runs whose end cannot be proved stay as they are.
    """
    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
        if process_is_gone(run):
            instance.report_run_canceled(run, "The process that executed this run was killed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def layers_name(source: str) -> str:
    """Return the name of the dynamic partitions that hold the layers of a source."""
    return f"{source}_layers"


def declared_layers_name(source: str) -> str:
    """Return the name of the dynamic partitions that record the layers from the experiment file, which are removed with the file's."""
    return f"{source}/declared_layers"  # no source can have this name


def layer_changes(instance: DagsterInstance, source: str, declared: Sequence[int]) -> list[tuple[str, list[str], list[str]]]:
    """Return the name of both dynamic partitions of a source, the layers to add in numeric order, and those that left its file.

    Layers added by hand stay.
    """
    now, names = [str(layer) for layer in sorted(declared)], (layers_name(source), declared_layers_name(source))
    known = {name: instance.get_dynamic_partitions(name) for name in names}
    gone = [layer for layer in known[names[1]] if layer not in now]
    return [(name, [layer for layer in now if layer not in known[name]], gone) for name in names]


def declare_layers(instance: DagsterInstance, source: str, declared: Sequence[int]) -> None:
    """Update the partitions of a source to the layers of its experiment file."""
    for name, added, gone in layer_changes(instance, source, declared):
        if added:
            instance.add_dynamic_partitions(name, added)
        for layer in gone:
            instance.delete_dynamic_partition(name, layer)


def register_layers(instance: DagsterInstance, source: str, layers: Sequence[int]) -> list[int]:
    """Add layers to a source, in numeric order, and return the new ones."""
    known = instance.get_dynamic_partitions(layers_name(source))
    new = [layer for layer in sorted(set(layers)) if str(layer) not in known]
    if new:
        instance.add_dynamic_partitions(layers_name(source), [str(layer) for layer in new])
    return new


def added_layers(instance: DagsterInstance, source: str) -> list[str]:
    """Return the partition keys that users added to a source's layers. They are unchecked: the UI accepts any text."""
    declared = set(instance.get_dynamic_partitions(declared_layers_name(source)))
    return [layer for layer in instance.get_dynamic_partitions(layers_name(source)) if layer not in declared]
