"""What an experiment consists of: the wiring from settings to ops, in the order in which things are made."""

from __future__ import annotations

from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference
from saeens_pipeline.assets.ensembles import ensemble_op
from saeens_pipeline.assets.evaluation import Subject, evaluation_op, stability_op
from saeens_pipeline.assets.residuals import residual_op
from saeens_pipeline.assets.saes import Target, sae_op
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.components.ensemble_experiment import ExperimentSettings


def experiment_ops(experiment: ExperimentSettings) -> list[Op]:
    """All ops of an experiment, on the activations of its source."""
    activations = activations_of(experiment.source)
    size = experiment.ensemble.members
    shape = ", ".join(f"{name} {value}" for name, value in experiment.sae.items())

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

    rounds: list[Declaration] = []
    given: Reference = activations
    for j in range(1, size + 1):
        first = j == 1
        what = "Round 1: the activations; equals member 1" if first else f"Round {j} of {size}: fits what rounds 1 to {j - 1} leave"
        target = Target("boosting", f"round_{j}", f"{what}\n\n{shape}.", init_index=j)
        twin = members_op.outputs[0] if first else None
        round_op = sae_op(
            f"{experiment.name}__boosting__round_{j}",
            experiment,
            [target],
            given,
            after=(Input("member_1", twin, decides=False),) if twin else (),
            twin=twin,
        )
        ops.append(round_op)
        rounds.append(round_op.outputs[0])
        if j < size:
            residual = residual_op(experiment, j, given, rounds[-1])
            ops.append(residual)
            given = residual.outputs[0]

    baselines: list[tuple[str, int, Declaration]] = []
    for method in experiment.baselines:
        for n in experiment.expanded_widths:
            name = method if n == size else f"{method}_{n}"
            matched = method == "expanded_l0_matched"
            about = f"One SAE as wide as {n} members{', with their L0' if matched else ', same sparsity'}\n\n{shape}."
            target = Target("baseline", name, about, init_index=0, width=n, l0=n if matched else 1)
            baseline_op = sae_op(f"{experiment.name}__baseline__{name}", experiment, [target], activations)
            ops.append(baseline_op)
            baselines.append((method, n, baseline_op.outputs[0]))

    bagging = ensemble_op(experiment, "bagging", members_op.outputs)
    boosting = ensemble_op(experiment, "boosting", rounds)
    ops += [bagging, boosting]

    subject = Subject(experiment, activations, bagging.outputs[0], boosting.outputs[0], baselines)
    if set(experiment.evaluations) - {"stability"}:
        ops.append(evaluation_op(subject))
    if "stability" in experiment.evaluations:
        ops.append(stability_op(subject))
    return ops
