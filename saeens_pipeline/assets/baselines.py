"""The single SAEs that ensembles are compared with: what each is as a target of the one builder of SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from saeens_pipeline.assets.saes import Target
from saeens_pipeline.components.ensemble_experiment import ExperimentSettings


class Baseline(NamedTuple):
    """What a baseline is called in the tables, and its SAE."""

    method: str
    n_members: int
    """The number of members whose width it has, of those that come in several widths; of others 1."""
    target: Target


def baselines_of(experiment: ExperimentSettings) -> Iterator[Baseline]:
    """All baselines of an experiment, in the order of its file. With equal targets two are the same SAE: of one member's width, say."""
    size, shape = experiment.ensemble.members, shape_of(experiment.sae)
    for method in experiment.baselines:
        training = experiment.complete_training_of(method) if method in experiment.baseline_training else None
        target = partial(Target, "baseline", init_index=0, training=training)
        match method:
            case "expanded" | "expanded_l0_matched":
                matched = method == "expanded_l0_matched"
                for n in experiment.expanded_widths:
                    about = f"One SAE as wide as {n} members{', with their L0' if matched else ', same sparsity'}\n\n{shape}."
                    name = method if n == size else f"{method}_{n}"
                    yield Baseline(method, n, target(name, about, width=n, l0=n if matched else 1))
            case "compute_matched":
                about = f"One SAE of a member's width, trained as long as {size} members\n\n{shape}. {size} passes, each in another order."
                yield Baseline(method, 1, target(method, about, epochs=size))
            case "matching_pursuit":
                sae = experiment.complete_matching_pursuit
                about = f"One matching pursuit SAE with the features of all members, and at most their L0\n\n{shape_of(sae)}."
                yield Baseline(method, 1, target(method, about, width=size, l0=size, sae=sae))


def shape_of(sae: Mapping[str, Any]) -> str:
    """An SAE's settings in words."""
    return ", ".join(f"{name} {value}" for name, value in sae.items())
