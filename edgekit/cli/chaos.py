"""``edgekit doctor --chaos``: words for `edgekit.chaos`."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import Answer, table

__all__ = ["chaos"]

#: Figures that the table shows, where a case has them.
_SHOWN = (
    "starts_until_back",
    "events",
    "events_lost",
    "duplicates",
    "kills",
    "cuts",
    "refused",
    "flips",
    "recovery_s",
    "noticed_s",
    "damaged",
    "jumps",
)
_MOST = 4


def chaos(
    bundle: Path | None,
    *,
    root: Path | None,
    work: Path | None,
    only: tuple[str, ...],
    quick: bool,
    minutes: float | None,
    out: Path | None,
    key: Path | None,
    require_all: bool,
) -> Answer:
    """Run the cases, write the report, say what was found. Exit code 1 where a case failed or nothing passed, and after
    a signal that cut the run off, whose report says so; 3 where ``require_all`` is asked for and one could not run."""
    from edgekit.chaos import run_cases, write_report
    from edgekit.chaos.report import check_key, report_place

    path = report_place(out)
    if key is not None:
        check_key(key)
    found = run_cases(bundle=bundle, root=root, work=work, only=only, quick=quick, minutes=minutes)
    found = {"edgekit": _version(), "machine": _machine(), **found}
    written = write_report(found, path, key)
    text = [_table(found["cases"]), "", _line(found), f"{written['report']} and {written['page']}, {_signed(written)}"]
    data = {**written, **found}
    code = 1 if found["failed"] or not found["passed"] or not found["complete"] else 0
    if code:
        hint = "the report says what was seen; docs/chaos.md what each case means"
        data |= {"error": _error(found), "hint": hint if found["complete"] else "the same command runs all of them again"}
    elif require_all and found["not_run"]:
        code = 3
        first = next(case for case in found["cases"] if case["outcome"] == "not run")
        data |= {"error": f"{found['not_run']} cases were not run: {first['name']}", "hint": str(first["reason"])}
    _say_error(data)
    return Answer(data, "\n".join(text), code)


def listed(only: Iterable[str]) -> Answer:
    from edgekit.chaos import list_cases

    rows = [{"case": case.name, "group": case.group, "done": case.done, "holds": case.holds} for case in list_cases(only)]
    text = "\n".join(f"{row['case']} ({row['group']})\n  {row['done']}\n  must hold: {row['holds']}" for row in rows)
    return Answer({"cases": rows}, text)


def _version() -> str:
    from edgekit.version import __version__

    return __version__


def _machine() -> dict[str, Any]:
    from edgekit.benchmarking.device import fingerprint

    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    return {"host": platform.node(), "os": system, **fingerprint()}


def _table(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        figures = [f"{name} {case['figures'][name]}" for name in _SHOWN if name in case["figures"]][:_MOST]
        told = ", ".join(figures) if case["outcome"] == "passed" else case["reason"]
        rows.append({key: case[key] for key in ("name", "outcome", "rounds", "seconds")} | {"": told})
    return table(rows)


def _line(found: dict[str, Any]) -> str:
    text = f"{found['passed']} passed, {found['failed']} failed, {found['not_run']} not run"
    return text if found["complete"] else f"interrupted; {text}"


def _signed(written: dict[str, Any]) -> str:
    return f"signed by key {written['key_id']}" if written["key_id"] else "not signed (--key K signs it)"


def _error(found: dict[str, Any]) -> str:
    if not found["complete"]:
        return _line(found)
    if not found["failed"]:
        return "not one case could run"
    first = next(case for case in found["cases"] if case["outcome"] == "failed")
    return f"{found['failed']} of {len(found['cases'])} cases failed, first {first['name']}: {first['reason']}"


def _say_error(data: dict[str, Any]) -> None:
    from edgekit.progress import say

    if "error" in data:
        say(f"error: {data['error']}", "error")
        say(f"hint: {data['hint']}", "error")
