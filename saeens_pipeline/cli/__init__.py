"""The `saeens` command: one module for each group of commands. Heavy modules are imported when a command runs."""

from saeens_pipeline.cli import doctor, export, gc, lineage, new, push, run, tables, ui
from saeens_pipeline.cli.app import app, main

__all__ = ["app", "doctor", "export", "gc", "lineage", "main", "new", "push", "run", "tables", "ui"]
