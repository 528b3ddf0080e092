"""Dagster resources: the store of artefacts, the device, and the tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from saeens_pipeline.assets.compute import DEVICES, MOST_MEMORY_GB, MOST_THREADS, Compute, Device, Precision
from saeens_pipeline.assets.materialise import Materialised
from saeens_pipeline.errors import ConfigurationError
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
    """The device that trains and evaluates; fields as in `Compute`. The launchpad shows and validates them."""

    device: Device = Field("auto", description=f"{DEVICES}; auto: CUDA if there is a GPU, else the CPU")
    precision: Precision = Field("float32", description="products of float32 matrices in training; weights and sums stay in float32")
    memory_gb: float = Field(
        0.0, ge=0, le=MOST_MEMORY_GB, description=f"memory of SAEs that are trained together, 0 to {MOST_MEMORY_GB:,} GB; 0: all there is"
    )
    threads: int = Field(0, ge=0, le=MOST_THREADS, description=f"CPU threads, 0 to {MOST_THREADS:,}; 0: PyTorch's choice")

    @classmethod
    def from_environment(cls) -> ComputeResource:
        """Return the resource that the environment describes. Raises ConfigurationError as `Compute.from_environment`."""
        return cls(**vars(Compute.from_environment()))

    @classmethod
    def definition(cls) -> dg.ResourceDefinition:
        """Return the resource of the environment, with limits that a run's configuration is compared with before the run starts.

        The launchpad validates types and enumerations by itself. Numbers are compared when the run is requested, in `configured`: Dagster
        would compare them in the run only. Raises as `from_environment`.
        """
        resource = cls.from_environment().get_resource_definition()
        return resource.configured(_within_limits, config_schema=resource.config_schema)

    @property
    def compute(self) -> Compute:
        """Return the device and limits of this process."""
        return Compute(self.device, self.precision, self.memory_gb, self.threads)


def _within_limits(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of `ComputeResource` unchanged. Raises ConfigurationError for a number out of its limits."""
    try:
        ComputeResource(**config)
    except ValidationError as error:
        wrong = [f"{each['loc'][0]}: {each['input']!r}, {each['msg'].lower()}" for each in error.errors()]
        raise ConfigurationError(f"resources, compute: {'; '.join(wrong)}") from None
    return config


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
