"""Residuals: the inputs of boosting rounds after the first. Their bytes may be dropped; their record stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, RunContext, Task
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics, ActivationStore
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.residuals import ResidualView, write_residual

if TYPE_CHECKING:
    from pathlib import Path

RESIDUAL_VERSION = 1


def open_reader(store: Store, given: Reference, partition: Partition, device: str = "cpu") -> ActivationReader:
    """Open activations or a residual. A residual without bytes is computed from its nearest stored ancestor."""
    artefact = store.require(given.address, given.narrow(partition))
    if artefact.files or not isinstance(given, Declaration):
        return ActivationStore(artefact.path)
    inputs = {each.name: each.artefact for each in given.inputs}
    return _view(store, inputs["activations"], inputs["round"], partition, device)


def _view(store: Store, activations: Reference, boosting_round: Reference, partition: Partition, device: str) -> ResidualView:
    import saeens_models as sm

    sae = sm.load_sae(store.require(boosting_round.address, partition).path).to(device)
    return ResidualView(
        open_reader(store, activations, partition, device),
        [lambda r: (r.to(device) - sae(r.to(device))).cpu()],
        name=str(boosting_round.address),
    )


def residual_op(experiment: ExperimentSettings, number: int, given: Reference, boosting_round: Declaration) -> Op:
    """Declare residual `number`: `given` minus its reconstruction by round `number`."""
    residual = Declaration(
        address=Address(experiment.name, "boosting", f"residual_{number}"),
        dimensions="layer_and_seed",
        builder="residual",
        version=RESIDUAL_VERSION,
        settings={},
        inputs=(Input("activations", given), Input("round", boosting_round)),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"zarr"}),
        tags={"experiment": experiment.name, "source": experiment.source, "method": "boosting"},
        description=f"Residual after round {number}\n\nIts bytes may be dropped (`keep_residuals`) and are computed again when needed.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        store, device = context.store, context.compute.resolve()
        view = _view(store, given, boosting_round, task.partition, device)
        n_rows = view.n_rows("train")
        provenance = context.provenance(task.declaration)
        writing = store.write_folder(
            residual.address,
            task.partition,
            task.recipe,
            provenance,
            versioned_content=False,
            resumable=experiment.keep_residuals != "none",
        )
        with writing as folder:
            with context.compute.measure() as measured, progress.task(f"{residual.address}, {task.partition}", n_rows) as advance:
                statistics = _stream(view, folder, experiment.keep_residuals != "none", str(residual.address), advance)
            flops_per_token = store.require(boosting_round.address, task.partition).provenance["inference_flops_per_token"]
            provenance |= {
                "statistics": {"train": statistics.to_json()},
                "seconds": measured.seconds,
                "peak_memory_bytes": measured.peak_memory_bytes,
                "flops": n_rows * flops_per_token,
            }
        if experiment.keep_residuals == "last" and number > 1:
            store.drop_bytes(store.require(given.address, task.partition))

    return Op(residual.address.op_name, (residual,), make, on_device=True)


def _stream(view: ResidualView, folder: Path, keep_bytes: bool, name: str, advance: progress.Advance) -> ActivationStatistics:
    if not keep_bytes:
        return view.statistics("train")
    return write_residual(folder, view, name=name, report=progress.differences(advance))
