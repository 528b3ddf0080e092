"""The ops of all experiments, those of the report included. Dagster builds its assets from them in `assets` and `catalogue`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.assets.experiments import experiment_ops
from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.assets.tables.leaderboard import leaderboard_op
from saeens_pipeline.report.asset import leaderboard_page_op, pareto_op, report_op
from saeens_pipeline.settings import ExperimentSettings, SourceSettings

Settings = TypeVar("Settings", SourceSettings, ExperimentSettings)


class Ops(Experiments):
    """Every source and experiment, and the ops that compute their artefacts."""

    def ops(self, experiment: ExperimentSettings) -> list[Op]:
        """Return the ops of an experiment and of its source, in the order in which artefacts are computed."""
        return [*self.source_ops(experiment.source), *self.own_ops(experiment)]

    def source_ops(self, name: str) -> list[Op]:
        """Return the ops of the source of this name. Raises as `source`."""
        return self._once(self.source(name), source_ops)

    def own_ops(self, experiment: ExperimentSettings) -> list[Op]:
        """Return the ops of an experiment with its report, which shows the figures of its control."""
        return self._once(experiment, self._own_ops)

    def _own_ops(self, experiment: ExperimentSettings) -> list[Op]:
        ops, control = experiment_ops(experiment), self.experiments.get(self._controls.get(experiment.name, ""))
        return [*ops, report_op(experiment, _tables(ops), _tables(experiment_ops(control)) if control else [])]

    def _once(self, settings: Settings, declare: Callable[[Settings], list[Op]]) -> list[Op]:
        """Declare the ops of a source or an experiment, unless they were: sensors ask for them in every tick."""
        known = self._declared.get((type(settings), settings.name))
        if known is None or known[0] is not settings:
            known = self._declared[type(settings), settings.name] = settings, declare(settings)
        return known[1]

    @cached_property
    def _declared(self) -> dict[tuple[type, str], tuple[SourceSettings | ExperimentSettings, list[Op]]]:
        return {}

    @cached_property
    def _controls(self) -> dict[str, str]:
        return self.controls

    def all_ops(self) -> list[Op]:
        """Return the ops of all sources, experiments and sweeps and, if there are experiments, of the leaderboard and its page."""
        of_sources = [op for name in self.sources for op in self.source_ops(name)]
        of_experiments = [op for each in self.experiments.values() for op in self.own_ops(each)]
        of_sweeps = [self.pareto(name) for name in self.sweeps]
        return [*of_sources, *of_experiments, *of_sweeps, *([self.leaderboard(), self.leaderboard_page()] if of_experiments else [])]

    def leaderboard(self) -> Op:
        """Return the op of the leaderboard over all experiments."""
        return leaderboard_op([output for e in self.experiments.values() for output in _tables(self.own_ops(e))], self._controls)

    def leaderboard_page(self) -> Op:
        """Return the op of the page over all experiments."""
        return leaderboard_page_op(self.leaderboard().outputs[0])

    def pareto(self, name: str) -> Op:
        """Return the op that compares the experiments of a sweep. Raises as `sweep`."""
        settings = self.sweep(name)
        return pareto_op(settings, [output for e in settings.experiments for output in _tables(self.own_ops(e))])


def _tables(ops: Sequence[Op]) -> list[Declaration]:
    return [output for op in ops for output in op.outputs if output.address.kind == "eval"]
