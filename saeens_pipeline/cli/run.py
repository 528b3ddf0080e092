"""`saeens run`."""

from __future__ import annotations

from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import ExperimentName, LayerOption, err, out, print_line


@app.command()
def run(
    experiment: ExperimentName,
    layer: LayerOption = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this ensemble seed; may be given several times.")] = None,
    select: Annotated[list[str] | None, typer.Option(help="Only this asset, such as bagging/member_1, and its inputs.")] = None,
) -> None:
    """Materialise missing and stale artefacts, and print a summary. For a sweep, run all its experiments, one after another."""
    from saeens_pipeline.cli.summary import print_outcome
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.runs import run_experiment

    try:
        catalogue = load_catalogue()
        for each in catalogue.named(experiment):
            outcome = run_experiment(catalogue, each.name, layers=layer or [], seeds=seed or [], select=select or [], console=out)
            print_outcome(outcome, out)
        if experiment in catalogue.sweeps:
            print_line(f"\n`saeens pareto {experiment}` compares the values of the sweep; with --picture FILE it draws them")
    except KeyboardInterrupt:
        err.print("stopped: finished artefacts are kept, and the next run resumes from there")
        raise typer.Exit(130) from None
