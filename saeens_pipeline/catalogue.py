"""The experiment files: finding them, reading them, and saying clearly what is wrong with those that cannot be read."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import dagster as dg
from pydantic import ValidationError

from saeens_pipeline import defs
from saeens_pipeline.assets.dagster_assets import build_assets
from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.experiments import experiment_ops
from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.components import ActivationSource, EnsembleExperiment, ExperimentSettings, SourceSettings
from saeens_pipeline.errors import ConfigurationError
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
        raise ConfigurationError(
            "\n".join(
                [f"there is no experiment {name!r}; there are: {', '.join(sorted(self.experiments)) or 'none'}", *self.broken.values()]
            )
        )

    def ops(self, experiment: ExperimentSettings) -> list[Op]:
        """The ops of an experiment and of its source, in the order in which things are made."""
        return [*source_ops(self.sources[experiment.source]), *experiment_ops(experiment)]

    def definitions(self) -> dg.Definitions:
        """Everything for Dagster. Steps run in one process: each of their own would spend seconds on importing torch."""
        return dg.Definitions(
            assets=build_assets(self._all_ops()),
            resources={"store": StoreResource(), "compute": ComputeResource()},
            executor=dg.in_process_executor,
        )

    def _all_ops(self) -> list[Op]:
        return [op for source in self.sources.values() for op in source_ops(source)] + [
            op for e in self.experiments.values() for op in experiment_ops(e)
        ]


def load_catalogue() -> Catalogue:
    """Read every folder below `saeens_pipeline/defs`, each on its own: a broken file does not take others down."""
    catalogue = Catalogue()
    for folder in sorted(path for root in defs.__path__ for path in Path(root).iterdir() if (path / "defs.yaml").is_file()):
        try:
            for component in _components(importlib.import_module(f"{defs.__name__}.{folder.name}"), folder):
                _add(catalogue, component, folder / "defs.yaml")
        except ConfigurationError as error:
            catalogue.broken[folder / "defs.yaml"] = str(error)
    for name, experiment in list(catalogue.experiments.items()):
        if experiment.source not in catalogue.sources:
            del catalogue.experiments[name]
            known = ", ".join(sorted(catalogue.sources)) or "none"
            catalogue.broken[Path(name)] = (
                f"experiment {name}: attributes.source: there is no source {experiment.source!r}; there are: {known}"
            )
    return catalogue


def _components(module: ModuleType, folder: Path) -> Iterator[dg.Component]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.BetaWarning)
            tree = dg.ComponentTree.from_module(module, folder)
            yield from tree.get_all_components(of_type=ActivationSource)
            yield from tree.get_all_components(of_type=EnsembleExperiment)
    except Exception as error:
        raise ConfigurationError(_explain(error, folder / "defs.yaml")) from error


def _add(catalogue: Catalogue, component: dg.Component, file: Path) -> None:
    if isinstance(component, ActivationSource):
        kind, known, settings = "source", catalogue.sources, component.settings
    elif isinstance(component, EnsembleExperiment):
        kind, known, settings = "experiment", catalogue.experiments, component.settings
    else:
        return
    if settings.name in known:
        raise ConfigurationError(f"{file}: attributes.name: there already is a {kind} called {settings.name!r}")
    known[settings.name] = settings  # pyright: ignore[reportArgumentType]


def _explain(error: BaseException, file: Path) -> str:
    """What is wrong with a file: a line for every field, or the innermost message."""
    while True:
        if isinstance(error, ValidationError):
            return "\n".join(_explain_field(dict(each), file) for each in error.errors())
        cause = error.__cause__ or error.__context__
        if cause is None:
            return f"{file}: {error}"
        error = cause


def _explain_field(error: dict, file: Path) -> str:
    names = ".".join(str(part) for part in error["loc"])
    field_name, _, position = names.partition(" at ")
    found = "" if error["type"] == "missing" else f" (found: {error['input']!r})"
    return f"{position or file}: {field_name}: {error['msg'].removeprefix('Value error, ')}{found}"
