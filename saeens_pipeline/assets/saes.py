"""The builder of SAEs. Members, boosting rounds and baselines differ in their inputs only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, RunContext, Task
from saeens_pipeline.assets.sae_recipes import START, config_of_settings, sae_config
from saeens_pipeline.assets.sources import tokens_of
from saeens_pipeline.settings.experiments import MAX_MEMBERS, ExperimentSettings
from saeens_pipeline.storage.names import Address, Kind, Partition

if TYPE_CHECKING:
    from saeens_models import SAEConfig, SAESettings

SAE_VERSION = 2


@dataclass(frozen=True)
class Target:
    """One SAE to train."""

    kind: Kind
    name: str
    description: str
    init_index: int
    """Index of its initial weights, different for each SAE of an ensemble."""
    sae: SAESettings
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training settings that differ from the experiment's."""
    epochs: int = 1
    """Passes over its input, each in another order; schedules extend over all passes."""
    documents: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Labels of the documents that it is trained on; empty: all documents."""
    start_from: Reference | None = None
    """The SAE that provides its initial weights."""
    boosting_scale: str | None = None
    """Scale of the input of a boosting round after the first, if inputs are scaled."""


def init_seed(ensemble_seed: int, index: int) -> int:
    """Return the seed of the initial weights of SAE `index` of an ensemble, different for every ensemble seed and index."""
    return ensemble_seed * (MAX_MEMBERS + 1) + index


def sae_op(
    name: str,
    experiment: ExperimentSettings,
    targets: Sequence[Target],
    given: Reference,
    *,
    twin: Reference | None = None,
) -> Op:
    """Declare SAEs that are trained together on one stream of `given` (activations or a residual).

    `twin`: an SAE made earlier that may have the same recipe. If it has, or an SAE of another experiment has, its files are linked and
    nothing is trained. SAEs that are trained together have no `documents`, `epochs` or `training` of their own.
    """
    outputs = tuple(_declare(experiment, target, given, partial(_seeds, target.init_index), after=twin) for target in targets)

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.training import train_saes

        train_saes(context, tasks, given, outputs, name)

    return Op(name, outputs, make, on_device=True, links=True, twin=twin)


def concurrent_rounds_op(name: str, experiment: ExperimentSettings, rounds: Sequence[Target], given: Reference, *, twin: Reference) -> Op:
    """Declare boosting rounds that are trained in one pass over `given`, each on the residual of the earlier rounds.

    The recipe of a round has `given`, the settings, and the initial weights of the earlier rounds. Round 1 has the recipe of its `twin`,
    and is linked if the twin exists. No round depends on later ones: missing rounds are made by training all rounds up to the last
    missing one.
    """
    first, *later = rounds
    outputs = [_declare(experiment, first, given, partial(_seeds, first.init_index), after=twin)]
    for number, target in enumerate(later, start=1):
        seeds = partial(_seeds_after, tuple(each.init_index for each in rounds[:number]), target.init_index)
        settings: dict[str, Any] = {"boosting": "concurrent"}
        if isinstance(experiment.sae, list):
            settings["saes_before"] = [each.sae.to_json() for each in rounds[:number]]
        outputs.append(_declare(experiment, target, given, seeds, after=outputs[-1], settings=settings))

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.training import train_rounds

        train_rounds(context, tasks, given, outputs, name)

    return Op(name, tuple(outputs), make, on_device=True, links=True, twin=twin)


def _declare(
    experiment: ExperimentSettings,
    target: Target,
    given: Reference,
    seeds: Callable[[Partition], Mapping[str, Any]],
    *,
    after: Reference | None,
    settings: Mapping[str, Any] | None = None,
) -> Declaration:
    training = {**experiment.complete_training, **target.training}
    every_sae = {"sae": target.sae.to_json(), "training": training}
    own = ({"documents": target.documents} if target.documents else {}) | ({"epochs": target.epochs} if target.epochs > 1 else {})
    own |= {"boosting_scale": target.boosting_scale} if target.boosting_scale else {}
    inputs = [Input("activations", given)]
    inputs += [Input("tokens", tokens_of(experiment.source))] if target.documents else []
    inputs += [Input(START, target.start_from)] if target.start_from else []
    inputs += [Input(after.address.name, after, decides=False)] if after else []
    return Declaration(
        address=Address(experiment.name, target.kind, target.name),
        dimensions="layer_and_seed",
        builder="sae",
        version=SAE_VERSION,
        settings={**every_sae, **own, **(settings or {})},
        partition_settings=seeds,
        inputs=tuple(inputs),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"pytorch"}),
        tags=_tags(experiment, target) | {"architecture": target.sae.architecture},
        description=target.description,
    )


def _seeds(init_index: int, partition: Partition) -> dict[str, int]:
    """Return the seeds of one SAE. SAEs of an ensemble share the order of the data and differ in their initial weights."""
    assert partition.seed is not None, "SAEs are partitioned by layer and seed"
    return {"init_seed": init_seed(partition.seed, init_index), "data_seed": partition.seed}


def _seeds_after(init_indices_before: Sequence[int], init_index: int, partition: Partition) -> dict[str, Any]:
    """Return the seeds of a concurrently trained round, with those of the earlier rounds, which decide its input."""
    assert partition.seed is not None, "SAEs are partitioned by layer and seed"
    return _seeds(init_index, partition) | {"init_seeds_before": [init_seed(partition.seed, index) for index in init_indices_before]}


def validate_targets(experiment: ExperimentSettings, d_in: int) -> None:
    """Raise ConfigurationError if one of the experiment's SAEs cannot be built on activations of this width."""
    pursuit = [experiment.pursuit_sae] if "matching_pursuit" in experiment.baselines else []
    for sae in [*experiment.saes, *pursuit]:
        config_of_settings(sae, d_in, seed=0, name=experiment.name)


def config_of(declaration: Declaration, d_in: int) -> SAEConfig:
    """Return the configuration of a declared SAE for activations of this width, with seed 0. Raises as `validate_targets`."""
    return sae_config(declaration.settings["sae"], d_in, seed=0, name=str(declaration.address))


def _tags(experiment: ExperimentSettings, target: Target) -> dict[str, str]:
    method = target.kind if target.kind != "baseline" else target.name
    return {"experiment": experiment.name, "source": experiment.source, "method": method}
