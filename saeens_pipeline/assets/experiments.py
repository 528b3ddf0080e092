"""What an experiment consists of: the wiring from settings to ops, in the order in which things are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeens_pipeline.assets.declarations import Declaration, Op, Reference
from saeens_pipeline.assets.ensembles import ensemble_op
from saeens_pipeline.assets.evaluation import Subject, evaluation_op, stability_op
from saeens_pipeline.assets.features import features_op
from saeens_pipeline.assets.marginal_gain import marginal_gain_op
from saeens_pipeline.assets.probing import PROBED, probing_op
from saeens_pipeline.assets.residuals import residual_op
from saeens_pipeline.assets.saes import Target, concurrent_rounds_op, sae_op
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.components.ensemble_experiment import ExperimentSettings


def experiment_ops(experiment: ExperimentSettings) -> list[Op]:
    """All ops of an experiment, on the activations of its source."""
    activations = activations_of(experiment.source)
    size = experiment.ensemble.members
    ops = _member_ops(experiment, activations)
    made = {output.address.name: output for op in ops for output in op.outputs}
    members = [made[f"member_{j}"] for j in range(1, size + 1)]

    boost = _concurrent_boosting if experiment.ensemble.boosting == "concurrent" else _sequential_boosting
    boosting_ops = boost(experiment, activations, members[0])
    rounds = [output for op in boosting_ops for output in op.outputs if output.builder == "sae"]
    ops += boosting_ops

    baselines: list[tuple[str, int, Declaration]] = []
    alike: list[tuple[Target, Declaration]] = []
    for method in experiment.baselines:
        for n in experiment.expanded_widths:
            name = method if n == size else f"{method}_{n}"
            target = _expanded_target(experiment, name, n, l0_matched=method == "expanded_l0_matched")
            # of one member's width, two methods agree
            twin = next(
                (made for other, made in alike if (other.sae, other.width, other.l0) == (target.sae, target.width, target.l0)), None
            )
            baseline_op = sae_op(f"{experiment.name}__baseline__{name}", experiment, [target], activations, twin=twin)
            ops.append(baseline_op)
            baselines.append((method, n, baseline_op.outputs[0]))
            alike.append((target, baseline_op.outputs[0]))

    bagging = ensemble_op(experiment, "bagging", members)
    boosting = ensemble_op(experiment, "boosting", rounds)
    ops += [bagging, boosting]

    subject = Subject(experiment, activations, bagging.outputs[0], boosting.outputs[0], baselines)
    if set(experiment.evaluations) - {"stability", "marginal_gain", "features", *PROBED}:
        ops.append(evaluation_op(subject))
    if "stability" in experiment.evaluations:
        ops.append(stability_op(subject))
    if "features" in experiment.evaluations:
        ops.append(features_op(subject))
    if set(experiment.evaluations) & set(PROBED):
        ops.append(probing_op(subject))
    if "marginal_gain" in experiment.evaluations:
        tables = {output.address.name: output for op in ops for output in op.outputs if output.address.is_table}
        ops.append(marginal_gain_op(subject, tables))
    return ops


def _member_ops(experiment: ExperimentSettings, activations: Reference) -> list[Op]:
    """Members that see all rows are trained on one stream; each that is specialised by itself, after what it starts from."""
    size = experiment.ensemble.members
    targets = [
        Target(
            "bagging",
            f"member_{j}",
            f"Member {j} of {size}: own initial weights, same data\n\n{_shape(sae)}. Trained on one stream with the others.",
            init_index=j,
            sae=experiment.complete_saes[j - 1],
        )
        for j, sae in enumerate(experiment.saes, start=1)
        if experiment.ensemble.specialisation(j) is None
    ]
    ops = [sae_op(f"{experiment.name}__bagging__members", experiment, targets, activations)] if targets else []
    made = {output.address.name: output for op in ops for output in op.outputs}
    for special in sorted(experiment.ensemble.specialised, key=lambda each: each.member):
        j, name = special.member, f"member_{special.member}"
        what = "some documents" if special.documents else "same data"
        what += f", from the weights of member {special.start_from}" if special.start_from else ", own initial weights"
        labels = "".join(f" Documents with {field} {' or '.join(values)}." for field, values in special.documents.items())
        target = Target(
            "bagging",
            name,
            f"Member {j} of {size}: {what}\n\n{_shape(experiment.saes[j - 1])}. Trained by itself.{labels}",
            init_index=j,
            sae=experiment.complete_saes[j - 1],
            documents=special.documents,
            start_from=made[f"member_{special.start_from}"] if special.start_from else None,
        )
        ops.append(sae_op(f"{experiment.name}__bagging__{name}", experiment, [target], activations))
        made[name] = ops[-1].outputs[0]
    return ops


def _round_target(experiment: ExperimentSettings, j: int) -> Target:
    if j == 1:
        what = f"Round 1: the activations{'' if experiment.ensemble.specialisation(1) else '; equals member 1'}"
    else:
        together = ", trained beside them" if experiment.ensemble.boosting == "concurrent" else ""
        what = f"Round {j} of {experiment.ensemble.members}: fits what rounds 1 to {j - 1} leave{together}"
    about = f"{what}\n\n{_shape(experiment.saes[j - 1])}."
    return Target("boosting", f"round_{j}", about, init_index=j, sae=experiment.complete_saes[j - 1])


def _expanded_target(experiment: ExperimentSettings, name: str, n: int, *, l0_matched: bool) -> Target:
    about = f"One SAE as wide as {n} members{', with their L0' if l0_matched else ', same sparsity'}"
    if isinstance(experiment.sae, list):
        sae = experiment.joined_sae(n, l0_matched=l0_matched)
        return Target("baseline", name, f"{about}: in all else as member 1\n\n{_shape(sae)}.", init_index=0, sae=sae)
    return Target("baseline", name, f"{about}\n\n{_shape(experiment.sae)}.", init_index=0, width=n, l0=n if l0_matched else 1)


def _sequential_boosting(experiment: ExperimentSettings, activations: Reference, member_1: Declaration) -> list[Op]:
    """Each round on the residual that is made after the one before."""
    ops: list[Op] = []
    given = activations
    for j in range(1, experiment.ensemble.members + 1):
        name = f"{experiment.name}__boosting__round_{j}"
        round_op = sae_op(name, experiment, [_round_target(experiment, j)], given, twin=member_1 if j == 1 else None)
        ops.append(round_op)
        if j < experiment.ensemble.members:
            residual = residual_op(experiment, j, given, round_op.outputs[0])
            ops.append(residual)
            given = residual.outputs[0]
    return ops


def _concurrent_boosting(experiment: ExperimentSettings, activations: Reference, member_1: Declaration) -> list[Op]:
    """All rounds in one pass over the activations; no residual is stored."""
    rounds = [_round_target(experiment, j) for j in range(1, experiment.ensemble.members + 1)]
    return [concurrent_rounds_op(f"{experiment.name}__boosting__rounds", experiment, rounds, activations, twin=member_1)]


def _shape(sae: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sae.items())
