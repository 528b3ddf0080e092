"""All experiment files: their sources, experiments and sweeps, and the error messages of broken files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from saeens_pipeline.assets import tables  # noqa: F401  # registers them
from saeens_pipeline.assets.baselines import registry as baselines
from saeens_pipeline.assets.registry import complaint_about, complaint_about_source
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.changes import Change
from saeens_pipeline.settings.controls import controls_of
from saeens_pipeline.settings.files import MODELS, ExperimentFile, Settings, experiment_name, find_files, parse_setting, similar
from saeens_pipeline.settings.sweeps import swept

_NOT_FOR_ONE_RUN = {  # fields that `--set` refuses, with the reason
    "name": "another name is another experiment: copy the file",
    "sweep": "a sweep has its own experiments: change the file",
    "source": "an experiment on another source is another experiment: copy the file",
    "layers": "`--layer` chooses layers, and `saeens layers add` adds them",
}


@dataclass
class Experiments:
    """The sources and experiments of all files that can be read, and the error messages of the others.

    `sweeps` has the sweeps by name; the experiments of a sweep are in `experiments`.
    """

    sources: dict[str, SourceSettings] = field(default_factory=dict)
    experiments: dict[str, ExperimentSettings] = field(default_factory=dict)
    sweeps: dict[str, ExperimentSettings] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def load(cls, changes: Sequence[Change] = ()) -> Self:
        """Read every experiment file, with these changes. Broken files are left out and recorded in `broken`.

        Raises ConfigurationError if SAEENS_EXPERIMENTS names a folder that does not exist.
        """
        found = cls()
        declared: dict[str, tuple[ExperimentFile, Settings]] = {}  # the file of each experiment
        for path in find_files():
            try:
                file = ExperimentFile(path, changes)
                for settings in file.settings():
                    for experiment in found._add(file, settings):
                        declared[experiment.name] = file, settings
            except ConfigurationError as error:
                found.broken[path] = str(error)
        for name, (file, settings) in declared.items():
            experiment = found.experiments[name]
            source = found.sources.get(experiment.source)
            if source is None:
                known = ", ".join(sorted(found.sources)) or "none"
                wrong = ("source",), f"there is no source {experiment.source!r}; there are: {known}"
            else:
                wrong = complaint_about_source(experiment, source)
            if wrong:
                del found.experiments[name]
                found.sweeps.pop(settings.name, None)
                found.broken[file.path] = file.complaint(settings, *wrong)
            elif source and source.synthetic:  # the default measures the loss of a language model
                found.experiments[name] = experiment.model_copy(update={"ce_loss_tokens": 0})
        return found

    @classmethod
    def load_with(cls, name: str, settings: Sequence[str]) -> Self:
        """Read every experiment file; fields of the experiment or sweep `name` and of its source have other values: `sae.k=8`.

        Nothing else may change: raises ConfigurationError for fields of a source that other experiments use. Raises it, too, for fields
        that do not exist, for invalid values, with the option instead of file and line, and as `named`.
        """
        found = cls.load()
        if not settings:
            return found
        changed = cls.load(found._changes(name, settings))
        if wrong := [message for path, message in changed.broken.items() if path not in found.broken]:
            raise ConfigurationError("\n".join(wrong))
        return changed

    def _changes(self, name: str, settings: Sequence[str]) -> list[Change]:
        experiments = self.named(name)
        names = [each.name for each in experiments]
        of_sweep = (each for each in self.sweeps.values() if names[0] in [one.name for one in each.experiments])
        document = next(of_sweep, experiments[0])
        source = self.sources[document.source]
        others = sorted(each.name for each in self.experiments.values() if each.source == source.name and each.name not in names)
        types: dict[type[Settings], str] = {model: kind for kind, model in MODELS.items()}
        changes: list[Change] = []
        for location, value in map(parse_setting, settings):
            field, option = location[0], f"--set {'.'.join(location)}"
            if location in [each.location for each in changes]:
                raise ConfigurationError(f"{option} is given twice")
            if field in _NOT_FOR_ONE_RUN:
                raise ConfigurationError(f"{option}: {_NOT_FOR_ONE_RUN[field]}")
            if document.sweep and location == ("sae", swept(document.sweep)[0]):
                raise ConfigurationError(f"{option}: the sweep {document.name} gives this field its values")
            if field in SourceSettings.model_fields and others:
                shared = f"the source {source.name}, which {', '.join(others)} {'use' if len(others) > 1 else 'uses'}, too"
                raise ConfigurationError(f"{option}: this is a field of {shared}: change the file, or declare a source of its own")
            if field not in {*ExperimentSettings.model_fields, *SourceSettings.model_fields}:
                known = [*ExperimentSettings.model_fields, *SourceSettings.model_fields]
                raise ConfigurationError(f"{option}: unknown key; one of: {', '.join(dict.fromkeys(known))}{similar(field, known)}")
            owner = source if field in SourceSettings.model_fields else document
            changes.append(Change(types[type(owner)], owner.name, location, value))
        return changes

    def _add(self, file: ExperimentFile, settings: Settings) -> list[ExperimentSettings]:
        """Add settings and return their experiments. Raises ConfigurationError for names in use and unknown tables."""
        if isinstance(settings, SourceSettings):
            if settings.name in self.sources:
                raise ConfigurationError(file.complaint(settings, "name", f"there already is a source called {settings.name!r}"))
            self.sources[settings.name] = settings
            return []
        if wrong := baselines.complaint_about(settings):
            raise ConfigurationError(file.complaint(settings, *wrong))
        if wrong := complaint_about(settings):
            entry, message = wrong
            raise ConfigurationError(file.complaint(settings, ("evaluations", entry), message))
        experiments, taken = settings.experiments, self.experiments.keys() | self.sweeps.keys()
        for name, field_name in ((settings.name, "name"), *((each.name, "sweep") for each in experiments)):
            if name in taken:
                raise ConfigurationError(file.complaint(settings, field_name, f"there already is an experiment called {name!r}"))
        self.experiments |= {each.name: each for each in experiments}
        if settings.sweep:
            self.sweeps[settings.name] = settings
        return experiments

    def experiment(self, name: str) -> ExperimentSettings:
        """Return the experiment of this name. Raises ConfigurationError, with the known names and the broken files, for another name."""
        if name in self.experiments:
            return self.experiments[name]
        if name in self.sweeps:
            names = ", ".join(each.name for each in self.sweeps[name].experiments)
            raise ConfigurationError(f"{name!r} is a sweep: name one of its experiments, {names}")
        own = [message for path, message in self.broken.items() if experiment_name(path) == name]
        others = f"there are: {', '.join(sorted(self.experiments)) or 'none'}"
        if own:
            raise ConfigurationError("\n".join([*own, f"experiment {name!r} is left out for this; {others}"]))
        raise ConfigurationError("\n".join([f"there is no experiment {name!r}; {others}", *self.broken.values()]))

    def source(self, name: str) -> SourceSettings:
        """Return the source of this name. Raises ConfigurationError, with the known names and the broken files, for another name."""
        if name not in self.sources:
            message = f"there is no source {name!r}; there are: {', '.join(sorted(self.sources)) or 'none'}"
            raise ConfigurationError("\n".join([message, *self.broken.values()]))
        return self.sources[name]

    def named(self, name: str) -> list[ExperimentSettings]:
        """Return the experiment of this name or, for a sweep, all its experiments. Raises as `experiment`."""
        return [self.experiments[each.name] for each in self.sweeps[name].experiments] if name in self.sweeps else [self.experiment(name)]

    def sweep(self, name: str) -> ExperimentSettings:
        """Return the sweep of this name. Raises ConfigurationError, with the known names, for another name."""
        if name not in self.sweeps:
            known = f"sweeps are: {', '.join(sorted(self.sweeps))}" if self.sweeps else "no experiment file has a sweep"
            raise ConfigurationError("\n".join([f"there is no sweep {name!r}; {known}", *self.broken.values()]))
        return self.sweeps[name]

    @property
    def controls(self) -> dict[str, str]:
        """Return the controls by experiment: the same experiment on an untrained language model."""
        return controls_of(self.experiments.values(), self.sources)

    def counterpart(self, name: str) -> str | None:
        """Return the control of an experiment, or the experiment that it controls; None without either."""
        controls = self.controls
        return controls.get(name) or next((trained for trained, control in controls.items() if control == name), None)
