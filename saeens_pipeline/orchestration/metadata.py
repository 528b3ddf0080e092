"""Metadata in the Dagster UI: a summary, a picture, path, recipe and versions of each artefact."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import dagster as dg
import polars as pl

from saeens_pipeline.assets.declarations import Declaration, Reference, changes_in
from saeens_pipeline.assets.held_out import held_out
from saeens_pipeline.assets.massive_activations import cautions, marked
from saeens_pipeline.assets.registry import SUBJECT, TABLES, Markdown, Table
from saeens_pipeline.assets.saes import shape_of
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.assets.tables.pareto import PARETO, PICTURE_FILE, TABLE_FILE
from saeens_pipeline.orchestration.report_pages import report_url
from saeens_pipeline.storage.names import CURVE_FILE, ENSEMBLES, INDEX_FILE, PICTURES_FOLDER, SAES, Address, Partition
from saeens_pipeline.storage.recipes import Artefact, Store, read_artefact
from saeens_pipeline.storage.tables import Column, read_part

_DAGSTER_TYPES = {"str": "string", "int": "int", "float": "float"}
_MOST_INPUTS = 40  # that are listed
_INLINE_CHARACTERS = 1000  # the UI hides longer Markdown behind a link


def static_metadata(declaration: Declaration) -> dict[str, Any]:
    """Return the metadata of a declaration: a table's columns."""
    if declaration.address.name not in TABLES:
        return {}
    columns = TABLES[declaration.address.name].all_columns
    shown = [dg.TableColumn(column.name, _DAGSTER_TYPES[column.type], description=column.description) for column in columns]
    return {"dagster/column_schema": dg.TableSchema(shown)}


def describe_artefact(store: Store, declaration: Declaration, partition: Partition, artefact: Artefact, *, is_hit: bool) -> dict[str, Any]:
    """Return the metadata of one materialisation, by name, in the order in which the UI lists them."""
    made = artefact.provenance
    summary: dict[str, Any] = {}
    if declaration.builder == "sae":
        summary = _sae_summary(artefact)
    elif declaration.builder == "published_sae":
        summary = _published_summary(artefact)
    elif declaration.address.is_table:
        summary = _table_summary(declaration, artefact) | _links(declaration, partition)
        summary["dagster/column_lineage"] = column_lineage(declaration)
    elif declaration.builder == "ensemble":
        summary = _ensemble_summary(artefact) | _links(declaration, partition)
    elif declaration.builder == PARETO:
        summary = _pareto_summary(artefact)
    elif declaration.address.kind == "report":
        summary = _report_summary(artefact)
    elif "statistics" in made:
        summary = _statistics_summary(made["statistics"]) | _composition_summary(made) | _quantised(artefact) | _on_demand(artefact)
    leading = held_out_figures(store, declaration, partition, artefact) if declaration.builder in (*SAES, "ensemble") else {}
    if declaration.address.is_table:
        leading = {name: value for name, value in summary.items() if isinstance(value, int | float) and not name.startswith("dagster/")}
    if url := report_url(declaration.address, partition):  # below `saeens ui`
        link = {"open in a browser" if declaration.address.kind == "report" else "report": dg.MetadataValue.url(url)}
        summary = link | summary if declaration.address.kind == "report" else summary | link
    seconds = made.get("train_seconds", made.get("seconds"))
    size = sum(n_bytes for n_bytes, _ in artefact.files.values())
    general = {
        "duration [s]": None if seconds is None else round(seconds, 2),
        "peak memory [MB]": round(made["peak_memory_bytes"] / 1e6) if made.get("peak_memory_bytes") else None,
        "device": made["device"],
        "size [MB]": round(size / 1e6, 2) if not declaration.address.is_table else None,
        "same as": made.get("same_as"),
        "set on the command line": changes_in(made) or None,
        "data version": artefact.data_version,
        "computed from": _inputs(store, declaration, partition, artefact),
        "path": dg.MetadataValue.path(str(artefact.path)),
        "recipe": dg.MetadataValue.json(artefact.recipe),
        "versions": dg.MetadataValue.json(made["versions"]),
    }
    return {name: value for name, value in (leading | {"cache_hit": is_hit} | summary | general).items() if value is not None}


def _sae_summary(artefact: Artefact) -> dict[str, Any]:
    from saeens_models import SAESettings

    made = artefact.provenance
    last = made["last_step"]
    curve = pl.read_parquet(artefact.path / CURVE_FILE, glob=False)
    seconds = made["train_seconds"]
    return {
        "SAE": shape_of(SAESettings.model_validate(artefact.recipe["settings"]["sae"])),
        "explained variance in training": round(last["explained_variance"], 4),
        "L0 in training [features per token]": round(last["l0"], 2),
        "dead features in training": f"{last['dead_features']:.1%}",
        "training figures are of": "the last batch",
        "curve": picture({"": curve["explained_variance"].to_list()}, "explained variance by training tokens"),
        "train tokens": made["train_tokens"],
        "resumed from a checkpoint at [tokens]": ", ".join(f"{tokens:,}" for tokens in made.get("resumed_at_tokens", ())) or None,
        "tokens/s": round(made["train_tokens"] / seconds) if seconds else None,
        "train FLOPs": f"{made['train_flops']:.3g}",
        "energy [J]": round(made["energy_joules"], 1) if made.get("energy_joules") else None,
        "out of memory with": "; ".join(made.get("out_of_memory_with", ())) or None,
        "micro-batch [tokens]": made.get("micro_batch_tokens"),
    }


def _published_summary(artefact: Artefact) -> dict[str, Any]:
    made, cfg = artefact.provenance, json.loads((artefact.path / "cfg.json").read_text())
    return {
        "published": made["published"],
        "architecture": cfg["architecture"],
        "features": cfg["d_sae"],
        "target L0 [features per token]": made["l0_target"],
        "FLOPs per token": f"{made['inference_flops_per_token']:.3g}",
        "differs from the source": "; ".join(made["differences"]) or None,
    }


def _ensemble_summary(artefact: Artefact) -> dict[str, Any]:
    """Return the summary of an ensemble; features and L0 are sums over its SAEs."""
    saes = [read_artefact(artefact.path / path) for path in json.loads((artefact.path / "ensemble.json").read_text())["members"]]
    steps = [sae.provenance["last_step"] for sae in saes if "last_step" in sae.provenance]  # a published SAE has none
    widths = [json.loads((sae.path / "cfg.json").read_text())["d_sae"] for sae in saes]
    return {
        "SAEs (J)": len(saes),
        "features": sum(widths),
        "L0 in training [features per token]": round(sum(step["l0"] for step in steps), 2) if len(steps) == len(saes) else None,
    }


def _report_summary(artefact: Artefact) -> dict[str, Any]:
    pictures = {path.stem.replace("_", " "): path for path in sorted((artefact.path / PICTURES_FOLDER).glob("*.png"))}
    return {
        "file": dg.MetadataValue.path(str(artefact.path / INDEX_FILE)),
        **{title: _png(path.read_bytes(), title) for title, path in pictures.items()},
    }


def held_out_figures(store: Store, declaration: Declaration, partition: Partition, artefact: Artefact) -> dict[str, Any]:
    """Return the held-out figures of an SAE or an ensemble as UI metadata, with a link to their table; empty before they are measured."""
    if found := held_out(store, declaration, partition, artefact):
        rounded: dict[str, Any] = {title: round(value, 4) for title, value in found.figures.items()}
        return rounded | {"held-out figures are from": dg.MetadataValue.md(_link(found.table, partition))}
    return {}


def _inputs(store: Store, declaration: Declaration, partition: Partition, artefact: Artefact) -> dg.MarkdownMetadataValue | None:
    """Return the inputs with their data versions, each with a link to its partition; of a table over many inputs the first ones."""
    versions, known = artefact.recipe["inputs"], {name: (each, where) for name, each, where in declaration.all_inputs(store, partition)}
    lines = [f"{_link(known[name][0].address, known[name][1], name)} `{version}`" for name, version in versions.items() if name in known]
    if len(lines) > _MOST_INPUTS:
        lines[_MOST_INPUTS:] = [f"and {len(lines) - _MOST_INPUTS} more: `saeens lineage {declaration.address}` lists them"]
    return dg.MetadataValue.md("  \n".join(lines)) if lines else None


def _link(address: Address, partition: Partition, text: str = "") -> str:
    """Return a link to an asset's partition."""
    key = "|".join(str(value) for value in partition if value is not None)
    query = f"?view=partitions&partition={quote(key)}" if key else ""
    return f"[{text or address}](/assets/{'/'.join(address.key)}{query})"


def _links(declaration: Declaration, partition: Partition) -> dict[str, Any]:
    """Return links to the SAEs of a table or an ensemble as UI metadata, by label."""
    where = Partition() if None in partition else partition  # SAEs have layer and seed

    def link(sae: Declaration) -> str:
        return _link(sae.address, where, sae.address.name)

    return {label: dg.MetadataValue.md(" ".join(map(link, saes))) for label, saes in _saes_below(declaration)}


def _saes_below(declaration: Declaration) -> Iterator[tuple[str, list[Declaration]]]:
    """Yield label and SAEs of each part of a declaration's inputs: single SAEs, and the SAEs of each ensemble."""
    below = [each.artefact for each in declaration.inputs if isinstance(each.artefact, Declaration)]
    single = [each for each in below if each.builder in SAES]
    if single:
        yield ("its SAEs" if declaration.builder == "ensemble" else "baselines"), single
    for each in below:
        if each.builder == "ensemble":
            yield f"SAEs of {each.address.name}", [sae for _, saes in _saes_below(each) for sae in saes]


def column_lineage(declaration: Declaration) -> dg.TableColumnLineage:
    """Return the upstream assets that each column of a table is computed from, with the part that is read.

    The part of an SAE is its `weights`, `data_version` or training records; of activations the test split; of a table the column of that
    name.
    """
    table = TABLES[declaration.address.name]
    deps: dict[str, list[dg.TableColumnDep]] = {}
    for column in table.all_columns:
        for upstream in (each.artefact for each in declaration.inputs if each.in_graph):
            if part := _part_read(upstream, table, column):
                deps.setdefault(column.name, []).append(dg.TableColumnDep(dg.AssetKey(upstream.address.key), part))
    return dg.TableColumnLineage(deps)


def _part_read(upstream: Reference, table: Table, column: Column) -> str | None:
    """Return the part of an upstream asset from which a column is computed; None if the column does not depend on the asset."""
    address, name = upstream.address, column.name.removeprefix("control_")
    if address.is_table:
        names = column.from_columns or (name,)
        return next((c.name for c in TABLES[address.name].all_columns if c.name in names), None)
    if column.from_columns:
        return None
    is_description = not table.over_experiments and name in {each.name for each in SUBJECT}
    if address.kind == "source":
        if is_description:
            return "language_model" if address.name == "activations" and name == "language_model" else None
        parts = table.source_parts.get(address.name, {})
        return parts.get(name, parts.get("*"))
    if is_description:
        return "data_version" if name == "sae_data_versions" else None
    return table.sae_part


def _table_summary(declaration: Declaration, artefact: Artefact) -> dict[str, Any]:
    registered = TABLES[declaration.address.name]
    if registered.is_large:
        return {"dagster/row_count": pl.scan_parquet(artefact.path, hive_partitioning=False, glob=False).select(pl.len()).collect().item()}
    from saeens_pipeline.report.pictures import table_picture

    table = with_totals(read_part(artefact.path))
    summary: dict[str, Any] = {"dagster/row_count": len(table)}
    if said := " ".join(cautions(table)):
        summary["caution"] = said
    for name, value in registered.summary(table, artefact).items():
        summary[name] = dg.MetadataValue.md(value) if isinstance(value, Markdown) else value
    shown = registered.headlines[0].column if registered.headlines else None
    if shown and table[shown].null_count() < len(table):
        by_method = table.group_by("method", "n_members", maintain_order=True).agg(pl.col(shown).mean())
        largest = by_method.group_by("method", maintain_order=True).agg(pl.all().sort_by("n_members").last())
        title = marked(shown.replace("_", " "), shown, table)
        rows = "\n".join(f"| {row['method']} | {row['n_members']} | {row[shown]:.4g} |" for row in largest.iter_rows(named=True))
        for row in largest.filter(pl.col("method").is_in(["single", *ENSEMBLES])).iter_rows(named=True):
            summary[f"{title} of {row['method']}"] = round(row[shown], 4)  # a number, which the UI plots by partition
        summary["summary"] = dg.MetadataValue.md(f"| method | members | {title} |\n|---|---|---|\n{rows}")
        curves: dict[str, Sequence[float]] = {
            m: by_method.filter(pl.col("method") == m).sort("n_members")[shown].to_list() for m in ENSEMBLES if m in set(table["method"])
        }
        if curves and all(len(values) > 1 for values in curves.values()):
            summary[f"{shown.replace('_', ' ')} by number of members"] = picture(curves, "members")
    png = table_picture(registered.name, table)
    if png:
        summary["plot"] = _png(png, registered.name.replace("_", " "))
    return summary


def _pareto_summary(artefact: Artefact) -> dict[str, Any]:
    """Return the UI metadata of a Pareto table: number of rows, missing experiments, and the plot."""
    table = pl.read_parquet(artefact.path / TABLE_FILE, glob=False)
    return {
        "dagster/row_count": len(table),
        "caution": " ".join(cautions(table)) or None,
        "not evaluated yet": ", ".join(artefact.provenance["not_evaluated"]) or None,
        "picture": _png((artefact.path / PICTURE_FILE).read_bytes(), "explained variance and recovered loss by L0 and by bits"),
    }


def _png(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """Return a picture as Markdown that holds the bytes."""
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")


def _statistics_summary(statistics: dict[str, Any]) -> dict[str, Any]:
    rows = {f"{split} rows": values["rows"] for split, values in statistics.items()}
    norms = {f"mean norm ({split})": round(values["mean_norm"], 4) for split, values in statistics.items() if "mean_norm" in values}
    documents = {f"{split} documents": values["documents"] for split, values in statistics.items() if "documents" in values}
    return rows | documents | norms


def _composition_summary(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return rows and documents of each corpus of a mixed one."""
    return {
        f"{split} rows of {name}": f"{each['rows']:,} of {each['documents']:,} documents"
        for split, of_split in made.get("composition", {}).items()
        for name, each in of_split.items()
    }


def _quantised(artefact: Artefact) -> dict[str, Any]:
    """Return the types of quantised weights from which activations were computed."""
    settings = artefact.recipe["settings"]
    model = settings.get("language_model")
    is_quantised = isinstance(model, dict) and model.get("quantised") and settings["weights"] == "trained"
    return {"quantised weights": model["quantised"]} if is_quantised else {}


def _on_demand(artefact: Artefact) -> dict[str, Any]:
    """Return that training rows are not on disk, for activations with the bytes of test rows alone."""
    stored = {name.partition("/")[0] for name in artefact.files if "/activations/c/" in name}
    return {"training rows": "computed again when they are read (keep_activations: test)"} if stored == {"test"} else {}


def picture(curves: dict[str, Sequence[float]], x_label: str, width: int = 300, height: int = 90) -> dg.MarkdownMetadataValue:
    """Return a line plot as an SVG small enough for the UI to show inline; long curves are thinned."""
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
