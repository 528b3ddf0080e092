"""`saeens new`, `saeens layers add` and `saeens reference-model train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import notify, out, print_line
from saeens_pipeline.errors import ConfigurationError

layers = typer.Typer(no_args_is_help=True, help="The layers of a source.")
app.add_typer(layers, name="layers")
reference_model = typer.Typer(no_args_is_help=True, help="The embedded language model.")
app.add_typer(reference_model, name="reference-model")


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new source and experiment.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="builtin/reference or builtin/smollm2, a folder in transformers' format, a .gguf file, or a name on the hub."),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Layers of the model, from 0, such as 2,4,6; may be given several times.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Copy this experiment's file instead, such as gemma_2_2b, under the new name.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Texts: builtin/installed_packages, builtin/prose, a data set on the hub, or a file or pattern such as 'texts/*.jsonl'."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; default: NAME.yaml in the first folder of SAEENS_EXPERIMENTS. Nothing is overwritten."),
    ] = None,
) -> None:
    """Write an experiment file for a language model, with every field explained, or copy the file of another experiment."""
    from saeens_pipeline.cli.new_experiment import copy_experiment, new_experiment, parse_layers

    if like is not None:
        if model or layers or corpus:
            raise ConfigurationError("--like copies a file: change language_model, layers and corpus in the copy")
        written = copy_experiment(name, like, output)
    elif model is None or not layers:
        raise ConfigurationError("give --model and --layers, or --like with the name of an experiment to copy")
    else:
        written = new_experiment(name, model, parse_layers(layers), output, corpus)
    print_line(f"written to {written.path}")
    if written.is_read:
        print_line(f"edit it, then `saeens run {name}` or reload the code location in the UI")
    else:
        notify("note", f"experiments are not read from there: set SAEENS_EXPERIMENTS={written.path.parent}")


@layers.command("add")
def add_layers(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Name of a source, as its experiment file gives it.")],
    layer: Annotated[list[int], typer.Argument(min=0, metavar="LAYER", help="Layers of the language model, from 0.")],
) -> None:
    """Add layers to a source. All its experiments get them."""
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.orchestration.layers import add_layers

    added = add_layers(Experiments.load(), source, layer)
    for done, which in (("added", added.new), ("already had", added.known)):
        if which:
            print_line(f"{source}: {done} {'layers' if len(which) > 1 else 'layer'} {', '.join(map(str, which))}")
    for name in added.automated:
        print_line(f"{name}: missing artefacts are computed automatically while `saeens ui` is running")
    for name in added.on_request:
        print_line(f"{name}: `saeens run {name}` computes missing artefacts")
    if not added.automated and not added.on_request:
        print_line(f"no experiment uses {source} yet")


@reference_model.command("train")
def train_reference_model(
    output: Annotated[Path, typer.Option(help="Folder to write; the shipped model is changed only if it is named.")] = Path(
        "reference_model"
    ),
    tokens: Annotated[int | None, typer.Option(min=2048, help="Training tokens; by default those of the shipped model.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model: trains about a third faster, needs a C++ compiler.")
    ] = False,
) -> None:
    """Train the embedded language model again on text of the installed packages: about an hour and a half on two cores."""
    from saeens_pipeline.language_models import reference_model as reference
    from saeens_pipeline.orchestration.runs import reporter_for

    recipe = reference.ReferenceModelRecipe()
    recipe = replace(recipe, train_tokens=tokens) if tokens else recipe
    with reporter_for(out)("reference model", recipe.train_tokens, "tokens") as advance:
        done = 0

        def report(training: reference.TrainingStatus) -> None:
            nonlocal done
            advance(training.tokens - done)
            done = training.tokens
            if training.bits_per_byte:
                losses = f"loss {training.loss:.3f} nats per token, held out {training.bits_per_byte:.3f} bits per byte"
                out.print(f"step {training.step}: {losses}")

        reference.train_reference_model(output, recipe, compile_model=compile, report=report)
    out.print(f"written to {output.absolute()}")
