"""The record of an experiment: its settings, versions and artefacts, read from the recipes on disk, and the diagram of their lineage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from saeens_pipeline.assets.over_seeds import written
from saeens_pipeline.report.methods import method
from saeens_pipeline.storage.names import SAES, Address, Partition, locate
from saeens_pipeline.storage.recipes import RECIPE_FILE, Artefact, DamagedArtefactError, Store, digest, read_artefact

UI = "http://127.0.0.1:3000"  # the address of `saeens ui`


class Fact(NamedTuple):
    """A line of the record."""

    name: str
    value: str


@dataclass(frozen=True)
class Found:
    """An artefact on disk, with its layer, seed and recipe."""

    address: Address
    partition: Partition
    artefact: Artefact
    folder: str  # relative to the data root

    @property
    def version(self) -> str:
        return self.artefact.data_version

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.artefact.recipe["settings"]

    @property
    def title(self) -> str:
        """Return its name on pages: `round 2`, or the label of a method that consists of this SAE."""
        name = self.address.name
        if self.address.kind not in ("baseline", "consensus"):
            return name.replace("_", " ")
        known, _, width = name.rpartition("_")
        return f"{method(known).label}, {width} members wide" if width.isdecimal() else method(name).label

    @property
    def link(self) -> str:
        """Return the address of the page of the asset's partition in the Dagster UI."""
        partition = "|".join(str(value) for value in self.partition if value is not None)
        view = f"?view=partitions&partition={quote(partition)}" if partition else ""
        return f"{UI}/assets/{'/'.join(self.address.key)}{view}"


@dataclass(frozen=True)
class Record:
    """The artefacts of one experiment and layer, and of its source, that can be read."""

    layer: int
    found: Sequence[Found]

    @classmethod
    def read(cls, store: Store, experiment: str, source: str, layer: int) -> Record:
        """Return the artefacts on disk of an experiment and of its source for one layer."""
        root = store.root
        folders = [root / "sources" / source, root / "experiments" / experiment / f"layer={layer}"]
        recipes = sorted(path.parent for folder in folders for path in folder.rglob(RECIPE_FILE))
        tables = sorted((root / "tables" / experiment).glob(f"*/layer={layer}/**/part.parquet"))
        return cls(layer, list(_readable(root, [*recipes, *tables], layer)))

    def of(self, kind: str) -> list[Found]:
        """Return the artefacts of a kind, one for each seed."""
        return [each for each in self.found if each.address.kind == kind]

    def sae(self, version: str, method: str) -> Found | None:
        """Return the SAE with a data version, or None. If member 1 and round 1 share the version, `method` decides between them."""
        found = self._saes_by_version.get(version, [])
        return next((each for each in found if each.address.kind == method), found[0] if found else None)

    @cached_property
    def _saes_by_version(self) -> dict[str, list[Found]]:
        by_version: dict[str, list[Found]] = {}
        for each in self.found:
            if each.artefact.recipe["builder"] in SAES:
                by_version.setdefault(each.version, []).append(each)
        return by_version

    @cached_property
    def tokens(self) -> Found | None:
        return next((each for each in self.of("source") if each.address.name == "tokens"), None)

    @cached_property
    def activations(self) -> Found | None:
        return next((each for each in self.of("source") if each.address.name == "activations"), None)

    def setting(self, name: str, default: object = None) -> Any:
        """Return a setting of the activations or, where they have none of that name, of the tokens."""
        settings = {key: value for each in (self.tokens, self.activations) if each for key, value in each.settings.items()}
        return settings.get(name, default)

    @property
    def language_model(self) -> str:
        return named(self.setting("language_model", ""))

    def facts(self) -> Iterator[tuple[str, list[Fact]]]:
        """Yield the lines of the record under headings."""
        if self.setting("synthetic"):
            yield "Synthetic activations", list(self._synthetic_facts())
        else:
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
        identity = self.setting("language_model")
        if isinstance(identity, Mapping) and identity.get("quantised") and self.setting("weights") == "trained":
            yield Fact("quantised", f"{identity['quantised']} (GGUF), dequantised to float32")
        yield Fact("activations", f"{self.setting('hook')}, layer {self.layer} (from 0), stored in {self.setting('dtype')}")
        statistics = self.activations.artefact.provenance.get("statistics", {})
        if "train" in statistics:
            yield Fact("dimensions (d_in)", f"{len(statistics['train']['mean']):,}")
        yield Fact("data version", self.activations.version)

    def _synthetic_facts(self) -> Iterator[Fact]:
        settings = self.setting("synthetic")
        yield from (Fact(name, _value(value)) for name, value in settings.items())
        if self.setting("weights") == "random":
            yield Fact("control", "without sparse features")
        yield Fact("rows for training", f"{self.setting('train_tokens'):,}")
        yield Fact("rows held out", f"{self.setting('test_tokens'):,}")
        if self.activations:
            yield Fact("data version", self.activations.version)

    def _text_facts(self) -> Iterator[Fact]:
        if self.tokens is None:
            return
        settings = self.tokens.settings
        yield Fact("corpus", named(settings["corpus"]))
        for split, purpose in (("train", "for training"), ("test", "held out")):
            statistics = self.tokens.artefact.provenance.get("statistics", {}).get(split, {})
            documents = f" of {statistics['documents']:,} documents" if "documents" in statistics else ""
            yield Fact(f"tokens {purpose}", f"{settings[f'{split}_tokens']:,}{documents}")
            for name, each in self.tokens.artefact.provenance.get("composition", {}).get(split, {}).items():
                yield Fact(f"tokens {purpose} of {name}", f"{each['rows']:,} of {each['documents']:,} documents")
            corpus = self.tokens.artefact.provenance.get("corpus", {}).get(split, {})
            for label in (key for key in corpus if key.startswith("bytes_by_")):
                sizes = ", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in corpus[label].items())
                yield Fact(f"documents {purpose} in the corpus", f"{corpus['documents']:,}: {sizes}")
        windows = settings.get("windows_per_document")
        at_most = f", at most {windows} of a document" if windows else ""
        yield Fact("windows", f"{settings['context_length']:,} tokens, packed by {settings['packing']}{at_most}")
        if settings.get("drop"):
            yield Fact("dropped positions", ", ".join(settings["drop"]))
        yield Fact("data version", self.tokens.version)

    def _sae_facts(self) -> Iterator[Fact]:
        members = [each for each in self.of("bagging") if each.artefact.recipe["builder"] in SAES]
        if not members:
            return
        trained = [each for each in members if each.artefact.recipe["builder"] == "sae"]
        saes = list(dict.fromkeys(_shape(each) for each in members))
        yield Fact("SAE" if len(saes) == 1 else "SAEs, by member", "; ".join(saes))
        yield Fact("training", _in_words(trained[0].settings["training"]) if trained else "none: all members are published")
        yield Fact("members", str(len({each.address.name for each in members})))
        yield Fact("ensemble seeds", ", ".join(map(str, sorted({seed for each in members if (seed := each.partition.seed) is not None}))))

    def _computation_facts(self) -> Iterator[Fact]:
        made = [each.artefact.provenance for each in self.found if each.address.kind != "report"]
        if not made:
            return
        yield Fact("devices", "; ".join(dict.fromkeys(str(each["device"]) for each in made if each.get("device"))))
        dates = sorted(str(each["date"]).replace("T", " ")[:16] for each in made if each.get("date"))
        if dates:
            yield Fact("written", " to ".join(dict.fromkeys((dates[0], dates[-1]))) + " UTC")
        yield from self._training_facts()
        versions: dict[str, dict[str, None]] = {}
        for name, version in (pair for each in made for pair in each.get("versions", {}).items()):
            versions.setdefault(name, {})[version] = None
        yield Fact("versions", ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items()))

    def _training_facts(self) -> Iterator[Fact]:
        """Yield training totals. Linked SAEs count once: a link has the totals of the SAE that it links to."""
        of_versions = self._saes_by_version.values()
        if saes := [found for found in of_versions if found[0].artefact.recipe["builder"] == "sae"]:
            passes = [each.artefact.provenance for each in self.found if each.artefact.recipe["builder"] == "residual"]
            spent = [(found[0].artefact.provenance, "train_") for found in saes] + [(each, "") for each in passes]
            seconds, flops = (sum(each.get(f"{prefix}{unit}") or 0 for each, prefix in spent) for unit in ("seconds", "flops"))
            linked = sum(all(each.artefact.provenance.get("same_as") for each in found) for found in saes)
            elsewhere = f", {linked} of them linked from another experiment" if linked else ""
            took = f"{seconds:,.0f} s, {written(flops, '.3g')} FLOPs, with the passes that compute residuals"
            yield Fact("training in all", f"{len(saes)} SAEs{elsewhere}: {took}")


def named(identity: object) -> str:
    """Return the name of a language model or corpus, which recipes hold as text or with its settings."""
    return str(identity.get("corpus") or identity.get("name") or identity) if isinstance(identity, Mapping) else str(identity)


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


def _shape(sae: Found) -> str:
    published = sae.artefact.provenance.get("published")
    return f"published: {published}" if published else _in_words(sae.settings["sae"])


def _in_words(settings: Mapping[str, Any]) -> str:
    """Return `architecture topk, expansion 4, k 8`, the most important first; settings that are off or unset are left out."""
    first = ("architecture", "expansion", "d_sae", "k", "l1_coefficient", "l0_coefficient")
    ordered = {name: settings[name] for name in first if name in settings} | dict(settings)
    shown = {name: value for name, value in ordered.items() if value not in (None, False, 0)}
    return ", ".join(name if value is True else f"{name} {_value(value)}" for name, value in shown.items())


def _value(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(map(_value, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Node:
    """A box of the lineage diagram: an asset with a data version per seed, or an external input with the hash of its name or settings."""

    title: str
    versions: Sequence[tuple[str, str]]  # seed, or empty, and data version
    link: str = ""
    about: str = ""


@dataclass(frozen=True)
class Lane:
    """One way from activations to a dictionary: SAEs, in a chain or side by side, and their ensemble."""

    title: str
    about: str
    nodes: Sequence[Node]
    becomes: Node | None
    chained: bool = False


def diagram(record: Record) -> dict[str, Sequence[Node | Lane]]:
    """Return the boxes of artefacts on disk, from top to bottom."""
    lanes = [
        Lane("Bagging", "members differ in their initial weights only", *_ensemble(record, "bagging")),
        Lane("Boosting", "each round is trained on the residual of those before it", *_ensemble(record, "boosting"), chained=True),
        Lane("Baselines", "single SAEs to compare with", *_ensemble(record, "baseline", "consensus")),
    ]
    source = [node for found in (record.tokens, record.activations) if found for node in _nodes([found])]
    lanes = [lane for lane in lanes if lane.nodes]
    return {"outside": list(_outside(record)), "source": source, "lanes": lanes, "tables": _nodes(record.of("eval"))}


def _outside(record: Record) -> Iterator[Node]:
    if record.tokens:
        corpus = record.tokens.settings["corpus"]
        yield Node("corpus", [("", digest(corpus))], about=named(corpus))
    if record.activations:
        identity = record.setting("language_model")
        yield Node("language model", [("", digest(identity))], about=f"{record.language_model}, {record.setting('weights')}")


def _ensemble(record: Record, *kinds: str) -> tuple[list[Node], Node | None]:
    parts, whole = (
        _nodes([each for kind in kinds for each in record.of(kind) if (each.artefact.recipe["builder"] == "ensemble") == is_whole])
        for is_whole in (False, True)
    )
    return parts, whole[0] if whole else None


def _nodes(found: Sequence[Found]) -> list[Node]:
    """Return one box for each asset; a round is followed by its residual."""
    by_asset: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: (*_place(each.address.name), each.partition.seed or 0)):
        by_asset.setdefault(each.address.name, []).append(each)
    return [
        Node(of[0].title, [("" if (seed := each.partition.seed) is None else f"seed {seed}", each.version) for each in of], of[0].link)
        for of in by_asset.values()
    ]


def _place(name: str) -> tuple[str, int, str]:
    number = re.search(r"^(?:member|round|residual)_(\d+)$", name)
    return ("", int(number[1]), "0" if name.startswith("round") else "1") if number else (name, 0, "")
