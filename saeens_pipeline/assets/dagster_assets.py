"""From declarations to Dagster assets: one multi-asset per op, which makes what its recipes say is missing."""

# Without `from __future__ import annotations`: Dagster reads the annotations of ops at run time.
import errno
import warnings
from collections.abc import Iterable, Iterator, Sequence

import dagster as dg

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Task, Workplace
from saeens_pipeline.assets.metadata import describe_artefact, static_metadata
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.resources import ComputeResource, StoreResource
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Artefact

OWNERS = ["team:interpretability"]
LAYERS_TAG = "saeens/layers"  # on a run: all layers that it will ask for


def layers_of(source: str) -> dg.DynamicPartitionsDefinition:
    """The layers of a source: one definition, shared by all its experiments."""
    return dg.DynamicPartitionsDefinition(name=f"{source}_layers")


def partitions_of(declaration: Declaration) -> dg.PartitionsDefinition | None:
    """How Dagster partitions an artefact."""
    layers = layers_of(declaration.source)
    match declaration.dimensions:
        case "none":
            return None
        case "layer":
            return layers
        case _:
            return dg.MultiPartitionsDefinition(
                {"layer": layers, "seed": dg.StaticPartitionsDefinition([str(seed) for seed in declaration.seeds])}
            )


def partition_key(declaration: Declaration, partition: Partition) -> str | None:
    """The partition's key in Dagster."""
    match declaration.dimensions:
        case "none":
            return None
        case "layer":
            return str(partition.layer)
        case _:
            return dg.MultiPartitionKey({"layer": str(partition.layer), "seed": str(partition.seed)})


def build_assets(ops: Iterable[Op]) -> list[dg.AssetsDefinition]:
    """The Dagster assets of some ops."""
    return [_build_asset(op) for op in ops]


def _build_asset(op: Op) -> dg.AssetsDefinition:
    by_key = {dg.AssetKey(output.address.key): output for output in op.outputs}

    @dg.multi_asset(
        name=op.name,
        specs=[_spec(output) for output in op.outputs],
        partitions_def=partitions_of(op.outputs[0]),
        can_subset=len(op.outputs) > 1,
        pool="gpu" if op.on_device else None,
    )
    def make(context: dg.AssetExecutionContext, store: StoreResource, compute: ComputeResource) -> Iterator[dg.MaterializeResult]:
        selected = [by_key[key] for key in sorted(context.selected_asset_keys, key=list(by_key).index)]
        with progress.report_to(progress.LineReporter(context.log.info)):
            yield from _materialise(
                op, selected, _partition(context), Workplace(store.store, compute, context.run.run_id, _requested_layers(context))
            )

    return make


def _spec(declaration: Declaration) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=declaration.address.key,
        deps=[_dependency(declaration, each) for each in declaration.inputs],
        skippable=True,
        group_name=declaration.address.group,
        kinds=set(declaration.kinds),
        tags=dict(declaration.tags),
        owners=OWNERS,
        description=declaration.description,
        code_version=declaration.code_version,
        metadata=static_metadata(declaration),
    )


def _dependency(declaration: Declaration, upstream: Input) -> dg.AssetDep:
    """Between (layer, seed) and (layer) the layers correspond; what has no partitions serves all."""
    across = {declaration.dimensions, upstream.artefact.dimensions} == {"layer", "layer_and_seed"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        mapping = dg.MultiToSingleDimensionPartitionMapping("layer") if across else None
    return dg.AssetDep(dg.AssetKey(upstream.artefact.address.key), partition_mapping=mapping)


def _partition(context: dg.AssetExecutionContext) -> Partition:
    if not context.has_partition_key:
        return Partition()
    key = context.partition_key
    dimensions = key.keys_by_dimension if isinstance(key, dg.MultiPartitionKey) else {"layer": key}
    try:
        return Partition(**{name: int(value) for name, value in dimensions.items()})
    except ValueError:
        raise ConfigurationError(
            f"the layer {dimensions['layer']!r} is not a number: delete this partition and add one such as 4"
        ) from None


def _requested_layers(context: dg.AssetExecutionContext) -> tuple[int, ...]:
    tag = context.run.tags.get(LAYERS_TAG, "")
    return tuple(int(layer) for layer in tag.split(",") if layer)


def _materialise(op: Op, selected: Sequence[Declaration], partition: Partition, workplace: Workplace) -> Iterator[dg.MaterializeResult]:
    store = workplace.store
    tasks = [Task(declaration, partition, declaration.recipe(store, partition)) for declaration in selected]
    hits: dict[int, Artefact] = {i: artefact for i, task in enumerate(tasks) if (artefact := store.hit(*task.where, task.recipe))}
    misses = [task for i, task in enumerate(tasks) if i not in hits]
    if misses:
        try:
            op.make(workplace, misses)
        except Exception as error:
            if _is_full_disk(error):
                message = f"the disk below {store.root} is full: free some space and run again; what was finished before is kept"
                raise SaeensError(message) from error
            raise
    for i, task in enumerate(tasks):
        artefact = hits.get(i) or store.require(*task.where)
        yield dg.MaterializeResult(
            asset_key=dg.AssetKey(task.declaration.address.key),
            metadata=describe_artefact(task.declaration, artefact, cache_hit=i in hits),
            data_version=dg.DataVersion(artefact.data_version),
        )


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error or what caused it is ENOSPC; safetensors and polars raise it under names of their own."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
