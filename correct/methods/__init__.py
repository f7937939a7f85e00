"""The correction methods, one a file. Every file in this folder is imported, so a new one needs no list."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
