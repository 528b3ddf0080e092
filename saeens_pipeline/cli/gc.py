"""`saeens gc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.text import Text

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import FormatOption, grid, notify, out, print_line, print_rows
from saeens_pipeline.storage.root import data_root


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove the listed files; without it nothing is changed.")] = False,
    forget_folder: Annotated[
        list[Path] | None, typer.Option(help="A former folder of SAEENS_EXPERIMENTS: artefacts of its files count as unused.")
    ] = None,
    format: FormatOption = "table",
) -> None:
    """List files below the data root that belong to no present experiment or source."""
    from saeens_pipeline.orchestration.garbage import by_folder, declared, find_garbage, remove_garbage
    from saeens_pipeline.orchestration.ops import Ops
    from saeens_pipeline.settings.files import FOLDERS_VARIABLE

    experiments, root = Ops.load(), data_root().resolve()
    inventory = find_garbage(root, declared(experiments), forget_folder or [])
    garbage, freed_bytes = by_folder(inventory.garbage, root), inventory.freed_bytes
    if delete:
        remove_garbage(experiments, inventory, root)
    marked = ((garbage, "removed" if delete else "unused"), (inventory.unknown, "unknown, kept"))
    rows = [(mark, n_bytes, str(path.relative_to(root)), reason) for findings, mark in marked for path, n_bytes, reason in findings]
    freed = f"{decimal(freed_bytes)} {'freed' if delete else 'would be freed by `saeens gc --delete`; nothing was changed'}"
    summary = freed if garbage else f"nothing below {root} is unused"
    if format == "table":
        table = grid(show_header=False)
        for mark, n_bytes, path, reason in rows:
            table.add_row(mark, Text(decimal(n_bytes), justify="right"), Text(path, overflow="fold"), Text(reason))
        if table.rows:
            out.print(table)
        print_line(summary)
    else:
        headings = ("state", "bytes", "path", "reason")
        print_rows([dict(zip(headings, row, strict=True)) for row in rows], headings, format)
        notify("note", summary)
    for message in experiments.broken.values():
        notify("note", f"{message}\nartefacts of this file are listed as unused")
    for folder in inventory.unread_folders:
        remedy = f"set {FOLDERS_VARIABLE}={folder}, or count them as unused with `saeens gc --forget-folder {folder}`"
        notify("note", f"{folder}: artefacts here are from its experiment files, which are not read now: {remedy}")
