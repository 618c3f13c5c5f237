"""Whatever stands in a config: the scan that it says, or each mistake in one line with its place and its cure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import InputError, UsageError
from edgekit.scanner import ScanConfig
from edgekit.scanner.config import config_of, parse_config

Cli = Callable[..., Any]
TABLES = list(ScanConfig.__struct_fields__)
SOUND: dict[str, Any] = {"codes": {}, "source": [{"address": "pattern:8x8@1,1"}]}


def keys_of(table: str) -> tuple[str, ...]:
    from edgekit.scanner.tables import _tables_in

    hint = {field.name: field.type for field in msgspec.structs.fields(ScanConfig)}[table]
    kind, _ = _tables_in(hint)
    assert kind is not None
    return kind.__struct_fields__


KEYS = sorted({key for table in TABLES for key in keys_of(table)})
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([*KEYS, *TABLES])
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
TABLE = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=5)
CONFIG = st.dictionaries(
    st.sampled_from(TABLES) | st.text(max_size=5), VALUES | TABLE | st.lists(TABLE, max_size=2), max_size=5
)


def toml(value: Any) -> str:
    """A value in TOML's words; None is not among them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ("nan" if value != value else "inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value if v is not None) + "]"
    if isinstance(value, int):
        return str(value)
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value) + '"'


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIG, st.booleans())
def test_any_table_is_a_config_or_its_mistakes_in_a_line_each(tmp_path: Path, tables: dict[str, Any], sound: bool) -> None:
    tables = {**tables, **SOUND} if sound else tables
    try:
        assert isinstance(config_of(tables), ScanConfig)
    except (UsageError, InputError) as error:
        assert "\n" not in error.message + error.hint  # noqa: PT017
    file = tmp_path / "scan.toml"
    file.write_text("".join(f"{toml(k)} = {toml(v)}\n" for k, v in tables.items() if v is not None), encoding="utf-8")
    config, problems = parse_config(file)
    assert (config is None) == bool(problems)
    for problem in problems:
        assert "\n" not in str(problem)
