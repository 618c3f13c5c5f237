"""The compiler room: foreign ONNX in, TensorRT engines and build kits out, and a prediction of what a device will need.

Nothing heavy is loaded here: onnx and TensorRT run in a child process (`compiler.child`), which contains the crashes
of native parsers and keeps a cached build at a few milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgekit.errors import MissingExtra

if TYPE_CHECKING:
    from .builder import build
    from .importer import import_onnx
    from .roofline import estimate
    from .shapes import parse_batch
    from .summary import summarise

_HOMES = {
    "build": "builder",
    "estimate": "roofline",
    "import_onnx": "importer",
    "parse_batch": "shapes",
    "summarise": "summary",
}

__all__ = [
    "build",
    "estimate",
    "import_onnx",
    "parse_batch",
    "summarise",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekit.compiler' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise MissingExtra.of(error) from None
