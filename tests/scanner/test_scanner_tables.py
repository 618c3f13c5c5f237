"""Whatever stands in a config: the scan that it says, or each mistake in one line with its place and its cure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.errors import InputError, UsageError
from edgekit.scanner import ScanConfig, Scanner
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


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIG, st.booleans())
def test_any_table_is_a_config_or_its_mistakes_in_a_line_each(tmp_path: Path, tables: dict[str, Any], sound: bool) -> None:
    tables = {**tables, **SOUND} if sound else tables
    try:
        assert isinstance(config_of(tables), ScanConfig)
    except (UsageError, InputError) as error:
        assert "\n" not in error.message + error.hint  # noqa: PT017
    file = tmp_path / "scan.toml"
    file.write_text("".join(f"{toml(k)} = {toml(v)}\n" for k, v in tables.items() if v is not None), encoding="utf-8")
    config, problems, *_ = parse_config(file)
    assert problems or config is not None
    for problem in problems:
        assert "\n" not in str(problem)


#: What is wrong in a table -> the line of it in the file, a word of the cause, a word of the cure.
WRONG = [
    ("[drift]\nwindow_frame = 3", 2, "unknown key `drift.window_frame`", "did you mean `window_frames`?"),
    ("[drift]\nlevel_psi = 0.1", 1, "back_psi: above 0 and up to level_psi (0.1), not 0.15", ""),
    ("[shadow]\nagreement = 98", 1, "agreement: 0 to 1, not 98", ""),
    ("[shadow]\nagreemnt = 1", 2, "unknown key", "agreement"),
    ("[selftest]\nevery_s = -1", 1, "every_s: 0 (once) or seconds", ""),
    ("[selftest]\nhot_celsius = nan", 1, "hot_celsius: 0 (never) to 1000", ""),
    ('[harvest]\nfolder = "x"\nmost_megabytes = nan', 1, "most_megabytes: above 0", ""),
    ('[harvest]\nfolder = "x"\non = ["no-read"]', 3, "there is no event 'no-read'", "did you mean `no_read`?"),
    ("[harvest]", 1, "`harvest.folder` is missing", ""),
    ('[ring]\nfolder = "x"\nkeep = "god"', 3, "`ring.keep` is 'god'", "did you mean `good`?"),
    ('[incidents]\nfolder = "x"\nseconds = inf', 1, "seconds: above 0 and up to 3600, not inf", ""),
    ('[incidents]\nfolder = "x"\non = ["incident"]', 3, "there is no event 'incident'", ""),
    ("[text]\nbeam = 0", 2, "`text.beam` is 0", "expected int >= 1"),
    ('[trigger]\nmode = "brust"', 2, "`trigger.mode` is 'brust'", "did you mean `burst`?"),
    ('[trigger]\ninputs = "tcp://:7"', 2, "`trigger.inputs` is 'tcp://:7'", "expected array, got str"),
    ('[trigger]\nmode = "single"\ninputs = "mqtt://me:geheim@host/t"', 3, "`trigger.inputs` is 'mqtt://host/t'", ""),
    ('[votes]\nformats = ["EAN-12"]', 2, "there is no symbology 'EAN-12'", "did you mean"),
    ("[votes]\nhits = 1", 1, "hits: 2 to 100", ""),
    ('[duplicates.per_format]\n"EAN-99" = 3', 1, "there is no symbology 'EAN-99'", "did you mean"),
    ("[duplicates]\nwindow_ms = -2", 1, "window_ms: -1 (once), 0 (off) or milliseconds", ""),
    ('[crosscheck]\nais = ["1"]', 1, "ais: two to four digits each", ""),
    ("[region]\nleft = 0.5\nright = 0.5", 1, "the region is empty", "left is below right"),
    ("[region]\nleft = 50", 2, "`region.left` is 50", "<= 1"),
    ('[outbox]\npolicy = "drop old"', 2, "`outbox.policy` is 'drop old'", "did you mean `drop oldest`?"),
    ("[outbox]\nmost_events = 1", 1, "the outbox's limits are too small", "most_events from 100"),
    ('[server]\naddress = "9110"', 1, "the address '9110'", "HOST:PORT"),
    ('[log]\nlevel = "warn"', 2, "`log.level` is 'warn'", "did you mean `warning`?"),
    ("[incident]", 1, "unknown key `incident`", "did you mean `incidents`?"),
    ("ring = 3", 1, "`ring` is 3", "a table was expected: [ring]"),
    ("[[ring]]", 1, "`ring` is [{}]", "a table was expected: [ring]"),
    ('source = [{address = "pattern:8x8@1"}, {adress = "x"}]', 1, "unknown key `source[1].adress`", "address"),
]


@pytest.mark.parametrize(("table", "line", "cause", "cure"), WRONG, ids=[each[0].split("\n")[0] for each in WRONG])
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, table: str, line: int, cause: str, cure: str) -> None:
    file = tmp_path / "scan.toml"
    rest = '[model]\nbundle = "b"\n[codes]\n' + ("" if "source" in table else '[[source]]\naddress = "in"\n')
    file.write_text(f"{table}\n{rest}")
    problems = parse_config(file).problems
    found = [problem for problem in problems if cause in problem.message]
    assert [problem.where for problem in found] == [f"{file}:{line}"], problems
    assert cure in found[0].hint
    assert "geheim" not in str(problems)


def test_what_does_nothing_is_a_warning(tmp_path: Path, cli: Cli, digits_bundle: Bundle) -> None:
    file = tmp_path / "scan.toml"
    file.write_text(
        f'[model]\nbundle = "{digits_bundle.path}"\n[[source]]\naddress = "pattern:8x8@1"\n[votes]\n[crosscheck]\n[shadow]\n'
        '[trigger]\nmode = "single"\n[selftest]\nzones = "/proc/none"\n'
    )
    done = cli("scan", "--check", file, "--json")
    assert (done.code, done.json["problems"]) == (0, [])
    found = {warning["where"].rpartition(":")[2]: warning["error"] for warning in done.json["warnings"]}
    assert {line: words.split()[0] for line, words in found.items()} == {
        "5": "[votes]",
        "6": "[crosscheck]",
        "7": "[shadow]",
        "8": "mode",
        "11": "no",
    }


def test_every_step_bears_an_event_of_another(digits_bundle: Bundle, tmp_path: Path) -> None:
    """A drift event comes amid the frames: it has no number, and goes through all that stands behind it."""
    random = np.random.default_rng(0)
    config = {
        "model": {"bundle": str(digits_bundle.path)},
        "codes": {"budget_ms": 0},
        "drift": {"every_frames": 1, "window_frames": 40, "learn_frames": 40},
        "selftest": {},
        "harvest": {"folder": str(tmp_path / "harvest"), "near_bits": 0},
        "votes": {},
        "trigger": {},
        "crosscheck": {},
        "duplicates": {},
        "ring": {"folder": str(tmp_path / "ring"), "keep": "both"},
        "incidents": {"folder": str(tmp_path / "incidents")},
        "sink": [{"address": f"jsonl:{tmp_path}/events.jsonl"}],
    }
    frames = [random.integers(0, 256 if i < 100 else 64, (32, 32), np.uint8) for i in range(200)]
    events = list(Scanner(config, frames=frames))
    assert [event["state"] for event in events if event.get("event") == "drift" and event["part"] == "brightness"] == [
        "drifted"
    ]
    assert sum("label" in event for event in events) == 200
    assert list((tmp_path / "harvest").glob("*.png"))
