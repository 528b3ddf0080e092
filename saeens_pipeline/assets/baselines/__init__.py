"""Baselines, one file each: single SAEs that ensembles are compared with. A new file here that registers one adds it everywhere."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
