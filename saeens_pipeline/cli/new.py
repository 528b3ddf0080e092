"""`saeens new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import complain, print_line


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the new source and experiment.")],
    model: Annotated[str, typer.Option(help="builtin/reference, a folder in transformers' format, or a model's name on the hub.")],
    layers: Annotated[list[str], typer.Option(help="Layers of the model, from 0, such as 2,4,6; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default in a folder of experiment files. Nothing is overwritten.")
    ] = None,
) -> None:
    """Write an experiment file for a language model, with every field explained."""
    from saeens_pipeline.cli.new_experiment import new_experiment, parse_layers

    written = new_experiment(name, model, parse_layers(layers), output)
    print_line(f"written to {written.path}")
    if written.is_read:
        print_line(f"edit it, then `saeens run {name}` or reload the code location in the UI")
    else:
        complain("note", f"experiments are not read from there: set SAEENS_EXPERIMENTS={written.path.parent}")
