"""`saeens lineage`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import FormatOption, notify, out, print_line, print_rows
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

if TYPE_CHECKING:
    from saeens_pipeline.assets.lineage import Ancestor

_COLUMNS = ("depth", "role", "title", "data_version", "facts", "problem", "shown_before")


@app.command()
def lineage(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            help="A table row, TABLE:COLUMN=VALUE,..., such as members:layer=1,seed=42,method=bagging; an asset, "
            "ASSET:layer=L,seed=S, such as quickstart/bagging/member_1:layer=1,seed=42; or a data version, at least its first 4 digits.",
        ),
    ],
    format: FormatOption = "table",
) -> None:
    """Print the inputs of a table row or an artefact, down to corpus and language model, and the runs that wrote them."""
    from saeens_pipeline.assets.lineage import lineage as trace
    from saeens_pipeline.orchestration.catalogue import Catalogue

    declarations = [output for op in Catalogue.load().all_ops() for output in op.outputs]
    found = trace(Store(data_root()), declarations, subject)
    if format == "json":
        print_line(json.dumps(asdict(found), indent=1))
    elif format == "csv":
        print_rows(list(_rows(found)), _COLUMNS, format)
    else:
        out.print(_tree(found), soft_wrap=not out.is_terminal)
    problems = list(found.problems())
    if problems:
        notify("note", "parts of it are no longer on disk in the versions that were used:\n" + "\n".join(problems))


def _rows(ancestor: Ancestor, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a lineage as rows, each before the rows of its inputs, which are one deeper."""
    values = {"depth": depth, "facts": "; ".join(ancestor.facts)}
    yield {name: values.get(name, getattr(ancestor, name, None)) for name in _COLUMNS}
    for parent in ancestor.parents:
        yield from _rows(parent, depth + 1)


def _tree(ancestor: Ancestor) -> Tree:
    """Return a lineage as a tree for the terminal."""
    label = Text.assemble(
        (f"{ancestor.role}: " if ancestor.role else "", "dim"),
        (ancestor.title, "bold"),
        (f"  {ancestor.data_version}", "cyan"),
        (" (see above)" if ancestor.shown_before else "", "dim"),
        *((f"\n{fact}", "dim") for fact in ancestor.facts),
        *(((f"\n{ancestor.problem}", "red"),) if ancestor.problem else ()),
    )
    tree = Tree(label)
    tree.children = [_tree(parent) for parent in ancestor.parents]
    return tree
