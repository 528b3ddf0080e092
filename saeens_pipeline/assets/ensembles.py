"""Ensembles as artefacts: references to their SAEs, whose data versions are in the recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from saeens_pipeline.assets.declarations import Declaration, Input, Op, RunContext, Task
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import Address

ENSEMBLE_VERSION = 1


def ensemble_op(experiment: ExperimentSettings, kind: Literal["bagging", "boosting"], members: Sequence[Declaration]) -> Op:
    """Declare the ensemble of all members. `sm.load_ensemble` opens its folder; the members stay where they are."""
    meaning = "Mean of the members" if kind == "bagging" else "Sum of the rounds, each trained on the residual"
    architectures = {sae.architecture for sae in experiment.saes}
    architecture = architectures.pop() if len(architectures) == 1 else "mixed"
    ensemble = Declaration(
        address=Address(experiment.name, kind, f"{kind}_ensemble"),
        dimensions="layer_and_seed",
        builder="ensemble",
        version=ENSEMBLE_VERSION,
        settings={"kind": kind},
        inputs=tuple(Input(member.address.name, member) for member in members),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"pytorch"}),
        tags={"experiment": experiment.name, "source": experiment.source, "method": kind, "architecture": architecture},
        description=f"{meaning}, as one dictionary\n\nHolds references to its SAEs: `sm.load_ensemble(path)` follows them.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        contents = {
            "format_version": 1,
            "kind": kind,
            "members": [f"../{member.address.name}" for member in members],
        }
        with context.store.write_folder(*task.where, task.recipe, context.provenance(task.declaration)) as folder:
            (folder / "ensemble.json").write_text(json.dumps(contents, indent=2) + "\n")

    return Op(ensemble.address.op_name, (ensemble,), make)
