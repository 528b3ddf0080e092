"""`saeens reference-model`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import out

reference_model = typer.Typer(no_args_is_help=True, help="The embedded language model.")
app.add_typer(reference_model, name="reference-model")


@reference_model.command("train")
def train_reference_model(
    output: Annotated[Path, typer.Option(help="Folder to write; the shipped model is changed only if it is named.")] = Path(
        "reference_model"
    ),
    tokens: Annotated[int | None, typer.Option(min=2048, help="Training tokens; by default those of the shipped model.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="A third faster; needs a C++ compiler.")] = False,
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
                out.print(
                    f"step {training.step}: loss {training.loss:.3f} nats per token, held out {training.bits_per_byte:.3f} bits per byte"
                )

        reference.train_reference_model(output, recipe, compile_model=compile, report=report)
    out.print(f"written to {output.absolute()}")
