"""The code location: everything that Dagster shows."""

from __future__ import annotations

import logging

import dagster as dg

from saeens_pipeline.assets.dagster_assets import build_assets
from saeens_pipeline.catalogue import load_catalogue
from saeens_pipeline.resources import ComputeResource, StoreResource

catalogue = load_catalogue()
for message in catalogue.broken.values():
    logging.getLogger("dagster").error("left out: %s", message)

defs = dg.Definitions(
    assets=build_assets(catalogue.all_ops()),
    resources={"store": StoreResource(), "compute": ComputeResource()},
    executor=dg.in_process_executor,  # a step of its own process would spend seconds on importing torch
)
