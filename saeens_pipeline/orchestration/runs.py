"""Runs of the command line: checks, then one Dagster run in this process for each stage."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from dagster import AssetKey, DagsterEventType, DagsterExecutionInterruptedError, DagsterInstance
from rich.console import Console

from saeens_pipeline import progress
from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.declarations import CHANGED, Declaration, Force, Op, changes_in
from saeens_pipeline.assets.kernels import compiled_meanwhile
from saeens_pipeline.assets.memory import out_of_memory_message
from saeens_pipeline.assets.registry import evaluations_of
from saeens_pipeline.assets.sources import declared_facts
from saeens_pipeline.assets.staleness import Stage, Status, plan
from saeens_pipeline.errors import ConfigurationError, SaeensError, counted
from saeens_pipeline.orchestration.alerts import alerting, webhook
from saeens_pipeline.orchestration.assets import force_tag, partition_key
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.orchestration.dagster_internals import MaxRetriesExceededError, name_code_location
from saeens_pipeline.orchestration.instance import (
    LOCATION,
    command_line_instance,
    declare_layers,
    end_dead_runs,
    process_tag,
    recorded,
    register_layers,
    replace_damaged_database,
)
from saeens_pipeline.orchestration.layers import LAYERS_TAG, recorded_layers
from saeens_pipeline.orchestration.retries import unwrapped
from saeens_pipeline.orchestration.trackers import chosen_tracker
from saeens_pipeline.report.asset import REPORT
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.disk import writing_nothing
from saeens_pipeline.storage.names import INDEX_FILE, Address, Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root
from saeens_pipeline.storage.tables import has_table, layers_with_tables

_RUN = "saeens run"
SET_TAG = "saeens/set"  # of a run: fields of the experiment file with values from the command line
_NO_RETRIES = {"dagster/max_retries": "0"}  # by the daemon of a UI that is open meanwhile: the next command goes on


class Counterpart(NamedTuple):
    """The same experiment on a language model with other weights: the control, or the experiment that it controls."""

    name: str
    language_model: str
    statuses: Sequence[Status]


class Outcome(NamedTuple):
    """An experiment after a run."""

    experiment: ExperimentSettings
    statuses: Sequence[Status]
    counterpart: Counterpart | None
    reports: Sequence[Path]
    """Pages of the fresh reports."""
    renewed: Sequence[Path]
    """Pages of other experiments' reports that show this one as their control and were written again."""
    seconds: float


def reporter_for(console: Console) -> progress.Reporter:
    """Return bars for a terminal, plain lines elsewhere."""
    return partial(progress.in_bars, console) if console.is_terminal else partial(progress.in_lines, partial(print_line, console))


def print_line(console: Console, line: str) -> None:
    """Print a line unchanged: rich adds no markup, colours or line breaks."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def experiment_status(catalogue: Catalogue, name: str) -> list[Status]:
    """Return the status of every artefact of an experiment, in the order in which they are computed."""
    experiment = catalogue.experiment(name)
    return _statuses(_plan(catalogue, experiment, recorded_layers(catalogue.sources[experiment.source]).layers))


def _plan(catalogue: Catalogue, experiment: ExperimentSettings, layers: Sequence[int]) -> list[Stage]:
    return plan(Store(data_root()), catalogue.ops(experiment), layers, experiment.ensemble.seeds)


def _statuses(stages: Sequence[Stage]) -> list[Status]:
    return [status for stage in stages for status in stage.statuses]


class Selection(NamedTuple):
    """The part of an experiment that a command computes. An empty sequence restricts nothing."""

    layers: Sequence[int] = ()
    seeds: Sequence[int] = ()
    assets: Sequence[str] = ()
    """Ends of asset keys, such as `bagging/member_1`; their inputs are computed where they are missing or stale."""
    force: bool = False
    """Compute the selected artefacts anew although they are fresh, but not their inputs."""


class _Choice(NamedTuple):
    """The artefacts that a run computes, by stage, and the layers and stages of the experiment."""

    experiment: ExperimentSettings
    layers: Sequence[int]
    stages: Sequence[Stage]
    chosen: Sequence[tuple[Stage, list[Declaration]]]
    force: Force | None

    @property
    def n_wanted(self) -> int:
        return sum(len(declarations) for _, declarations in self.chosen)


def run_experiment(catalogue: Catalogue, name: str, selection: Selection, *, verbose: bool = False, console: Console) -> Outcome:
    """Compute missing and stale artefacts of an experiment, stage by stage, and show progress. `verbose`: Dagster tells everything."""
    began = time.monotonic()
    recorded(end_dead_runs, None)
    choice = _choose(catalogue, name, selection, console)
    experiment, store, n_wanted = choice.experiment, Store(data_root()), choice.n_wanted
    n_fresh = sum(s.state == "fresh" and s.declaration not in made for stage, made in choice.chosen for s in stage.statuses)
    n_others = len(_statuses(choice.stages)) - n_fresh - n_wanted
    others = f", {n_others} not selected" if n_others else ""
    if not n_wanted:
        print_line(console, f"{name}: nothing to do: {counted(n_fresh, 'artefact')} fresh (cache hits){others}; no training")
    else:
        wanted = [declaration for _, declarations in choice.chosen for declaration in declarations]
        with _log_lines(console):
            _check(catalogue, choice, console)
        print_line(console, f"{name}: {counted(n_wanted, 'artefact')} to compute, {n_fresh} fresh (cache hits){others}")
        for stage, declarations in choice.chosen:
            for status in stage.statuses:
                if status.state == "damaged" and status.declaration in declarations:
                    print_line(console, status.reason)
        stages = [(stage.partition, made) for stage, made in choice.chosen if made]
        with compiling_ahead(store, wanted), _log_lines(console), progress.report_to(reporter_for(console)):
            of_source, tags = {experiment.source: choice.layers}, _tags(catalogue, choice)
            _execute(catalogue, of_source, stages, _RUN, tags, console=console, verbose=verbose)
    statuses, seeds = _statuses(_plan(catalogue, experiment, choice.layers)), selection.seeds or experiment.ensemble.seeds
    asked = [status for status in statuses if status.partition.seed in (None, *seeds)]
    reports = [store.path(*s.where) / INDEX_FILE for s in asked if s.declaration.address.kind == REPORT and s.state == "fresh"]
    renewed = _renew_reports_that_show(catalogue, store, name, choice.layers) if n_wanted else []
    if reports or renewed:
        make_alone(catalogue, catalogue.leaderboard_page(), _RUN)
    return Outcome(experiment, asked, _counterpart(catalogue, name, choice.layers), reports, renewed, time.monotonic() - began)


def dry_run(catalogue: Catalogue, name: str, selection: Selection, *, console: Console) -> list[Status]:
    """Return the artefacts that `run_experiment` would compute, in the order of its stages, with their reasons. Write nothing.

    Raises the errors with which the run would be refused before its first stage.
    """
    with writing_nothing():
        choice = _choose(catalogue, name, selection, console)
        if choice.n_wanted:
            with _log_lines(console):
                _check(catalogue, choice, console)
    reasons = {"fresh": "computed anew: --force", "missing": "not computed yet"}
    wanted = [status for stage, made in choice.chosen for status in stage.statuses if status.declaration in made]
    return [replace(status, reason=status.reason or reasons[status.state]) for status in wanted]


def _choose(catalogue: Catalogue, name: str, selection: Selection, console: Console) -> _Choice:
    """Return the artefacts to compute. Raises ConfigurationError for unknown seeds and assets, SaeensError for a root without access."""
    experiment = catalogue.experiment(name)
    layers, impossible = sorted(set(selection.layers)), []
    if not layers:
        layers, impossible = recorded_layers(catalogue.sources[experiment.source])
    if impossible:
        console.print(f"left out, since the language model lacks them: layers {', '.join(impossible)}; remove them in the UI")
    if unknown := ", ".join(map(str, sorted(set(selection.seeds) - set(experiment.ensemble.seeds)))):
        raise ConfigurationError(f"{name} has no seed {unknown}; it has {', '.join(map(str, experiment.ensemble.seeds))}")
    Store(data_root()).require_writable()
    stages = _plan(catalogue, experiment, layers)
    request = _request(stages, selection.assets) if selection.force else None
    return _Choice(experiment, layers, stages, _restricted(stages, selection, request, console), request)


def _check(catalogue: Catalogue, choice: _Choice, console: Console) -> None:
    """Run the checks before the first stage, and print what they announce. Raises the errors of the tracker and the preflights."""
    chosen_tracker()  # refused here, rather than after the preflight
    webhook()
    for line in _preflight(catalogue, choice.experiment, Store(data_root()), choice.chosen):
        print_line(console, line)


def _log_lines(console: Console) -> contextlib.AbstractContextManager[None]:
    return progress.forward_log_lines(lambda _level, message: print_line(console, " ".join(message.splitlines())))


def _tags(catalogue: Catalogue, choice: _Choice) -> dict[str, str]:
    """Return further tags of a command's runs: fields that were set on the command line, and what is computed anew."""
    changes = [*choice.experiment.changes, *catalogue.sources[choice.experiment.source].changes]
    told = {SET_TAG: changes_in({CHANGED: {each.field: each.value for each in changes}})} if changes else {}
    return told | (force_tag(choice.force) if choice.force else {})


def make_reports(catalogue: Catalogue, name: str | None, layers: Sequence[int]) -> list[Path]:
    """Materialise the reports of an experiment and the page over all experiments; return the pages to open.

    A report with missing tables names them. Without `layers`: the reports of all layers with a table. Without a name: only the page over
    all experiments. Raises SaeensError without any table.
    """
    store = Store(data_root())
    pages: list[Path] = []
    if name:
        experiment = catalogue.experiment(name)
        pages = _make_reports(catalogue, store, experiment, _layers_with_tables(catalogue, store, experiment, layers), "saeens report")
    return [*pages, make_alone(catalogue, catalogue.leaderboard_page(), "saeens report") / INDEX_FILE]


def make_alone(catalogue: Catalogue, op: Op, command: str) -> Path:
    """Materialise the output of an op without partitions, unless it is a cache hit; return its path. `command` is shown as the user."""
    store, (declaration,) = Store(data_root()), op.outputs
    if not store.hit(declaration.address, Partition(), declaration.recipe(store, Partition())):
        _execute(catalogue, {}, [(Partition(), [declaration])], command)
    return store.path(declaration.address, Partition())


def _counterpart(catalogue: Catalogue, name: str, layers: Sequence[int]) -> Counterpart | None:
    """Return the status of an experiment's control, or of the experiment that it controls; None without either."""
    other = catalogue.counterpart(name)
    if other is None:
        return None
    experiment = catalogue.experiments[other]
    return Counterpart(other, catalogue.sources[experiment.source].weights, _statuses(_plan(catalogue, experiment, layers)))


def _renew_reports_that_show(catalogue: Catalogue, store: Store, control: str, layers: Sequence[int]) -> list[Path]:
    """Make the reports that show this control again, where they are on disk and stale; return their pages."""
    pages: list[Path] = []
    for name in (name for name, each in catalogue.controls.items() if each == control):
        experiment = catalogue.experiments[name]
        report = _report_of(catalogue, experiment)
        there = [layer for layer in layers if (store.path(report.address, Partition(layer)) / INDEX_FILE).exists()]
        is_fresh = {layer: store.hit(report.address, where := Partition(layer), report.recipe(store, where)) for layer in there}
        pages += _make_reports(catalogue, store, experiment, [layer for layer in there if not is_fresh[layer]], _RUN)
    return pages


def _report_of(catalogue: Catalogue, experiment: ExperimentSettings) -> Declaration:
    return next(output for op in catalogue.ops(experiment) for output in op.outputs if output.address.kind == REPORT)


def _make_reports(catalogue: Catalogue, store: Store, experiment: ExperimentSettings, layers: Sequence[int], command: str) -> list[Path]:
    report = _report_of(catalogue, experiment)
    _execute(catalogue, {experiment.source: layers}, [(Partition(layer), [report]) for layer in layers], command)
    return [store.path(report.address, Partition(layer)) / INDEX_FILE for layer in layers]


def _layers_with_tables(catalogue: Catalogue, store: Store, experiment: ExperimentSettings, wanted: Sequence[int]) -> list[int]:
    source, name, root = catalogue.sources[experiment.source], experiment.name, store.root
    known = sorted(source.layers)
    if not {*wanted, *layers_with_tables(root, name)} <= set(known):
        known = recorded_layers(source).layers
    unknown = [str(layer) for layer in wanted if layer not in known]
    if unknown:
        raise ConfigurationError(f"{name} has no layer {', '.join(unknown)}; it has {', '.join(map(str, known))}")
    tables = [table.name for table in evaluations_of(experiment)]
    there = [layer for layer in wanted or known if any(has_table(root, name, table, layer) for table in tables)]
    if not there:
        which = f" of layer {', '.join(map(str, wanted))}" if wanted else ""
        raise SaeensError(f"{name} has no table{which} below {root} yet, and a report needs tables: run `saeens run {name}`")
    return there


def _preflight(
    catalogue: Catalogue, experiment: ExperimentSettings, store: Store, chosen: Sequence[tuple[Stage, list[Declaration]]]
) -> Iterator[str]:
    """Run the preflights of the ops of these artefacts, then yield the announcements of their tables."""
    facts = cache(partial(declared_facts, catalogue.sources[experiment.source]))
    wanted = {(each.address, stage.partition): each for stage, declarations in chosen for each in declarations}
    for op in catalogue.ops(experiment):
        addresses = {output.address for output in op.outputs}
        if of_op := [(each, partition) for (address, partition), each in wanted.items() if address in addresses]:
            op.preflight(store, of_op, facts)
    for table in evaluations_of(experiment):
        n_tables = sum(each.address.name == table.name for each in wanted.values())
        if n_tables and (announced := table.announcement(experiment, n_tables)):
            yield f"{experiment.name}/eval/{table.name}: {announced}"


def _restricted(
    stages: Sequence[Stage], selection: Selection, force: Force | None, console: Console
) -> list[tuple[Stage, list[Declaration]]]:
    """Return the artefacts of each stage that are not fresh or computed anew, restricted to the selected seeds and assets."""
    seeds, allowed = selection.seeds, _selected(stages, selection.assets) if selection.assets else None
    chosen: list[tuple[Stage, list[Declaration]]] = []
    left_out = False
    for stage in stages:
        to_make = [d for d in stage.to_make if allowed is None or d in allowed]
        anew = [s.declaration for s in stage.statuses if force and force.concerns(s.declaration)]
        wanted = [s.declaration for s in stage.statuses if s.declaration in to_make or s.declaration in anew]
        if seeds and stage.partition.seed is not None and stage.partition.seed not in seeds:
            left_out = left_out or bool(wanted)
            wanted = []
        if left_out and stage.partition.seed is None and any(d.seeds for d in wanted):
            console.print("tables that compare seeds are left out: not all seeds are selected", highlight=False)
            wanted = []
        chosen.append((stage, wanted))
    return chosen


def _selected(stages: Sequence[Stage], select: Sequence[str]) -> list[Declaration]:
    """Return the artefacts whose keys end in one of `select`, and all their inputs."""
    declarations = _by_address(stages)
    pending, found = _named(declarations, select), []
    while pending:
        declaration = pending.pop()
        if declaration not in found:
            found.append(declaration)
            pending += [declarations[each.artefact.address] for each in declaration.inputs if each.in_graph]
    return found


def _by_address(stages: Sequence[Stage]) -> dict[Address, Declaration]:
    return {status.declaration.address: status.declaration for stage in stages for status in stage.statuses}


def _named(declarations: Mapping[Address, Declaration], select: Sequence[str]) -> list[Declaration]:
    """Return the artefacts whose keys end in one of `select`. Raises ConfigurationError, with all keys, for one that fits none."""
    named: list[Declaration] = []
    for wanted in select:
        matching = [d for d in declarations.values() if f"/{d.address}".endswith(f"/{wanted.strip('/')}")]
        if not matching:
            raise ConfigurationError(f"--select {wanted}: no such asset; there are: {', '.join(map(str, declarations))}")
        named += matching
    return named


def _request(stages: Sequence[Stage], select: Sequence[str]) -> Force:
    """Return a new request to compute the selected artefacts anew, without their inputs; without `select`, all."""
    return Force(uuid.uuid4().hex[:8], frozenset(str(each.address) for each in _named(_by_address(stages), select)))


def compiling_ahead(store: Store, wanted: Sequence[Declaration]) -> contextlib.AbstractContextManager[object]:
    """Compile the kernels of CPU training in another process during the steps before training, if there are any."""
    architectures = {declaration.tags["architecture"] for declaration in wanted if declaration.builder == "sae"}
    comes_first = any(declaration.builder in {"tokens", "activations"} for declaration in wanted)
    if architectures and comes_first and Compute.from_environment().resolve() == "cpu":
        return compiled_meanwhile(store.root, architectures)
    return contextlib.nullcontext()


def _execute(
    catalogue: Catalogue,
    layers: Mapping[str, Sequence[int]],
    chosen: Sequence[tuple[Partition, list[Declaration]]],
    command: str,
    tags: Mapping[str, str] | None = None,
    *,
    console: Console | None = None,
    verbose: bool = False,
) -> None:
    """Execute a Dagster run in this process for each partition, and raise the error of a failed run. Registers `layers`, by source.

    `tags`: further tags of the runs. A line on `console` tells the end of each; with `verbose` Dagster tells everything.
    """
    if not chosen:
        return
    replace_damaged_database()
    with contextlib.nullcontext() if verbose else _quiet(), command_line_instance() as instance, _interrupts() as raise_interrupt:
        name_code_location(instance, LOCATION)
        for source, wanted in layers.items():
            declare_layers(instance, source, catalogue.sources[source].layers)
            register_layers(instance, source, wanted)
        job = catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def()
        together = sorted({partition.layer for partition, _ in chosen if partition.layer is not None})
        for partition, declarations in chosen:
            raise_interrupt()
            began, run_id = time.monotonic(), str(uuid.uuid4())
            try:
                with unwrapped(), alerting(instance):
                    job.execute_in_process(
                        instance=instance,
                        run_id=run_id,
                        partition_key=partition_key(declarations[0], partition),
                        asset_selection=[AssetKey(declaration.address.key) for declaration in declarations],
                        tags={"user": command, LAYERS_TAG: ",".join(map(str, together)), **_NO_RETRIES, **process_tag(), **(tags or {})},
                        run_config={"loggers": {"console": {"config": {"log_level": "DEBUG" if verbose else "CRITICAL"}}}},
                    )
            except DagsterExecutionInterruptedError:
                raise KeyboardInterrupt(_at_work(instance, run_id, partition)) from None
            except MaxRetriesExceededError as error:
                raise SaeensError(_message_of(error)) from error
            if console:
                where = ", ".join(filter(None, (declarations[0].address.owner, str(partition))))
                number = counted(len(declarations), "artefact")
                print_line(console, f"{where}: {number} in {time.monotonic() - began:.1f} s")
        raise_interrupt()


def _at_work(instance: DagsterInstance, run_id: str, partition: Partition) -> str:
    """Return what an interrupted run was at, and what it says of that, such as the checkpoint from which training goes on."""
    kinds = {DagsterEventType.STEP_START, DagsterEventType.STEP_SUCCESS, DagsterEventType.RUN_CANCELING}
    steps, said = list[str](), ""
    for entry in instance.all_logs(run_id, of_type=kinds):
        event = entry.get_dagster_event()
        if event.event_type == DagsterEventType.RUN_CANCELING:
            said = event.message or ""
        elif event.event_type == DagsterEventType.STEP_START:
            steps.append((event.step_key or "").replace("__", "/"))
        else:
            steps.pop()
    where = f" of {partition}" if str(partition) else ""
    return f"{', '.join(steps)}{where}: {said}" if steps and said else ""


def _message_of(error: MaxRetriesExceededError) -> str:
    """Return the message of the error that retries did not mend, instead of Dagster's traces."""
    (info,) = error.user_code_process_error_infos
    name, _, message = (info.cause or info).message.strip().partition(": ")
    name = name.rpartition(".")[2]
    if name.endswith("MemoryError"):
        return out_of_memory_message(message)
    return message if name == SaeensError.__name__ else ": ".join(filter(None, (name, message)))


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed inside this context and had no effect.

    Dagster loses an interrupt at the end of a run, and Python loses one during a weak reference's callback. The interpreter writes every
    signal to the wakeup descriptor, also if its handler ignores the signal.
    """
    receiver, sender = os.pipe()
    for end in (receiver, sender):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(sender)
    ends = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # it ends a run as Ctrl-C does

    def raise_interrupt() -> None:
        with contextlib.suppress(BlockingIOError):  # no signal
            if signal.SIGINT in os.read(receiver, 4096):
                raise KeyboardInterrupt

    try:
        yield raise_interrupt
    finally:
        signal.signal(signal.SIGTERM, ends)
        signal.set_wakeup_fd(before)
        os.close(receiver)
        os.close(sender)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dagster's own warnings and log lines off the console."""
    logger = logging.getLogger("dagster")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
