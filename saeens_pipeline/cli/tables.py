"""`saeens tables`, `table`, `leaderboard`, `pareto` and `report`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import (
    ExperimentName,
    FormatOption,
    LayerOption,
    notify,
    out,
    print_data,
    print_line,
    print_rows,
    rich_table,
)
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

if TYPE_CHECKING:
    from saeens_pipeline.orchestration.catalogue import Catalogue

_SHOWN_ROWS = 1000  # of a table in the terminal
SortOption = Annotated[str | None, typer.Option(help="Column to sort by, the better end first, by name or heading, such as EV.")]


class _ListsTables(TyperCommand):
    """A command whose help lists the registered tables. The registry is imported only for the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import saeens_pipeline.assets.tables  # noqa: F401  # registers them
        from saeens_pipeline.assets.registry import listed

        argument = next(each for each in self.params if each.name == "name")
        argument.help = f"Name of a table, one of {', '.join(table.name for table in listed(over_experiments=False))}."  # pyright: ignore[reportAttributeAccessIssue]
        super().format_help(ctx, formatter)


@app.command()
def tables(format: FormatOption = "table") -> None:
    """List the tables that experiments can fill, with the question that each answers."""
    import saeens_pipeline.assets.tables  # noqa: F401  # registers them
    from saeens_pipeline.assets.registry import listed

    rows = [{"table": each.name, "default": each.by_default, "question": each.question} for each in listed(over_experiments=False)]
    print_rows(rows, ("table", "default", "question"), format)


@app.command(cls=_ListsTables)
def table(
    experiment: ExperimentName,
    name: Annotated[str, typer.Argument(metavar="TABLE", help="Name of a table; `saeens tables` lists them.")],
    sort: SortOption = None,
    format: FormatOption = "table",
) -> None:
    """Print an evaluation table: all layers on disk, and the experiment's seeds."""
    import polars as pl

    from saeens_pipeline.assets.massive_activations import SHARE, cautions, marked
    from saeens_pipeline.assets.registry import find_table, sorted_by
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.runs import experiment_status
    from saeens_pipeline.storage.tables import has_table, read_table

    catalogue = Catalogue.load()
    seeds, registered, root = catalogue.experiment(experiment).ensemble.seeds, find_table(name), data_root()
    statuses = experiment_status(catalogue, experiment)
    if not any(each.declaration.address.key == [experiment, "eval", name] for each in statuses) and not has_table(root, experiment, name):
        raise ConfigurationError(f"{experiment} does not fill the table {name}: add it to evaluations in the experiment file")
    frame = read_table(root, experiment, name).filter(pl.col("seed").is_in(seeds))
    if sort:
        frame = sorted_by(frame, sort, {each.column: each.title for each in registered.headlines}, f"the table {name}")
    if any(each.state != "fresh" for each in statuses if each.declaration.address.key == [experiment, "eval", name]):
        notify("note", f"parts of this table are missing, stale or damaged: see `saeens status {experiment}`")
    measured = frame
    if "explained_variance" in frame.columns and SHARE not in frame.columns and has_table(root, experiment, "reconstruction"):
        measured = read_table(root, experiment, "reconstruction").filter(pl.col("seed").is_in(seeds))
    if not print_data(frame, format):
        shown = frame.drop("experiment", "sae_data_versions").head(_SHOWN_ROWS)
        out.print(rich_table(shown.rename(lambda column: marked(column, column, measured))))
        if len(frame) > _SHOWN_ROWS:
            notify("note", f"these are the first {_SHOWN_ROWS:,} of {len(frame):,} rows: --format csv or json prints all")
    for each in cautions(measured):
        notify("note", each)
    if note := registered.note(Store(root), experiment, seeds, None):
        notify("note", note)


@app.command()
def leaderboard(
    sort: Annotated[
        str, typer.Option(help="Column to rank by, within each source and layer, by name or heading, such as EV.")
    ] = "explained_variance",
    n: Annotated[Literal["full", "all"], typer.Option(help="Ensembles with all their members, or with the first n for every n.")] = "full",
    format: FormatOption = "table",
) -> None:
    """Rank every evaluated method of every experiment and layer."""
    from saeens_pipeline.assets.massive_activations import cautions
    from saeens_pipeline.assets.tables.leaderboard import for_reading, grows_with_features, ranked, sort_column, standings, unequal_tokens
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.runs import make_alone
    from saeens_pipeline.storage.tables import read_part

    catalogue, store = Catalogue.load(), Store(data_root())
    op, sort = catalogue.leaderboard(), sort_column(sort)
    try:
        store.require_writable()
    except SaeensError as error:
        notify("note", f"the table is printed and not stored: {error}")
        rows = standings(store, op.outputs[0], sort, n)
    else:
        made = ranked(read_part(make_alone(catalogue, op, "saeens leaderboard")), sort)
        rows = made if n == "full" else standings(store, op.outputs[0], sort, n)
    if rows.is_empty():
        notify("note", "nothing is evaluated yet: run `saeens run EXPERIMENT`; `saeens experiments` lists the experiments")
    _note_outdated(catalogue, rows["experiment"].unique(maintain_order=True))
    for each in (*cautions(rows), *unequal_tokens(rows), *grows_with_features(rows, sort)):
        notify("note", each)
    if print_data(rows, format):
        return
    for (source, layer), of_layer in rows.partition_by("source", "layer", as_dict=True, maintain_order=True).items():
        out.print(rich_table(for_reading(of_layer, sort), f"{source}, layer {layer}"), "")


@app.command()
def report(
    experiment: Annotated[
        str | None,
        typer.Argument(
            metavar="EXPERIMENT", help="Name of an experiment; `saeens experiments` lists them. Without it: the leaderboard's page only."
        ),
    ] = None,
    layer: LayerOption = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md", help="Write the results as a page of Markdown instead, from the tables on disk, with figures beside it."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write every chart of the report as SVG and PDF instead, 3.3 and 6.8 inches wide.")
    ] = None,
) -> None:
    """Materialise the report of an experiment and the page over all experiments, which open from disk, and print their paths."""
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.runs import make_reports

    for option, value in (("--layer", layer), ("--markdown", markdown), ("--figures", figures)):
        if value and experiment is None:
            raise ConfigurationError(f"{option} needs the name of an experiment")
    if experiment and (markdown or figures):
        for written in _write_results(Catalogue.load(), experiment, layer or [], markdown, figures):
            print_line(str(written))
        return
    for page in make_reports(Catalogue.load(), experiment, layer or []):
        print_line(str(page))


def _write_results(catalogue: Catalogue, name: str, layers: list[int], markdown: Path | None, figures: Path | None) -> list[Path]:
    """Write the page and the figures of an experiment from its tables; return the paths, without those of the page's own figures."""
    from saeens_pipeline.report.markdown import Subject, write_figures, write_page
    from saeens_pipeline.storage.tables import layers_with_tables

    experiment, store = catalogue.experiment(name), Store(data_root())
    found = layers or layers_with_tables(store.root, name)
    if not found:
        raise SaeensError(f"{name} has no table below {store.root} yet: `saeens run {name}` computes them")
    subjects = [Subject.read(store, catalogue, experiment, layer) for layer in found]
    written = write_page(markdown, subjects)[:1] if markdown else []
    written += write_figures(figures, subjects) if figures else []
    _note_outdated(catalogue, [name])
    return written


@app.command()
def pareto(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="Name of an experiment with a sweep.")],
    picture: Annotated[Path | None, typer.Option(help="PNG file to write the plot to.")] = None,
    sort: SortOption = None,
    format: FormatOption = "table",
) -> None:
    """Compare the experiments of a sweep: explained variance against L0 and description length, for each method."""
    from saeens_pipeline.assets.registry import sorted_by, summary_titles
    from saeens_pipeline.assets.tables.pareto import PICTURE_FILE, TABLE_FILE, for_reading, notes, pareto_rows
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.runs import make_alone
    from saeens_pipeline.storage.tables import read_part

    catalogue, store = Catalogue.load(), Store(data_root())
    op = catalogue.pareto(sweep)
    declaration = op.outputs[0]
    try:
        store.require_writable()
    except SaeensError as error:
        from saeens_pipeline.report.pictures import sweep_picture

        notify("note", f"the table is printed and not stored: {error}")
        rows = pareto_rows(store, declaration)
        drawn = partial(sweep_picture, rows, declaration)
    else:
        folder = make_alone(catalogue, op, "saeens pareto")
        rows, drawn = read_part(folder / TABLE_FILE), (folder / PICTURE_FILE).read_bytes
    for note in notes(rows, declaration):
        notify("note", note)
    _note_outdated(catalogue, rows["experiment"].unique(maintain_order=True))
    if picture:
        picture.write_bytes(drawn())
    if sort:
        titles = {"n_members": "n", "n_seeds": "seeds", "value": rows["field"][0] if len(rows) else "value"}
        rows = sorted_by(rows, sort, summary_titles() | titles, f"the comparison of {sweep}")
    if print_data(rows, format):
        return
    for (layer,), of_layer in rows.partition_by("layer", as_dict=True, maintain_order=True).items():
        out.print(rich_table(for_reading(of_layer), f"{sweep}, layer {layer}"), "")
    if picture:
        print_line(f"written to {picture}")


def _note_outdated(catalogue: Catalogue, experiments: Iterable[str]) -> None:
    """Print a note for each experiment with outdated figures, and for each whose status cannot be found out."""
    from saeens_pipeline.orchestration.runs import experiment_status

    for name in experiments:
        try:
            made = [each for each in experiment_status(catalogue, name) if each.declaration.address.kind == "eval"]
        except SaeensError as error:
            notify("note", f"figures of {name} may be outdated, which cannot be checked: {error}")
            continue
        if any(each.state in ("stale", "damaged") for each in made):
            notify("note", f"figures of {name} are outdated: see `saeens status {name}`")
