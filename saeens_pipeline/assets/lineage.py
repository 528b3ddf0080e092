"""The lineage of a table row or an artefact: SAEs, activations, tokens, corpus and language model, with the run that computed each.

Artefacts are identified by data version, not by name: the artefact of a name may have been computed again since.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import polars as pl

from saeens_pipeline.assets.declarations import Declaration, changes_in
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.names import ENSEMBLES, LEADERBOARD, SAES, Address, Kind, Partition, place
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store, Stored, all_artefacts, digest

MAX_CANDIDATES = 12
_VERSION = re.compile(r"[0-9a-f]{4,16}")
_MEMBER_NAMES: Mapping[str, tuple[Kind, str]] = {
    "single": ("bagging", "member"),
    "bagging": ("bagging", "member"),
    "boosting": ("boosting", "round"),
}
_ROW_NAMES = ("experiment", "layer", "seed", "method", "n_members", "member")


@dataclass(frozen=True)
class Ancestor:
    """A node of a lineage: an artefact, table row, corpus or language model, with its inputs as `parents`.

    `role`: its name as an input. `facts`: run, date, device, time and code. `problem`: why it is not on disk in the version that was used.
    `shown_before`: it appears earlier in the lineage, with its parents.
    """

    title: str
    role: str = ""
    data_version: str = ""
    facts: tuple[str, ...] = ()
    problem: str = ""
    shown_before: bool = False
    parents: tuple[Ancestor, ...] = ()

    def problems(self) -> Iterator[str]:
        """Yield every problem of this node and its ancestors."""
        if self.problem:
            yield f"{self.title}: {self.problem}"
        for parent in self.parents:
            yield from parent.problems()


def lineage(store: Store, declarations: Iterable[Declaration], argument: str) -> Ancestor:
    """Return the lineage of a table row, an asset, or a data version, which may be shortened to a unique beginning.

    Examples: `reconstruction:layer=1,seed=42,method=bagging,n_members=3`, `quickstart/bagging/member_1:layer=1,seed=42`, `a1b2c3d4`.
    Raises ConfigurationError, with candidates, if nothing or more than one thing has this name; SaeensError for an asset that is declared
    and not computed yet.
    """
    genealogy = _Genealogy(store, declarations)
    name, filters = _parse(argument)
    named = _named(genealogy.stored, name, argument)
    if not named:
        return genealogy.trace(genealogy.of_version(argument))
    chosen = [each for each in named if _matches(each.partition, filters)]
    if named[0].address.is_table and filters.keys() - set(_dimensions(named[0])):
        return _trace_row(genealogy, chosen or named, filters)
    return genealogy.trace(_only_one(named, filters, argument))


def find_dictionary(store: Store, declarations: Iterable[Declaration], argument: str) -> Stored:
    """Return an SAE or an ensemble on disk, such as `quickstart/boosting:layer=1,seed=42` or `quickstart/bagging/member_1:layer=1,seed=42`.

    `EXPERIMENT/bagging` and `EXPERIMENT/boosting` are the whole ensembles. Raises as `lineage`, and ConfigurationError for other assets.
    """
    name, filters = _parse(argument)
    kind = name.rpartition("/")[2]
    whole = f"{name}/{kind}_ensemble" if kind in ENSEMBLES else name
    genealogy = _Genealogy(store, declarations)
    named = _named(genealogy.stored, whole, argument)
    found = _only_one(named, filters, argument) if named else genealogy.of_version(argument.replace(name, whole, 1))
    if found.artefact.recipe["builder"] not in (*SAES, "ensemble"):
        raise ConfigurationError(
            f"{found.address} is no SAE and no ensemble: name one, such as {found.address.owner}/bagging:layer=1,seed=42"
        )
    return found


def ancestors(store: Store, declarations: Iterable[Declaration], subject: Stored) -> list[Stored]:
    """Return an artefact and all artefacts on disk that it was computed from, in the versions that were used, each data version once."""
    genealogy = _Genealogy(store, declarations)
    found: dict[str, Stored] = {}

    def add(stored: Stored) -> None:
        if stored.artefact.data_version not in found:
            found[stored.artefact.data_version] = stored
            for version, where, _ in genealogy.inputs(stored):
                if each := genealogy.find_version(version, where):
                    add(each)

    add(subject)
    return list(found.values())


def _named(stored: Iterable[Stored], name: str, argument: str) -> list[Stored]:
    """Return all partitions of the asset of this name. Raises ConfigurationError if several assets have it."""
    named = [each for each in stored if _is_called(each.address, name)]
    addresses = list(dict.fromkeys(str(each.address) for each in named))
    if len(addresses) > 1:
        raise _refusal(f"{argument!r} can be any of several assets", addresses)
    return named


def _only_one(named: Sequence[Stored], filters: Mapping[str, str], argument: str) -> Stored:
    """Return the one partition that the filters leave. Raises ConfigurationError, with candidates, if it is not one."""
    _require_known(filters, _dimensions(named[0]), argument)
    chosen = [each for each in named if _matches(each.partition, filters)]
    if len(chosen) != 1:
        what = "is not on disk" if not chosen else "can be any of several"
        raise _refusal(f"{argument!r} {what}", [_written(each.address, each.partition._asdict()) for each in chosen or named])
    return chosen[0]


def _dimensions(stored: Stored) -> list[str]:
    return [dimension for dimension, value in stored.partition._asdict().items() if value is not None]


class _Genealogy:
    """All artefacts on disk by data version, and a record of those already in the lineage."""

    def __init__(self, store: Store, declarations: Iterable[Declaration]) -> None:
        self._store = store
        self._declarations = {declaration.address: declaration for declaration in declarations}
        self.stored = [each for each in all_artefacts(store.root) if isinstance(each, Stored)]
        self._by_place = {(each.address, each.partition): each for each in self.stored}
        self._shown: set[str] = set()

    def of_version(self, argument: str) -> Stored:
        """Return the artefact whose data version begins with `argument`."""
        found = [each for each in self.stored if each.artefact.data_version.startswith(argument)] if _VERSION.fullmatch(argument) else []
        if len({each.artefact.data_version for each in found}) > 1:
            candidates = [f"{each.artefact.data_version} ({each.place})" for each in found]
            raise _refusal(f"{argument!r} begins several data versions", candidates)
        if found:
            return next((each for each in found if "same_as" not in each.artefact.provenance), found[0])
        name, _ = _parse(argument)
        declared = [address for address in self._declarations if _is_called(address, name)]
        if declared:
            remedy = "materialise it in the UI" if declared[0].owner == LEADERBOARD else f"`saeens run {declared[0].owner}` computes it"
            raise SaeensError(f"{declared[0]} is not computed yet: {remedy}")
        if _VERSION.fullmatch(argument):
            raise SaeensError(f"no artefact below {self._store.root} has a data version that begins with {argument}")
        known = {*self._declarations, *(each.address for each in self.stored)}
        full_names = {name: str(address) for address in known for name in (address.name, str(address))}
        close = [full_names[match] for match in get_close_matches(name, full_names, n=MAX_CANDIDATES)]
        lists = "" if close else ": `saeens tables` lists the tables, `saeens status EXPERIMENT` the assets"
        raise _refusal(f"{argument!r} is no table, asset or data version{lists}", list(dict.fromkeys(close)))

    def trace(self, stored: Stored, role: str = "") -> Ancestor:
        """Return an artefact with its ancestors."""
        artefact = stored.artefact
        if artefact.data_version in self._shown:
            return Ancestor(stored.place, role, artefact.data_version, shown_before=True)
        self._shown.add(artefact.data_version)
        parents = (*(self.trace_version(*each) for each in self.inputs(stored)), *_origins(artefact))
        return Ancestor(stored.place, role, artefact.data_version, _facts(artefact), self.damage(stored), parents=parents)

    def damage(self, stored: Stored) -> str:
        """Return the error message for an artefact with damaged files; empty if they are intact."""
        try:
            self._store.find(stored.address, stored.partition)
        except DamagedArtefactError as error:
            return str(error)
        return ""

    def trace_version(self, version: str, expected: tuple[Address, Partition] | None, role: str) -> Ancestor:
        """Return the node of a data version: the artefact at the expected place, one elsewhere, or a node with a problem without any."""
        if found := self.find_version(version, expected):
            return self.trace(found, role)
        now = self._by_place.get(expected) if expected else None
        state = f"there it is {now.artefact.data_version} now" if now else "nothing is there now"
        problem = f"this version is no longer on disk{f'; {state}' if expected else ''}"
        return Ancestor(place(*expected) if expected else role, role, version, problem=problem)

    def find_version(self, version: str, expected: tuple[Address, Partition] | None) -> Stored | None:
        """Return the artefact with a data version: the one at the expected place, or one elsewhere; None without any."""
        now = self._by_place.get(expected) if expected else None
        if now and now.artefact.data_version == version:
            return now
        return next((each for each in self.stored if each.artefact.data_version == version), None)

    def inputs(self, stored: Stored) -> list[tuple[str, tuple[Address, Partition] | None, str]]:
        """Return data version, place and role of every input of an artefact. The place is None if today's declarations lack the input."""
        expected: dict[str, tuple[Address, Partition]] = {}
        declaration = self._declarations.get(stored.address)
        if declaration:
            expected = {name: (each.address, where) for name, each, where in declaration.input_partitions(stored.partition)}
            optional = declaration.optional_inputs(self._store, stored.partition)
            expected |= {name: (each.address, where) for name, each, where, _ in optional}
        return [(version, expected.get(role), role) for role, version in stored.artefact.recipe["inputs"].items()]


def _trace_row(genealogy: _Genealogy, tables: Sequence[Stored], filters: Mapping[str, str]) -> Ancestor:
    """Return the node of a table row, with its SAEs in member order and the activations as parents."""
    row, table = _one_row(tables, filters)
    saes = [
        genealogy.trace_version(version, _expected_sae(row, number), f"SAE {number}")
        for number, version in enumerate(re.findall("[^,;]+", row["sae_data_versions"]), start=1)
    ]
    # the tokens are parents of the activations
    sources = [(version, where) for version, where, role in genealogy.inputs(table) if where and role == "activations"]
    shown = [f"{name} {row[name]}" for name in _ROW_NAMES if name != "experiment" and row.get(name) is not None]
    return Ancestor(
        ", ".join([str(table.address), *shown]),
        data_version=table.artefact.data_version,
        facts=(_measurements(row), *_facts(table.artefact)),
        problem=genealogy.damage(table),
        parents=(*saes, *(genealogy.trace_version(version, where, "measured on") for version, where in sources)),
    )


def _one_row(tables: Sequence[Stored], filters: Mapping[str, str]) -> tuple[dict[str, Any], Stored]:
    """Return the one row that the filters select, and the part of the table that has it. Raises ConfigurationError for none or several."""
    address = tables[0].address
    parts = [pl.read_parquet(each.artefact.path, hive_partitioning=False, glob=False) for each in tables]
    _require_known(filters, parts[0].columns, str(address))
    rows = pl.concat([part.with_columns(part=pl.lit(i)) for i, part in enumerate(parts)])
    found = rows.filter([pl.col(name).cast(pl.String) == value for name, value in filters.items()])
    names = [name for name in _ROW_NAMES if name in rows.columns]
    if found.select(names).n_unique() != 1:
        differing = [name for name in names if name in filters or (len(found) and found[name].n_unique() > 1)]
        meant = (found if len(found) else rows).select(differing).unique(maintain_order=True)
        asked = ", ".join(f"{name}={value}" for name, value in filters.items())
        what = "several rows" if len(found) else "no row"
        raise _refusal(f"{address} has {what} with {asked}", [_written(address, row) for row in meant.iter_rows(named=True)])
    row = found.row(0, named=True)
    return row, tables[row["part"]]


def _expected_sae(row: Mapping[str, Any], number: int) -> tuple[Address, Partition] | None:
    """Return the place at which SAE `number` of a row was written; None for a mean over seeds."""
    if row.get("seed") is None:
        return None
    kind, name = _MEMBER_NAMES.get(row["method"], ("consensus" if row["method"] == "consensus" else "baseline", ""))
    name = f"{name}_{row.get('member') or number}" if name else row["method"]
    return Address(row["experiment"], kind, name), Partition(row["layer"], row["seed"])


def _measurements(row: Mapping[str, Any]) -> str:
    described = (*_ROW_NAMES, "part", "source", "language_model", "sae_data_versions")
    values = {name: value for name, value in row.items() if name not in described and value is not None}
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())


def _facts(artefact: Artefact) -> tuple[str, ...]:
    """Return lines about an artefact: run, date, device and seconds; code and versions; and the artefact that it links to."""
    made, recipe = artefact.provenance, artefact.recipe
    seconds = made.get("train_seconds", made.get("seconds"))
    by = [f"run {made.get('run_id', 'unknown')[:8]}", made.get("date"), made.get("device"), f"{seconds:.1f} s" if seconds else None]
    versions = made.get("versions", {})
    commit = f", commit {versions['commit']}" if "commit" in versions else ""
    code = f"code: {recipe['builder']} version {recipe['version']}, saeens {versions.get('saeens', 'unknown')}{commit}"
    same_as = f"linked: the same as {made['same_as']}" if made.get("same_as") else None
    changes = changes_in(made)
    return tuple(filter(None, (", ".join(filter(None, by)), code, changes and f"set on the command line: {changes}", same_as)))


def _origins(artefact: Artefact) -> list[Ancestor]:
    """Return inputs that are no artefacts: corpus and tokenizer of tokens, language model of activations, files of a published SAE."""
    settings, builder = artefact.recipe["settings"], artefact.recipe["builder"]
    if builder == "tokens":
        return [_origin("corpus", settings["corpus"]), _origin("tokenizer", settings["tokenizer"])]
    if builder == "published_sae":
        return [_origin("published SAE", {"name": artefact.provenance["published"], **settings["published"]})]
    return [_origin(f"language model, {settings['weights']} weights", settings["language_model"])] if builder == "activations" else []


def _origin(role: str, identity: Mapping[str, Any] | str) -> Ancestor:
    """Return the node of an outside input. `identity` is its entry in a recipe: a name, or a name with hashes and perhaps a revision."""
    if isinstance(identity, str):
        return Ancestor(identity, role)
    name = identity.get("name") or identity.get("corpus") or "unnamed"
    others = {key: value for key, value in identity.items() if key not in ("name", "corpus")}
    facts = []
    for key, value in others.items():
        if isinstance(value, dict):
            entries = [f"{entry} {each[:16] if isinstance(each, str) else each}" for entry, each in value.items()]
            facts.append(f"{key}: {', '.join(entries) if len(entries) <= MAX_CANDIDATES else f'{len(entries)}, hash {digest(value)}'}")
        elif key == "parts":  # of a mixed corpus
            facts += [f"{each['share']:.3g} {each['name']}, hash {digest(each['identity'])}" for each in value]
        else:
            facts.append(f"{key} {value}")
    return Ancestor(str(name), role, digest(identity), tuple(facts))


def _parse(argument: str) -> tuple[str, dict[str, str]]:
    """Return the name and the filters of `NAME:COLUMN=VALUE,...`. Raises ConfigurationError for a filter without `=`."""
    name, _, rest = argument.partition(":")
    filters: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        column, equals, value = part.partition("=")
        if not equals:
            raise ConfigurationError(f"{part!r} in {argument!r}: write NAME=VALUE with commas between, such as layer=1,seed=42")
        filters[column.strip()] = value.strip()
    return name.strip().strip("/"), filters


def _is_called(address: Address, name: str) -> bool:
    """Return True for `quickstart/bagging/member_1`, its last parts, or for tables `quickstart/reconstruction`."""
    return f"/{address}".endswith(f"/{name}") or name == f"{address.owner}/{address.name}"


def _matches(partition: Partition, filters: Mapping[str, str]) -> bool:
    own = {name: str(value) for name, value in partition._asdict().items() if value is not None}
    return all(own[name] == value for name, value in filters.items() if name in own)


def _require_known(filters: Mapping[str, str], names: Sequence[str], argument: str) -> None:
    unknown = [name for name in filters if name not in names]
    if unknown:
        known = ", ".join(names) or "nothing"
        raise ConfigurationError(f"{argument}: there is no {', '.join(unknown)}; it can be narrowed by {known}")


def _written(address: Address, filters: Mapping[str, Any]) -> str:
    """Return an argument of `saeens lineage`: `quickstart/bagging/member_1:layer=1,seed=42`."""
    given = ",".join(f"{name}={value}" for name, value in filters.items() if value is not None)
    return f"{address}:{given}" if given else str(address)


def _refusal(what: str, candidates: Sequence[str]) -> ConfigurationError:
    shown = candidates[:MAX_CANDIDATES]
    more = [f"and {len(candidates) - len(shown)} more"] if len(candidates) > len(shown) else []
    return ConfigurationError("\n  ".join([f"{what}{'; there are' if candidates else ''}", *shown, *more]))
