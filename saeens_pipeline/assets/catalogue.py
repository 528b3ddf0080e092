"""All experiment files: their sources, experiments, sweeps and followed sets, and the error messages of broken files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import ValidationError

from saeens_pipeline.assets import tables  # noqa: F401  # registers them
from saeens_pipeline.assets.baselines import registry as baselines
from saeens_pipeline.assets.registry import complaint_about, complaint_about_source
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.followed_models import followed_sources
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.changes import Change
from saeens_pipeline.settings.controls import controls_of
from saeens_pipeline.settings.files import MODELS, ExperimentFile, Settings, experiment_name, find_files, parse_setting, similar
from saeens_pipeline.settings.messages import in_words
from saeens_pipeline.settings.sweeps import swept

_NOT_FOR_ONE_RUN = {  # fields that `--set` refuses, with the reason
    "name": "another name is another experiment: copy the file",
    "sweep": "a sweep has its own experiments: change the file",
    "source": "an experiment on another source is another experiment: copy the file",
    "layers": "`--layer` chooses layers, and `saeens layers add` adds them",
}


class FollowedSource(NamedTuple):
    """A source that follows a set of language models."""

    settings: SourceSettings
    sources: list[str]
    """Names of the sources of its language models."""
    waiting: list[str]
    """Sentences about language models that are not taken yet."""


class FollowingExperiment(NamedTuple):
    """An experiment on a source that follows a set of language models."""

    settings: ExperimentSettings
    names: list[str]
    """Its experiments or, of a sweep, its sweeps, one for each language model."""


@dataclass
class Experiments:
    """The sources and experiments of all files that can be read, and the error messages of the others.

    The experiments of a sweep, and sources and experiments of each language model of a followed set, are in `sources` and `experiments`.
    """

    sources: dict[str, SourceSettings] = field(default_factory=dict)
    experiments: dict[str, ExperimentSettings] = field(default_factory=dict)
    sweeps: dict[str, ExperimentSettings] = field(default_factory=dict)
    followed: dict[str, FollowedSource] = field(default_factory=dict)
    following: dict[str, FollowingExperiment] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def load(cls, changes: Sequence[Change] = ()) -> Self:
        """Read every experiment file, with these changes. Broken files are left out and recorded in `broken`.

        Raises ConfigurationError if SAEENS_EXPERIMENTS names a folder that does not exist.
        """
        found = cls()
        files: list[tuple[ExperimentFile, list[ExperimentSettings]]] = []
        for path in find_files():
            try:
                file = ExperimentFile(path, changes)
                files.append((file, []))
                for settings in file.settings():
                    if isinstance(settings, SourceSettings):
                        found._add_source(file, settings)
                    else:
                        files[-1][1].append(settings)
            except ConfigurationError as error:
                found.broken[path] = str(error)
        declared: dict[str, tuple[ExperimentFile, ExperimentSettings]] = {}  # the file and the settings in it of each experiment
        for file, of_file in files:  # after all sources: what an experiment stands for depends on its source
            try:
                for settings in of_file:
                    declared |= dict.fromkeys(found._add_experiment(file, settings), (file, settings))
            except ConfigurationError as error:
                found.broken[file.path] = str(error)
        for name, (file, settings) in declared.items():
            found._check_source(name, file, settings)
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
        document = self._document_of(experiments[0])
        followed = self.followed.get(document.source)
        source, sources = (followed.settings, followed.sources) if followed else (self.sources[document.source], [document.source])
        others = sorted(each.name for each in self.experiments.values() if each.source in sources and each.name not in names)
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

    def _document_of(self, experiment: ExperimentSettings) -> ExperimentSettings:
        """Return the settings of the document that an experiment is from: its own, of a sweep, or on a followed source."""
        for name, following in self.following.items():
            if experiment.name in [each.name for each in self.parts(name)]:
                return following.settings
        return next((each for each in self.sweeps.values() if experiment.name in [one.name for one in each.experiments]), experiment)

    def _check_source(self, name: str, file: ExperimentFile, settings: ExperimentSettings) -> None:
        """Take out an experiment whose source is unknown or does not fit, with the sweep and the followed set that it is from."""
        experiment = self.experiments[name]
        source = self.sources.get(experiment.source)
        if source is None:
            known = ", ".join(sorted({*self.sources, *self.followed})) or "none"
            wrong = ("source",), f"there is no source {experiment.source!r}; there are: {known}"
        else:
            wrong = complaint_about_source(experiment, source)
        if wrong:
            del self.experiments[name]
            for each in (settings.name, *self.sweeps_of(settings.name)):
                self.sweeps.pop(each, None)
            self.following.pop(settings.name, None)
            self.broken[file.path] = file.complaint(settings, *wrong)
        elif source and source.synthetic:  # the default measures the loss of a language model
            self.experiments[name] = experiment.model_copy(update={"ce_loss_tokens": 0})

    def _add_source(self, file: ExperimentFile, settings: SourceSettings) -> None:
        """Add a source, or those of a followed set. Raises ConfigurationError for names in use, and as `followed_sources`."""

        def require_new(source: SourceSettings, field_name: str) -> None:
            if source.name in self.sources or source.name in self.followed:
                raise ConfigurationError(file.complaint(settings, field_name, f"there already is a source called {source.name!r}"))

        require_new(settings, "name")
        if not settings.follows:
            self.sources[settings.name] = settings
            return
        field_name = "revisions" if settings.revisions else "language_model"
        self.followed[settings.name] = FollowedSource(settings, [], [])
        try:
            sources, waiting = followed_sources(settings)
        except ConfigurationError as error:
            raise ConfigurationError(file.complaint(settings, field_name, str(error))) from None
        for source in sources:
            require_new(source, field_name)
        self.sources |= {source.name: source for source in sources}
        self.followed[settings.name] = FollowedSource(settings, [source.name for source in sources], waiting)

    def _add_experiment(self, file: ExperimentFile, settings: ExperimentSettings) -> list[str]:
        """Add an experiment, or those of a sweep or a followed set, and return their names.

        Raises ConfigurationError for names that are in use or not possible, and for unknown tables.
        """
        if wrong := baselines.complaint_about(settings):
            raise ConfigurationError(file.complaint(settings, *wrong))
        if wrong := complaint_about(settings):
            entry, message = wrong
            raise ConfigurationError(file.complaint(settings, ("evaluations", entry), message))
        followed = self.followed.get(settings.source)
        try:
            suffixes = [name.removeprefix(f"{settings.source}__") for name in followed.sources] if followed else []
            on_sources = [settings.on_source(f"{settings.source}__{suffix}", suffix) for suffix in suffixes] if followed else [settings]
            experiments = [experiment for each in on_sources for experiment in each.experiments]
        except ValidationError as error:  # a name that is too long
            message = f"with a language model of source {settings.source}: {in_words(dict(error.errors()[0]))}"
            raise ConfigurationError(file.complaint(settings, "name", message)) from None
        taken = {*self.experiments, *self.sweeps, *self.following}
        fields = [(settings.name, "name"), *((each.name, "source") for each in on_sources)]
        for name, field_name in (*fields, *((each.name, "sweep" if settings.sweep else "source") for each in experiments)):
            if name in taken:
                raise ConfigurationError(file.complaint(settings, field_name, f"there already is an experiment called {name!r}"))
        self.experiments |= {each.name: each for each in experiments}
        self.sweeps |= {each.name: each for each in on_sources if each.sweep}
        if followed:
            self.following[settings.name] = FollowingExperiment(settings, [each.name for each in on_sources])
        return [each.name for each in experiments]

    def experiment(self, name: str) -> ExperimentSettings:
        """Return the experiment of this name. Raises ConfigurationError, with the known names and the broken files, for another name."""
        if name in self.experiments:
            return self.experiments[name]
        if name in self.sweeps or name in self.following:
            names = ", ".join(each.name for each in self.parts(name)) or "there is none yet"
            what = "is a sweep" if name in self.sweeps else "follows a set of language models"
            raise ConfigurationError(f"{name!r} {what}: name one of its experiments, {names}")
        own = [message for path, message in self.broken.items() if experiment_name(path) == name]
        others = f"there are: {', '.join(sorted(self.experiments)) or 'none'}"
        if own:
            raise ConfigurationError("\n".join([*own, f"experiment {name!r} is left out for this; {others}"]))
        raise ConfigurationError("\n".join([f"there is no experiment {name!r}; {others}", *self.broken.values()]))

    def source(self, name: str) -> SourceSettings:
        """Return the source of this name. Raises ConfigurationError, with the known names and the broken files, for another name."""
        if name in self.followed:
            names = ", ".join(self.followed[name].sources) or "there is none yet"
            raise ConfigurationError(f"source {name!r} follows a set of language models: name one of its sources, {names}")
        if name not in self.sources:
            message = f"there is no source {name!r}; there are: {', '.join(sorted(self.sources)) or 'none'}"
            raise ConfigurationError("\n".join([message, *self.broken.values()]))
        return self.sources[name]

    def sources_of(self, name: str) -> list[SourceSettings]:
        """Return the source of this name or, for a followed set, those of its language models. Raises as `source`."""
        return [self.sources[each] for each in self.followed[name].sources] if name in self.followed else [self.source(name)]

    def named(self, name: str) -> list[ExperimentSettings]:
        """Return the experiment of this name or, for a sweep or a followed set, all its experiments.

        Raises as `experiment`, and SaeensError for a set without any language model yet.
        """
        found = self.parts(name)
        if not found:
            source = self.followed[self.following[name].settings.source]
            reasons = "; ".join(source.waiting)
            raise SaeensError(f"{name}: source {source.settings.name} follows language models, and none is there: {reasons}")
        return found

    def parts(self, name: str) -> list[ExperimentSettings]:
        """Return the experiments that a name stands for, which are none for a set without any language model. Raises as `experiment`."""
        if name in self.following:
            return [each for part in self.following[name].names for each in self.parts(part)]
        return [self.experiments[each.name] for each in self.sweeps[name].experiments] if name in self.sweeps else [self.experiment(name)]

    def sweeps_of(self, name: str) -> list[str]:
        """Return the names of the sweeps that a name stands for: itself, or those of a followed set."""
        return [each for each in (name, *(self.following[name].names if name in self.following else ())) if each in self.sweeps]

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
