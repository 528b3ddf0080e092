"""The pages as assets: the report of an experiment, by layer, and the leaderboard's page over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from saeens_pipeline.assets.declarations import Declaration, Input, Op, Task, Workplace
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import LEADERBOARD, Address, Partition
from saeens_pipeline.storage.recipes import DamagedArtefactError, Recipe, Store

REPORT_VERSION = 3
REPORT = "report"


def report_op(experiment: ExperimentSettings, tables: Sequence[Declaration]) -> Op:
    """Declare the report over all tables of an experiment.

    What else it shows, such as dates and folders, is behind these tables. The control on an untrained language model is not an input:
    its layers are those of another source, and a report does not wait for it. `saeens report` writes it anew.
    """
    report = Declaration(
        address=Address(experiment.name, REPORT, REPORT),
        dimensions="layer",
        builder=REPORT,
        version=REPORT_VERSION,
        settings={},
        inputs=tuple(Input(each.address.name, each) for each in tables),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"html", "plotly"}),
        tags={"experiment": experiment.name, "source": experiment.source},
        description=f"What {experiment.name} found: pages that open from disk\n\n`saeens report {experiment.name}` writes them anew.",
    )

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.orchestration.catalogue import load_catalogue
        from saeens_pipeline.report.pages import write_report

        (task,) = tasks
        assert task.partition.layer is not None
        provenance = workplace.provenance()
        with workplace.store.write_folder(*task.where, task.recipe, provenance) as folder, workplace.compute.measure() as measured:
            write_report(folder, workplace.store, load_catalogue(), experiment, task.partition.layer)
        provenance.update(vars(measured))

    return Op(report.address.op_name, (report,), make)


def leaderboard_page_op(leaderboard: Declaration) -> Op:
    """Declare the page over all experiments, from the tables that the leaderboard is made from."""
    page = Declaration(
        address=Address(LEADERBOARD, REPORT, REPORT),
        dimensions="none",
        builder="leaderboard page",
        version=REPORT_VERSION,
        settings=leaderboard.settings,
        inputs=leaderboard.inputs,
        source="",
        kinds=frozenset({"html", "plotly"}),
        tags={},
        description="All experiments side by side: a page that opens from disk\n\n`saeens report` writes it anew.",
    )

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.assets.tables.leaderboard import standings
        from saeens_pipeline.report.pages import write_leaderboard

        (task,) = tasks
        with workplace.store.write_folder(*task.where, task.recipe, workplace.provenance()) as folder:
            write_leaderboard(folder, standings(workplace.store, leaderboard), _reports(workplace.store))

    return Op(page.address.op_name, (page,), make)


def recipe_of_what_is_there(declaration: Declaration, store: Store, partition: Partition) -> Recipe:
    """The recipe with those inputs that are on disk. What is made by it is stale as soon as there are more."""
    inputs: dict[str, str] = {}
    for name, artefact, where in declaration.input_partitions(partition):
        try:
            found = store.find(artefact.address, where)
        except DamagedArtefactError:
            found = None
        inputs |= {name: found.data_version} if found else {}
    inputs |= {f"{each.name}, {where}": artefact.data_version for each, where, artefact in declaration.optional_inputs(store)}
    return Recipe(declaration.builder, declaration.version, declaration.settings, inputs)


def _reports(store: Store) -> dict[tuple[str, int], str]:
    """Links from the leaderboard's folder to the reports that there are."""
    found = sorted((store.root / "reports").glob("*/layer=*/index.html"))
    layers = {path: path.parent.name.removeprefix("layer=") for path in found}
    return {
        (path.parent.parent.name, int(layer)): f"../{path.parent.parent.name}/{path.parent.name}/index.html"
        for path, layer in layers.items()
        if layer.isdecimal()
    }
