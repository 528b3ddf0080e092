"""The asset checks of what is on disk. `bytes` reads a whole artefact and compares it with its record; `recipe` says what is stale.

Executed on their own, they look at every partition. Executed by Dagster with a materialisation, `bytes` reads that partition.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of ops at run time.
from collections.abc import Iterator, Sequence

import dagster as dg

from saeens_pipeline.assets.declarations import DIMENSION_NAMES, Declaration, Dimensions
from saeens_pipeline.assets.health import compare_bytes
from saeens_pipeline.orchestration.assets import partition_of
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.orchestration.resources import StoreResource
from saeens_pipeline.orchestration.staleness import RECIPE, recipe_check, recipe_checks
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import DamagedArtefactError, Store

BYTES = "bytes"
_ABOUT_RECIPE = (
    "Settings, inputs and versions are those from which the artefact was computed. A stale one is computed again by the next run. "
    "The sensor `staleness` keeps this check up to date."
)
_ABOUT_BYTES = "All files have the hashes in the record. An artefact with changed files is invalidated, and the next run computes it again."


def build_disk_checks(catalogue: Ops) -> list[dg.AssetChecksDefinition]:
    """Return the checks of all assets: one op for each owner and kind of partitions."""
    grouped: dict[tuple[str, Dimensions], list[Declaration]] = {}
    for output in (output for op in catalogue.all_ops() for output in op.outputs):
        grouped.setdefault((output.address.owner, output.dimensions), []).append(output)
    return [_build_check(catalogue, f"{owner}__disk__{dimensions}", declarations) for (owner, dimensions), declarations in grouped.items()]


def _build_check(catalogue: Ops, name: str, declarations: Sequence[Declaration]) -> dg.AssetChecksDefinition:
    by_key = {dg.AssetKey(declaration.address.key): declaration for declaration in declarations}
    owner, kind = declarations[0].address.owner, declarations[0].address.kind
    users = [each.name for each in catalogue.experiments.values() if (each.source if kind == "source" else each.name) == owner]
    specs = [dg.AssetCheckSpec(BYTES, asset=key, description=_ABOUT_BYTES) for key in by_key]
    if users:  # the pages over all experiments have no recipe of one experiment
        specs += [dg.AssetCheckSpec(RECIPE, asset=key, description=_ABOUT_RECIPE) for key in by_key]

    # No partitions_def: the UI does not execute a partitioned check on its own.
    @dg.multi_asset_check(name=name, specs=specs, can_subset=True)
    def compare(context: dg.AssetCheckExecutionContext, store: StoreResource) -> Iterator[dg.AssetCheckResult]:
        chosen = context.selected_asset_check_keys
        partition = partition_of(context) if context.has_partition_key else None
        for key, declaration in by_key.items():
            if dg.AssetCheckKey(key, BYTES) in chosen:
                yield _compare(store.store, declaration, partition)
        if any(key.name == RECIPE for key in chosen):
            found = recipe_checks(catalogue, users[0], context.instance)
            for key in (key for key in by_key if dg.AssetCheckKey(key, RECIPE) in chosen):
                yield dg.AssetCheckResult(asset_key=key, check_name=RECIPE, **found.get(key, recipe_check([]))._asdict())

    return compare


def _compare(store: Store, declaration: Declaration, partition: Partition | None) -> dg.AssetCheckResult:
    """Compare one partition or, in a run without a partition, all that are on disk.

    The result is that of the whole asset: damage found earlier in other partitions is reported until they are computed again.
    """
    on_disk = store.partitions(declaration.address, *DIMENSION_NAMES[declaration.dimensions])
    to_read = on_disk if partition is None else [each for each in on_disk if each == declaration.narrow(partition)]
    differences = [difference for each in to_read for difference in compare_bytes(store, declaration, each)]
    for each in (each for each in on_disk if each not in to_read):
        try:
            store.find(declaration.address, each)
        except DamagedArtefactError as error:
            differences.append(str(error))
    description = list(differences)
    if not to_read:
        description.append("There is nothing to read: materialise the asset first.")
    elif len(to_read) < len(on_disk):
        description.append(f"Read {len(to_read)} of {len(on_disk)} partitions: execute this check on its own to read all.")
    return dg.AssetCheckResult(
        asset_key=dg.AssetKey(declaration.address.key),
        check_name=BYTES,
        passed=bool(to_read) and not differences,
        severity=dg.AssetCheckSeverity.ERROR if differences else dg.AssetCheckSeverity.WARN,
        description="\n".join(description) or None,
        metadata={"partitions read": len(to_read), "partitions on disk": len(on_disk)},
    )
