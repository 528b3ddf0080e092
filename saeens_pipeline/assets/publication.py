"""The files that `saeens push` sends for an SAE or an ensemble: weights, tables and lineage. The model card is the report's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import polars as pl

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.lineage import ancestors
from saeens_pipeline.assets.registry import SUBJECT, listed
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.hub_folders import CARD_FILE, LINEAGE_FILE, LINEAGE_VERSION, Content
from saeens_pipeline.storage.names import SAES, Address, Partition
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store, Stored
from saeens_pipeline.storage.tables import read_part

QUOTING = ("contexts",)
"""Tables that quote held-out texts: they stay here, since the licence of a corpus may not allow it, and texts may be private."""
SAE_LENS_FOLDER = "sae_lens"
_STATISTICS = ("mean", "variance", "top_rows")  # of activations: vectors and rows, which no reader of a lineage needs
_PATH = re.compile(r"""(?<![\w.:/~\\-])(?:~?/|[A-Za-z]:[\\/])[^\s'",;]+""")


@dataclass(frozen=True)
class Publication:
    """An SAE or an ensemble with everything that is pushed, before its model card."""

    subject: Stored
    saes: Sequence[Stored]
    """The members or rounds in order; of a single SAE itself."""
    tables: Mapping[str, pl.DataFrame]
    """The rows of the tables that measure it."""
    of_seeds: Mapping[int, Mapping[str, pl.DataFrame]]
    """The same of every seed with equal settings, itself included: tables with headlines only."""
    not_measured: Mapping[str, str]
    """Metrics that a table leaves out, with the reason."""
    ancestors: Sequence[Stored]
    """The artefacts that it was computed from, itself first."""
    table_parts: Sequence[Stored]
    files: Mapping[str, Content] = field(repr=False)

    @property
    def is_ensemble(self) -> bool:
        return self.subject.artefact.recipe["builder"] == "ensemble"

    @property
    def kind(self) -> str:
        """The method: bagging, boosting, consensus, or the name of a baseline; of a member or round that of its ensemble."""
        address = self.subject.address
        return address.name if address.kind == "baseline" else address.kind

    def settings_of(self, builder: str) -> Mapping[str, Any]:
        """Return the settings of the first input of a builder, such as activations, without local paths; empty without one."""
        found = (each.artefact.recipe["settings"] for each in self.ancestors if each.artefact.recipe["builder"] == builder)
        return without_paths(next(found, {}))

    def with_card(self, card: str) -> dict[str, Content]:
        """Return all files, with the model card and the lineage, which lists them with sizes and hashes."""
        files = {CARD_FILE: Content.of(card.encode()), **self.files}
        lineage = {
            "format_version": LINEAGE_VERSION,
            "subject": _record(self.subject, ("asset", "layer", "seed", "data_version")),
            "artefacts": [_record(each) for each in self.ancestors],
            "tables": [_record(each) for each in self.table_parts],
            "files": {name: [each.size, each.sha256] for name, each in sorted(files.items())},
        }
        return {**files, LINEAGE_FILE: Content.of(f"{json.dumps(without_paths(lineage), indent=1)}\n".encode())}


def publication(store: Store, declarations: Iterable[Declaration], subject: Stored, workspace: Path) -> Publication:
    """Collect an SAE or an ensemble with the rows of its tables. Files that have to be written are in `workspace`, a folder.

    Raises SaeensError for damaged files, and for an ensemble one of whose SAEs was computed again since.
    """
    saes = _saes(store, subject)
    parts = list(_parts(store, subject, [table.name for table in listed(over_experiments=False)]))
    rows = {part.address.name: _rows(part, subject, saes) for part in parts}
    found = {name: frame for name, frame in rows.items() if len(frame)}
    files = _weights(subject, saes, workspace)
    for name, frame in found.items():
        if name not in QUOTING:
            buffer = BytesIO()
            frame.write_parquet(buffer)  # without the record of the whole table, which has paths
            files[f"tables/{name}.parquet"] = Content.of(buffer.getvalue())
    used = [part for part in parts if part.address.name in found]
    reasons = [part.artefact.provenance.get("not_measured", {}) for part in used]
    return Publication(
        subject=subject,
        saes=saes,
        tables=found,
        of_seeds=_of_seeds(store, subject, saes),
        not_measured={name: reason for each in reasons for name, reason in each.items()},
        ancestors=ancestors(store, declarations, subject),
        table_parts=[part for part in used if part.address.name not in QUOTING],
        files=files,
    )


def without_paths(value: Any) -> Any:
    """Return JSON values in which absolute paths, also inside texts and as keys, are replaced by their last part."""
    if isinstance(value, Mapping):
        return {without_paths(name): without_paths(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(each) for each in value]
    return _without_path(value) if isinstance(value, str) else value


def _without_path(text: str) -> str:
    for path in (PurePosixPath(text), PureWindowsPath(text)):
        if path.is_absolute() or text.startswith("~/"):
            return path.name
    return _PATH.sub(lambda found: PureWindowsPath(found[0]).name, text)


def _saes(store: Store, subject: Stored) -> list[Stored]:
    """Return the SAEs in member order, after a comparison of every byte with the records."""
    recipe, owner = subject.artefact.recipe, subject.address.owner
    saes = [subject]
    if recipe["builder"] == "ensemble":
        saes = []
        for name, version in recipe["inputs"].items():
            address = Address(owner, subject.address.kind, name)
            artefact = store.require(address, subject.partition)
            if artefact.data_version != version:
                raise SaeensError(
                    f"{subject.place} is the ensemble of {name} {version}, which is {artefact.data_version} now: "
                    f"`saeens run {owner}` computes the ensemble again"
                )
            saes.append(Stored(address, subject.partition, artefact))
    for each in {subject.artefact.path: subject, **{sae.artefact.path: sae for sae in saes}}.values():
        for difference in each.artefact.verify():
            raise DamagedArtefactError(f"{each.place} is damaged: {difference}. The next `saeens run` computes it again")
    return saes


def _weights(subject: Stored, saes: Sequence[Stored], workspace: Path) -> dict[str, Content]:
    """Return the files of the SAEs and, of an ensemble, `ensemble.json`, and the plain SAE of SAELens if it equals one."""
    if saes == [subject]:
        return dict(_files(subject.artefact))
    names = [each.address.name for each in saes]
    manifest = json.loads((subject.artefact.path / "ensemble.json").read_text(encoding="utf-8")) | {"members": names}
    files = {"ensemble.json": Content.of(f"{json.dumps(manifest, indent=2)}\n".encode())}
    for name, sae in zip(names, saes, strict=True):
        files |= {f"{name}/{file}": content for file, content in _files(sae.artefact)}
    return files | dict(_plain_sae(subject, workspace / SAE_LENS_FOLDER))


def _files(artefact: Artefact) -> Iterator[tuple[str, Content]]:
    """Yield the files of an SAE, as they are; the configuration without local paths."""
    for name, (size, sha256) in artefact.files.items():
        file = artefact.path / name
        if name == "cfg.json":
            text = file.read_text(encoding="utf-8")
            found = json.loads(text)
            cleaned = without_paths(found)
            yield name, Content.of((text if cleaned == found else json.dumps(cleaned, indent=2, sort_keys=True) + "\n").encode())
        else:
            yield name, Content(file, size, sha256)


def _plain_sae(subject: Stored, folder: Path) -> Iterator[tuple[str, Content]]:
    """Yield the files of the plain SAE that a bag of standard, JumpReLU or gated SAEs is. SAELens opens it without this package.

    Other ensembles are left out: SAELens opens them only with a class of this package, which writes its form from the members.
    """
    import saeens_models as sm
    from saeens_models.interop import as_one_sae

    ensemble = sm.load_ensemble(subject.artefact.path)
    if len(ensemble) == 1:
        return
    try:
        sae = as_one_sae(ensemble)
    except ValueError:
        return
    sae.metadata = without_paths(sae.metadata)
    sm.save_sae(sae, folder, {"saeens_asset": str(subject.address), "saeens_data_version": subject.artefact.data_version})
    for file in sorted(folder.iterdir()):
        content = Content.of(file.read_bytes())
        yield f"{SAE_LENS_FOLDER}/{file.name}", content._replace(content=file) if file.suffix == ".safetensors" else content


def _parts(store: Store, subject: Stored, names: Iterable[str]) -> Iterator[Stored]:
    """Yield the parts of tables on disk that may have rows of an SAE or an ensemble. Raises DamagedArtefactError for a damaged one."""
    for name in names:
        address = Address(subject.address.owner, "eval", name)
        for partition in (subject.partition, Partition(subject.partition.layer)):
            if artefact := store.find(address, partition):
                yield Stored(address, partition, artefact)


def _rows(part: Stored, subject: Stored, saes: Sequence[Stored]) -> pl.DataFrame:
    """Return the rows of a table that measure these SAEs, by data version: of an ensemble also of its first members, and of each member.

    A row that was computed from other versions of the SAEs is not among them. Of a table that is not pushed, the first columns alone.
    """
    rows = read_part(part.artefact.path, [column.name for column in SUBJECT] if part.address.name in QUOTING else None)
    versions = [each.artefact.data_version for each in saes]

    def measures(prefix: str) -> pl.Expr:
        if subject.artefact.recipe["builder"] != "ensemble":
            return pl.col(f"{prefix}sae_data_versions") == versions[0]
        of_ensemble = pl.col(f"{prefix}method") == subject.address.kind
        return of_ensemble & pl.col(f"{prefix}sae_data_versions").str.split(",").list.set_difference(pl.lit(versions)).list.len().eq(0)

    compares = "other_sae_data_versions" in rows.columns
    return rows.filter(seed=subject.partition.seed).filter(measures("") | measures("other_") if compares else measures(""))


def _of_seeds(store: Store, subject: Stored, saes: Sequence[Stored]) -> dict[int, dict[str, pl.DataFrame]]:
    """Return the rows of every seed on disk with the same settings, by seed and table."""
    names = [table.name for table in listed(over_experiments=False) if table.headlines]
    found: dict[int, dict[str, pl.DataFrame]] = {}
    for partition in store.partitions(subject.address, "layer", "seed"):
        if partition.layer != subject.partition.layer or partition.seed is None:
            continue
        try:
            other = Stored(subject.address, partition, store.require(subject.address, partition))
            others = [Stored(each.address, partition, store.require(each.address, partition)) for each in saes]
        except SaeensError:  # damaged, or with fewer members
            continue
        if _decides(others) == _decides(saes):
            rows = ((each.address.name, _rows(each, other, others)) for each in _parts(store, other, names))
            found[partition.seed] = {name: frame for name, frame in rows if len(frame)}
    return dict(sorted(found.items()))


def _decides(saes: Sequence[Stored]) -> object:
    """Return what seeds share: the settings of the SAEs except the seeds, and the activations of the first."""
    recipes = [each.artefact.recipe for each in saes]
    settings = [{name: value for name, value in each["settings"].items() if name not in ("init_seed", "data_seed")} for each in recipes]
    return [each["version"] for each in recipes], settings, recipes[0]["inputs"].get("activations")


def _record(stored: Stored, only: Sequence[str] = ()) -> dict[str, Any]:
    """Return an artefact for the lineage; the hashes of files of SAEs only, since those of activations can be thousands."""
    artefact = stored.artefact
    made = dict(artefact.provenance)
    if isinstance(statistics := made.get("statistics"), dict):
        made["statistics"] = {
            split: {name: value for name, value in each.items() if name not in _STATISTICS} if isinstance(each, dict) else each
            for split, each in cast("dict[str, Any]", statistics).items()
        }
    record = {
        "asset": str(stored.address),
        **{name: value for name, value in stored.partition._asdict().items() if value is not None},
        "data_version": artefact.data_version,
        "recipe": artefact.recipe,
        "provenance": made,
        **({"files": artefact.files} if artefact.recipe["builder"] in SAES else {}),
    }
    return {name: record[name] for name in only if name in record} if only else record
