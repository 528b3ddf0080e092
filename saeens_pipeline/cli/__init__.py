"""The `saeens` command: one module for each group of commands. Heavy modules are imported when a command runs."""

from saeens_pipeline.cli import doctor, gc, layers, lineage, new, plan, reference_model, run, status, tables, ui
from saeens_pipeline.cli.app import app, main

__all__ = ["app", "doctor", "gc", "layers", "lineage", "main", "new", "plan", "reference_model", "run", "status", "tables", "ui"]
