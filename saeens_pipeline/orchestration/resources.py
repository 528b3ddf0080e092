"""Dagster resources: the store of artefacts, the device, and the tracker."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.materialise import Materialised
from saeens_pipeline.orchestration.trackers import chosen_tracker, mirror
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root


class StoreResource(dg.ConfigurableResource):
    """The store below `root`; if empty, below SAEENS_DATA or `data`."""

    root: str = ""

    @property
    def store(self) -> Store:
        """Return the store."""
        return Store(Path(self.root) if self.root else data_root())


class ComputeResource(dg.ConfigurableResource):
    """The device that trains and evaluates; fields as in `Compute`."""

    device: str = "auto"
    precision: str = "float32"
    memory_gb: float = 0.0
    threads: int = 0

    @classmethod
    def from_environment(cls) -> ComputeResource:
        """Return the resource that the environment describes. Raises ConfigurationError as `Compute.from_environment`."""
        return cls(**vars(Compute.from_environment()))

    @property
    def compute(self) -> Compute:
        """Return the device and limits of this process."""
        return Compute(self.device, self.precision, self.memory_gb, self.threads)


class TrackerResource(dg.ConfigurableResource):
    """The tracker, by its name in `TRACKERS`, that mirrors training curves and tables; empty: none."""

    name: str = ""

    @classmethod
    def from_environment(cls) -> TrackerResource:
        """Return the resource that the environment describes. Raises ConfigurationError as `chosen_tracker`."""
        return cls(name=chosen_tracker())

    def mirror(self, made: Materialised) -> None:
        """Mirror an artefact that is reported to Dagster. Errors are logged: see `trackers.mirror`."""
        if self.name:
            mirror(self.name, made)
