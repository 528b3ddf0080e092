"""Residuals: the inputs of boosting rounds after the first. Their bytes may be dropped; their record stays."""

from __future__ import annotations

from collections.abc import Sequence

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, RunContext, Task, fields_of
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import place

RESIDUAL_VERSION = 1


def residual_op(experiment: ExperimentSettings, number: int, given: Reference, boosting_round: Declaration) -> Op:
    """Declare residual `number`: `given` minus its reconstruction by round `number`."""
    residual = Declaration(
        **fields_of(experiment, "boosting", f"residual_{number}", method="boosting"),
        builder="residual",
        version=RESIDUAL_VERSION,
        settings={},
        inputs=(Input("activations", given), Input("round", boosting_round)),
        kinds=frozenset({"zarr"}),
        description=f"Residual after round {number}\n\nIts bytes may be dropped (`keep_residuals`) and are computed again when needed.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.readers import residual_view
        from saeens_pipeline.storage.residuals import write_residual

        (task,) = tasks
        store, keeps_bytes, label = context.store, experiment.keep_residuals != "none", place(*task.where)
        view = residual_view(store, given, boosting_round, task.partition, context.compute.resolve())
        n_rows, provenance = view.n_rows("train"), context.provenance(task.declaration)
        with store.write_folder(*task.where, task.recipe, provenance, versioned_content=False, resumable=keeps_bytes) as folder:
            with context.compute.measure() as measured, progress.task(label, n_rows) as advance:
                if keeps_bytes:
                    statistics = write_residual(folder, view, name=str(residual.address), report=progress.differences(advance))
                else:
                    statistics = view.statistics("train")
            flops_per_token = boosting_round.require(store, task.partition).provenance["inference_flops_per_token"]
            provenance |= {
                "statistics": {"train": statistics.to_json()},
                "seconds": measured.seconds,
                "peak_memory_bytes": measured.peak_memory_bytes,
                "flops": n_rows * flops_per_token,
            }

    def settle(context: RunContext, task: Task) -> None:
        dropped = {"last": given if number > 1 else None, "none": residual, "all": None}[experiment.keep_residuals]
        if dropped and (artefact := dropped.require(context.store, task.partition)).files:
            context.store.drop_bytes(artefact)

    needs_bytes = experiment.keep_residuals == "all"
    return Op(residual.address.op_name, (residual,), make, on_device=True, links=True, needs_bytes=needs_bytes, settle=settle)
