"""Assemblies: a checkpoint and a processor made into something one can call. Importing registers all of them."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
