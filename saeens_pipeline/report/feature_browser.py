"""The feature browser: a table of all features of both ensembles, and a page for each feature.

`features.html` reads `features/list.js` when it is opened, and the shard `features/N.js` when one of the shard's features is shown. A page
from disk may load scripts and nothing else. Each of these scripts calls one function with base64 of gzipped JSON, so that no text of the
corpus is ever script or HTML.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from saeens_pipeline.assets.registry import TABLES
from saeens_pipeline.assets.tables.autointerp import WHY, outcome
from saeens_pipeline.report.methods import method
from saeens_pipeline.report.results import Results
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import has_table, read_table

PAGE = "features.html"
DATA = "features"  # the folder of the scripts
NEAR_DUPLICATE = 0.7  # cosine similarity, as in the tables
SHARD_FEATURES = 512
ENSEMBLES = {"bagging": "member", "boosting": "round"}
DIGITS = 3  # of activations and logits
COMPRESSION = 4  # gzip's level; 6 takes three times as long for 6% less
_KEY = ["method", "member", "index"]
_FIRST = r"\[1, (\d+), (-?\d[\d.e-]*)\]"  # the nearest feature of member 1 in the column `matches`
_LISTED = {  # column of the page: column of the table
    "member": "member", "index": "index", "density": "density", "mean": "mean_activation", "near": "nearest_cosine",
    "nearMember": "nearest_member", "seed": "nearest_other_seed_cosine", "otherSeed": "nearest_other_seed",
    "seedMember": "nearest_other_seed_member", "seedIndex": "nearest_other_seed_index",
}  # fmt: skip
_EXPLAINED = {"explanation": "explanation", "score": "detection_score", "control": "control_score", "status": "status"}


@dataclass(frozen=True)
class Column:
    """A column of the feature browser's table: key, heading and meaning."""

    key: str
    title: str
    number: bool
    about: str


COLUMNS = (
    Column("method", "method", False, "sorts by method, member or round, index"),
    Column("member", "member", True, "member of bagging, round of boosting"),
    Column("index", "index", True, "row of that member's W_dec, from 0"),
    Column("density", "density", True, "share of the test tokens on which the feature fires"),
    Column("mean", "mean act.", True, "mean activation over the tokens on which the feature fires"),
    Column("near", "other members", True, "largest cosine to a feature of another member or round"),
    Column("nearest", "nearest", False, "the feature of another member or round with that cosine"),
    Column("seed", "stability", True, "largest cosine to any feature of the same method under another seed"),
    Column("score", "detection", True, "balanced accuracy of telling, by the explanation, the texts on which the feature fires"),
    Column("explanation", "explanation", False, "the language model's explanation of the feature"),
    Column("tokens", "most active on", False, "the ten test tokens with the largest activations, the largest first"),
)


@dataclass(frozen=True)
class FeatureBrowser:
    """The features of both ensembles under one seed: the first declared seed with a table of features.

    `contexts` and `explanations` are tables of the same seed, or None. `outcome` counts the explanations and says how to get them; it is
    empty without the table `autointerp`.
    """

    experiment: str
    layer: int
    seed: int
    other_seeds: Sequence[int]
    rows: pl.DataFrame
    contexts: pl.DataFrame | None
    explanations: pl.DataFrame | None
    outcome: str

    @classmethod
    def read(cls, store: Store, results: Results, seeds: Sequence[int]) -> FeatureBrowser | None:
        """Return the browser, or None where the table `features` is missing or of an earlier version.

        Raises SaeensError for a table that cannot be read.
        """
        experiment, layer, table = results.experiment, results.layer, results.tables.get("features")
        if table is None or "matches" not in table.columns:
            return None
        seeds_there, table = set(table["seed"]), table.filter(pl.col("method").is_in(list(ENSEMBLES)))
        seed = next((seed for seed in seeds if seed in set(table["seed"])), None)
        if seed is None:
            return None

        def of_seed(name: str) -> pl.DataFrame | None:
            if name not in TABLES or not has_table(store.root, experiment, name, layer):
                return None
            rows = read_table(store.root, experiment, name, layer).filter(seed=seed)
            return rows if len(rows) else None

        rows, explained = table.filter(seed=seed).sort(_KEY), outcome(store, experiment, [seed], layer)
        others = sorted(seeds_there - {seed})
        return cls(experiment, layer, seed, others, rows, of_seed("contexts"), of_seed("autointerp"), explained)

    @property
    def statuses(self) -> list[str]:
        """Return the statuses of the features drawn for explanation, the most frequent first."""
        if self.explanations is None:
            return []
        return self.explanations["status"].value_counts(sort=True).sort("count", "status", descending=[True, False])["status"].to_list()

    @property
    def columns(self) -> list[Column]:
        """Return the columns that have any value."""
        is_explained, has_others = self.explanations is not None, self.rows["nearest_member"].null_count() < len(self.rows)
        there = {
            "seed": bool(self.other_seeds),
            "score": is_explained,
            "explanation": is_explained,
            "near": has_others,
            "nearest": has_others,
        }
        return [column for column in COLUMNS if there.get(column.key, True)]

    def write(self, folder: Path, missing_contexts: str) -> None:
        """Write the list and the shards; `missing_contexts` says on a feature's page why it has no contexts.

        Memory: the tables of the seed, about 3.5 kB for each feature, twice.
        """
        (folder / DATA).mkdir()
        _write_script(folder / DATA, "list", self._list(missing_contexts))
        for number, shard in enumerate(self._shards()):
            _write_script(folder / DATA, str(number), shard)

    def _list(self, missing_contexts: str) -> dict[str, Any]:
        rows = self.rows
        columns = _columns(rows, _LISTED)
        matches = [{member: index for member, index, _ in json.loads(text or "[]")} for text in rows["matches"]]
        columns["nearIndex"] = [of.get(member) for of, member in zip(matches, rows["nearest_member"], strict=True)]
        columns["first"] = with_partner(rows)["first_cosine"].to_list()
        lists = [json.loads(text) for text in rows["top_tokens"]]
        vocabulary = sorted({token for tokens in lists for token in tokens})
        ids = {token: number for number, token in enumerate(vocabulary)}
        columns["tokens"] = [[ids[token] for token in tokens] for tokens in lists]
        header = {
            "experiment": self.experiment,
            "layer": self.layer,
            "seed": self.seed,
            "otherSeeds": self.other_seeds,
            "shared": NEAR_DUPLICATE,
            "shardFeatures": SHARD_FEATURES,
            "ensembles": [
                {"name": name, "label": (about := method(name)).label, "colour": about.colour, "glyph": about.glyph, "unit": unit}
                for name, unit in ENSEMBLES.items()
                if name in set(rows["method"])
            ],
            "groups": rows.group_by("method", "member", maintain_order=True).len("count").rows(),
            "vocabulary": vocabulary,
            "missingContexts": missing_contexts,
        }
        if self.explanations is not None:
            columns |= _columns(rows.select(_KEY).join(self.explanations, on=_KEY, how="left", maintain_order="left"), _EXPLAINED)
            header["why"] = WHY
        return {**header, "columns": columns}

    def _shards(self) -> Iterator[dict[str, Any]]:
        rows = self.rows.select(*_KEY, "matches")
        wanted = ["contexts", "max_activation", "histogram", "bin_width", "promoted_tokens", "suppressed_tokens"]
        if self.contexts is not None:
            rows = rows.join(self.contexts.select(*_KEY, *wanted), on=_KEY, how="left", maintain_order="left")
        for part in rows.iter_slices(SHARD_FEATURES):
            ids: dict[str, int] = {}
            features = [_details(row, ids) for row in part.iter_rows(named=True)]
            yield {"tokens": list(ids), "features": features}


def with_partner(rows: pl.DataFrame) -> pl.DataFrame:
    """Return rows of the table `features` with `first_index` and `first_cosine`, of the nearest feature in member 1; null for member 1."""
    groups = pl.col("matches").str.extract_groups(_FIRST).struct
    return rows.with_columns(
        first_index=groups.field("1").cast(pl.Int64, strict=False), first_cosine=groups.field("2").cast(float, strict=False)
    )


def _columns(rows: pl.DataFrame, names: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return columns as lists, numbers in single precision; null for values that are not finite."""
    chosen = rows.select(pl.col(column).alias(name) for name, column in names.items())
    numbers = pl.col(pl.Float32, pl.Float64)
    return chosen.with_columns(pl.when(numbers.is_finite()).then(numbers.round_sig_figs(7))).to_dict(as_series=False)


def _details(row: Mapping[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Return the details of a feature that are not in its row; `ids` numbers the tokens."""

    def number(token: str) -> int:
        return ids.setdefault(token, len(ids))

    details: dict[str, Any] = {"matches": json.loads(row["matches"] or "[]")}
    if row.get("contexts") is None:
        return details
    contexts = json.loads(row["contexts"])
    for each in contexts:
        each |= {"tokens": list(map(number, each["tokens"])), "activations": list(map(_rounded, each["activations"]))}
    for name in ("promoted", "suppressed"):
        details[name] = [[number(token), _rounded(logit)] for token, logit in json.loads(row[f"{name}_tokens"])]
    histogram = {"histogram": json.loads(row["histogram"]), "binWidth": row["bin_width"]}
    return details | histogram | {"contexts": contexts, "max": _rounded(row["max_activation"])}


def _rounded(value: float | None) -> float | None:
    return value and float(f"{value:.{DIGITS}g}")


def _write_script(folder: Path, name: str, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    packed = base64.b64encode(gzip.compress(text, COMPRESSION, mtime=0)).decode()
    (folder / f"{name}.js").write_text(f'saeensFeatures("{name}","{packed}");\n')
