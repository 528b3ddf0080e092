"""Published SAEs: members, and a first round of boosting, that are loaded instead of trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeens_pipeline.assets.declarations import Declaration, Facts, Input, Op, Reference, RunContext, Task, Wanted, fields_of
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.fingerprints import fingerprint_once
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.files import blamed_on
from saeens_pipeline.settings.published import HUB, PublishedSAE
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store

PUBLISHED_VERSION = 1


def published_op(experiment: ExperimentSettings, entry: PublishedSAE, activations: Reference, member_1: Reference | None = None) -> Op:
    """Declare a published member or, given `member_1`, round 1 of boosting, which is the same SAE and is linked.

    The SAE is loaded from its files and checked against `activations`. The recipe has the SHA-256 of local files, or the commit on the hub.
    """
    kind, name = ("boosting", "round_1") if member_1 else ("bagging", f"member_{entry.member}")
    what = "Round 1: published, equals member 1" if member_1 else f"Member {entry.member} of {experiment.ensemble.members}: published"

    def identity(partition: Partition) -> dict[str, Any]:
        with _blamed_on(experiment, entry):
            return {"published": _identity(entry.at(*partition))}

    published = Declaration(
        **fields_of(experiment, kind, name, method=kind, architecture="published"),
        builder="published_sae",
        version=PUBLISHED_VERSION,
        settings={},
        partition_settings=identity,
        inputs=(Input("activations", activations), *([Input(member_1.address.name, member_1, decides=False)] if member_1 else [])),
        kinds=frozenset({"pytorch"}),
        description=f"{what}\n\n{entry.sae}",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.published_loading import write_published

        for task in tasks:
            with _blamed_on(experiment, entry):
                write_published(context, task, entry.at(*task.partition))

    def check(store: Store, wanted: Wanted, facts: Facts) -> None:
        from saeens_pipeline.assets.published_loading import load_published, require_width

        there = store.partitions(published.address, "layer", "seed")
        layers = sorted({partition.layer or 0 for partition in (*there, *(partition for _, partition in wanted))})
        if len(layers) > 1 and not entry.depends_on("layer"):
            with _blamed_on(experiment, entry):
                raise ConfigurationError(
                    f"one SAE, wanted or there at the layers {', '.join(map(str, layers))}: write {{layer}} where the paths differ"
                )
        for place in dict.fromkeys(entry.at(*partition) for _, partition in wanted):
            with _blamed_on(experiment, entry):
                require_width(load_published(place), facts().d_in, place)

    return Op(published.address.op_name, (published,), make, preflight=check, links=True, twin=member_1)


@contextmanager
def _blamed_on(experiment: ExperimentSettings, entry: PublishedSAE) -> Iterator[None]:
    """Turn errors of the files of a published SAE into ConfigurationError, with the line of the entry, or SaeensError for the network's."""
    with blamed_on(experiment, ("ensemble", "published", experiment.ensemble.published.index(entry), "sae")):
        try:
            yield
        except (ConnectionError, ModuleNotFoundError) as error:
            raise SaeensError(f"{experiment.name}: {error}") from error
        except (ValueError, OSError) as error:
            raise ConfigurationError(str(error)) from error


def _identity(place: str) -> dict[str, Any]:
    """Return what decides the content at a place: a commit on the hub, or the SHA-256 of local files."""
    from saeens_models.interop import files_of, hub

    if place.startswith(HUB):
        return {"sae": hub.pin(place)}
    return {"sha256": {file.name: fingerprint_once(file) for file in files_of(Path(place))}}
