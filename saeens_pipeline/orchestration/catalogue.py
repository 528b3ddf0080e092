"""All experiments as Dagster definitions."""

from __future__ import annotations

import dagster as dg

from saeens_pipeline.orchestration.assets import build_assets
from saeens_pipeline.orchestration.automation import automate
from saeens_pipeline.orchestration.broken_files import broken_assets
from saeens_pipeline.orchestration.byte_checks import build_byte_checks
from saeens_pipeline.orchestration.executors import executor_from_environment
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource


class Catalogue(Ops):
    """Every source and experiment, their ops, and their Dagster definitions."""

    def definitions(self, *, byte_checks: bool = True) -> dg.Definitions:
        """Return everything for Dagster: assets, automation, schedules, and resources.

        `byte_checks=False` leaves out the checks `bytes`, which Dagster would otherwise run with every materialisation.
        """
        ops = self.all_ops()
        given = dg.Definitions(
            assets=broken_assets(self.broken),
            asset_checks=build_byte_checks(ops) if byte_checks else [],
            resources={"store": StoreResource(), "compute": ComputeResource.from_environment()},
            executor=executor_from_environment(),
        )
        return dg.Definitions.merge(automate(build_assets(ops), self), given)


def load_catalogue() -> Catalogue:
    """Read every experiment file. Raises as `Experiments.load`."""
    return Catalogue.load()
