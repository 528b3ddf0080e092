"""The asset check `bytes`: reads an artefact whole and compares it with its recipe. It runs on request, and is no part of making it."""

# Without `from __future__ import annotations`: Dagster reads the annotations of ops at run time.
import contextlib
from collections.abc import Iterable, Iterator, Sequence

import dagster as dg

from saeens_pipeline.assets.dagster_assets import partition_of
from saeens_pipeline.assets.declarations import DIMENSION_NAMES, Declaration, Dimensions, Op
from saeens_pipeline.checks import compare_bytes
from saeens_pipeline.resources import StoreResource
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import DamagedArtefactError, Store

BYTES = "bytes"
_ABOUT = "All files are those that the recipe describes. What was changed by hand is found, and made again by the next run."


def build_byte_checks(ops: Iterable[Op]) -> list[dg.AssetChecksDefinition]:
    """The check of every asset: one op for each owner and way of being partitioned."""
    grouped: dict[tuple[str, Dimensions], list[Declaration]] = {}
    for output in (output for op in ops for output in op.outputs):
        grouped.setdefault((output.address.owner, output.dimensions), []).append(output)
    return [_build_check(f"{owner}__{BYTES}__{dimensions}", declarations) for (owner, dimensions), declarations in grouped.items()]


def _build_check(name: str, declarations: Sequence[Declaration]) -> dg.AssetChecksDefinition:
    by_key = {dg.AssetKey(declaration.address.key): declaration for declaration in declarations}

    # No partitions_def: the UI does not execute a partitioned check on its own.
    @dg.multi_asset_check(name=name, specs=[dg.AssetCheckSpec(BYTES, asset=key, description=_ABOUT) for key in by_key], can_subset=True)
    def compare(context: dg.AssetCheckExecutionContext, store: StoreResource) -> Iterator[dg.AssetCheckResult]:
        chosen = {key.asset_key for key in context.selected_asset_check_keys}
        partition = partition_of(context) if context.has_partition_key else None
        for declaration in (by_key[key] for key in by_key if key in chosen):
            yield _compare(store.store, declaration, partition, context.run.run_id)

    return compare


def _compare(store: Store, declaration: Declaration, partition: Partition | None, run_id: str) -> dg.AssetCheckResult:
    """One partition or, in a run that has none, all that are on disk. What this very run has written is not read again."""
    if partition is None:
        partitions = store.partitions(declaration.address, *DIMENSION_NAMES[declaration.dimensions])
    else:
        partitions = [declaration.narrow(partition)]
    to_read = [each for each in partitions if not _is_made_by(store, declaration, each, run_id)]
    differences = [difference for each in to_read for difference in compare_bytes(store, declaration, each)]
    return dg.AssetCheckResult(
        asset_key=dg.AssetKey(declaration.address.key),
        check_name=BYTES,
        passed=not differences,
        description="\n".join(differences) or None,
        metadata={"partitions read": len(to_read), "partitions just written by this run": len(partitions) - len(to_read)},
    )


def _is_made_by(store: Store, declaration: Declaration, partition: Partition, run_id: str) -> bool:
    with contextlib.suppress(DamagedArtefactError):  # `compare_bytes` reports it
        artefact = store.find(declaration.address, partition)
        return artefact is not None and artefact.provenance.get("run_id") == run_id
    return False
