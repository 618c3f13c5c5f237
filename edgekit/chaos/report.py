"""The report of a run: JSON with its signature as the last line, and the same as a page to read.

What counts is the signed file: the page beside it names its sha256. ``head -n -5 REPORT`` is the JSON alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from html import escape
from pathlib import Path
from typing import Any

from edgekit.errors import DataError, OutputExists, SignatureError
from edgekit.files import atomic_write, check_new

__all__ = ["check_key", "check_report", "is_report", "report_place", "write_report"]

FORMAT = "edgekit-chaos-report"
_HEAD = ('{\n "format": "' + FORMAT + '"').encode()
_MAX_BYTES = 16 << 20
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1a1a1a}
body{background:#fff}table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #ccc;padding:.4rem .6rem;text-align:left;vertical-align:top}
.passed{color:#0a6b2d}.failed{color:#b00020;font-weight:bold}.not{color:#6b5900}code{font-size:.9em;overflow-wrap:anywhere}
td:first-child code{white-space:nowrap}
@media(prefers-color-scheme:dark){body{color:#eee;background:#161616}td,th{border-color:#444}.passed{color:#6fd08c}
.failed{color:#ff8a8a}.not{color:#e0c060}}"""


def report_place(out: str | os.PathLike[str] | None) -> Path:
    """Where the report goes: a file, or in a folder (the current one, where nothing is said) a new name by the time.

    Raises `OutputExists`: a report is evidence, and never overwritten; `UsageError` where no file can be made.
    """
    path = Path(out) if out is not None else Path()
    if path.is_dir() or path.suffix != ".json":
        path = path / time.strftime("chaos-%Y%m%dT%H%M%SZ.json", time.gmtime())
    for each in (path, path.with_suffix(".html")):
        if each.exists() or each.is_symlink():
            raise OutputExists(each)
    check_new(path)
    return path


def write_report(found: dict[str, Any], path: Path, key: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Write what `run_cases` found, and the machine in it, to ``path`` and a page beside it; signed with ``key``, if given.

    Where another run has taken the name meanwhile, a number is added to it: neither report is lost.

    Returns ``report``, ``page`` and ``key_id`` (None where it is not signed). Raises `SignatureError` for a bad key.
    """
    body = json.dumps({"format": FORMAT, "version": 1, **found}, indent=1, allow_nan=False).encode() + b"\n"
    key_id = None
    if key is not None:
        body, key_id = _signed(body, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path, page = _claimed(path)
    try:
        atomic_write(path, body)
    except BaseException:
        for each in (path, page):
            each.unlink(missing_ok=True)  # empty, and ours
        raise
    atomic_write(page, _page(found, path.name, hashlib.sha256(body).hexdigest(), key_id).encode())
    return {"report": str(path), "page": str(page), "key_id": key_id}


def _claimed(path: Path) -> tuple[Path, Path]:
    """A name for the report and its page that nobody has, and nobody else gets: both are created, empty."""
    for number in itertools.count(1):
        name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        made: list[Path] = []
        try:
            for each in (name, name.with_suffix(".html")):
                each.open("xb").close()
                made.append(each)
        except FileExistsError:
            for each in made:
                each.unlink()
        else:
            return made[0], made[1]
    raise AssertionError  # numbers do not end


def _signed(body: bytes, key: str | os.PathLike[str]) -> tuple[bytes, str]:
    from edgekit.deployment.signing import Statement, blank_trailer, sign_file

    file = io.BytesIO(body + blank_trailer(Statement(0)))  # a release, which says nothing of a report
    key_id = sign_file(file, key)
    return file.getvalue(), key_id


def check_key(key: str | os.PathLike[str]) -> None:
    """Better said before the work than after. Raises `SignatureError` for a key that cannot sign."""
    _signed(b"\n", key)


def is_report(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a report does; nothing of it is parsed."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_HEAD)) == _HEAD
    except OSError:
        return False


def check_report(path: str | os.PathLike[str], pub: Any, revoked: Any = None) -> dict[str, Any]:
    """Check a report's signature, then read it. Returns what it holds, ``verified`` (True) and ``key_id``.

    Raises `SignatureError` where it is not signed, was signed by another or a revoked key, or differs by one bit; `DataError`
    for a signed file that is no report.
    """
    from edgekit.deployment.signing import check_signature
    from edgekit.deployment.trusted import believe

    trust = believe(pub, revoked=revoked)
    with open(path, "rb") as file:
        try:
            signed = check_signature(file, trust.keys, trust.revoked.keys)
        except SignatureError as error:
            words = error.message.replace("the pack", "the report")
            raise SignatureError(words, "it proves nothing; run again: edgekit doctor --chaos --key K") from None
        file.seek(0)
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("it is too large")
        found, _ = json.JSONDecoder().raw_decode(data.decode("utf-8"))
        if found["format"] != FORMAT or not all(isinstance(case, dict) for case in found["cases"]):
            raise ValueError("it has another format")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{os.fspath(path)} is signed, but no report: {error}", "name the file of doctor --chaos") from None
    return {**found, "verified": True, "key_id": signed.key_ids[0]}


def _page(found: dict[str, Any], name: str, sha256: str, key_id: str | None) -> str:
    """One self-contained page; all text from outside is escaped."""
    failed, counts = found["failed"], f"{found['passed']} passed, {found['failed']} failed, {found['not_run']} not run"
    facts = _facts(found)
    partial = "" if found["complete"] else f", partial: cut off by {found.get('cut_off_by')}"
    rows = "".join(_row(case) for case in found["cases"])
    signed = f"signed by key <code>{escape(key_id)}</code>" if key_id else "not signed"
    verdict = "failed" if failed else "passed" if found["passed"] else "not"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>edgekit under faults: {escape(counts)}</title><style>{_STYLE}</style>"
        f'<h1>edgekit under faults</h1><p class="{verdict}">{escape(counts)}'
        f"{escape(partial)}</p>"
        f"<p>Made from <code>{escape(name)}</code> (sha256 <code>{sha256}</code>), {signed}. That file counts, not this page: "
        f"<code>edgekit verify {escape(name)} --pub edgekit.pub</code></p>"
        f"<table>{''.join(f'<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in facts.items())}</table>"
        "<h2>Cases</h2><table><tr><th>case</th><th>what was done, what must hold</th><th>outcome</th><th>measured</th></tr>"
        f"{rows}</table><p>Killing a process does not prove what a power cut does: only the case power-cut models one, for "
        "SQLite's own writes. What each case proves and what not: docs/chaos.md of edgekit.</p></html>\n"
    )


def _rounds(case: dict[str, Any]) -> str:
    stated = case.get("rounds_stated")
    return f"{case['rounds']} of {stated}" if stated and case["rounds"] < stated else str(case["rounds"])


def _row(case: dict[str, Any]) -> str:
    reason = f"<br>{escape(case['reason'])}" if case["reason"] else ""
    figures = [f"{_rounds(case)} rounds, {case['seconds']} s", *(f"{k} {v}" for k, v in case["figures"].items())]
    kind = case["outcome"].split()[0]
    return (
        f"<tr><td><code>{escape(case['name'])}</code></td><td>{escape(case['done'])}<br><b>must hold:</b> "
        f'{escape(case["holds"])}</td><td class="{kind}">{escape(case["outcome"])}{reason}</td>'
        f"<td>{'<br>'.join(map(escape, figures))}</td></tr>"
    )


def _facts(found: dict[str, Any]) -> dict[str, str]:
    machine, work = found.get("machine", {}), found["work"]
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    board = machine.get("jetson")
    device = f"{board['model']}, L4T {board['l4t']}" if board else f"{machine.get('cpu')}, {machine.get('cores')} cores"
    bundle, root = found["bundle"], found["root"]
    return {
        "device": f"{machine.get('host', '')} {device} ({machine.get('architecture')})",
        "system": f"{machine.get('os')}, kernel {machine.get('kernel')}",
        "versions": f"{versions}, Python {machine.get('python')}",
        "disk": f"{work['folder']} on {work['device']} ({work['filesystem']}), {work['free_bytes'] / 1e9:.1f} GB free",
        "bundle": f"{bundle['name']}, digest {bundle['digest']}" if bundle else "built-in: three colours, 111 bytes",
        "root": f"a copy of {root['copied_from']} ({root['bytes']} bytes)" if root else "a new one",
        "started, ended": f"{found['started']}, {found['ended']}",
        "options": json.dumps(found["options"]),
    }
