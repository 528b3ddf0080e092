"""Writes the pages that the browser tests open: of a tiny experiment that is run for it, and of one whose tables hold hostile text.

    python tests/browser/write_pages.py FOLDER

`FOLDER/expected.json` has values of tables, computed from the Parquet files alone, `features.ndjson` and `autointerp.ndjson` the rows of
these tables.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "saeens_pipeline"))
from fake_endpoint import FakeEndpoint, Question, serving
from tiny_experiment import NAME, Laboratory, write_rows
from tiny_models import write_tiny_model

from saeens_pipeline.language_models.autointerp.endpoint import URL_VARIABLE
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.orchestration.runs import make_reports
from saeens_pipeline.report.metrics import METRICS
from saeens_pipeline.storage.tables import read_table

HOSTILE = '<script>document.title = "taken"</script><img src="x" onerror="alert(1)">'
LAYERS = [0, 1]
SEEDS = [1, 2, 3]
EVALUATIONS = ["reconstruction", "members", "coactivation", "stability", "marginal_gain", "cost", "training_curves", "features", "contexts"]
EXPLAINED = {"model": "fake", "features": 20, "retries": 0}


def answer(question: Question) -> str:
    """Something that follows from the texts and the explanation; to some questions there is no list."""
    sums = [sum(text.encode()) for text in question.texts]
    if question.explanation is None:
        return f"texts of kind {sums[0] % 10}"
    fits = [(each + int(question.explanation[-1])) % 2 for each in sums]
    return json.dumps(fits if sum(sums) % 5 else fits[1:])


def main(folder: Path) -> None:
    """Write all pages below `folder`."""
    folder = folder.resolve()  # paths in an experiment file are relative to that file
    shutil.rmtree(folder, ignore_errors=True)
    plain = Laboratory(write_tiny_model(folder / "model"), folder / "defs", folder / "plain")
    hostile = Laboratory(plain.model, plain.folder, folder / "hostile")
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain.activate(monkeypatch)
        ensemble = {"members": 3, "seeds": SEEDS}
        plain.declare({"layers": LAYERS}, ensemble=ensemble, evaluations=[*EVALUATIONS, "autointerp"], autointerp=EXPLAINED)
        with serving(FakeEndpoint(answer)) as endpoint:
            monkeypatch.setenv(URL_VARIABLE, endpoint.url)
            plain.run()
        shutil.copytree(plain.root, hostile.root)
        hostile.activate(monkeypatch)
        for part in (hostile.root / "tables").rglob("part.parquet"):
            rows = pl.read_parquet(part, hive_partitioning=False).with_columns(method=pl.col("method").replace("expanded", HOSTILE))
            write_rows(hostile.store, part, _with_hostile_tokens(rows))
        make_reports(Catalogue.load(), NAME, [])
    (folder / "expected.json").write_text(json.dumps({str(layer): _expected(plain.root, layer) for layer in LAYERS}, indent=1))
    for table in ("features", "autointerp"):
        rows = read_table(plain.root, NAME, table, LAYERS[1])
        rows.drop("experiment", "sae_data_versions").write_ndjson(folder / f"{table}.ndjson")


def _with_hostile_tokens(rows: pl.DataFrame) -> pl.DataFrame:
    """The first token of every list of tokens is hostile, and every explanation."""
    if "explanation" in rows.columns:
        return rows.with_columns(explanation=pl.when(pl.col("explanation").is_not_null()).then(pl.lit(HOSTILE)))
    texts = {name for name in ("top_tokens", "contexts", "promoted_tokens", "suppressed_tokens") if name in rows.columns}

    def changed(text: str) -> str:
        items = json.loads(text)
        for i, item in enumerate(items):
            if isinstance(item, dict):
                item["tokens"][0] = HOSTILE
            elif isinstance(item, list):
                item[0] = HOSTILE
            elif i == 0:
                items[0] = HOSTILE
        return json.dumps(items)

    return rows.with_columns(pl.col(name).map_elements(changed, return_dtype=pl.String) for name in texts)


def _expected(root: Path, layer: int) -> dict[str, dict[str, float]]:
    """By method and column, the mean over seeds at the largest size."""
    expected: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        if metric.table not in EVALUATIONS:
            continue
        parts = sorted((root / "tables" / NAME / metric.table / f"layer={layer}").rglob("part.parquet"))
        rows = pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts])
        largest = rows.filter(pl.col("n_members") == pl.col("n_members").max().over("method"))
        unit = metric.column.removeprefix("total_")
        value = pl.col(f"train_{unit}") + pl.col(f"residual_{unit}") if unit != metric.column else pl.col(metric.column)
        for row in largest.group_by("method").agg(value.mean().alias(metric.column)).drop_nulls().iter_rows(named=True):
            expected.setdefault(row["method"], {})[metric.column] = row[metric.column]
    return expected


if __name__ == "__main__":
    main(Path(sys.argv[1]))
