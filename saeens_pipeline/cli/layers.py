"""`saeens layers`."""

from __future__ import annotations

from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import print_line

layers = typer.Typer(no_args_is_help=True, help="The layers of a source.")
app.add_typer(layers, name="layers")


@layers.callback()
def _layers() -> None:
    """Declare a group, so that `add` stays a subcommand although it is the only one."""


@layers.command("add")
def add_layers(
    source: Annotated[str, typer.Argument(help="Name of a source, as its experiment file gives it.")],
    layer: Annotated[list[int], typer.Argument(min=0, metavar="L...", help="Layers of the language model, from 0.")],
) -> None:
    """Add layers to a source. All its experiments get them."""
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.orchestration.layers import add_layers

    added = add_layers(Experiments.load(), source, layer)
    for done, which in (("added", added.new), ("already had", added.known)):
        if which:
            print_line(f"{source}: {done} {'layers' if len(which) > 1 else 'layer'} {', '.join(map(str, which))}")
    for name in added.automated:
        print_line(f"{name}: missing artefacts are made automatically while `saeens ui` is running")
    for name in added.on_request:
        print_line(f"{name}: `saeens run {name}` makes missing artefacts")
    if not added.automated and not added.on_request:
        print_line(f"no experiment uses {source} yet")
