"""The feature browser: every feature of both ensembles in a table and on a map, and each on a page of its own.

`features.html` reads `features/list.js` when it is opened, and the shard `features/N.js` when one of its features is. A page from disk
may load scripts and nothing else; each of these calls one function with base64 of gzipped bytes, so that no text of the corpus is ever
script or HTML.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.tables.autointerp_outcome import WHY, outcome
from saeens_pipeline.report.figures import NEAR_DUPLICATE
from saeens_pipeline.report.methods import method
from saeens_pipeline.report.record import Record
from saeens_pipeline.report.results import Results
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store
from saeens_pipeline.storage.tables import TABLES, has_table, read_table

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from torch import Tensor

PAGE = "features.html"
DATA = "features"  # the folder of the scripts
SHARD_FEATURES = 512
ENSEMBLES = {"bagging": "member", "boosting": "round"}
DIGITS = 3  # of activations and logits
FEW_FEATURES = 50_000  # up to which one thread places them faster than several that wait for each other on busy cores
COMPRESSION = 4  # gzip's level; 6 takes three times as long for 6% less
_KEY = ["method", "member", "index"]
_TYPES = {"float32": "Float32Array", "int16": "Int16Array", "uint16": "Uint16Array", "uint32": "Uint32Array"}


@dataclass(frozen=True)
class Column:
    """A column of the table of features: its heading, and what it means."""

    key: str
    title: str
    number: bool
    about: str


COLUMNS = (
    Column("method", "method", False, "in this order features come: by method, member or round, index"),
    Column("member", "member", True, "member of bagging, round of boosting"),
    Column("index", "index", True, "row of that member's W_dec, from 0"),
    Column("density", "density", True, "share of the test tokens on which it fires"),
    Column("mean", "mean act.", True, "mean activation over the tokens on which it fires"),
    Column("near", "other members", True, "largest cosine to a feature of another member or round"),
    Column("nearest", "nearest", False, "the feature of another member or round with that cosine"),
    Column("seed", "stability", True, "largest cosine to any feature of the same method under another seed"),
    Column("score", "detection", True, "how well the explanation tells texts on which it fires: balanced accuracy"),
    Column("explanation", "explanation", False, "what it was explained as"),
    Column("tokens", "most active on", False, "the ten test tokens on which it is most active, the most active first"),
)


@dataclass(frozen=True)
class FeatureBrowser:
    """The features of both ensembles under one seed, the first declared that has any.

    `contexts` and `explanations` are tables of the same seed, or None where there is none; `outcome` says in words what came of asking for
    explanations, and is empty where nobody wanted any.
    """

    results: Results
    seed: int
    rows: pl.DataFrame
    contexts: pl.DataFrame | None
    explanations: pl.DataFrame | None
    outcome: str

    @classmethod
    def read(cls, store: Store, results: Results, seeds: Sequence[int]) -> FeatureBrowser | None:
        """None where the table `features` is missing, or is one of those that an earlier version made.

        Raises SaeensError for a table that cannot be read.
        """
        import polars as pl

        table = results.tables.get("features")
        if table is None or "matches" not in table.columns:
            return None
        table = table.filter(pl.col("method").is_in(list(ENSEMBLES)))
        there = set(table["seed"])
        seed = next((seed for seed in seeds if seed in there), None)
        if seed is None:
            return None
        contexts, explanations = (
            _of_seed(store.root, results.experiment, name, results.layer, seed) for name in ("contexts", "autointerp")
        )
        said = outcome(store, results.experiment, [seed], results.layer)
        return cls(results, seed, table.filter(seed=seed).sort(_KEY), contexts, explanations, said)

    @property
    def other_seeds(self) -> list[int]:
        return sorted(set(self.results.tables["features"]["seed"]) - {self.seed})

    @property
    def statuses(self) -> list[str]:
        """What became of the features that were drawn to be explained, the most frequent first."""
        if self.explanations is None:
            return []
        return self.explanations["status"].value_counts(sort=True).sort("count", "status", descending=[True, False])["status"].to_list()

    @property
    def columns(self) -> set[str]:
        """Keys of those that there is anything in."""
        lacking = set() if self.other_seeds else {"seed"}
        lacking |= set() if self.explanations is not None else {"score", "explanation"}
        lacking |= {"near", "nearest"} if self.rows["nearest_member"].null_count() == len(self.rows) else set()
        return {column.key for column in COLUMNS} - lacking

    def write(self, folder: Path, store: Store, record: Record, missing_contexts: str) -> None:
        """Write the list and the shards; `missing_contexts` is what the page of a feature says where there are none.

        Memory: the tables of the seed, of about 3.5 kB for each feature, twice, and one SAE.
        """
        (folder / DATA).mkdir()
        _write_script(folder / DATA, "list", self._list(store, record, missing_contexts))
        for number, shard in enumerate(self._shards()):
            _write_script(folder / DATA, str(number), json.dumps(shard, separators=(",", ":")).encode())

    def _list(self, store: Store, record: Record, missing_contexts: str) -> bytes:
        import numpy as np

        rows = self.rows
        groups = rows.group_by("method", "member", maintain_order=True).len("count")
        matches = [{member: index for member, index, _ in json.loads(text or "[]")} for text in rows["matches"]]
        vocabulary, tokens = _encoded([json.loads(text) for text in rows["top_tokens"]])
        columns = {
            "member": rows["member"].to_numpy().astype(np.uint16),
            "index": rows["index"].to_numpy().astype(np.uint32),
            "density": _float(rows, "density"),
            "mean": _float(rows, "mean_activation"),
            "nearCosine": _float(rows, "nearest_cosine"),
            "nearMember": _whole(rows, "nearest_member", np.uint16),
            "nearIndex": np.array(
                [of_feature.get(member, 0) for of_feature, member in zip(matches, rows["nearest_member"], strict=True)], np.uint32
            ),
            "seedCosine": _float(rows, "nearest_other_seed_cosine"),
            "seedMember": _whole(rows, "nearest_other_seed_member", np.uint16),
            "seedIndex": _whole(rows, "nearest_other_seed_index", np.uint32),
            "tokens": tokens,
        }
        seeds = self.other_seeds
        places = {seed: place for place, seed in enumerate(seeds)}
        columns["seed"] = np.array([places.get(seed, 0) for seed in rows["nearest_other_seed"]], np.uint16)
        placed = _on_a_map(groups.iter_rows(named=True), rows, store, record)
        if placed:
            columns["x"], columns["y"] = placed.coordinates
        header = {
            "experiment": self.results.experiment,
            "layer": self.results.layer,
            "seed": self.seed,
            "otherSeeds": seeds,
            "shared": NEAR_DUPLICATE,
            "shardFeatures": SHARD_FEATURES,
            "ensembles": [
                {"name": name, "label": (about := method(name)).label, "colour": about.colour, "glyph": about.glyph, "unit": unit}
                for name, unit in ENSEMBLES.items()
                if name in set(rows["method"])
            ],
            "groups": groups.rows(),
            "vocabulary": vocabulary,
            "axes": placed.shares if placed else None,
            "missingContexts": missing_contexts,
        }
        if self.explanations is not None:
            about = rows.select(_KEY).join(self.explanations, on=_KEY, how="left", maintain_order="left")
            statuses = ["", *self.statuses]
            columns["score"], columns["control"] = _float(about, "detection_score"), _float(about, "control_score")
            columns["status"] = np.array([statuses.index(status or "") for status in about["status"]], np.uint16)
            header |= {"explanations": about["explanation"].to_list(), "statuses": statuses, "why": WHY}
        return _packed(header, columns)

    def _shards(self) -> Iterator[dict[str, Any]]:
        rows = self.rows.select(*_KEY, "matches")
        wanted = ["contexts", "max_activation", "histogram", "bin_width", "promoted_tokens", "suppressed_tokens"]
        if self.contexts is not None:
            rows = rows.join(self.contexts.select(*_KEY, *wanted), on=_KEY, how="left", maintain_order="left")
        for part in rows.iter_slices(SHARD_FEATURES):
            ids: dict[str, int] = {}
            features = [_details(row, ids) for row in part.iter_rows(named=True)]
            yield {"tokens": list(ids), "features": features}


@dataclass(frozen=True)
class _Map:
    """Where features lie on the plane of the two principal axes."""

    coordinates: tuple[np.ndarray, np.ndarray]
    """int16 [n] each; both axes have one scale"""
    shares: list[float]
    """of the variance of the unit decoder rows that each axis has"""


def _of_seed(root: Path, experiment: str, table: str, layer: int, seed: int) -> pl.DataFrame | None:
    """The rows of a table that may be missing, or not be known at all."""
    if table not in TABLES or not has_table(root, experiment, table, layer):
        return None
    rows = read_table(root, experiment, table, layer).filter(seed=seed)
    return rows if len(rows) else None


def _on_a_map(groups: Iterator[Mapping[str, Any]], rows: pl.DataFrame, store: Store, record: Record) -> _Map | None:
    """None where the SAEs that the table was made from are no longer on disk."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    import saeens_models as sm

    saes: list[Artefact] = []
    for group in groups:
        (version,) = rows.filter(method=group["method"], member=group["member"])["sae_data_versions"].unique()
        found = record.sae(version, group["method"])
        try:
            sae = found and store.find(found.address, found.partition)
        except DamagedArtefactError:
            sae = None
        if sae is None:
            return None
        saes.append(sae)

    def dictionaries() -> Iterator[Tensor]:
        for sae in saes:
            yield sm.load_sae(sae.path).W_dec.detach()

    with threadpool_limits(1 if len(rows) <= FEW_FEATURES else None):
        axes = sm.metrics.principal_axes(dictionaries())
        coordinates = torch.cat([axes.coordinates(W_dec) for W_dec in dictionaries()]).numpy()
    scaled = np.round(coordinates / max(np.abs(coordinates).max(), 1e-12) * 32767).astype(np.int16)
    return _Map((scaled[:, 0], scaled[:, 1]), axes.explained_variance_ratio.tolist())


def _details(row: Mapping[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """What the page of a feature shows beside its row; tokens are numbers, which `ids` gives out."""
    details: dict[str, Any] = {"matches": json.loads(row["matches"] or "[]")}
    if row.get("contexts") is None:
        return details

    def numbers(tokens: Sequence[str]) -> list[int]:
        return [ids.setdefault(token, len(ids)) for token in tokens]

    return details | {
        "contexts": [
            context | {"tokens": numbers(context["tokens"]), "activations": [value and _rounded(value) for value in context["activations"]]}
            for context in json.loads(row["contexts"])
        ],
        "max": row["max_activation"] and _rounded(row["max_activation"]),
        "histogram": json.loads(row["histogram"]),
        "binWidth": row["bin_width"],
        **{
            name: [[ids.setdefault(token, len(ids)), _rounded(logit)] for token, logit in json.loads(row[f"{name}_tokens"])]
            for name in ("promoted", "suppressed")
        },
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _encoded(lists: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The distinct tokens in alphabetical order, and for each feature the numbers of its own from 1, 0 where it has fewer: `[n * most]`."""
    import numpy as np

    vocabulary = sorted({token for tokens in lists for token in tokens})
    ids = {token: number for number, token in enumerate(vocabulary, start=1)}
    most = max(map(len, lists), default=0)
    encoded = np.zeros((len(lists), most), np.uint16 if len(vocabulary) < 2**16 else np.uint32)
    for row, tokens in enumerate(lists):
        encoded[row, : len(tokens)] = [ids[token] for token in tokens]
    return vocabulary, encoded.ravel()


def _float(rows: pl.DataFrame, column: str) -> np.ndarray:
    """float32, nan for null."""
    import numpy as np
    import polars as pl

    return rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy().astype(np.float32)


def _whole(rows: pl.DataFrame, column: str, dtype: Any) -> np.ndarray:
    return rows[column].fill_null(0).to_numpy().astype(dtype)


def _packed(header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> bytes:
    """The length of the header (uint32, little endian, as all else), the header in JSON, and the columns.

    Each begins at a multiple of 8 bytes; the header says at which, after its own end, and what type the column is of.
    """
    body = bytearray()
    places: dict[str, Any] = {}
    for name, column in columns.items():
        places[name] = [_TYPES[column.dtype.name], len(body), len(column)]
        body += column.astype(column.dtype.newbyteorder("<")).tobytes()
        body += bytes(-len(body) % 8)
    text = json.dumps({**header, "columns": places}, separators=(",", ":")).encode()
    text += b" " * (-(4 + len(text)) % 8)
    return len(text).to_bytes(4, "little") + text + bytes(body)


def _write_script(folder: Path, name: str, data: bytes) -> None:
    packed = base64.b64encode(gzip.compress(data, COMPRESSION, mtime=0)).decode()
    (folder / f"{name}.js").write_text(f'saeensFeatures("{name}","{packed}");\n')
