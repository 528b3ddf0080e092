"""Materialise an experiment from the command line: plan, check, and run stage by stage through Dagster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from saeens_pipeline import progress
from saeens_pipeline.assets.staleness import Stage, Status, plan
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration import log_lines
from saeens_pipeline.orchestration.instance import end_dead_runs, recorded_instance
from saeens_pipeline.orchestration.layers import layers_of_source, recorded_layers
from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from rich.console import Console

    from saeens_pipeline.assets.declarations import Declaration
    from saeens_pipeline.cli.summary import Beside
    from saeens_pipeline.language_models.models import LanguageModelDescription
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.settings import ExperimentSettings, SourceSettings
    from saeens_pipeline.storage.recipes import Store


def reporter_for(console: Console) -> progress.Reporter:
    """Bars in a terminal, plain lines elsewhere."""
    if console.is_terminal:
        return progress.BarReporter(console)
    return progress.LineReporter(partial(_print_line, console))


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def experiment_status(name: str) -> list[Status]:
    """The state of every artefact of an experiment, in the order in which they are made."""
    from saeens_pipeline.orchestration.catalogue import load_catalogue

    catalogue = load_catalogue()
    experiment = catalogue.experiment(name)
    layers = recorded_layers(catalogue.sources[experiment.source]).layers
    stages = plan(StoreResource().store, catalogue.ops(experiment), layers, experiment.ensemble.seeds)
    return [status for stage in stages for status in stage.statuses]


def run_experiment(name: str, *, layers: Sequence[int], seeds: Sequence[int], select: Sequence[str], console: Console) -> None:
    """Make what is missing or stale, show progress, and print the summary table."""
    from saeens_pipeline.cli.summary import print_summary
    from saeens_pipeline.orchestration.catalogue import load_catalogue

    began = time.monotonic()
    with recorded_instance() as instance:
        if instance:
            end_dead_runs(instance)
    catalogue = load_catalogue()
    experiment = catalogue.experiment(name)
    source = catalogue.sources[experiment.source]
    if layers:
        layers = sorted(set(layers))
    else:
        layers, impossible = recorded_layers(source)
        if impossible:
            console.print(f"left out, since the language model lacks them: layers {', '.join(impossible)}; remove them in the UI")
    description = _check(catalogue, experiment, layers, seeds)
    store = StoreResource().store
    store.require_writable()

    ops = catalogue.ops(experiment)
    stages = plan(store, ops, layers, experiment.ensemble.seeds)
    chosen = _restricted(stages, seeds, select, console)
    n_wanted = sum(len(stage) for _, stage in chosen)
    n_fresh = sum(status.state == "fresh" for stage in stages for status in stage.statuses)
    n_others = sum(len(stage.statuses) for stage in stages) - n_fresh - n_wanted
    others = f", {n_others} were not asked for" if n_others else ""
    if not n_wanted:
        console.print(f"{name}: nothing to do: {n_fresh} artefacts are fresh (cache hits){others}; no training", highlight=False)
    else:
        everything = [declaration for _, wanted in chosen for declaration in wanted]
        _check_what_is_read(experiment, source, layers, description, wanted=everything, console=console)
        console.print(f"{name}: {n_wanted} artefacts to make, {n_fresh} are fresh (cache hits){others}", highlight=False)
        damaged = [s for stage, wanted in chosen for s in stage.statuses if s.state == "damaged" and s.declaration in wanted]
        for status in damaged:
            console.print(status.reason, highlight=False, markup=False, soft_wrap=True)
        with (
            _compiling(store, everything),
            _quiet(),
            log_lines.written_with(partial(_print_line, console)),
            progress.report_to(reporter_for(console)),
        ):
            _execute(catalogue, experiment, layers, [(stage, wanted) for stage, wanted in chosen if wanted])
    after = plan(store, ops, layers, experiment.ensemble.seeds)
    asked = [s for stage in after for s in stage.statuses if not seeds or s.partition.seed is None or s.partition.seed in seeds]
    print_summary(store, experiment, asked, console, _beside(catalogue, store, name, layers))
    _show_reports(catalogue, store, asked, console)
    if n_wanted:
        _renew_reports_beside(catalogue, name, layers, console)
    console.print(
        f"\nTook {time.monotonic() - began:.0f} s. Everything lies below {store.root}; `saeens ui` opens the Dagster UI.",
        highlight=False,
        soft_wrap=True,
    )


def _beside(catalogue: Catalogue, store: Store, name: str, layers: Sequence[int]) -> Beside | None:
    """What an experiment's figures are shown beside, where its language model is trained here and untrained there, or the other way."""
    from saeens_pipeline.cli.summary import Beside

    other = catalogue.counterpart(name)
    if other is None:
        return None
    experiment = catalogue.experiments[other]
    stages = plan(store, catalogue.ops(experiment), layers, experiment.ensemble.seeds)
    return Beside(other, catalogue.sources[experiment.source].weights, [status for stage in stages for status in stage.statuses])


def _show_reports(catalogue: Catalogue, store: Store, statuses: Sequence[Status], console: Console) -> None:
    """Say where the reports are; the page over all experiments, which they lead to, is brought up to date."""
    from saeens_pipeline.orchestration.reports import INDEX, renew_leaderboard_page

    reports = [s for s in statuses if s.declaration.address.kind == "report" and s.state == "fresh"]
    if reports:
        renew_leaderboard_page(catalogue)
        pages = "\n".join(f"  {store.path(*report.where) / INDEX}" for report in reports)
        console.print(f"\nThe report, to open in a browser:\n{pages}", highlight=False, markup=False, soft_wrap=True)


def _renew_reports_beside(catalogue: Catalogue, name: str, layers: Sequence[int], console: Console) -> None:
    """Of a control: the reports that show it are written again, and named."""
    from saeens_pipeline.orchestration.reports import renew_reports_beside

    pages = "\n".join(f"  {page}" for page in renew_reports_beside(catalogue, name, layers))
    if pages:
        console.print(f"\nIt is the control of these reports, which now show it:\n{pages}", highlight=False, markup=False, soft_wrap=True)


def _check(catalogue: Catalogue, experiment: ExperimentSettings, layers: Sequence[int], seeds: Sequence[int]) -> LanguageModelDescription:
    """Find out what cannot work before anything is spent. Returns the language model that there is."""
    from saeens_pipeline.assets.saes import validate_targets
    from saeens_pipeline.assets.sources import validate_source
    from saeens_pipeline.assets.tables.evaluation import validate_ce_loss
    from saeens_pipeline.language_models.models import HOOKS

    unknown = sorted(set(seeds) - set(experiment.ensemble.seeds))
    if unknown:
        raise ConfigurationError(
            f"{experiment.name} has no seed {', '.join(map(str, unknown))}; it has {', '.join(map(str, experiment.ensemble.seeds))}"
        )
    source = catalogue.sources[experiment.source]
    description = validate_source(source, layers)
    validate_ce_loss(experiment, description, source.hook)
    if source.hook in HOOKS:  # of other modules the width is known when the model runs
        validate_targets(experiment, description.d_model)
    return description


def _check_what_is_read(
    experiment: ExperimentSettings,
    source: SourceSettings,
    layers: Sequence[int],
    description: LanguageModelDescription,
    *,
    wanted: Sequence[Declaration],
    console: Console,
) -> None:
    """Find out, for what is to be made, whether modules and texts are there; say what an endpoint will be asked, if it is set rightly."""
    from saeens_pipeline.assets.sources import validate_corpus
    from saeens_pipeline.assets.tables.autointerp import expected_requests
    from saeens_pipeline.assets.tables.probing import validate_labelled_texts
    from saeens_pipeline.language_models.autointerp.endpoint import Endpoint
    from saeens_pipeline.language_models.models import validate_modules

    builders, names = {declaration.builder for declaration in wanted}, {declaration.address.name for declaration in wanted}
    if "activations" in builders:
        validate_modules(description, source.hook, layers)
    if "tokens" in builders:
        validate_corpus(source)
    validate_labelled_texts(experiment, names, description, source.drop)
    n_explained = sum(declaration.address.name == "autointerp" for declaration in wanted)
    if n_explained and (endpoint := Endpoint.from_environment()):
        _print_line(console, f"{experiment.name}/eval/autointerp: {expected_requests(experiment, n_explained)} at {endpoint.host}")


def _restricted(
    stages: Sequence[Stage], seeds: Sequence[int], select: Sequence[str], console: Console
) -> list[tuple[Stage, list[Declaration]]]:
    """What each stage has to make, given the seeds and assets that were asked for."""
    allowed = _selected(stages, select) if select else None
    chosen: list[tuple[Stage, list[Declaration]]] = []
    left_out = False
    for stage in stages:
        wanted = [d for d in stage.to_make if allowed is None or d in allowed]
        if seeds and stage.partition.seed is not None and stage.partition.seed not in seeds:
            left_out = left_out or bool(wanted)
            wanted = []
        if left_out and stage.partition.seed is None and any(d.seeds for d in wanted):
            console.print("what compares all seeds is left out: not all seeds were asked for", highlight=False)
            wanted = []
        chosen.append((stage, wanted))
    return chosen


def _selected(stages: Sequence[Stage], select: Sequence[str]) -> list[Declaration]:
    """The artefacts whose keys end in what was asked for, and everything that they need."""
    declarations = {status.declaration.address: status.declaration for stage in stages for status in stage.statuses}
    pending = []
    for wanted in select:
        matching = [d for d in declarations.values() if f"/{d.address}".endswith(f"/{wanted.strip('/')}")]
        if not matching:
            raise ConfigurationError(f"--select {wanted}: no such asset; there are: {', '.join(map(str, declarations))}")
        pending += matching
    found = []
    while pending:
        declaration = pending.pop()
        if declaration not in found:
            found.append(declaration)
            pending += [declarations[each.artefact.address] for each in declaration.inputs]
    return found


def stages_to_retrain(
    catalogue: Catalogue, experiment: ExperimentSettings, instance: DagsterInstance
) -> list[tuple[Stage, list[Declaration]]]:
    """What is not fresh, of all layers. Where `freshness` watches the tables, those that are fresh come along: a hit confirms them."""
    layers = layers_of_source(catalogue.sources[experiment.source], instance).layers
    stages = plan(StoreResource().store, catalogue.ops(experiment), layers, experiment.ensemble.seeds)
    watched = "eval" if experiment.freshness else None
    wanted = [
        (stage, [s.declaration for s in stage.statuses if s.state != "fresh" or s.declaration.address.kind == watched]) for stage in stages
    ]
    return [(stage, declarations) for stage, declarations in wanted if declarations]


def _compiling(store: Store, wanted: Sequence[Declaration]) -> contextlib.AbstractContextManager[object]:
    """What trains on the CPU is compiled beside what comes before training, if anything does."""
    from saeens_pipeline.assets.kernels import compiled_meanwhile

    architectures = {declaration.tags["architecture"] for declaration in wanted if declaration.builder == "sae"}
    comes_first = any(declaration.builder in {"tokens", "activations"} for declaration in wanted)
    if architectures and comes_first and ComputeResource.from_environment().resolve() == "cpu":
        return compiled_meanwhile(store.root, architectures)
    return contextlib.nullcontext()


def _execute(
    catalogue: Catalogue, experiment: ExperimentSettings, layers: Sequence[int], chosen: Sequence[tuple[Stage, list[Declaration]]]
) -> None:
    """Make what was chosen, with the instance of the command line."""
    from saeens_pipeline.orchestration.instance import command_line_instance, declare_layers, register_layers

    with command_line_instance() as instance, _interrupts() as raise_interrupt:
        declare_layers(instance, experiment.source, catalogue.sources[experiment.source].layers)
        register_layers(instance, experiment.source, layers)
        make_stages(catalogue, instance, chosen, tags={"user": "saeens run"}, before_each=raise_interrupt)
        raise_interrupt()


def make_stages(
    catalogue: Catalogue,
    instance: DagsterInstance,
    chosen: Sequence[tuple[Stage, list[Declaration]]],
    *,
    tags: Mapping[str, str],
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """One Dagster run in this process for each stage, seen in the UI afterwards. Raises what made one fail."""
    from dagster import AssetKey, DagsterExecutionInterruptedError

    from saeens_pipeline.orchestration.assets import partition_key
    from saeens_pipeline.orchestration.instance import process_tag
    from saeens_pipeline.orchestration.requested_layers import LAYERS_TAG

    job = catalogue.definitions(byte_checks=False).resolve_implicit_global_asset_job_def()
    layers = sorted({stage.partition.layer for stage, _ in chosen if stage.partition.layer is not None})
    for stage, declarations in chosen:
        before_each()
        try:
            job.execute_in_process(
                instance=instance,
                partition_key=partition_key(declarations[0], stage.partition),
                asset_selection=[AssetKey(declaration.address.key) for declaration in declarations],
                tags={**tags, LAYERS_TAG: ",".join(map(str, layers)), **process_tag()},
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        except DagsterExecutionInterruptedError:
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Give a function that raises KeyboardInterrupt if Ctrl-C was pressed inside this context and had no effect.

    Dagster forgets one that comes as a run ends, and Python one that comes while a weak reference's callback runs. The
    interpreter writes every signal to the wakeup descriptor, whatever its handler makes of it.
    """
    receiver, sender = os.pipe()
    for end in (receiver, sender):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(sender)

    def raise_interrupt() -> None:
        with contextlib.suppress(BlockingIOError):  # nothing came
            if signal.SIGINT in os.read(receiver, 4096):
                raise KeyboardInterrupt

    try:
        yield raise_interrupt
    finally:
        signal.set_wakeup_fd(before)
        os.close(receiver)
        os.close(sender)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Dagster's own warnings and log lines stay in its event log."""
    import warnings

    logger = logging.getLogger("dagster")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
