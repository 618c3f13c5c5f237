"""``python -m tests.fuzz TARGET... --minutes 10``: damaged inputs for the readers of foreign bytes, until time is up.

Inputs that are refused in another place of edgekit than all before are changed further. What a reader does not stand is kept
in ``fuzz-findings/TARGET/`` and goes, mended, to ``tests/fuzz/corpus/TARGET/``. Each target runs in a process of its own: what
ends or holds up the interpreter itself is found as well.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy

from edgekit.progress import bar
from edgekit.version import __version__

from . import guard, seeds
from .targets import SECONDS, TARGETS, Target

FINDINGS = Path("fuzz-findings")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"], metavar="TARGET", help=", ".join(TARGETS) + ", or all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process of one target
    parser.add_argument("--out", type=Path, help="a JSON file that the figures are added to")
    asked = parser.parse_args()
    if asked.inside:
        try:
            print(json.dumps(_run(asked.targets[0], asked.minutes, asked.seed)))  # noqa: T201
        finally:
            seeds.close()
        return 0
    found = False
    for name in list(TARGETS) if "all" in asked.targets else asked.targets:
        row = _apart(name, asked.minutes, asked.seed)
        print(json.dumps(row))  # noqa: T201
        if asked.out:
            _store(asked.out, row)
        found |= bool(row["findings"])
    return found


def _apart(name: str, minutes: float, seed: int) -> dict[str, Any]:
    """The figures of a target, from a process of its own; where that died, its last input is the finding."""
    words = ["-m", "tests.fuzz", name, "--minutes", str(minutes), "--seed", str(seed), "--inside"]
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, check=False)
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout)
        (FINDINGS / f"{name}.last").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            FINDINGS.rmdir()
        return row
    last = FINDINGS / f"{name}.last"
    words = [f"the process ended with {done.returncode}; its last input is {last}"]
    return {"target": name, "findings": {last.name: words[0]}, **_machine(seed)}


def _run(name: str, minutes: float, seed: int) -> dict[str, Any]:
    target, rng = TARGETS[name], random.Random(seed)
    sound = [*target.seeds(), *seeds.found(name)]
    pool, kinds = list(sound), set[str]()
    begun, end = time.monotonic(), time.monotonic() + 60 * minutes
    executions, findings = 0, dict[str, str]()
    FINDINGS.mkdir(exist_ok=True)
    last = FINDINGS / f"{name}.last"
    with guard.limits(), bar(f"fuzzing {name}", max(1, int(60 * minutes))) as shown:
        for data in sound:
            executions += 1
            _note(name, data, guard.tried(target.read, data), findings)
        said = begun
        while (now := time.monotonic()) < end:
            data = _next(target, pool, rng)
            last.write_bytes(data)
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # a native loop takes no alarm
            wrong, kind = _outcome(target, data)
            executions += 1
            _note(name, data, wrong, findings, kind)
            if kind not in kinds and len(kinds) < 400 and len(data) < 1 << 17:
                kinds.add(kind)
                pool.append(data)
            if now - said >= 1:
                shown(int(now - said), f"{executions} tried, {len(findings)} found")
                said = now
    faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - begun
    row = {
        "target": name,
        "minutes": round(seconds / 60, 2),
        "executions": executions,
        "per_second": round(executions / seconds),
    }
    return {**row, "places": len(kinds), "findings": findings, **_machine(seed)}


def _next(target: Target, pool: list[bytes], rng: random.Random) -> bytes:
    """The newest are changed as often as all others together."""
    base = rng.choice(pool[-20:]) if rng.random() < 0.5 else rng.choice(pool)
    return target.mutator(base, pool, rng)


def _outcome(target: Target, data: bytes) -> tuple[str, str]:
    """What is wrong, and the lines of edgekit that the input ended in: coverage for the price of a traceback."""
    reached: list[str] = []

    def read(data: bytes, folder: Path) -> None:
        try:
            target.read(data, folder)
        except Exception as error:
            trace, context = error.__traceback__, error.__context__
            while context is not None and context.__traceback__ is not None:
                trace, context = context.__traceback__, context.__context__
            while trace is not None:
                reached.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
                trace = trace.tb_next
            raise

    wrong = guard.tried(read, data)
    return wrong, "/".join(reached[-6:])


def _note(name: str, data: bytes, wrong: str, findings: dict[str, str], kind: str = "") -> None:
    """Once for each kind of error and place."""
    told = f"{wrong.partition(':')[0]} at {kind}"
    if not wrong or any(words.startswith(told) for words in findings.values()):
        return
    folder = FINDINGS / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    findings[path.name] = f"{told}: {wrong[:300]}"
    print(f"{path}: {wrong[:300]}", file=sys.stderr)  # noqa: T201


def _machine(seed: int) -> dict[str, Any]:
    return {"seed": seed, "edgekit": __version__, "python": platform.python_version(), "numpy": numpy.__version__}


def _store(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text("utf-8"))["targets"] if path.exists() else []
    rows = sorted([*(old for old in rows if old["target"] != row["target"]), row], key=lambda each: str(each["target"]))
    machine = {"machine": platform.machine(), "system": platform.system()}
    path.write_text(json.dumps({**machine, "targets": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
