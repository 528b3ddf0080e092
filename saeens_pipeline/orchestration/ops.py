"""The ops of all experiments, those of the report included. Dagster builds its assets from them in `assets` and `catalogue`."""

from __future__ import annotations

from collections.abc import Sequence

from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.assets.experiments import experiment_ops
from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.assets.tables.leaderboard import leaderboard_op
from saeens_pipeline.report.asset import leaderboard_page_op, pareto_op, report_op
from saeens_pipeline.settings import ExperimentSettings


class Ops(Experiments):
    """Every source and experiment, and the ops that compute their artefacts."""

    def ops(self, experiment: ExperimentSettings) -> list[Op]:
        """Return the ops of an experiment and of its source, in the order in which artefacts are computed."""
        return [*source_ops(self.sources[experiment.source]), *self.own_ops(experiment)]

    def own_ops(self, experiment: ExperimentSettings) -> list[Op]:
        """Return the ops of an experiment with its report, which shows the figures of its control."""
        ops, control = experiment_ops(experiment), self.experiments.get(self.controls.get(experiment.name, ""))
        return [*ops, report_op(experiment, _tables(ops), tables_of(control) if control else [])]

    def all_ops(self) -> list[Op]:
        """Return the ops of all sources, experiments and sweeps and, if there are experiments, of the leaderboard and its page."""
        of_sources = [op for source in self.sources.values() for op in source_ops(source)]
        of_experiments = [op for each in self.experiments.values() for op in self.own_ops(each)]
        of_sweeps = [self.pareto(name) for name in self.sweeps]
        return [*of_sources, *of_experiments, *of_sweeps, *([self.leaderboard(), self.leaderboard_page()] if of_experiments else [])]

    def leaderboard(self) -> Op:
        """Return the op of the leaderboard over all experiments."""
        return leaderboard_op([output for e in self.experiments.values() for output in tables_of(e)], self.controls)

    def leaderboard_page(self) -> Op:
        """Return the op of the page over all experiments."""
        return leaderboard_page_op(self.leaderboard().outputs[0])

    def pareto(self, name: str) -> Op:
        """Return the op that compares the experiments of a sweep. Raises as `sweep`."""
        settings = self.sweep(name)
        return pareto_op(settings, [output for e in settings.experiments for output in tables_of(e)])


def tables_of(experiment: ExperimentSettings) -> list[Declaration]:
    """Return the tables of an experiment."""
    return _tables(experiment_ops(experiment))


def _tables(ops: Sequence[Op]) -> list[Declaration]:
    return [output for op in ops for output in op.outputs if output.address.kind == "eval"]
