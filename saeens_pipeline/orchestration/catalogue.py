"""The experiment files: finding them, reading them, and saying clearly what is wrong with those that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.experiments import experiment_ops
from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.assets.tables.leaderboard import leaderboard_op
from saeens_pipeline.assets.tables.pareto import pareto_op
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.assets import build_assets
from saeens_pipeline.orchestration.automation import automate
from saeens_pipeline.orchestration.broken_files import broken_assets
from saeens_pipeline.orchestration.byte_checks import build_byte_checks
from saeens_pipeline.orchestration.executors import executor_from_environment
from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource
from saeens_pipeline.report.asset import leaderboard_page_op
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.controls import controls_of
from saeens_pipeline.settings.files import ExperimentFile, Settings, called, find_files


@dataclass
class Catalogue:
    """Every source and experiment that could be read, and the message of every file that could not.

    A sweep is in `sweeps`, by its name, and its experiments are among the others.
    """

    sources: dict[str, SourceSettings] = field(default_factory=dict)
    experiments: dict[str, ExperimentSettings] = field(default_factory=dict)
    sweeps: dict[str, ExperimentSettings] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)

    def experiment(self, name: str) -> ExperimentSettings:
        """The experiment of that name. Raises ConfigurationError, which lists those that exist and what is broken."""
        if name in self.experiments:
            return self.experiments[name]
        if name in self.sweeps:
            names = ", ".join(each.name for each in self.sweeps[name].experiments)
            raise ConfigurationError(f"{name!r} is a sweep: name one of its experiments, {names}")
        own = [message for path, message in self.broken.items() if called(path) == name]
        others = f"there are: {', '.join(sorted(self.experiments)) or 'none'}"
        if own:
            raise ConfigurationError("\n".join([*own, f"experiment {name!r} is left out for this; {others}"]))
        raise ConfigurationError("\n".join([f"there is no experiment {name!r}; {others}", *self.broken.values()]))

    def named(self, name: str) -> list[ExperimentSettings]:
        """The experiment of that name or, of a sweep, all of its experiments. Raises what `experiment` does."""
        return self.sweeps[name].experiments if name in self.sweeps else [self.experiment(name)]

    def sweep(self, name: str) -> ExperimentSettings:
        """The sweep of that name. Raises ConfigurationError, which lists those that exist."""
        if name not in self.sweeps:
            known = f"sweeps are: {', '.join(sorted(self.sweeps))}" if self.sweeps else "no experiment file has a sweep"
            raise ConfigurationError("\n".join([f"there is no sweep {name!r}; {known}", *self.broken.values()]))
        return self.sweeps[name]

    @property
    def controls(self) -> dict[str, str]:
        """Which experiments are the same on a trained and on an untrained language model: the control of each that has one."""
        return controls_of(self.experiments.values(), self.sources)

    def counterpart(self, name: str) -> str | None:
        """The control of an experiment, or what it is the control of; None where there is neither."""
        controls = self.controls
        return controls.get(name) or next((trained for trained, control in controls.items() if control == name), None)

    def ops(self, experiment: ExperimentSettings) -> list[Op]:
        """The ops of an experiment and of its source, in the order in which things are made."""
        return [*source_ops(self.sources[experiment.source]), *experiment_ops(experiment)]

    def definitions(self, *, byte_checks: bool = True) -> dg.Definitions:
        """Everything for Dagster: assets, what makes them without asking, and what they are given.

        `byte_checks=False`: without the checks that run on request, which Dagster would run beside every making.
        """
        ops = self.all_ops()
        given = dg.Definitions(
            assets=broken_assets(self.broken),
            asset_checks=build_byte_checks(ops) if byte_checks else [],
            resources={"store": StoreResource(), "compute": ComputeResource.from_environment()},
            executor=executor_from_environment(),
        )
        return dg.Definitions.merge(automate(build_assets(ops, {name: e.checks for name, e in self.experiments.items()}), self), given)

    def leaderboard(self) -> Op:
        """The op of the leaderboard over all experiments."""
        return leaderboard_op(
            [output for e in self.experiments.values() for op in experiment_ops(e) for output in op.outputs], self.controls
        )

    def pareto(self, name: str) -> Op:
        """The op that compares the experiments of a sweep. Raises what `sweep` does."""
        settings = self.sweep(name)
        return pareto_op(settings, [output for e in settings.experiments for op in experiment_ops(e) for output in op.outputs])

    def leaderboard_page(self) -> Op:
        """The op of the page over all experiments."""
        return leaderboard_page_op(self.leaderboard().outputs[0])

    def all_ops(self) -> list[Op]:
        """The ops of all sources, experiments and sweeps, and the leaderboard and its page where there are experiments."""
        of_sources = [op for source in self.sources.values() for op in source_ops(source)]
        of_experiments = [op for e in self.experiments.values() for op in experiment_ops(e)]
        of_sweeps = [self.pareto(name) for name in self.sweeps]
        return [*of_sources, *of_experiments, *of_sweeps, *([self.leaderboard(), self.leaderboard_page()] if of_experiments else [])]


def load_catalogue() -> Catalogue:
    """Read every experiment file, each on its own: a broken one does not take others down.

    Raises ConfigurationError where SAEENS_EXPERIMENTS names a folder that is not there.
    """
    catalogue = Catalogue()
    declared: dict[str, tuple[ExperimentFile, Settings]] = {}  # where each experiment is from
    for path in find_files():
        try:
            file = ExperimentFile(path)
            for settings in file.settings():
                for experiment in _add(catalogue, file, settings):
                    declared[experiment.name] = file, settings
        except ConfigurationError as error:
            catalogue.broken[path] = str(error)
    for name, (file, settings) in declared.items():
        source = catalogue.experiments[name].source
        if source not in catalogue.sources:
            del catalogue.experiments[name]
            catalogue.sweeps.pop(settings.name, None)
            known = ", ".join(sorted(catalogue.sources)) or "none"
            message = f"there is no source {source!r}; there are: {known}"
            catalogue.broken[file.path] = file.complaint(settings, "source", message)
    return catalogue


def _add(catalogue: Catalogue, file: ExperimentFile, settings: Settings) -> list[ExperimentSettings]:
    """Put what was read into the catalogue. Gives the experiments among it."""
    if isinstance(settings, SourceSettings):
        if settings.name in catalogue.sources:
            raise ConfigurationError(file.complaint(settings, "name", f"there already is a source called {settings.name!r}"))
        catalogue.sources[settings.name] = settings
        return []
    experiments, taken = settings.experiments, catalogue.experiments.keys() | catalogue.sweeps.keys()
    for name, field_name in ((settings.name, "name"), *((each.name, "sweep") for each in experiments)):
        if name in taken:
            raise ConfigurationError(file.complaint(settings, field_name, f"there already is an experiment called {name!r}"))
    catalogue.experiments |= {each.name: each for each in experiments}
    if settings.sweep:
        catalogue.sweeps[settings.name] = settings
    return experiments
