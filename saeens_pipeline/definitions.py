"""The code location: everything that Dagster shows."""

from __future__ import annotations

import logging

from saeens_pipeline.orchestration.catalogue import load_catalogue

catalogue = load_catalogue()
for message in catalogue.broken.values():
    logging.getLogger("dagster").error("left out: %s", message)

defs = catalogue.definitions()
