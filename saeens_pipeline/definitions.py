"""The code location: everything that Dagster shows. Before their first run templates are not in it, nor what lacks a package."""

from __future__ import annotations

import gc
import logging

from saeens_pipeline.orchestration.catalogue import Catalogue

gc.disable()  # what is created here stays: with thousands of assets, collections would look at all of it over and over
catalogue = Catalogue.load().shown()
for message in catalogue.broken.values():
    logging.getLogger("dagster").error("left out: %s", message)

defs = catalogue.definitions()
gc.freeze()
gc.enable()
