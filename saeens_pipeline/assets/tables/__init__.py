"""Evaluation tables, one file each. A new file here that registers a table adds it everywhere."""

from importlib import import_module
from pkgutil import iter_modules

from saeens_pipeline.assets.registry import (
    METHODS,
    SUBJECT,
    TABLES,
    Headline,
    Making,
    Markdown,
    Row,
    SharedPass,
    Subject,
    Table,
    columns_of,
    complaint_about,
    evaluations_of,
    fills,
    find_table,
    listed,
    register,
    seed_metrics,
    table_frame,
    table_ops,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "SUBJECT",
    "TABLES",
    "Headline",
    "Making",
    "Markdown",
    "Row",
    "SharedPass",
    "Subject",
    "Table",
    "columns_of",
    "complaint_about",
    "evaluations_of",
    "fills",
    "find_table",
    "listed",
    "register",
    "seed_metrics",
    "table_frame",
    "table_ops",
]
