"""Garbage collection: files below the data root that belong to no present experiment or source.

A path counts as an artefact only if it is at an artefact's place and has a record. All other unknown files are listed and never removed,
and so are artefacts with files that are not in their record. Symbolic links are not followed.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models import gguf_models
from saeens_pipeline.language_models.autointerp.answers import FOLDER as ANSWERS_FOLDER
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.followed_models import FILE as REVISIONS_FILE
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.pinned_packages import FOLDER as CORPORA_FOLDER
from saeens_pipeline.orchestration.dagster_internals import forget_partitions
from saeens_pipeline.orchestration.instance import home_folder, layers_name, recorded_instance
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.orchestration.trackers import FOLDER as TRACKERS_FOLDER
from saeens_pipeline.settings.files import unread_folder
from saeens_pipeline.storage import locks
from saeens_pipeline.storage.checkpoints import is_unfinished_checkpoint, locate_checkpoint
from saeens_pipeline.storage.names import Address, Partition, is_above_artefacts, locate
from saeens_pipeline.storage.recipes import (
    DamagedArtefactError,
    Store,
    Stored,
    all_artefacts,
    foreign_files,
    read_artefact,
    read_temporary,
    remove_whole,
)
from saeens_pipeline.storage.rolling_cache import FOLDER as CACHE_FOLDER

logger = logging.getLogger(__name__)


class Finding(NamedTuple):
    """A file or folder below the data root, and the reason why it is listed."""

    path: Path
    n_bytes: int
    reason: str


@dataclass
class Inventory:
    """Files and folders without a reference, and those of unknown origin; both in the order of their paths."""

    garbage: list[Finding] = field(default_factory=list)
    unknown: list[Finding] = field(default_factory=list)
    unread_folders: list[Path] = field(default_factory=list)
    """Folders of experiment files of artefacts here that are not read now."""

    @property
    def freed_bytes(self) -> int:
        """Return the bytes that become free by removing the garbage. A file with several hard links becomes free with its last link."""
        found = [file.lstat() for finding in self.garbage for file in _files(finding.path)]
        names = Counter((status.st_dev, status.st_ino) for status in found)
        nodes = {(status.st_dev, status.st_ino): status for status in found}
        return sum(status.st_size for node, status in nodes.items() if names[node] == status.st_nlink)


@dataclass(frozen=True)
class Declared:
    """References of experiments and sources: artefacts by address, the first output of each op by the op's name, layers by source."""

    outputs: Mapping[Address | str, Declaration]
    layers: Mapping[str, frozenset[int]]
    of_op: Mapping[str, Sequence[Declaration]]
    """All outputs of each op by the op's name."""
    dequantised: frozenset[str] | None = frozenset()
    """Names of the folders of dequantised GGUF models; None if the GGUF file of a source is missing, so that its folder is not known."""

    def objection(self, to: Address | str, partition: Partition) -> str:
        """Return the reason why an artefact, or the checkpoint of an op of this name, is unused; empty if something refers to it."""
        declaration = self.outputs.get(to)
        if declaration is None:
            return self._objection_to_name(to)
        if declaration.narrow(partition) != partition:
            return f"{declaration.address} has no such partitions any more"
        if partition.layer is not None and partition.layer not in self.layers[declaration.source]:
            return f"layer {partition.layer} is neither in the file of source {declaration.source} nor registered"
        if partition.seed is not None and partition.seed not in declaration.seeds:
            return f"seed {partition.seed} is not declared any more"
        return ""

    def _objection_to_name(self, to: Address | str) -> str:
        if isinstance(to, str):
            return f"nothing is trained under the name {to} any more"
        owner = "source" if to.kind == "source" else "experiment"
        addresses = [each.address for each in self.outputs.values()]
        if any(each.owner == to.owner and (each.kind == "source") == (to.kind == "source") for each in addresses):
            return f"{to} is not declared any more"
        return f"there is no {owner} {to.owner} any more"


def declared(catalogue: Ops) -> Declared:
    """Return all references of the experiments, with the layers of their files and those added to the instance."""
    with recorded_instance() as instance:
        added = {name: instance.get_dynamic_partitions(layers_name(name)) if instance else [] for name in catalogue.sources}
    layers = {
        name: frozenset([*source.layers, *(int(layer) for layer in added[name] if layer.isdecimal())])
        for name, source in catalogue.sources.items()
    }
    ops = catalogue.all_ops()
    outputs = {output.address: output for op in ops for output in op.outputs} | {op.name: op.outputs[0] for op in ops}
    try:
        files = [file for source in catalogue.sources.values() if (file := gguf_models.gguf_file(str(source.language_model)))]
        dequantised = frozenset(gguf_models.cache_folder(file).name for file in files)
    except (ConfigurationError, OSError):
        dequantised = None
    return Declared(outputs, layers, {op.name: op.outputs for op in ops}, dequantised)


def find_garbage(root: Path, references: Declared, given_up: Sequence[Path] = ()) -> Inventory:
    """Search the data root for garbage. Changes nothing.

    Artefacts whose record names an experiment file in a folder that is not read now are kept, unless that folder or one above it is
    in `given_up`. Raises ConfigurationError for a folder in `given_up` if no record names a file below it that is not read now.
    """
    root = root.resolve()
    given_up = [folder.expanduser().resolve() for folder in given_up]
    recorded = (each.artefact.provenance.get("experiment_file", "") for each in all_artefacts(root) if isinstance(each, Stored))
    unread = {folder for file in set(recorded) if (folder := unread_folder(file))}
    for folder in given_up:
        if not any(each.is_relative_to(folder) for each in unread):
            known = ", ".join(map(str, sorted(unread))) or "none"
            raise ConfigurationError(
                f"--forget-folder {folder}: no artefact here is from files of this folder, or it is read now; there are: {known}"
            )
    kept = sorted(each for each in unread if not any(each.is_relative_to(folder) for folder in given_up))
    inventory = Inventory(unread_folders=kept)
    own = (
        root / "dagster",
        root / locks.FOLDER,
        root / CORPORA_FOLDER,
        root / ANSWERS_FOLDER,
        root / CACHE_FOLDER,
        root / TRACKERS_FOLDER,
        root / REVISIONS_FILE,
    )  # answers cost money and serve all experiments
    others = (*own, home_folder().resolve(), describe_language_model(REFERENCE_MODEL).path.resolve())
    for path in _entries(root):
        if path == root / gguf_models.FOLDER:
            _look_at_dequantised(path, root, references, inventory)
        elif path not in others and path.resolve() not in others:
            _look_at(path, root, references, inventory)
    return inventory


def by_folder(findings: Sequence[Finding], root: Path) -> list[Finding]:
    """Return the findings in short: a folder below `root` replaces its entries if all are listed for the same reason."""
    root, shown = root.resolve(), {finding.path: finding for finding in findings}
    pending = [path.parent for path in shown]
    while pending:
        folder = pending.pop()
        held = [shown.get(entry) for entry in folder.iterdir()]
        reasons = {finding.reason if finding else None for finding in held}
        if folder not in shown and root not in (folder, folder.parent) and len(reasons) == 1 and None not in reasons:
            of_folder = [shown.pop(finding.path) for finding in held if finding]
            shown[folder] = Finding(folder, sum(finding.n_bytes for finding in of_folder), of_folder[0].reason)
            pending.append(folder.parent)
    return sorted(shown.values(), key=lambda finding: [_natural(part) for part in finding.path.parts])


def remove_garbage(catalogue: Experiments, inventory: Inventory, root: Path) -> None:
    """Remove the garbage, and folders that become empty.

    Raises ConfigurationError, and removes nothing, if an experiment file is broken, or if none of the language models of a followed set is
    there, as on a disk that is not mounted: their artefacts look like garbage.
    """
    if catalogue.broken:
        broken = "\n".join(catalogue.broken.values())
        raise ConfigurationError(f"{broken}\nnothing is removed: the artefacts of a broken file look unused; correct the file first")
    if lost := _lost_sets(catalogue, inventory.garbage, root.resolve()):
        reason = "artefacts of its language models look unused; remove the source from its file first"
        raise ConfigurationError(f"{lost[0]}\nnothing is removed: {reason}")
    _forget(inventory.garbage, root.resolve())  # first: after an interruption, removed files could not be found again
    for finding in inventory.garbage:
        if not _remove(finding.path, root.resolve()):
            logger.warning("%s is being written by another process: it is kept", finding.path)
            continue
        with contextlib.suppress(OSError):  # ends at the first folder that is not empty
            for folder in finding.path.relative_to(root.resolve()).parents[:-1]:
                (root / folder).rmdir()


def _lost_sets(catalogue: Experiments, findings: Sequence[Finding], root: Path) -> list[str]:
    """Return a sentence for each followed set of which no language model is there and artefacts are among the findings."""
    found = (locate(PurePosixPath(each.path.relative_to(root).as_posix())) for each in findings)
    owners = {each[0].owner for each in found if each}
    sentences: list[str] = []
    for name, followed in catalogue.followed.items():
        names = [name, *(experiment for experiment, each in catalogue.following.items() if each.settings.source == name)]
        if not followed.sources and any(owner.startswith(tuple(f"{each}__" for each in names)) for owner in owners):
            sentences.append(f"source {name}: {'; '.join(followed.waiting)}")
    return sentences


def _remove(path: Path, root: Path) -> bool:
    """Remove an artefact, a checkpoint or a temporary path. Return False if its artefact is being written."""
    temporary = read_temporary(path)
    final = locate(PurePosixPath((temporary.final if temporary else path).relative_to(root).as_posix()))
    with locks.writing_if_free(root, *final) if final else contextlib.nullcontext(True) as is_free:
        if is_free and path.exists():
            remove_whole(path)
        return is_free


def _forget(findings: Sequence[Finding], root: Path) -> None:
    """Mark the artefacts among the findings as missing in Dagster, so that the automation computes them if they are declared again."""
    partitions: dict[Address, list[str]] = {}
    for address, partition in filter(None, (locate(PurePosixPath(each.path.relative_to(root).as_posix())) for each in findings)):
        key = "|".join(str(value) for value in partition if value is not None)  # as Dagster writes it
        partitions.setdefault(address, []).extend([key] if key else [])
    try:
        with recorded_instance() as instance:
            if instance:
                for address, keys in partitions.items():
                    forget_partitions(instance, address.key, keys)
    except Exception as error:  # an error of Dagster's storage must not stop the removal of files
        logger.warning("Dagster still shows removed artefacts as materialised: %s", error)


def _look_at(path: Path, root: Path, references: Declared, inventory: Inventory) -> None:
    relative = PurePosixPath(path.relative_to(root).as_posix())
    if path.is_symlink():
        inventory.unknown.append(Finding(path, 0, "a link: it is not followed"))
    elif path.is_dir() and is_above_artefacts(relative):
        for entry in _entries(path):
            _look_at(entry, root, references, inventory)
    elif (temporary := read_temporary(path)) and (final := _located(relative.with_name(temporary.final.name))):
        is_awaited = temporary.is_needed and isinstance(final[0], Address) and not references.objection(*final)
        if not (temporary.in_use or is_awaited or _may_be_written(root, *final)):
            inventory.garbage.append(Finding(path, _size(path), "left behind by a process that was killed"))
    elif found := _located(relative):
        if objection := references.objection(*found):
            doubt = _doubt(path, inventory.unread_folders, is_checkpoint=isinstance(found[0], str))
            findings, reason = (inventory.unknown, f"{objection}, but {doubt}") if doubt else (inventory.garbage, objection)
            findings.append(Finding(path, _size(path), reason))
        elif isinstance(found[0], str) and _is_finished(path, root, references.of_op[found[0]], found[1]):
            inventory.garbage.append(Finding(path, _size(path), "its SAEs are finished"))
    elif is_unfinished_checkpoint(relative):
        if not locks.may_be_training(root):
            inventory.garbage.append(Finding(path, _size(path), "left behind by a process that was killed"))
    else:
        inventory.unknown.append(Finding(path, _size(path), "not written by saeens"))


def _look_at_dequantised(folder: Path, root: Path, references: Declared, inventory: Inventory) -> None:
    """List dequantised models that no source uses. While files of other folders are not read, whose sources may use them, keep them."""
    for path in _entries(folder):
        temporary = read_temporary(path)
        if locks.may_be_held(root, gguf_models.lock_name(temporary.final if temporary else path)):
            continue
        if temporary:
            if not temporary.in_use:
                inventory.garbage.append(Finding(path, _size(path), "left behind by a process that was killed"))
        elif not gguf_models.is_cache_folder(path):
            inventory.unknown.append(Finding(path, _size(path), "not written by saeens"))
        elif references.dequantised is not None and path.name not in references.dequantised and not inventory.unread_folders:
            inventory.garbage.append(Finding(path, _size(path), "no source uses this dequantised language model"))


def _located(path: PurePosixPath) -> tuple[Address | str, Partition] | None:
    """Return the op and partition of a checkpoint, or the address and partition of an artefact; None for other paths."""
    return locate_checkpoint(path) or locate(path)


def _may_be_written(root: Path, to: Address | str, partition: Partition) -> bool:
    return isinstance(to, Address) and locks.may_be_written(root, to, partition)


def _is_finished(checkpoint: Path, root: Path, outputs: Sequence[Declaration], partition: Partition) -> bool:
    """Return whether every SAE in a checkpoint is on disk; of one that cannot be read, whether every SAE of its op is."""
    from saeens_models.training import recipes_in

    if any(locks.may_be_written(root, each.address, partition) for each in outputs):
        return False
    finished: list[str | None] = []
    for each in outputs:
        with contextlib.suppress(DamagedArtefactError):
            artefact = Store(root).find(each.address, partition)
            finished.append(artefact.recipe_hash if artefact else None)
    recipes = recipes_in(checkpoint)
    return set(recipes) <= set(finished) if recipes else len(finished) == len(outputs) and None not in finished


def _doubt(path: Path, unread: Sequence[Path], *, is_checkpoint: bool) -> str:
    """Return why something at the place of an artefact or a checkpoint may not be garbage; empty if it is."""
    if is_checkpoint:
        return "it may be one of a folder that is not read now" if unread else ""
    try:
        artefact = read_artefact(path)
    except DamagedArtefactError:
        return "it carries no recipe that can be read"
    if foreign := foreign_files(artefact):
        return f"it holds {', '.join(foreign[:3])}, which saeens did not write"
    file = artefact.provenance.get("experiment_file")
    if file is None:
        return "its record names no experiment file: it was written by an earlier version"
    return f"its experiment file is {file}, whose folder is not read now" if unread_folder(file) in unread else ""


def _entries(folder: Path) -> Sequence[Path]:
    return sorted(folder.iterdir(), key=lambda path: _natural(path.name)) if folder.is_dir() else []


def _natural(name: str) -> tuple[str, int]:
    """Return a sort key with which `layer=10` comes after `layer=2`."""
    stem = name.rstrip("0123456789")
    return stem, int(name.removeprefix(stem) or -1)


def _files(path: Path) -> list[Path]:
    return [each for each in (path, *path.rglob("*")) if not each.is_dir()]


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in _files(path))
