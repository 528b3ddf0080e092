"""What the Dagster UI shows of an artefact: a summary first, then a picture, then where it lies and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import dagster as dg

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.saes import CURVE_FILE
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import columns_of

_DAGSTER_TYPES = {"str": "string", "int": "int", "float": "float"}
_SHOWN = {"reconstruction": "explained_variance", "coactivation": "connectivity", "stability": "stability", "cost": "train_seconds"}
_INLINE_CHARACTERS = 1000  # longer Markdown hides behind a link in the UI


def static_metadata(declaration: Declaration) -> dict[str, Any]:
    """What is known before anything is made: a table's columns."""
    if declaration.address.kind != "eval":
        return {}
    columns = [dg.TableColumn(c.name, _DAGSTER_TYPES[c.type], description=c.description) for c in columns_of(declaration.address.name)]
    return {"dagster/column_schema": dg.TableSchema(columns=columns)}


def describe_artefact(declaration: Declaration, artefact: Artefact, cache_hit: bool) -> dict[str, Any]:
    """Metadata of one materialisation, in the order in which the UI shows it."""
    made = artefact.provenance
    summary: dict[str, Any] = {}
    if declaration.builder == "sae":
        summary = _sae_summary(artefact)
    elif declaration.address.kind == "eval":
        summary = _table_summary(declaration, artefact)
    elif "statistics" in made:
        summary = _statistics_summary(made["statistics"])
    seconds = made.get("train_seconds", made.get("seconds"))
    size = sum(n_bytes for n_bytes, _ in artefact.files.values())
    general = {
        "seconds": None if seconds is None else round(seconds, 2),
        "peak memory [MB]": round(made["peak_memory_bytes"] / 1e6) if made.get("peak_memory_bytes") else None,
        "device": made["device"],
        "size [MB]": round(size / 1e6, 2) if declaration.address.kind != "eval" else None,
        "same as": made.get("same_as"),
        "cache_hit": cache_hit,
        "path": dg.MetadataValue.path(str(artefact.path)),
        "recipe": dg.MetadataValue.json(artefact.recipe),
        "versions": dg.MetadataValue.json(made["versions"]),
    }
    return {name: value for name, value in (summary | general).items() if value is not None}


def _sae_summary(artefact: Artefact) -> dict[str, Any]:
    import polars as pl

    made = artefact.provenance
    last = made["last_step"]
    curve = pl.read_parquet(artefact.path / CURVE_FILE)
    seconds = made["train_seconds"]
    return {
        "explained variance": round(last["explained_variance"], 4),
        "l0": round(last["l0"], 2),
        "dead features": f"{last['dead_features']:.1%}",
        "measured on": "the last training batch; held-out figures are in eval/members",
        "curve": picture({"": curve["explained_variance"].to_list()}, "explained variance by training tokens"),
        "train tokens": made["train_tokens"],
        "tokens/s": round(made["train_tokens"] / seconds) if seconds else None,
        "train FLOPs": f"{made['train_flops']:.3g}",
    }


def _table_summary(declaration: Declaration, artefact: Artefact) -> dict[str, Any]:
    import polars as pl

    table = pl.read_parquet(artefact.path, hive_partitioning=False)
    name = declaration.address.name
    summary: dict[str, Any] = {"dagster/row_count": len(table)}
    shown = _SHOWN.get(name)
    if shown and table[shown].null_count() < len(table):
        by_method = table.group_by("method", "n_members", maintain_order=True).agg(pl.col(shown).mean())
        largest = by_method.group_by("method", maintain_order=True).agg(pl.all().sort_by("n_members").last())
        rows = "\n".join(f"| {row['method']} | {row['n_members']} | {row[shown]:.4g} |" for row in largest.iter_rows(named=True))
        summary["summary"] = dg.MetadataValue.md(f"| method | members | {shown.replace('_', ' ')} |\n|---|---|---|\n{rows}")
        curves: dict[str, Sequence[float]] = {
            m: by_method.filter(pl.col("method") == m).sort("n_members")[shown].to_list() for m in ("bagging", "boosting")
        }
        if all(len(values) > 1 for values in curves.values()):
            summary[f"{shown.replace('_', ' ')} by number of members"] = picture(curves, "members")
    return summary


def _statistics_summary(statistics: dict[str, Any]) -> dict[str, Any]:
    rows = {f"{split} rows": values["rows"] for split, values in statistics.items()}
    norms = {f"mean norm ({split})": round(values["mean_norm"], 4) for split, values in statistics.items() if "mean_norm" in values}
    documents = {f"{split} documents": values["documents"] for split, values in statistics.items() if "documents" in values}
    return rows | documents | norms


def picture(curves: dict[str, Sequence[float]], x_label: str, width: int = 300, height: int = 90) -> dg.MarkdownMetadataValue:
    """Line plot as an SVG small enough for the UI to show in place; long curves are thinned."""
    low, high = min(min(c) for c in curves.values()), max(max(c) for c in curves.values())
    for n_points in (40, 24, 16, 10):
        drawn = ""
        for (name, curve), colour in zip(curves.items(), ("%230072b2", "%23d55e00"), strict=False):
            chosen = [round(i * (len(curve) - 1) / (n_points - 1)) for i in range(n_points)] if len(curve) > n_points else range(len(curve))
            ys = [height - 16 - (curve[i] - low) / (high - low or 1) * (height - 28) for i in chosen]
            xs = [4 + i * (width - 94) / max(1, len(curve) - 1) for i in chosen]
            points = " ".join(f"{x:.0f},{y:.0f}" for x, y in zip(xs, ys, strict=True))
            drawn += f"<polyline points='{points}' fill='none' stroke='{colour}'/>"
            drawn += f"<text x='{width - 86}' y='{ys[-1] + 4:.0f}'>{curve[-1]:.3g} {name}</text>"
        drawn += f"<text x='4' y='{height - 3}'>{x_label}</text>"
        svg = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-size='10' fill='gray'>{drawn}</svg>"
        markdown = f"![curve](data:image/svg+xml,{quote(svg, safe='/:=,%-.')})".replace("%2523", "%23")
        if len(markdown) < _INLINE_CHARACTERS:
            break
    return dg.MetadataValue.md(markdown)
