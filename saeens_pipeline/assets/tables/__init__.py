"""Evaluation tables, one file each. A new file here that registers a table adds it everywhere."""

from importlib import import_module
from pkgutil import iter_modules

from saeens_pipeline.assets.registry import *  # noqa: F403  # the registry with all tables in it

for _module in iter_modules(__path__):  # noqa: F405
    import_module(f"{__name__}.{_module.name}")
