"""Controls: an experiment with the same settings on the same language model, untrained. What it reaches shows nothing learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saeens_pipeline.settings import ExperimentSettings, SourceSettings

_OF_SOURCES = {"name", "weights", "layers"}  # in which a control's source may differ
_OF_EXPERIMENTS = {"sae", "training", "ensemble"}  # in which a control may not; a baseline that both have has the same recipe then


def controls_of(experiments: Iterable[ExperimentSettings], sources: Mapping[str, SourceSettings]) -> dict[str, str]:
    """By the name of each experiment on a trained language model that has a control: the control's, the first by name."""
    by_name = sorted(experiments, key=lambda experiment: experiment.name)
    untrained = [each for each in by_name if sources[each.source].weights == "random"]
    controls: dict[str, str] = {}
    for experiment in by_name:
        if sources[experiment.source].weights == "trained":
            alike = [each.name for each in untrained if _decisive(each, sources) == _decisive(experiment, sources)]
            controls |= {experiment.name: alike[0]} if alike else {}
    return controls


def _decisive(experiment: ExperimentSettings, sources: Mapping[str, SourceSettings]) -> list[dict[str, Any]]:
    return [sources[experiment.source].model_dump(exclude=_OF_SOURCES), experiment.model_dump(include=_OF_EXPERIMENTS)]
