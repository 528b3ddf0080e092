"""The single SAEs that ensembles are compared with: what each is as a target of the one builder of SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings


class Baseline(NamedTuple):
    """What a baseline is called in the tables, and its SAE."""

    method: str
    n_members: int
    """The number of members whose width it has, of those that come in several widths; of others 1."""
    target: Target


def baselines_of(experiment: ExperimentSettings) -> Iterator[Baseline]:
    """All baselines of an experiment, in the order of its file. With equal targets two are the same SAE: of one member's width, say."""
    size = experiment.ensemble.members
    for method in experiment.baselines:
        target = partial(Target, "baseline", training=experiment.baseline_training.get(method, {}))
        match method:
            case "expanded" | "expanded_l0_matched":
                matched = method == "expanded_l0_matched"
                for n in experiment.expanded_widths:
                    about = f"One SAE as wide as {n} members{', with their L0' if matched else ', same sparsity'}"
                    name = method if n == size else f"{method}_{n}"
                    if isinstance(experiment.sae, list):
                        sae = experiment.joined_sae(n, l0_matched=matched)
                        about += f": in all else as member 1\n\n{shape_of(sae)}."
                        yield Baseline(method, n, target(name, about, init_index=0, sae=sae))
                    else:
                        about += f"\n\n{shape_of(experiment.sae)}."
                        yield Baseline(method, n, target(name, about, init_index=0, width=n, l0=n if matched else 1))
            case "compute_matched":
                about = (
                    f"Member 1, trained as long as {size} members\n\n{shape_of(experiment.saes[0])}. {size} passes, each in another order."
                )
                sae = experiment.complete_saes[0]
                yield Baseline(method, 1, target(method, about, init_index=1, sae=sae, epochs=size))
            case "matching_pursuit":
                sae = experiment.pursuit_sae
                about = f"One matching pursuit SAE with the features of all members, and at most their L0\n\n{shape_of(sae)}."
                yield Baseline(method, 1, target(method, about, init_index=0, sae=sae))


def shape_of(sae: Mapping[str, Any]) -> str:
    """An SAE's settings in words."""
    return ", ".join(f"{name} {value}" for name, value in sae.items())
