"""Ops of the pages: the report of an experiment, by layer; the page over all experiments; the comparison of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from saeens_pipeline.assets.declarations import Declaration, Input, Op, RunContext, Task, with_file
from saeens_pipeline.assets.tables.pareto import PICTURE_FILE, TABLE_FILE, not_evaluated, pareto_declaration, pareto_rows
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import LEADERBOARD, Address
from saeens_pipeline.storage.recipes import Store

REPORT_VERSION = 8
REPORT = "report"


def report_op(experiment: ExperimentSettings, tables: Sequence[Declaration], control_tables: Sequence[Declaration]) -> Op:
    """Declare the report of an experiment's tables and those of its control on an untrained language model.

    The report is computed from the tables on disk and waits for none; later tables make it stale.
    """
    report = Declaration(
        address=Address(experiment.name, REPORT, REPORT),
        dimensions="layer",
        builder=REPORT,
        version=REPORT_VERSION,
        settings={},
        inputs=(
            *(Input(each.address.name, each, optional=True) for each in tables),
            *(Input(f"control {each.address}", each, optional=True, in_graph=False) for each in control_tables),
        ),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"html", "plotly"}),
        tags={"experiment": experiment.name, "source": experiment.source},
        description=f"Results of {experiment.name}: pages that open from disk\n\n`saeens report {experiment.name}` writes them.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.catalogue import Experiments
        from saeens_pipeline.report.pages import write_report

        (task,) = tasks
        assert task.partition.layer is not None
        if all(name.startswith("control ") for name in task.recipe.inputs):
            raise SaeensError(
                f"{experiment.name} has no table of {task.partition} below {context.store.root} yet, and a report needs tables: "
                f"run `saeens run {experiment.name}`"
            )
        provenance = context.provenance(task.declaration)
        with context.store.write_folder(*task.where, task.recipe, provenance) as folder, context.compute.measure() as measured:
            write_report(folder, context.store, Experiments.load(experiment.changes), experiment, task.partition.layer)
        provenance.update(vars(measured))

    return with_file([Op(report.address.op_name, (report,), make)], experiment)[0]


def leaderboard_page_op(leaderboard: Declaration) -> Op:
    """Declare the page over all experiments, with the inputs of the leaderboard."""
    page = replace(
        leaderboard,
        address=Address(LEADERBOARD, REPORT, REPORT),
        builder="leaderboard page",
        version=REPORT_VERSION,
        kinds=frozenset({"html", "plotly"}),
        tags={},
        description="All experiments side by side: a page that opens from disk\n\n`saeens report` writes it.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.tables.leaderboard import standings
        from saeens_pipeline.report.pages import write_leaderboard

        (task,) = tasks
        with context.store.write_folder(*task.where, task.recipe, context.provenance(task.declaration)) as folder:
            write_leaderboard(folder, standings(context.store, leaderboard), _reports(context.store))

    return Op(page.address.op_name, (page,), make)


def pareto_op(settings: ExperimentSettings, outputs: Iterable[Declaration]) -> Op:
    """Declare the comparison of a sweep's experiments: a table and a picture."""
    pareto = pareto_declaration(settings, outputs)

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.report.pictures import sweep_picture

        (task,) = tasks
        provenance = context.provenance(task.declaration)
        with context.store.write_folder(*task.where, task.recipe, provenance) as folder:
            with context.compute.measure() as measurement:
                table = pareto_rows(context.store, pareto)
                table.write_parquet(folder / TABLE_FILE)
                (folder / PICTURE_FILE).write_bytes(sweep_picture(table, pareto))
            provenance |= vars(measurement) | {"not_evaluated": not_evaluated(table, pareto)}

    return with_file([Op(pareto.address.op_name, (pareto,), make)], settings)[0]


def _reports(store: Store) -> dict[tuple[str, int], str]:
    """Return links from the leaderboard's folder to the reports on disk."""
    return {
        (path.parts[-3], int(layer)): "/".join(["..", *path.parts[-3:]])
        for path in sorted((store.root / "reports").glob("*/layer=*/index.html"))
        if (layer := path.parts[-2].removeprefix("layer=")).isdecimal()
    }
