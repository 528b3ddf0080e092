"""What an experiment consists of: the wiring from settings to ops, in the order in which things are made."""

from __future__ import annotations

from saeens_pipeline.assets.declarations import Declaration, Op, Reference
from saeens_pipeline.assets.ensembles import ensemble_op
from saeens_pipeline.assets.evaluation import Subject, evaluation_op, stability_op
from saeens_pipeline.assets.probing import PROBED, probing_op
from saeens_pipeline.assets.residuals import residual_op
from saeens_pipeline.assets.saes import Target, concurrent_rounds_op, sae_op
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.components.ensemble_experiment import ExperimentSettings


def experiment_ops(experiment: ExperimentSettings) -> list[Op]:
    """All ops of an experiment, on the activations of its source."""
    activations = activations_of(experiment.source)
    size = experiment.ensemble.members
    shape = _shape(experiment)

    members = [
        Target(
            "bagging",
            f"member_{j}",
            f"Member {j} of {size}: own initial weights, same data\n\n{shape}. Trained on one stream with the others.",
            init_index=j,
        )
        for j in range(1, size + 1)
    ]
    members_op = sae_op(f"{experiment.name}__bagging__members", experiment, members, activations)
    ops = [members_op]

    boost = _concurrent_boosting if experiment.ensemble.boosting == "concurrent" else _sequential_boosting
    boosting_ops = boost(experiment, activations, members_op.outputs[0])
    rounds = [output for op in boosting_ops for output in op.outputs if output.builder == "sae"]
    ops += boosting_ops

    baselines: list[tuple[str, int, Declaration]] = []
    alike: dict[tuple[int, int], Declaration] = {}  # the first of each width and L0: of one member's width, two methods agree
    for method in experiment.baselines:
        for n in experiment.expanded_widths:
            name = method if n == size else f"{method}_{n}"
            matched = method == "expanded_l0_matched"
            about = f"One SAE as wide as {n} members{', with their L0' if matched else ', same sparsity'}\n\n{shape}."
            target = Target("baseline", name, about, init_index=0, width=n, l0=n if matched else 1)
            twin = alike.get((target.width, target.l0))
            baseline_op = sae_op(f"{experiment.name}__baseline__{name}", experiment, [target], activations, twin=twin)
            ops.append(baseline_op)
            baselines.append((method, n, baseline_op.outputs[0]))
            alike.setdefault((target.width, target.l0), baseline_op.outputs[0])

    bagging = ensemble_op(experiment, "bagging", members_op.outputs)
    boosting = ensemble_op(experiment, "boosting", rounds)
    ops += [bagging, boosting]

    subject = Subject(experiment, activations, bagging.outputs[0], boosting.outputs[0], baselines)
    if set(experiment.evaluations) - {"stability", *PROBED}:
        ops.append(evaluation_op(subject))
    if "stability" in experiment.evaluations:
        ops.append(stability_op(subject))
    if set(experiment.evaluations) & set(PROBED):
        ops.append(probing_op(subject))
    return ops


def _round_target(experiment: ExperimentSettings, j: int) -> Target:
    if j == 1:
        what = "Round 1: the activations; equals member 1"
    else:
        together = ", trained beside them" if experiment.ensemble.boosting == "concurrent" else ""
        what = f"Round {j} of {experiment.ensemble.members}: fits what rounds 1 to {j - 1} leave{together}"
    return Target("boosting", f"round_{j}", f"{what}\n\n{_shape(experiment)}.", init_index=j)


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


def _shape(experiment: ExperimentSettings) -> str:
    return ", ".join(f"{name} {value}" for name, value in experiment.sae.items())
