"""Runs the cases: each in a process of its own, in a fresh folder, with an end in time; and sees that nothing is left."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError, UsageError
from edgekit.progress import bar

from .case import Case
from .cases import CASES

__all__ = ["list_cases", "run_cases"]

#: Disk that the built-in bundle's cases need, in bytes.
_LEAST_FREE = 256 << 20
#: Beyond its share of the time, what a case may take to end by itself, in seconds.
_GRACE_S = 180.0
_SECONDS, _QUICK_SECONDS = 60.0, 10.0
#: What the processes of a case have to be gone in once it is over, in seconds.
_GO_S = 3.0
_MARK = "EDGEKIT_CHAOS"
_BACKEND_MODULES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
#: What would tie a case to the service or the session that started it.
_NOT_PASSED = ("STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "RANK", "WORLD_SIZE")
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from edgekit.chaos.child import main; main()"
_INTERRUPTED = "interrupted"


def list_cases(only: Iterable[str] = ()) -> tuple[Case, ...]:
    """All cases, or those named; a group's name (scan, update) stands for its cases. Raises `UsageError` for another name."""
    wanted = set(only)
    known = {case.name for case in CASES} | {case.group for case in CASES}
    if odd := sorted(wanted - known):
        raise UsageError(f"there is no case {odd[0]!r}", "edgekit doctor --chaos --list shows them")
    return tuple(case for case in CASES if not wanted or wanted & {case.name, case.group})


def run_cases(
    *,
    bundle: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    only: Iterable[str] = (),
    quick: bool = False,
    minutes: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Run the cases in a fresh folder in ``work`` (the state folder's, where nothing else is said), which is gone afterwards.

    ``bundle``: the user's own; a scan and the updates use copies of it. ``root``: the user's own; the updates use a copy of
    it. ``minutes``: each case goes on until its share of them is spent, instead of a number of rounds.

    Returns ``started``, ``ended`` (RFC 3339), ``complete``, ``cut_off_by`` (the signal that ended it early, or None),
    ``options``, ``work`` (folder, file system, free bytes), ``bundle``, ``root``, ``cases`` (name, group, done, holds, outcome,
    reason, rounds, rounds_stated, seconds, figures) and the counts ``passed``, ``failed``, ``not_run``. Raises `UsageError`,
    `BundleError`, and `EdgekitError` where no backend is installed or the disk has too little room.
    """
    from edgekit.scanner.outbox_options import default_outbox  # a case's process is to start without the scanner

    cases = list_cases(only)
    if minutes is not None and not 0 < minutes <= 7 * 24 * 60:
        raise UsageError(f"--minutes {minutes:g}", "give minutes above 0, at most a week of them")
    given = Bundle.open(bundle) if bundle is not None else None
    _check_backend()
    place = Path(work) if work is not None else default_outbox().parent
    place.mkdir(parents=True, exist_ok=True)
    copied = _size(Path(root)) if root is not None else 0
    _check_room(place, 12 * (_size(given.path) if given else 0) + copied)
    seed = secrets.randbelow(2**31) if seed is None else seed
    started = _now()
    where = {"folder": str(place.absolute()), **filesystem(place), "free_bytes": shutil.disk_usage(place).free}
    base = {"bundle": str(given.path.absolute()) if given else "", "root": str(Path(root).absolute()) if root else ""}
    rows, cut_off_by = [_row(case) for case in cases], None
    try:
        with tempfile.TemporaryDirectory(prefix="edgekit-chaos-", dir=place, ignore_cleanup_errors=True) as folder:
            _all(cases, rows, Path(folder), base, quick, minutes, seed)
    except (KeyboardInterrupt, SystemExit) as error:  # the second: SIGTERM or SIGHUP, see the commands' main
        cut_off_by = error.signal.name if hasattr(error, "signal") else "SIGINT"
        for row in rows:  # what a case has said by now counts, and a later one had no turn
            if row["reason"] == _INTERRUPTED and row["rounds_stated"] is not None:
                row["reason"] = f"interrupted by {cut_off_by} in round {row['rounds'] + 1}"
    left = [row["outcome"] for row in rows]
    return {
        "started": started,
        "ended": _now(),
        "complete": cut_off_by is None,
        "cut_off_by": cut_off_by,
        "options": {"quick": quick, "minutes": minutes, "only": sorted(only), "seed": seed},
        "work": where,
        "bundle": {"path": str(given.path), "name": given.manifest.name, "digest": given.digest} if given else None,
        "root": {"copied_from": os.fspath(root), "bytes": copied} if root is not None else None,
        "passed": left.count("passed"),
        "failed": left.count("failed"),
        "not_run": left.count("not run"),
        "cases": rows,
    }


def _row(case: Case) -> dict[str, Any]:
    """Of a case that has not had its turn."""
    about = {"name": case.name, "group": case.group, "done": case.done, "holds": case.holds}
    nothing: dict[str, Any] = {"rounds": 0, "rounds_stated": None, "seconds": 0.0, "figures": {}}
    return {**about, "outcome": "not run", "reason": _INTERRUPTED, **nothing}


def _all(
    cases: tuple[Case, ...],
    rows: list[dict[str, Any]],
    folder: Path,
    base: dict[str, str],
    quick: bool,
    minutes: float | None,
    seed: int,
) -> None:
    """Run the cases; their rows are filled as they go on."""
    seconds = minutes * 60 / len(cases) if minutes else _QUICK_SECONDS if quick else _SECONDS
    _isolated(folder)
    with bar("chaos", len(cases)) as advance:
        for number, (case, row) in enumerate(zip(cases, rows, strict=True)):
            rounds = 0 if minutes else case.quick if quick else case.rounds
            task = {**base, "name": case.name, "rounds": rounds, "seconds": seconds, "quick": quick, "seed": seed + number}
            row["rounds_stated"] = rounds
            advance(0, case.name)
            _one(folder, task, row)
            advance(1, f"{case.name} {row['outcome']}")


def _isolated(folder: Path) -> None:
    """The state folder of the cases, with what this user trusts: the user's own engines are to run as they do."""
    from edgekit.trust import state_folders

    state = folder / "state" / "edgekit"
    state.mkdir(parents=True)
    notes = state_folders()[0] / "trusted"
    if notes.is_dir():
        shutil.copytree(notes, state / "trusted")


def _one(folder: Path, task: dict[str, Any], row: dict[str, Any]) -> None:
    """Run one case; ``row`` is filled as it goes on."""
    own, temporary = folder / "case", folder / "tmp"
    for each in (own, temporary):
        each.mkdir()
    token = uuid.uuid4().hex
    kept = {key: value for key, value in os.environ.items() if key not in _NOT_PASSED}
    changed = {"XDG_STATE_HOME": str(folder / "state"), "TMPDIR": str(temporary), "no_proxy": "*", _MARK: token}
    process = subprocess.Popen(  # noqa: S603  this Python
        [sys.executable, "-c", _CHILD, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("EDGEKIT_DEBUG") else subprocess.DEVNULL,
        env={**kept, **changed},
        start_new_session=True,  # Ctrl-C is for us: the case is ended as a whole
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps({**task, "folder": str(own)}).encode())
        process.stdin.close()
        _listen(process, task["seconds"] + _GRACE_S, row)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        if left := _left_over(token):
            row |= {"outcome": "failed", "reason": f"{row['reason'] or 'it passed'}; processes were left: {left}"}
        for each in (own, temporary):
            shutil.rmtree(each, ignore_errors=True)


def _listen(process: subprocess.Popen[bytes], seconds: float, row: dict[str, Any]) -> None:
    """What the case says, until it ends or its time is up."""
    end, begun, text = time.monotonic() + seconds, time.monotonic(), b""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            block = os.read(process.stdout.fileno(), 1 << 16)
            if not block:
                break
            *lines, text = (text + block).split(b"\n")
            for line in lines:
                message = json.loads(line)
                row["rounds"] = message.get("done", row["rounds"])
                if "outcome" in message:
                    row |= message
                    return
    reason = f"it did not end within {seconds:.0f} s" if time.monotonic() >= end else "its process died"
    row |= {"outcome": "failed", "reason": reason, "seconds": round(time.monotonic() - begun, 2)}


def _left_over(token: str) -> list[str]:
    """Processes of a case that is over, after a moment to go; they are killed."""
    end = time.monotonic() + _GO_S
    while (found := list(_marked(token))) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [str(pid) for pid in found]


def _marked(token: str) -> Iterator[int]:
    wanted = f"{_MARK}={token}".encode()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(pid) != os.getpid() and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                yield int(pid)


def filesystem(place: Path) -> dict[str, str]:
    """``filesystem`` (its type) and ``device`` of a folder, as the kernel's list of mounts says; "unknown" without it."""
    best, found = "", {"filesystem": "unknown", "device": "unknown"}
    real = str(place.resolve())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            device, point, kind = line.split()[:3]
            point = point.replace("\\040", " ")
            if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                best, found = point, {"filesystem": kind, "device": device}
    return found


def _check_backend() -> None:
    """Raises `EdgekitError` where no backend is installed: each case runs a model, if only to install it."""
    if not any(importlib.util.find_spec(name) for name in _BACKEND_MODULES):
        raise EdgekitError("the cases run a model, and no backend for one is installed", "pip install 'edgekit[runtime]'")


def _check_room(place: Path, more: int) -> None:
    free, needed = shutil.disk_usage(place).free, _LEAST_FREE + more
    if free < needed:
        raise EdgekitError(
            f"{place} has {free >> 20} MiB free, the cases need {(needed >> 20) + 1}",
            "free some space, or name another folder: --work DIR",
        )


def _size(root: Path) -> int:
    """Bytes under a root. Raises `UsageError` where there is none."""
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}", "name the root of an install: --root DIR")
    return sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
