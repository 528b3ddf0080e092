"""The experiment files: finding them, reading them, and saying clearly what is wrong with those that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from saeens_pipeline.assets.broken_files import broken_assets
from saeens_pipeline.assets.byte_checks import build_byte_checks
from saeens_pipeline.assets.dagster_assets import build_assets
from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.experiments import experiment_ops
from saeens_pipeline.assets.leaderboard import leaderboard_op
from saeens_pipeline.assets.report import leaderboard_page_op
from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.automation import automate
from saeens_pipeline.components import ExperimentSettings, SourceSettings
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.executors import executor_from_environment
from saeens_pipeline.experiment_files import ExperimentFile, Settings, called, find_files
from saeens_pipeline.resources import ComputeResource, StoreResource


@dataclass
class Catalogue:
    """Every source and experiment that could be read, and the message of every file that could not."""

    sources: dict[str, SourceSettings] = field(default_factory=dict)
    experiments: dict[str, ExperimentSettings] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)

    def experiment(self, name: str) -> ExperimentSettings:
        """The experiment of that name. Raises ConfigurationError, which lists those that exist and what is broken."""
        if name in self.experiments:
            return self.experiments[name]
        own = [message for path, message in self.broken.items() if called(path) == name]
        others = f"there are: {', '.join(sorted(self.experiments)) or 'none'}"
        if own:
            raise ConfigurationError("\n".join([*own, f"experiment {name!r} is left out for this; {others}"]))
        raise ConfigurationError("\n".join([f"there is no experiment {name!r}; {others}", *self.broken.values()]))

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
        return leaderboard_op([output for e in self.experiments.values() for op in experiment_ops(e) for output in op.outputs])

    def leaderboard_page(self) -> Op:
        """The op of the page over all experiments."""
        return leaderboard_page_op(self.leaderboard().outputs[0])

    def all_ops(self) -> list[Op]:
        """The ops of all sources and experiments, and the leaderboard and its page where there are experiments."""
        of_sources = [op for source in self.sources.values() for op in source_ops(source)]
        of_experiments = [op for e in self.experiments.values() for op in experiment_ops(e)]
        return [*of_sources, *of_experiments, *([self.leaderboard(), self.leaderboard_page()] if of_experiments else [])]


def load_catalogue() -> Catalogue:
    """Read every experiment file, each on its own: a broken one does not take others down.

    Raises ConfigurationError where SAEENS_EXPERIMENTS names a folder that is not there.
    """
    catalogue = Catalogue()
    files: dict[str, ExperimentFile] = {}  # of experiments
    for path in find_files():
        try:
            file = ExperimentFile(path)
            for settings in file.settings():
                _add(catalogue, file, settings)
                if isinstance(settings, ExperimentSettings):
                    files[settings.name] = file
        except ConfigurationError as error:
            catalogue.broken[path] = str(error)
    for name, experiment in list(catalogue.experiments.items()):
        if experiment.source not in catalogue.sources:
            del catalogue.experiments[name]
            known = ", ".join(sorted(catalogue.sources)) or "none"
            message = f"there is no source {experiment.source!r}; there are: {known}"
            catalogue.broken[files[name].path] = files[name].complaint(experiment, "source", message)
    return catalogue


def _add(catalogue: Catalogue, file: ExperimentFile, settings: Settings) -> None:
    is_source = isinstance(settings, SourceSettings)
    if settings.name in (catalogue.sources if is_source else catalogue.experiments):
        kind = "a source" if is_source else "an experiment"
        raise ConfigurationError(file.complaint(settings, "name", f"there already is {kind} called {settings.name!r}"))
    if is_source:
        catalogue.sources[settings.name] = settings
    else:
        catalogue.experiments[settings.name] = settings
