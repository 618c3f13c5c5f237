"""Updates that are killed: updates.py [--kills N] [--seed S]

Processes that install, roll back, start and confirm under one root, each sent SIGKILL at a random moment of its work, one
after the other on what the last one left. After each: exactly one whole bundle runs (every file hashed), and it is the one
before or the one after, where the action leads to one: after a killed start the older one is right only where the trial had
failed, after a killed install only where what ran was on trial and the older one is confirmed. ``state.json`` is sound. At
the end the next install succeeds and leaves nothing behind.

The processes are forked from one that has loaded everything, so the moments fall into the work, not into starting Python;
the work itself is real: signature, copy, extraction, golden outputs, latency, fsync, switch.
Target: 1,000 kills, always one valid slot, 0 corrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from _machine import save
from model_overhead import DIGITS, write_bundle

import edgekit.runtime.onnxruntime  # noqa: F401  loaded before the forks, used after them
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.deployment import install, keygen, pack, rollback, starting, status
from edgekit.installed import read_state
from edgekit.progress import track

ACTIONS = ("install", "install", "install", "rollback", "start", "confirm")


def packs(folder: Path) -> tuple[list[Path], Path]:
    """Three packs of one graph under three names, and the public key."""
    made = keygen(folder / "keys")
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        first = write_bundle(folder / "digits.edge", DIGITS)
    found = []
    for number in range(3):
        with Bundle.create(folder / f"v{number}.edge") as draft:
            for name in (FLOAT_GRAPH, GOLDEN):
                draft.write(name, first.file(name).read_bytes())
            draft.manifest = msgspec.structs.replace(
                first.manifest, name=f"v{number}", files={}, labels=tuple(f"{number}{i}" for i in range(10))
            )
        found.append(pack(folder / f"v{number}.edge", out=folder / f"v{number}.zip", key=made["key"]))
    return found, Path(made["pub"])


def forked(act: Callable[[], Any], after_s: float | None) -> bool:
    """Run it in a process of its own; whether it was killed after so many seconds, before its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stderr = io.StringIO()
            act()
            code = 0
        except BaseException as error:  # noqa: BLE001  told by the parent
            os.write(1, f"\n{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a process failed with {code}")
    return code != 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        releases, pub = packs(folder)
        root = folder / "root"
        for release in releases[:2]:
            forked(lambda release=release: install(release, root=root, pub=pub, again=True), None)
        took = durations(root, releases, pub)
        unkilled = {action: round(seconds, 3) for action, seconds in took.items()}
        corrupt, killed, ended, after = 0, Counter[str](), Counter[str](), Counter[str]()
        progress = iter(track(range(options.kills), "killing"))
        while killed.total() < options.kills:
            found = status(root)
            before = found["name"]
            action = chance.choice(ACTIONS)
            if action == "rollback" and not found["previous"]:
                action = "install"
            release = releases[(int(before[1:]) + chance.choice((1, 2))) % 3]
            act, allowed = doing(action, found, root, release, pub)
            if not forked(act, chance.uniform(chance.choice((0.0, 0.6)), 1.05) * took[action]):
                ended[action] += 1
                took[action] *= 0.97  # the machine is faster now than it was
                continue
            killed[action] += 1
            took[action] *= 1.01
            next(progress, None)
            if killed.total() % 50 == 0:
                print(killed.total(), dict(ended), flush=True)
            found = status(root)
            read_state(root)
            if not (found["healthy"] and found["name"] in allowed):
                corrupt += 1
                print("CORRUPT", action, allowed, found)
            which = "old" if found["name"] == before else "new" if found["name"] == release.stem else "older"
            after[f"{action}: the {which} one runs"] += 1
        forked(lambda: install(releases[0], root=root, pub=pub, again=True), None)
        forked(lambda: install(releases[1], root=root, pub=pub, again=True), None)
        left = sorted(path.name for path in root.iterdir())
        whole = status(root)["name"] == "v1" and left == [".lock", "current", "slots", "state.json", "trust.json"]
    figures = {
        "kills": killed.total(),
        "corrupt": corrupt,
        "target": "1000 kills, 0 corrupt",
        "met": corrupt == 0 and whole,
        "killed": dict(killed),
        "ended_before_the_kill": dict(ended),
        "after_a_kill": dict(after),
        "the_next_install_is_whole": whole,
        "seconds_unkilled": unkilled,
        "seed": options.seed,
    }
    print(figures)
    print(save("updates", figures))


def doing(action: str, found: dict[str, Any], root: Path, release: Path, pub: Path) -> tuple[Callable[[], Any], set[str]]:
    """What to run, and the names of the bundles of which one must run once it was killed; ``found``: the status before."""
    trial, older, allowed = found["trial"], found["previous"], {found["name"]}
    if action == "install":
        if trial and older and older["confirmed"]:  # it goes back to what is proven before it takes the slot
            allowed.add(older["name"])
        return lambda: install(release, root=root, pub=pub, again=True), {*allowed, release.stem}
    if action == "rollback":
        return lambda: rollback(root), {*allowed, older["name"]}
    if trial and older and trial["failed"] >= trial["allowed"]:
        allowed.add(older["name"])
    return (lambda: starting(root)) if action == "start" else (lambda: starting(root).confirm()), allowed


def durations(root: Path, releases: list[Path], pub: Path) -> dict[str, float]:
    """Seconds of each action when nobody kills it, the middle one of three."""
    found: dict[str, list[float]] = {action: [] for action in ACTIONS}
    for _ in range(3):
        for action, act in (
            ("install", lambda: install(releases[2], root=root, pub=pub, again=True)),
            ("start", lambda: starting(root)),
            ("confirm", lambda: starting(root).confirm()),
            ("rollback", lambda: rollback(root)),
        ):
            begun = time.perf_counter()
            forked(act, None)
            found[action].append(time.perf_counter() - begun)
    return {action: sorted(seconds)[1] for action, seconds in found.items()}


if __name__ == "__main__":
    main()
