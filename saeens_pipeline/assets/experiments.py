"""The ops of an experiment, declared from its settings in the order in which artefacts are computed. The op of ensembles is here, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from saeens_pipeline.assets.baselines.registry import baselines_of
from saeens_pipeline.assets.declarations import Declaration, Facts, Input, Op, Reference, RunContext, Task, Wanted, fields_of, with_file
from saeens_pipeline.assets.published import published_op
from saeens_pipeline.assets.registry import Subject, evaluations_of, table_ops
from saeens_pipeline.assets.residuals import residual_op
from saeens_pipeline.assets.sae_recipes import sae_config
from saeens_pipeline.assets.saes import Target, concurrent_rounds_op, sae_op, shape_of
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.files import blamed_on
from saeens_pipeline.storage.names import SAES, Address
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import has_table

ENSEMBLE_VERSION = 1


def experiment_ops(experiment: ExperimentSettings) -> list[Op]:
    """Return all ops of an experiment, on the activations of its source."""
    activations = activations_of(experiment.source)
    size = experiment.ensemble.members
    ops = _member_ops(experiment, activations)
    made = {output.address.name: output for op in ops for output in op.outputs}
    members = [made[f"member_{j}"] for j in range(1, size + 1)]

    boost = _concurrent_boosting if experiment.ensemble.boosting == "concurrent" else _sequential_boosting
    boosting_ops = boost(experiment, activations, members[0]) if experiment.saes else []
    rounds = [output for op in boosting_ops for output in op.outputs if output.builder in SAES]
    ops += boosting_ops

    baselines: list[tuple[str, int, Declaration]] = []
    alike: list[tuple[Target, Declaration]] = []  # two methods have equal SAEs at the width of one member
    for method, n, target in baselines_of(experiment):
        unnamed = replace(target, name="", description="")
        twin = next((made for other, made in alike if other == unnamed), members[0] if target.init_index == 1 else None)
        name = Address(experiment.name, target.kind, target.name).op_name
        baseline_op = sae_op(name, experiment, [target], activations, twin=twin, members=members)
        ops.append(baseline_op)
        baselines.append((method, n, baseline_op.outputs[0]))
        alike.append((unnamed, baseline_op.outputs[0]))

    bagging = _ensemble_op(experiment, "bagging", members)
    boosting = _ensemble_op(experiment, "boosting", rounds) if rounds else None
    ops += [bagging, boosting] if boosting else [bagging]
    ops += table_ops(Subject(experiment, activations, bagging.outputs[0], boosting.outputs[0] if boosting else None, baselines))
    ops = [replace(op, checks=experiment.checks) for op in ops]
    ops = [replace(op, preflight=partial(_check_saes, experiment, op)) if op.outputs[0].builder in SAES else op for op in ops]
    return with_file(ops, experiment)


def validate_saes(experiment: ExperimentSettings, d_in: int) -> None:
    """Raise ConfigurationError if one of the experiment's SAEs cannot be built on activations of this width."""
    with blamed_on(experiment, "sae"):
        for sae in [*experiment.saes, *(each.target.sae for each in baselines_of(experiment))]:
            sae_config(sae, d_in, seed=0, name=experiment.name)


def _check_saes(experiment: ExperimentSettings, op: Op, store: Store, wanted: Wanted, facts: Facts) -> None:
    """Raise SaeensError for SAEs that cannot be built, for unknown labels, and for a missing table that would fail after training.

    Only the ops of members run slow preflights of tables.
    """
    op.preflight(store, wanted, facts)
    of_source = facts()
    if of_source.d_in:
        validate_saes(experiment, of_source.d_in)
    if of_source.tokens:
        _require_labels(of_source.tokens, experiment)
    for table in evaluations_of(experiment):
        is_missing = any(not has_table(store.root, experiment.name, table.name, partition.layer) for _, partition in wanted)
        if is_missing and (wanted[0][0].address.kind == "bagging" or not table.has_slow_preflight):
            table.preflight(experiment, facts)


def _require_labels(path: Path, experiment: ExperimentSettings) -> None:
    """Raise ConfigurationError, with the known labels, if a member is to be trained on a label that no document has."""
    asking = [each for each in experiment.ensemble.specialised if each.documents]
    if not asking:
        return
    tokens = open_tokens(path)
    for each in asking:
        try:
            tokens.documents_with("train", each.documents)
        except ConfigurationError as error:
            raise ConfigurationError(f"{experiment.name}: ensemble.specialised, member {each.member}, documents: {error}") from None


def _member_ops(experiment: ExperimentSettings, activations: Reference) -> list[Op]:
    """Declare the members: those on all rows are trained on one stream, each specialised one alone, after the SAE that it starts from.

    Published members are loaded.
    """

    def target(j: int, what: str, how: str, **special: Any) -> Target:
        sae = experiment.saes[j - 1]
        about = f"Member {j} of {experiment.ensemble.members}: {what}\n\n{shape_of(sae)}. {how}"
        return Target("bagging", f"member_{j}", about, init_index=j, sae=sae, **special)

    together = [
        target(j, "own initial weights, same data", "Trained on one stream with the other members.")
        for j in range(1, experiment.ensemble.members + 1)
        if experiment.ensemble.specialisation(j) is None and experiment.ensemble.published_sae(j) is None
    ]
    ops = [published_op(experiment, each, activations) for each in experiment.ensemble.published]
    ops += [sae_op(f"{experiment.name}__bagging__members", experiment, together, activations)] if together else []
    made = {output.address.name: output for op in ops for output in op.outputs}
    for special in sorted(experiment.ensemble.specialised, key=lambda each: each.member):
        what = "some documents" if special.documents else "same data"
        what += f", from member {special.start_from}'s weights" if special.start_from else ", own initial weights"
        labels = "".join(f" Documents with {field} {' or '.join(values)}." for field, values in special.documents.items())
        start_from = made[f"member_{special.start_from}"] if special.start_from else None
        alone = target(special.member, what, f"Trained alone.{labels}", documents=special.documents, start_from=start_from)
        ops.append(sae_op(f"{experiment.name}__bagging__{alone.name}", experiment, [alone], activations))
        made[alone.name] = ops[-1].outputs[0]
    return ops


def _round_target(experiment: ExperimentSettings, j: int) -> Target:
    if j == 1:
        what = f"Round 1: the activations{'' if experiment.ensemble.specialisation(1) else '; equals member 1'}"
    else:
        before = "round 1" if j == 2 else f"rounds 1 to {j - 1}"
        together = ", concurrently" if experiment.ensemble.boosting == "concurrent" else ""
        what = f"Round {j} of {experiment.ensemble.members}: residual of {before}{together}"
    about = f"{what}\n\n{shape_of(experiment.saes[j - 1])}."
    scaled = j > 1 and experiment.complete_training["normalize_activations"] != "none"
    scale = experiment.ensemble.boosting_scale if scaled else None
    return Target("boosting", f"round_{j}", about, init_index=j, sae=experiment.saes[j - 1], boosting_scale=scale)


def _sequential_boosting(experiment: ExperimentSettings, activations: Reference, member_1: Declaration) -> list[Op]:
    """Declare boosting rounds that are trained one after another, each on the stored residual of the round before."""
    ops: list[Op] = []
    given = activations
    for j in range(1, experiment.ensemble.members + 1):
        ops.append(_round_op(experiment, j, given, member_1))
        if j < experiment.ensemble.members:
            ops.append(residual_op(experiment, j, given, ops[-1].outputs[0]))
            given = ops[-1].outputs[0]
    return ops


def _round_op(experiment: ExperimentSettings, j: int, given: Reference, member_1: Declaration) -> Op:
    """Declare round j, trained on `given`; a published round 1 is loaded."""
    entry = experiment.ensemble.published_sae(j) if j == 1 else None
    if entry:
        return published_op(experiment, entry, given, member_1)
    name = f"{experiment.name}__boosting__round_{j}"
    return sae_op(name, experiment, [_round_target(experiment, j)], given, twin=member_1 if j == 1 else None)


def _concurrent_boosting(experiment: ExperimentSettings, activations: Reference, member_1: Declaration) -> list[Op]:
    """Declare boosting rounds that are trained in one pass over the activations. No residual is stored."""
    rounds = [_round_target(experiment, j) for j in range(1, experiment.ensemble.members + 1)]
    return [concurrent_rounds_op(f"{experiment.name}__boosting__rounds", experiment, rounds, activations, twin=member_1)]


def _ensemble_op(experiment: ExperimentSettings, kind: Literal["bagging", "boosting"], members: Sequence[Declaration]) -> Op:
    """Declare the ensemble of all members. `sm.load_ensemble` opens its folder; the members stay where they are."""
    meaning = "Mean of the members" if kind == "bagging" else "Sum of the rounds, each trained on the residual"
    architectures = {member.tags["architecture"] for member in members}
    architecture = architectures.pop() if len(architectures) == 1 else "mixed"
    ensemble = Declaration(
        **fields_of(experiment, kind, f"{kind}_ensemble", method=kind, architecture=architecture),
        builder="ensemble",
        version=ENSEMBLE_VERSION,
        settings={"kind": kind},
        inputs=tuple(Input(member.address.name, member) for member in members),
        kinds=frozenset({"pytorch"}),
        description=f"{meaning}, as one dictionary\n\nHolds references to its SAEs: `sm.load_ensemble(path)` follows them.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        contents = {"format_version": 1, "kind": kind, "members": [f"../{member.address.name}" for member in members]}
        with context.store.write_folder(*task.where, task.recipe, context.provenance(task.declaration)) as folder:
            (folder / "ensemble.json").write_text(json.dumps(contents, indent=2) + "\n")

    return Op(ensemble.address.op_name, (ensemble,), make)
