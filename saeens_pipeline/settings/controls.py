"""Controls: experiments with equal settings on an untrained language model. Their scores cannot come from learned features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saeens_pipeline.settings import ExperimentSettings, SourceSettings

_MAY_DIFFER_IN_SOURCES = {"name", "weights", "layers"}
_EQUAL_IN_EXPERIMENTS = {"sae", "training", "ensemble"}  # together with the source they decide the recipes of common baselines, too


def controls_of(experiments: Iterable[ExperimentSettings], sources: Mapping[str, SourceSettings]) -> dict[str, str]:
    """Return the name of the control of each experiment on a trained language model that has one; of several, the first by name."""
    by_name = sorted(experiments, key=lambda experiment: experiment.name)
    untrained = [(each.name, _decisive(each, sources)) for each in by_name if sources[each.source].weights == "random"]
    controls: dict[str, str] = {}
    for experiment in by_name:
        if sources[experiment.source].weights == "trained":
            own = _decisive(experiment, sources) if untrained else []
            alike = [name for name, decisive in untrained if decisive == own]
            controls |= {experiment.name: alike[0]} if alike else {}
    return controls


def _decisive(experiment: ExperimentSettings, sources: Mapping[str, SourceSettings]) -> list[dict[str, Any]]:
    source = sources[experiment.source].model_dump(exclude=_MAY_DIFFER_IN_SOURCES)
    return [source, experiment.model_dump(include=_EQUAL_IN_EXPERIMENTS)]
