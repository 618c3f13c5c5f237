"""One case in a process of its own, so that what it breaks ends with it. Says its rounds and its outcome as JSON lines."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError, MissingExtra, first_line

from .case import Bench, Broken, NotHere
from .cases import CASES

__all__ = ["judge", "main"]


def judge(name: str, bench: Bench) -> dict[str, Any]:
    """``outcome``, ``reason``, ``rounds``, ``seconds`` and ``figures`` of one case, run in this process."""
    case = next(each for each in CASES if each.name == name)
    begun = time.monotonic()
    outcome, reason = "passed", None
    try:
        case.load()(bench)
    except Broken as error:
        outcome, reason = "failed", str(error)
    except NotHere as error:
        outcome, reason = "not run", str(error)
    except MissingExtra as error:
        outcome, reason = "not run", f"{error.message}: {error.hint}"
    except Exception as error:  # noqa: BLE001  what nobody expected under a fault is what is looked for
        if os.environ.get("EDGEKIT_DEBUG"):
            traceback.print_exc()
        words = error.message if isinstance(error, EdgekitError) else f"{type(error).__name__}: {first_line(error)}"
        outcome, reason = "failed", f"unexpected: {words}"
    seconds = round(time.monotonic() - begun, 2)
    return {"outcome": outcome, "reason": reason, "rounds": bench.done, "seconds": seconds, "figures": bench.figures}


def main() -> None:
    """The task is one JSON object on stdin; stdout is for the answers alone."""
    task = json.loads(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    bench = Bench(
        folder=Path(task["folder"]),
        rounds=task["rounds"],
        seconds=task["seconds"],
        quick=task["quick"],
        seed=task["seed"],
        tell=lambda done: say({"done": done}),
        bundle=Path(task["bundle"]) if task["bundle"] else None,
        root=Path(task["root"]) if task["root"] else None,
    )
    say(judge(task["name"], bench))
    out.close()
    os._exit(0)  # a delivery that hangs on purpose is not waited for
