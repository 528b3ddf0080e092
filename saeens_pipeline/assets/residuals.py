"""Residuals: the inputs of boosting rounds after the first. Their bytes may be dropped; their record stays."""

from __future__ import annotations

from collections.abc import Sequence

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, RunContext, Task, fields_of
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore
from saeens_pipeline.storage.names import Partition, place
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.residuals import ResidualView, write_residual

RESIDUAL_VERSION = 1


def open_reader(store: Store, given: Reference, partition: Partition, device: str = "cpu") -> ActivationReader:
    """Open activations or a residual. A residual without bytes is computed from its nearest stored ancestor.

    Raises SaeensError if such a residual was computed from other activations, or by another round, than the present ones.
    """
    artefact = given.require(store, partition)
    if artefact.files or not isinstance(given, Declaration):
        return ActivationStore(artefact.path)
    inputs = {each.name: each.artefact for each in given.inputs}
    view = _view(store, inputs["activations"], inputs["round"], partition, device)
    for name, each in inputs.items():  # now that they are open
        if each.require(store, partition).data_version != artefact.recipe["inputs"][name]:
            raise SaeensError(f"{each.address} has changed since {place(given.address, partition)} was computed: compute that again first")
    return view


def _view(store: Store, activations: Reference, boosting_round: Reference, partition: Partition, device: str) -> ResidualView:
    import saeens_models as sm

    sae = sm.load_sae(boosting_round.require(store, partition).path).to(device)
    origin = open_reader(store, activations, partition, device)
    return ResidualView(origin, [lambda r: (r.to(device) - sae(r.to(device))).cpu()], name=str(boosting_round.address))


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
        (task,) = tasks
        store, keeps_bytes, label = context.store, experiment.keep_residuals != "none", place(*task.where)
        view = _view(store, given, boosting_round, task.partition, context.compute.resolve())
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
        if experiment.keep_residuals == "last" and number > 1:
            store.drop_bytes(given.require(store, task.partition))

    return Op(residual.address.op_name, (residual,), make, on_device=True)
