"""What was run, and where each number comes from: read from the recipes that artefacts on disk carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from saeens_pipeline.report.methods import method
from saeens_pipeline.report.results import written
from saeens_pipeline.storage.names import Address, Partition, locate
from saeens_pipeline.storage.recipes import RECIPE_FILE, Artefact, DamagedArtefactError, Store, read_artefact

UI = "http://127.0.0.1:3000"  # where `saeens ui` answers


@dataclass(frozen=True)
class Found:
    """An artefact on disk: what it is, for which layer and seed, and its recipe."""

    address: Address
    partition: Partition
    artefact: Artefact
    folder: str  # relative to the data root

    @property
    def version(self) -> str:
        return self.artefact.data_version

    @property
    def title(self) -> str:
        """Its name as a reader meets it: `round 2`, or what the method is called of which it is the only SAE."""
        name = self.address.name
        if self.address.kind != "baseline":
            return name.replace("_", " ")
        known, _, width = name.rpartition("_")
        return f"{method(known).label}, {width} members wide" if width.isdecimal() else method(name).label

    @property
    def link(self) -> str:
        """Its asset's page, while the Dagster UI runs."""
        return asset_link(self.address)


@dataclass(frozen=True)
class Fact:
    """A line of what was run."""

    name: str
    value: str


@dataclass(frozen=True)
class Record:
    """The artefacts of one experiment and layer that can be read, its source's among them."""

    experiment: str
    source: str
    layer: int
    found: Sequence[Found]

    @classmethod
    def read(cls, store: Store, experiment: str, source: str, layer: int) -> Record:
        root = store.root
        folders = [root / "sources" / source, root / "experiments" / experiment / f"layer={layer}"]
        recipes = sorted(path.parent for folder in folders for path in folder.rglob(RECIPE_FILE))
        tables = sorted((root / "tables" / experiment).glob(f"*/layer={layer}/**/part.parquet"))
        return cls(experiment, source, layer, list(_readable(root, [*recipes, *tables], layer)))

    def of(self, kind: str, name: str = "") -> list[Found]:
        """Of a kind, and of one name where it is given: one for each seed."""
        return [each for each in self.found if each.address.kind == kind and name in ("", each.address.name)]

    def sae(self, version: str, method: str) -> Found | None:
        """The SAE of a data version. Round 1 and member 1 can have the same: then it is the one that belongs to the method."""
        found = self._saes_by_version.get(version, [])
        return next((each for each in found if each.address.kind == method), found[0] if found else None)

    @cached_property
    def _saes_by_version(self) -> dict[str, list[Found]]:
        by_version: dict[str, list[Found]] = {}
        for each in self.saes:
            by_version.setdefault(each.version, []).append(each)
        return by_version

    @property
    def tokens(self) -> Found | None:
        return next(iter(self.of("source", "tokens")), None)

    @property
    def activations(self) -> Found | None:
        return next(iter(self.of("source", "activations")), None)

    @property
    def saes(self) -> list[Found]:
        return [each for each in self.found if each.artefact.recipe["builder"] == "sae"]

    def setting(self, name: str, default: object = None) -> Any:
        """A setting of the activations or, where they have none of that name, of the tokens."""
        for each in (self.activations, self.tokens):
            if each and name in each.artefact.recipe["settings"]:
                return each.artefact.recipe["settings"][name]
        return default

    @property
    def language_model(self) -> str:
        identity = self.setting("language_model", "")
        return str(identity["name"] if isinstance(identity, Mapping) else identity)

    def facts(self) -> Iterator[tuple[str, list[Fact]]]:
        """What was run, under headings."""
        yield "Language model", list(self._model_facts())
        yield "Text", list(self._text_facts())
        yield "Sparse autoencoders", list(self._sae_facts())
        yield "Computation", list(self._computation_facts())

    def _model_facts(self) -> Iterator[Fact]:
        if self.activations is None:
            return
        yield Fact("model", self.language_model)
        yield Fact("revision", str(self.setting("revision", "")))
        yield Fact("weights", {"random": "random: untrained, a control"}.get(self.setting("weights"), str(self.setting("weights"))))
        yield Fact("activations", f"{self.setting('hook')}, layer {self.layer} (from 0), stored in {self.setting('dtype')}")
        statistics = self.activations.artefact.provenance.get("statistics", {})
        if "train" in statistics:
            yield Fact("dimensions (d_in)", f"{len(statistics['train']['mean']):,}")
        yield Fact("data version", self.activations.version)

    def _text_facts(self) -> Iterator[Fact]:
        if self.tokens is None:
            return
        settings, made = self.tokens.artefact.recipe["settings"], self.tokens.artefact.provenance
        corpus = settings["corpus"]
        yield Fact("corpus", str(corpus.get("corpus") or corpus.get("name") or corpus) if isinstance(corpus, Mapping) else str(corpus))
        for split, purpose in (("train", "for training"), ("test", "held out")):
            statistics = made.get("statistics", {}).get(split, {})
            documents = f" of {statistics['documents']:,} documents" if "documents" in statistics else ""
            yield Fact(f"tokens {purpose}", f"{settings[f'{split}_tokens']:,}{documents}")
        windows = settings.get("windows_per_document")
        at_most = f", at most {windows} of a document" if windows else ""
        yield Fact("windows", f"{settings['context_length']:,} tokens, packed by {settings['packing']}{at_most}")
        if settings.get("drop"):
            yield Fact("left out positions", ", ".join(settings["drop"]))
        yield Fact("data version", self.tokens.version)

    def _sae_facts(self) -> Iterator[Fact]:
        members = [each for each in self.saes if each.address.kind == "bagging"]
        if not members:
            return
        saes = list(dict.fromkeys(_in_words(each.artefact.recipe["settings"]["sae"]) for each in members))
        yield Fact("SAE" if len(saes) == 1 else "SAEs, by member", "; ".join(saes))
        yield Fact("training", _in_words(members[0].artefact.recipe["settings"]["training"]))
        yield Fact("members", str(len({each.address.name for each in members})))
        yield Fact("ensemble seeds", ", ".join(map(str, sorted({seed for each in members if (seed := each.partition.seed) is not None}))))

    def _computation_facts(self) -> Iterator[Fact]:
        made = [each.artefact.provenance for each in self.found if each.address.kind != "report"]
        if not made:
            return
        yield Fact("devices", "; ".join(dict.fromkeys(str(each["device"]) for each in made if each.get("device"))))
        dates = sorted(str(each["date"]) for each in made if each.get("date"))
        if dates:
            first, last = (date.replace("T", " ")[:16] for date in (dates[0], dates[-1]))
            yield Fact("made", f"{first} UTC" if first == last else f"{first} to {last} UTC")
        yield from self._training_facts()
        versions: dict[str, list[str]] = {}
        for each in made:
            for name, version in each.get("versions", {}).items():
                versions.setdefault(name, [])
                versions[name] += [version] if version not in versions[name] else []
        yield Fact("versions", ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items()))

    def _training_facts(self) -> Iterator[Fact]:
        """Each SAE once, under however many names it is here: what is linked has the figures of what it is linked to."""
        saes = self._saes_by_version
        trained = [found[0].artefact.provenance for found in saes.values()]
        passes = [each.artefact.provenance for each in self.found if each.artefact.recipe["builder"] == "residual"]
        if trained:
            seconds = sum(each.get("train_seconds") or 0 for each in trained) + sum(each.get("seconds") or 0 for each in passes)
            flops = sum(each.get("train_flops") or 0 for each in trained) + sum(each.get("flops") or 0 for each in passes)
            elsewhere = sum(_linked(found) for found in saes.values())
            taken = f", {elsewhere} of them made by another experiment" if elsewhere else ""
            took = f"{seconds:,.0f} s, {written(flops, '.3g')} FLOPs, with the passes that make residuals"
            yield Fact("training in all", f"{len(trained)} SAEs{taken}: {took}")


def _linked(found: Sequence[Found]) -> bool:
    """Whether an SAE was made for another experiment: each that is here is the same as some other."""
    return all(each.artefact.provenance.get("same_as") for each in found)


def asset_link(address: Address) -> str:
    """An asset's page in the Dagster UI, while it runs."""
    return f"{UI}/assets/{'/'.join(address.key)}"


def _readable(root: Path, paths: Sequence[Path], layer: int) -> Iterator[Found]:
    for path in paths:
        relative = PurePosixPath(path.relative_to(root).as_posix())
        located = locate(relative)
        if located is None or located[1].layer not in (None, layer):
            continue
        try:
            yield Found(*located, read_artefact(path), str(relative))
        except DamagedArtefactError:
            continue


def _in_words(settings: Mapping[str, Any]) -> str:
    """`architecture topk, expansion 4, k 8`, what matters most first; what is off, or not set, is left out."""
    first = ("architecture", "expansion", "d_sae", "k", "l1_coefficient", "l0_coefficient")
    ordered = {name: settings[name] for name in first if name in settings} | dict(settings)
    shown = {name: value for name, value in ordered.items() if value not in (None, False, 0)}
    return ", ".join(name if value is True else f"{name} {_value(value)}" for name, value in shown.items())


def _value(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(map(_value, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
