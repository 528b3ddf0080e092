"""What an experiment consists of: the wiring from settings to ops, in the order in which things are made."""

from __future__ import annotations

from dataclasses import replace

from saeens_pipeline.assets.baselines import baselines_of, shape_of
from saeens_pipeline.assets.declarations import Declaration, Op, Reference
from saeens_pipeline.assets.ensembles import ensemble_op
from saeens_pipeline.assets.residuals import residual_op
from saeens_pipeline.assets.saes import Target, concurrent_rounds_op, sae_op
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.assets.tables.autointerp import autointerp_op
from saeens_pipeline.assets.tables.contexts import contexts_op
from saeens_pipeline.assets.tables.evaluation import Subject, evaluation_op, stability_op
from saeens_pipeline.assets.tables.features import features_op
from saeens_pipeline.assets.tables.marginal_gain import marginal_gain_op
from saeens_pipeline.assets.tables.pareto import pareto_op
from saeens_pipeline.assets.tables.probing import PROBED, probing_op
from saeens_pipeline.report.asset import report_op
from saeens_pipeline.settings.experiments import ExperimentSettings


def declared_ops(settings: ExperimentSettings) -> list[Op]:
    """All ops of what one document declares: of an experiment or, of a sweep, those of all its experiments, and their comparison."""
    ops = [op for experiment in settings.experiments for op in experiment_ops(experiment)]
    return [*ops, pareto_op(settings, [output for op in ops for output in op.outputs])] if settings.sweep else ops


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
    alike: list[tuple[Target, Declaration]] = []  # of one member's width, two methods agree
    for method, n, target in baselines_of(experiment):
        unnamed = replace(target, name="", description="")
        twin = next((made for other, made in alike if other == unnamed), members[0] if target.init_index == 1 else None)
        baseline_op = sae_op(f"{experiment.name}__baseline__{target.name}", experiment, [target], activations, twin=twin)
        ops.append(baseline_op)
        baselines.append((method, n, baseline_op.outputs[0]))
        alike.append((unnamed, baseline_op.outputs[0]))

    bagging = ensemble_op(experiment, "bagging", members)
    boosting = ensemble_op(experiment, "boosting", rounds)
    ops += [bagging, boosting]

    subject = Subject(experiment, activations, bagging.outputs[0], boosting.outputs[0], baselines)
    if set(experiment.evaluations) - {"stability", "marginal_gain", "features", "contexts", "autointerp", *PROBED}:
        ops.append(evaluation_op(subject))
    if "stability" in experiment.evaluations:
        ops.append(stability_op(subject))
    if "features" in experiment.evaluations:
        ops.append(features_op(subject))
    if "contexts" in experiment.evaluations:
        ops.append(contexts_op(subject))
    if "autointerp" in experiment.evaluations:
        ops.append(autointerp_op(subject, ops[-1].outputs[0]))
    if set(experiment.evaluations) & set(PROBED):
        ops.append(probing_op(subject))
    if "marginal_gain" in experiment.evaluations:
        tables = {output.address.name: output for op in ops for output in op.outputs if output.address.is_table}
        ops.append(marginal_gain_op(subject, tables))
    ops.append(report_op(experiment, [output for op in ops for output in op.outputs if output.address.kind == "eval"]))
    return ops


def _member_ops(experiment: ExperimentSettings, activations: Reference) -> list[Op]:
    """Members that see all rows are trained on one stream; each that is specialised by itself, after what it starts from."""
    size = experiment.ensemble.members
    targets = [
        Target(
            "bagging",
            f"member_{j}",
            f"Member {j} of {size}: own initial weights, same data\n\n{shape_of(sae)}. Trained on one stream with the others.",
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
            f"Member {j} of {size}: {what}\n\n{shape_of(experiment.saes[j - 1])}. Trained by itself.{labels}",
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
    about = f"{what}\n\n{shape_of(experiment.saes[j - 1])}."
    return Target("boosting", f"round_{j}", about, init_index=j, sae=experiment.complete_saes[j - 1])


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
