"""Names of a package that are loaded on first use (PEP 562): importing it costs nothing that is not needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["on_first_use"]


def on_first_use(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``; ``homes``: name -> its module, from the package (``.module``)."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(homes[name], package), name)
        vars(sys.modules[package])[name] = found
        return found

    return load, lambda: sorted({*vars(sys.modules[package]), *homes})
