"""The code location: everything that Dagster shows. Templates are not among it before their first run."""

from __future__ import annotations

import logging

from saeens_pipeline.orchestration.catalogue import Catalogue

catalogue = Catalogue.load().shown()
for message in catalogue.broken.values():
    logging.getLogger("dagster").error("left out: %s", message)

defs = catalogue.definitions()
