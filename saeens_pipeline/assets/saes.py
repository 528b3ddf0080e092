"""The builder of SAEs. Members, boosting rounds and baselines differ in their inputs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, RunContext, Task, fields_of
from saeens_pipeline.assets.sae_recipes import START, sae_config
from saeens_pipeline.assets.sources import tokens_of
from saeens_pipeline.settings.experiments import MAX_MEMBERS, ExperimentSettings
from saeens_pipeline.storage.names import Kind, Partition

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
    consensus: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `find_clusters`: its width is the number of clusters of the members' features. With `from_scratch` nothing else is
    taken from the members; otherwise the decoder, which stays fixed, and the initial values of the other weights."""
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
    members: Sequence[Reference] = (),
) -> Op:
    """Declare SAEs that are trained together on one stream of `given` (activations or a residual).

    `twin`: an earlier SAE that may have the same recipe. If it has, or an SAE of another experiment has, its files are linked and
    nothing is trained. `members`: those of a consensus. SAEs that are trained together have no `documents`, `epochs` or `training` of
    their own.
    """
    outputs = tuple(_declare(experiment, target, given, after=twin, members=members) for target in targets)

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.training import train_saes

        train_saes(context, tasks, given, outputs, name)

    return Op(name, outputs, make, on_device=True, links=True, twin=twin)


def concurrent_rounds_op(name: str, experiment: ExperimentSettings, rounds: Sequence[Target], given: Reference, *, twin: Reference) -> Op:
    """Declare boosting rounds that are trained in one pass over `given`, each on the residual of the earlier rounds.

    The recipe of a round has `given`, the settings, and the initial weights of the earlier rounds. Round 1 has the recipe of its `twin`,
    and is linked if the twin exists. No round depends on later ones: missing rounds are trained together with all rounds up to the last
    missing one.
    """
    outputs: list[Declaration] = []
    for number, target in enumerate(rounds):
        outputs.append(_declare(experiment, target, given, after=outputs[-1] if outputs else twin, before=rounds[:number]))

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.training import train_rounds

        train_rounds(context, tasks, given, outputs, name)

    return Op(name, tuple(outputs), make, on_device=True, links=True, twin=twin)


def _declare(
    experiment: ExperimentSettings,
    target: Target,
    given: Reference,
    *,
    after: Reference | None,
    before: Sequence[Target] = (),
    members: Sequence[Reference] = (),
) -> Declaration:
    """Declare an SAE whose inputs include `after`; `before` are the earlier rounds that are trained concurrently."""
    settings: dict[str, Any] = {"sae": target.sae.to_json(), "training": {**experiment.complete_training, **target.training}}
    settings |= {"documents": target.documents} if target.documents else {}
    settings |= {"epochs": target.epochs} if target.epochs > 1 else {}
    settings |= {"mixing": experiment.mixing} if experiment.mixing != "scattered" else {}
    settings |= {"consensus": dict(target.consensus)} if target.consensus else {}
    settings |= {"boosting_scale": target.boosting_scale} if target.boosting_scale else {}
    settings |= {"boosting": "concurrent"} if before else {}
    settings |= {"saes_before": [each.sae.to_json() for each in before]} if before and isinstance(experiment.sae, list) else {}
    method, inputs = target.kind if target.kind != "baseline" else target.name, [Input("activations", given)]
    inputs += [Input("tokens", tokens_of(experiment.source))] if target.documents else []
    inputs += [Input(START, target.start_from)] if target.start_from else []
    inputs += [Input(member.address.name, member) for member in members] if target.consensus else []
    inputs += [Input(after.address.name, after, decides=False)] if after else []

    def seeds(partition: Partition) -> dict[str, Any]:
        """Return the seeds of the SAE: those of an ensemble share the order of the data. Earlier concurrent rounds decide its input."""
        assert partition.seed is not None, "SAEs are partitioned by layer and seed"
        first, *others = (init_seed(partition.seed, each.init_index) for each in (target, *before))
        return {"init_seed": first, "data_seed": partition.seed} | ({"init_seeds_before": others} if before else {})

    return Declaration(
        **fields_of(experiment, target.kind, target.name, method=method, architecture=target.sae.architecture),
        builder="sae",
        version=SAE_VERSION,
        settings=settings,
        partition_settings=seeds,
        inputs=tuple(inputs),
        kinds=frozenset({"pytorch"}),
        description=target.description,
    )


def config_of(declaration: Declaration, d_in: int) -> SAEConfig:
    """Return the configuration of a declared SAE for activations of this width, with seed 0. Raises the errors of `sae_config`."""
    return sae_config(declaration.settings["sae"], d_in, seed=0, name=str(declaration.address))


def shape_of(sae: SAESettings) -> str:
    """Return an SAE's settings as text: architecture, width, and the fields that differ from their defaults."""
    fields = {"architecture": sae.architecture, sae.width_field: sae.width} | sae.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in fields.items())
