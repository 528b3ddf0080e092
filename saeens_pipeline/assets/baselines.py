"""Baselines: the single SAEs that ensembles are compared with, as targets for the builder of SAEs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from saeens_pipeline.assets.saes import Target
from saeens_pipeline.settings.experiments import ExperimentSettings

if TYPE_CHECKING:
    from saeens_models import SAESettings


class Baseline(NamedTuple):
    """A baseline: its method in the tables, and its SAE."""

    method: str
    n_members: int
    """For methods with several widths, the number of members that it is as wide as; else 1."""
    target: Target


def baselines_of(experiment: ExperimentSettings) -> Iterator[Baseline]:
    """Yield the baselines of an experiment in the order of its file. Baselines with equal targets are the same SAE."""
    size = experiment.ensemble.members
    for method in experiment.baselines:
        target = partial(Target, "baseline", training=experiment.baseline_training.get(method, {}))
        match method:
            case "expanded" | "expanded_l0_matched":
                matched = method == "expanded_l0_matched"
                for n in experiment.expanded_widths:
                    sae = experiment.joined_sae(n, l0_matched=matched)
                    others = " Other settings are those of member 1." if isinstance(experiment.sae, list) else ""
                    sparsity = "with their L0" if matched else "same sparsity"
                    about = f"One SAE as wide as {n} members, {sparsity}\n\n{shape_of(sae)}.{others}"
                    name = method if n == size else f"{method}_{n}"
                    yield Baseline(method, n, target(name, about, init_index=0, sae=sae))
            case "compute_matched":
                about = (
                    f"Member 1, trained as long as {size} members\n\n{shape_of(experiment.saes[0])}. {size} passes, each in another order."
                )
                yield Baseline(method, 1, target(method, about, init_index=1, sae=experiment.saes[0], epochs=size))
            case "matching_pursuit":
                sae = experiment.pursuit_sae
                about = f"Matching pursuit, as wide as all members, at most their L0\n\n{shape_of(sae)}. One SAE."
                yield Baseline(method, 1, target(method, about, init_index=0, sae=sae))


def shape_of(sae: SAESettings) -> str:
    """Return an SAE's settings as text: architecture, width, and the fields that differ from their defaults."""
    fields = {"architecture": sae.architecture, sae.width_field: sae.width} | sae.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in fields.items())
