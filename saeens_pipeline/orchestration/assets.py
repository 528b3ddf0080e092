"""Dagster assets from declarations: one multi-asset per op, which computes its missing and stale outputs."""

# Without `from __future__ import annotations`: Dagster reads the annotations of ops at run time.
import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import DIMENSION_NAMES, Declaration, Force, Input, Op, RunContext
from saeens_pipeline.assets.health import Health, examine, is_checked
from saeens_pipeline.assets.held_out import measured_by
from saeens_pipeline.assets.materialise import Materialised, materialise, require_sound
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.external_data import DATA_VERSION_TAG, external_key, observe_inputs
from saeens_pipeline.orchestration.instance import layers_name
from saeens_pipeline.orchestration.layers import requested_layers
from saeens_pipeline.orchestration.metadata import describe_artefact, held_out_figures, static_metadata
from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource, TrackerResource
from saeens_pipeline.orchestration.retries import killed_step_policy, retried
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.checkpoints import checkpoint_file
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store

OWNERS = ["team:interpretability"]
HEALTH = "health"
FORCE_TAG = "saeens/force"  # of a run: the request, and after it the assets, if not all are computed anew
_ABOUT_HEALTH = (
    "Error: numbers that are not finite, constant or beyond their dtype, and wrong shapes; nothing is computed from such an artefact. "
    "Warning: dead features, L0 or explained variance outside the thresholds of the experiment."
)


def partitions_of(declaration: Declaration) -> dg.PartitionsDefinition | None:
    """Return an artefact's partitions in Dagster. The layers of a source are one definition, shared by all its experiments."""
    if declaration.dimensions == "none":
        return None
    layers = dg.DynamicPartitionsDefinition(name=layers_name(declaration.source))
    seeds = dg.StaticPartitionsDefinition([str(seed) for seed in declaration.seeds])
    return layers if declaration.dimensions == "layer" else dg.MultiPartitionsDefinition({"layer": layers, "seed": seeds})


def partition_key(declaration: Declaration, partition: Partition) -> str | None:
    """Return the key of a partition in Dagster."""
    keys = {name: str(getattr(partition, name)) for name in DIMENSION_NAMES[declaration.dimensions]}
    return dg.MultiPartitionKey(keys) if len(keys) > 1 else keys.get("layer")


def build_asset(op: Op) -> dg.AssetsDefinition:
    """Return the Dagster multi-asset of an op."""
    by_key = {dg.AssetKey(output.address.key): output for output in op.outputs}
    policy = killed_step_policy()

    @dg.multi_asset(
        name=op.name,
        specs=[_spec(output) for output in op.outputs],
        check_specs=[_health_spec(output) for output in op.outputs if is_checked(output)],
        partitions_def=partitions_of(op.outputs[0]),
        backfill_policy=dg.BackfillPolicy.single_run() if _computes_layers_together(op) else None,
        can_subset=len(op.outputs) > 1,
        pool="gpu" if op.on_device else None,
        retry_policy=policy,
    )
    def make(
        context: dg.AssetExecutionContext, store: StoreResource, compute: ComputeResource, tracker: TrackerResource
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        selected = {output.address for key, output in by_key.items() if key in context.selected_asset_keys}
        checked = [by_key[key.asset_key] for key in context.selected_asset_check_keys]
        observe = partial(_observe, context)
        with (
            retried(context.retry_number, policy, sorted(map(str, selected)), _keys_in_words(context)),
            progress.forward_log_lines(context.log.log),
            progress.report_to(partial(progress.in_lines, context.log.info)),
        ):
            partitions = [op.outputs[0].narrow(each) for each in partitions_of_run(context)]
            in_range = [each.layer for each in partitions if each.layer is not None]
            layers = partial(requested_layers, context) if len(partitions) == 1 else lambda: in_range
            partition, *others = partitions
            run = RunContext(store.store, compute.compute, context.run.run_id, layers, observe, _force_of(context.run))
            checkpoint = checkpoint_file(store.store.root, op.name, partition) if partition.seed is not None else None
            with _cancelled_by_interrupts(context, checkpoint):
                if others:
                    yield from _make_layers_together(op, partitions, run, context)
                    return
                made = materialise(op, selected, partition, run)
                observe_inputs(context, made)
                yield from _report(made, checked, op.checks, partition, store.store)
                _tell_held_out_figures(context, made, store.store)
                for each in made:
                    tracker.mirror(each)

    return make


def _keys_in_words(context: dg.AssetExecutionContext) -> str:
    return ", ".join(map(str, context.partition_keys)) if context.has_partition_key or context.has_partition_key_range else ""


def force_tag(force: Force) -> dict[str, str]:
    """Return the run tag for a request, which the ops of the run read."""
    return {FORCE_TAG: " ".join([force.request, *sorted(force.assets)])}


def _force_of(run: dg.DagsterRun) -> Force | None:
    request, *assets = run.tags.get(FORCE_TAG, "").split() or [""]
    return Force(request, frozenset(assets)) if request else None


def _computes_layers_together(op: Op) -> bool:
    """Return whether a backfill runs an op once for all layers: one forward pass reads them."""
    return op.outputs[0].address.kind == "source" and op.outputs[0].dimensions == "layer"


def _make_layers_together(
    op: Op, partitions: Sequence[Partition], run: RunContext, context: dg.AssetExecutionContext
) -> Iterator[dg.AssetCheckResult]:
    """Materialise several layers of an op with one output, which Dagster has asked for in one run.

    Each layer's materialisation is logged with its own data version: a MaterializeResult has one for all.
    """
    (declaration,), healths = op.outputs, list[Health]()
    for partition in partitions:
        made = materialise(op, {declaration.address}, partition, run)
        observe_inputs(context, made)
        for each in made:
            healths += [each.health] if each.health else []
            context.log_event(
                dg.AssetMaterialization(
                    dg.AssetKey(declaration.address.key),
                    partition=partition_key(declaration, partition),
                    metadata=describe_artefact(run.store, declaration, partition, each.artefact, is_hit=each.is_hit),
                    tags={DATA_VERSION_TAG: each.artefact.data_version},
                )
            )
    yield _check_result(declaration, _together(healths))
    require_sound(healths)


@contextlib.contextmanager
def _cancelled_by_interrupts(context: dg.AssetExecutionContext, checkpoint: Path | None) -> Iterator[None]:
    """Report a run that Ctrl-C ends as being cancelled: otherwise Dagster records a failure, to be retried."""
    try:
        yield
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        kept = f" Training goes on from {checkpoint} in the next run." if checkpoint and checkpoint.exists() else ""
        context.instance.report_run_canceling(context.run, f"Interrupted by Ctrl-C or a signal. Finished artefacts are kept.{kept}")
        raise


def _observe(context: dg.AssetExecutionContext, declaration: Declaration, partition: Partition, metadata: Mapping[str, Any]) -> None:
    key, asset = partition_key(declaration, partition), dg.AssetKey(declaration.address.key)
    context.log_event(dg.AssetObservation(asset, partition=key, metadata=dict(metadata)))


def _tell_held_out_figures(context: dg.AssetExecutionContext, made: Sequence[Materialised], store: Store) -> None:
    """Report the SAEs and ensembles that new tables are about again, with their figures: Dagster shows and plots the last report.

    The tags stay those of the last report, so that nothing counts as changed. What was never reported to this instance, or what it knows
    in another version, is left alone.
    """
    new = [each for each in made if not each.is_hit and each.declaration.address.kind == "eval"]
    about = {each.address: (each, table.partition) for table in new for each in measured_by(table.declaration)}
    for declaration, partition in about.values():
        artefact, last = store.find(declaration.address, partition), _last_report(context.instance, declaration, partition)
        if not artefact or not last or (last.tags or {}).get(DATA_VERSION_TAG) != artefact.data_version:
            continue
        if figures := held_out_figures(store, declaration, partition, artefact):
            metadata = figures | {name: value for name, value in last.metadata.items() if name not in figures}
            key = partition_key(declaration, partition)
            context.log_event(dg.AssetMaterialization(last.asset_key, last.description, metadata, key, last.tags))


def _last_report(instance: dg.DagsterInstance, declaration: Declaration, partition: Partition) -> dg.AssetMaterialization | None:
    """Return the last materialisation of a partition that the instance knows."""
    key = partition_key(declaration, partition)
    records = dg.AssetRecordsFilter(dg.AssetKey(declaration.address.key), asset_partitions=[key] if key else None)
    return next((record.asset_materialization for record in instance.fetch_materializations(records, limit=1).records), None)


def _spec(declaration: Declaration) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=declaration.address.key,
        deps=[
            *(external_key(declaration, name) for name in declaration.external),
            *(_dependency(declaration, each) for each in declaration.inputs if each.in_graph),
        ],
        skippable=True,
        group_name=declaration.address.group,
        kinds=set(declaration.kinds),
        tags=dict(declaration.tags),
        owners=OWNERS,
        description=declaration.description,
        code_version=declaration.code_version,
        metadata=static_metadata(declaration),
    )


def _health_spec(declaration: Declaration) -> dg.AssetCheckSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.AssetCheckSpec(
            HEALTH,
            asset=dg.AssetKey(declaration.address.key),
            description=_ABOUT_HEALTH,
            blocking=True,
            partitions_def=partitions_of(declaration),
        )


def _dependency(declaration: Declaration, upstream: Input) -> dg.AssetDep:
    """Return the Dagster dependency of an asset on an input.

    Partitions with the same layer depend on each other if only one of the two assets has seeds. An input without partitions is an input of
    every partition.
    """
    across = {declaration.dimensions, upstream.artefact.dimensions} == {"layer", "layer_and_seed"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        mapping = dg.MultiToSingleDimensionPartitionMapping("layer") if across else None
    return dg.AssetDep(dg.AssetKey(upstream.artefact.address.key), partition_mapping=mapping)


def partitions_of_run(context: dg.AssetExecutionContext) -> list[Partition]:
    """Return the partitions of a run: several for a range of layers. Raises ConfigurationError for a layer that is not a number."""
    return [_partition(key) for key in context.partition_keys] if context.has_partition_key_range else [partition_of(context)]


def partition_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> Partition:
    """Return the partition of a run. Raises ConfigurationError for a layer that is not a number."""
    return _partition(context.partition_key) if context.has_partition_key else Partition()


def _partition(key: str) -> Partition:
    dimensions = key.keys_by_dimension if isinstance(key, dg.MultiPartitionKey) else {"layer": key}
    try:
        return Partition(**{name: int(value) for name, value in dimensions.items()})
    except ValueError:
        raise ConfigurationError(
            f"the layer {dimensions['layer']!r} is not a number: delete this partition and add one such as 4"
        ) from None


def _report(
    made: Sequence[Materialised], checked: Collection[Declaration], thresholds: CheckSettings, partition: Partition, store: Store
) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
    """Report artefacts and their health to Dagster. Raises UnsoundArtefactError, after all are reported, for unsound artefacts.

    Health is also reported for checks that are not in `checked`: the automation selects no checks of ops that can be subset.
    """
    healths: list[Health | None] = []
    for each in made:
        healths.append(each.health)
        yield dg.MaterializeResult(
            asset_key=dg.AssetKey(each.declaration.address.key),
            metadata=describe_artefact(store, each.declaration, partition, each.artefact, is_hit=each.is_hit),
            data_version=dg.DataVersion(each.artefact.data_version),
            check_results=[_check_result(each.declaration, each.health)] if each.health else [],
        )
    for declaration in checked:
        if declaration not in [each.declaration for each in made]:  # only the check was selected
            healths.append(health := _health_on_disk(declaration, partition, thresholds, store))
            yield _check_result(declaration, health)
    require_sound(healths)


def _health_on_disk(declaration: Declaration, partition: Partition, thresholds: CheckSettings, store: Store) -> Health:
    """Check the health of one partition or, in a run without a partition, of all partitions on disk."""
    if declaration.dimensions == "none" or partition.layer is not None:
        return examine(declaration, partition, store.require(declaration.address, partition), thresholds)
    places = store.partitions(declaration.address, *DIMENSION_NAMES[declaration.dimensions])
    return _together([examine(declaration, where, store.require(declaration.address, where), thresholds) for where in places])


def _together(healths: Sequence[Health]) -> Health:
    return Health([error for health in healths for error in health.errors], [warning for health in healths for warning in health.warnings])


def _check_result(declaration: Declaration, health: Health) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        asset_key=dg.AssetKey(declaration.address.key),
        check_name=HEALTH,
        passed=not health.errors and not health.warnings,
        severity=dg.AssetCheckSeverity.ERROR if health.errors else dg.AssetCheckSeverity.WARN,
        description="\n".join([*health.errors, *health.warnings]) or None,
        metadata={name: round(value, 6) if isinstance(value, float) else value for name, value in health.measured.items()},
    )
