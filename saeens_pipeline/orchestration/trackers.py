"""Mirrors of training curves and tables in trackers of experiments, one adapter for each. A tool is imported when it is first written to.

Artefacts do not depend on a tracker: one that fails is reported once and then left alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from filelock import FileLock

from saeens_pipeline.assets.materialise import Materialised
from saeens_pipeline.assets.registry import TABLES
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.names import CURVE_FILE
from saeens_pipeline.storage.recipes import digest
from saeens_pipeline.storage.tables import read_part

VARIABLE = "SAEENS_TRACKER"
FOLDER = "trackers"  # in the data root: the files of each tracker in a folder of its name
LOCK_SECONDS = 60.0
_SECRET_NAMES = ("KEY", "TOKEN", "PASSWORD", "SECRET", "WEBHOOK")
_IN_ADDRESSES = re.compile(r"(?<=://)[^/\s@]+@|(?<=token=)[^&\s'\"]+|(?<=key=)[^&\s'\"]+")

logger = logging.getLogger(__name__)
_failed: set[str] = set()  # trackers that failed in this process


class TrackedRun(NamedTuple):
    """A run of a tracker: an SAE's training, or one partition of a table."""

    experiment: str
    name: str
    """Such as `bagging/member_1/layer=1/seed=42/`, then the first digits of the data version."""
    config: Mapping[str, str | int | float]
    """Asset, partition, data version, and the settings of the recipe; fields of nested settings are joined by dots."""
    points: Sequence[tuple[int, Mapping[str, float]]]
    """Values by step, in increasing order: of a training the tokens, of a table the number of members."""


class Tracker(NamedTuple):
    """An adapter. The name of its extra in pyproject.toml is its name in `TRACKERS`."""

    package: str
    write: Callable[[TrackedRun, Path], None]
    """Write a run to the tool, or to files in a folder."""
    environment: Mapping[str, str] = {}
    """Variables that are set before the tool is imported, unless they are set: no telemetry, and no long waits for a server."""


def _write_tensorboard(run: TrackedRun, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / run.experiment / run.name)) as writer:
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in run.config.items()))
        for step, values in run.points:
            for name, value in values.items():
                writer.add_scalar(name, value, step)


def _write_wandb(run: TrackedRun, folder: Path) -> None:
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))  # a log of wandb's own program
    import wandb  # pyright: ignore[reportMissingImports]

    mode = os.environ.get("WANDB_MODE")
    if mode in (None, "online"):
        has_key = wandb.login(prompt=False)
        if mode and not has_key:
            raise RuntimeError("WANDB_MODE=online, and there is no key: set WANDB_API_KEY, or run `wandb login`")
        mode = "online" if has_key else "offline"
    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        init_timeout=30,
        finish_timeout=60,
        finish_timeout_raises=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    written = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or run.experiment,
        dir=os.environ.get("WANDB_DIR") or str(folder),
        id=digest([run.experiment, run.name, run.config["data_version"]]),
        name=run.name,
        group=run.experiment,
        config=dict(run.config),
        mode=mode,  # pyright: ignore[reportArgumentType]  # wandb names the values that it knows
        reinit="create_new",
        settings=quiet,
    )
    for step, values in run.points:
        written.log(dict(values), step=step)
    written.finish()


def _write_mlflow(run: TrackedRun, folder: Path) -> None:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

    server = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(server or f"sqlite:///{folder / 'mlflow.db'}")
    name, now = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.experiment, round(time.time() * 1000)
    found = client.get_experiment_by_name(name)
    files = None if server else str(folder / "artifacts")
    experiment = found.experiment_id if found else client.create_experiment(name, files)
    run_id = client.create_run(experiment, run_name=run.name).info.run_id
    params = [Param(name, str(value)) for name, value in run.config.items()]
    metrics = [Metric(name, value, now, step) for step, values in run.points for name, value in values.items()]
    for start in range(0, len(params), 100):  # limits of MLflow's requests
        client.log_batch(run_id, params=params[start : start + 100])
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    client.set_terminated(run_id)


def _write_trackio(run: TrackedRun, folder: Path) -> None:
    os.environ.setdefault("TRACKIO_DIR", str(folder))  # read at import
    import trackio  # pyright: ignore[reportMissingImports]
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    steps, values = [step for step, _ in run.points], [dict(each) for _, each in run.points]
    if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
        SQLiteStorage.bulk_log(run.experiment, run.name, values, steps, config=dict(run.config))  # `init` would ask the hub for the user
        return
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        written = trackio.init(run.experiment, name=run.name, config=dict(run.config), embed=False, auto_log_gpu=False, auto_log_cpu=False)
        for step, each in zip(steps, values, strict=True):
            written.log(each, step)
        trackio.finish()
    if failures := [str(each.message) for each in warned if each.category is UserWarning and trackio.__name__ in each.filename]:
        raise ConnectionError(failures[-1])  # trackio raises no errors of servers


TRACKERS = {
    "tensorboard": Tracker("tensorboard", _write_tensorboard),
    "wandb": Tracker("wandb", _write_wandb, {"WANDB_ERROR_REPORTING": "false"}),
    "mlflow": Tracker(
        "mlflow",
        _write_mlflow,
        {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        },
    ),
    "trackio": Tracker("trackio", _write_trackio, {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}),
}


def chosen_tracker() -> str:
    """Return the name in SAEENS_TRACKER; empty for none. Raises ConfigurationError for an unknown tracker, or one that is not installed."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in TRACKERS:
        raise ConfigurationError(f"{VARIABLE}={name}: there is no such tracker; one of: {', '.join(TRACKERS)}")
    if name and not find_spec(TRACKERS[name].package):
        raise ConfigurationError(f"{VARIABLE}={name}: {TRACKERS[name].package} is not installed: pip install 'saeens[{name}]'")
    return name


def mirror(name: str, made: Materialised) -> None:
    """Write an artefact that was computed to a tracker: the curve of an SAE, or the headlines of a table.

    Cache hits, linked artefacts and other artefacts are left out. An error is logged as a warning, without secrets; then nothing more is
    mirrored in this process.
    """
    if name in _failed or made.is_hit or "same_as" in made.artefact.provenance:
        return
    tracker, root = TRACKERS[name], made.artefact.root(made.declaration.address, made.partition)
    try:
        run = tracked_run(made)
        if run:
            folder = root.absolute() / FOLDER / name
            folder.mkdir(parents=True, exist_ok=True)
            for variable, value in tracker.environment.items():
                os.environ.setdefault(variable, value)
            with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
                tracker.write(run, folder)
    except Exception as error:
        _failed.add(name)
        reason = " ".join(without_secrets(f"{type(error).__name__}: {error}").split())
        logger.warning("the tracker %s failed, and nothing more is mirrored in this process; artefacts are complete. %s", name, reason)


def tracked_run(made: Materialised) -> TrackedRun | None:
    """Return the tracker's run of an artefact; None for artefacts without a training curve or headlines."""
    address, artefact = made.declaration.address, made.artefact
    if made.declaration.builder == "sae":
        points = _curve(artefact.path / CURVE_FILE)
    elif address.kind == "eval" and TABLES[address.name].headlines:
        points = _headlines(address.name, artefact.path)
    else:
        return None
    where = {name: value for name, value in made.partition._asdict().items() if value is not None}
    parts = [address.kind, address.name, *(f"{name}={value}" for name, value in where.items()), artefact.data_version[:8]]
    config = {"asset": str(address), **where, "data_version": artefact.data_version, **dict(_flat(artefact.recipe["settings"]))}
    return TrackedRun(address.owner, "/".join(parts), config, points) if points else None


def _curve(file: Path) -> list[tuple[int, dict[str, float]]]:
    rows = pl.read_parquet(file, glob=False).drop("step").iter_rows(named=True)
    return [(row.pop("tokens"), {name: float(value) for name, value in row.items() if value is not None}) for row in rows]


def _headlines(name: str, part: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the means of a table's headlines over the rows of each method and number of members."""
    table = with_totals(read_part(part))
    columns = dict.fromkeys(each.column for each in TABLES[name].headlines if each.column in table.columns)
    means = table.group_by("n_members", "method").agg(pl.col(*columns).cast(pl.Float64).mean()).drop_nulls("n_members")
    points: dict[int, dict[str, float]] = {}
    for row in means.sort("n_members", "method").iter_rows(named=True):
        n_members, method = row.pop("n_members"), row.pop("method")
        values = {f"{method}/{column}": value for column, value in row.items() if value is not None}
        if values:
            points.setdefault(n_members, {}).update(values)
    return list(points.items())


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str | int | float]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value if isinstance(value, str | int | float) else json.dumps(value)


def without_secrets(text: str) -> str:
    """Return text without the values of environment variables that hold keys, and without credentials in addresses."""
    for name, value in os.environ.items():
        if name.endswith(_SECRET_NAMES) and value.strip():
            text = text.replace(value.strip(), "***")
    return _IN_ADDRESSES.sub("***", text)
