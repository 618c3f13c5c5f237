"""`example_config`: a TOML file with every table, key and default of a scan, made of the types that read it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec

from .config import ScanConfig

__all__ = ["example_config"]

_WIDTH = 110
#: What stands for a value that there is no default of.
_NEEDED = {
    "bundle": "model.edge",
    "address": {"source": "camera:0", "sink": "jsonl:events.jsonl"},
    "folder": {"ring": "no-reads", "incidents": "incidents", "harvest": "kept"},
    "candidate": "next.edge",
}
#: What fits a key whose default is none.
_SAMPLES = {"budget_ms": 100.0, "left": 0.0, "top": 0.5, "right": 1.0, "bottom": 1.0}
_ON = ("model", "source", "sink")
_HEAD = """\
# Every setting of a scan. Tables behind a # are off, keys behind one stand at their defaults: take the # away to change them.
# What is wrong in a file is told by edgekit scan --check FILE.
"""


def example_config() -> str:
    """A config that reads ``camera:0`` with ``model.edge``; whatever else it may say is in comments."""
    parts = [_HEAD]
    hints = get_type_hints(ScanConfig)
    for name in ScanConfig.__struct_fields__:
        kinds = [each for each in (hints[name], *get_args(hints[name])) if isinstance(each, type)]
        kind = next(each for each in kinds if issubclass(each, msgspec.Struct))
        parts.append("\n".join(_table(name, kind, many=name in ("source", "sink"))) + "\n")
    return "\n".join(parts)


def _table(name: str, kind: type[msgspec.Struct], many: bool) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", " ".join([_words(base) for base in _documented(kind)])):
        yield from textwrap.wrap(paragraph, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    off, hints = "" if name in _ON else "#", get_type_hints(kind)
    yield f"{off}[[{name}]]" if many else f"{off}[{name}]"
    for field in msgspec.structs.fields(kind):
        needed = field.required
        if needed:
            value = _needed(name, field.name)
        else:
            value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        if value is None:
            sample = "true" if bool in get_args(hints[field.name]) else _SAMPLES[field.name]
            yield f"#{field.name} = {sample}  # by default not set"
        else:
            yield f"{off if needed else '#'}{field.name} = {json.dumps(value, ensure_ascii=False)}"


def _documented(kind: type[msgspec.Struct]) -> list[type]:
    """The type and those that it takes keys from, the general one last."""
    return [each for each in kind.__mro__ if each is not msgspec.Struct and issubclass(each, msgspec.Struct)]


def _words(kind: type) -> str:
    text = " ".join((kind.__doc__ or "").split())
    return re.sub(r"\s*Raises `UsageError`[^.]*\.", "", text).replace("``", "`")


def _needed(table: str, key: str) -> Any:
    value = _NEEDED[key]
    return value[table] if isinstance(value, dict) else value
