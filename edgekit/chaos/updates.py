"""Install and rollback, killed anywhere and on a full disk: one slot is always whole, and the next install works."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edgekit.bundle import GOLDEN, Bundle
from edgekit.deployment import install, keygen, pack, rollback, status
from edgekit.errors import BundleError, EdgekitError, GoldenError, MissingExtra
from edgekit.installed import LOCK, STARTS, lives, read_state
from edgekit.runtime import Model
from edgekit.runtime.golden import parse_golden, save_golden

from .case import Bench, Broken, NotHere
from .stage import SCANNED, bundle_of, forked, start_scan

__all__ = [
    "Site",
    "flip",
    "golden_fails",
    "install_disk_full",
    "install_killed",
    "rollback_killed",
    "slot_damaged",
    "starts_fail",
]

_FULL = 7  # the exit code of an install that was refused
#: Starts after which a way back should long have been taken.
_MOST_STARTS = 10
#: Kills of one round that may come too late; the second half of them come before a change, which seldom misses.
_MOST_MISSES = 10
_CHANGES = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "shutil.rmtree"})


class Site:
    """A root of its own with two installed versions, and packs of them; a copy of the user's root where one was given.

    Packs are signed by a key made for the case, where ``cryptography`` is installed (``signed``).
    """

    def __init__(self, bench: Bench, names: tuple[str, ...] = ("chaos-a", "chaos-b")) -> None:
        self.bench, self.root = bench, bench.folder / "root"
        if bench.root is not None:
            shutil.copytree(bench.root, self.root, symlinks=True, ignore=shutil.ignore_patterns(".start-*"))
        self.key: Path | None = None
        self.pub: Path | None = None
        with contextlib.suppress(MissingExtra):
            keys = keygen(bench.folder / "keys")
            self.key, self.pub = Path(keys["key"]), Path(keys["pub"])
        bench.figures["signed"] = self.pub is not None
        self.packs = {name: self.packed(bundle_of(bench, name), self.key) for name in names}
        for name in names:
            self.apart(partial(self.install, name))

    def public(self) -> Path:
        """The public key. Raises `NotHere` where nothing can be signed here."""
        if self.pub is None:
            raise NotHere("cryptography is not installed: pip install 'edgekit[sign]'")
        return self.pub

    def packed(self, bundle: Path, key: Path | None) -> Path:
        return pack(bundle, out=bundle.with_suffix(".zip"), key=key)

    def install(self, name: str) -> dict[str, Any]:
        return self.install_pack(self.packs[name])

    def install_pack(self, path: Path) -> dict[str, Any]:
        return install(path, root=self.root, pub=self.pub, unsigned=self.pub is None, again=True, rename=True)

    def apart(self, act: Callable[[], object]) -> None:
        """In a child process: what starts threads must not happen in a process that forks. Raises `Broken`."""
        with forked(act) as pid:
            _, code = os.waitpid(pid, 0)
        self.bench.check(code == 0, "an install or rollback that nobody disturbed failed")

    def running(self) -> str:
        """The name of what runs; all of it is checked. Raises `Broken` where it is not whole."""
        try:
            opened = Bundle.open(self.root / "current")
        except EdgekitError as error:
            raise Broken(f"what runs is not whole: {error.message}") from None
        now = status(self.root)
        if not now["healthy"] or now["name"] != opened.manifest.name:
            raise Broken(f"status is not in order: {now['reason'] or now['name']}")
        return opened.manifest.name

    def other(self) -> str:
        """A version that does not run."""
        return next(name for name in self.packs if name != self.running())

    def leftovers(self) -> list[str]:
        """Hidden entries under the root: what an install at work has there."""
        return [path.name for path in self.root.iterdir() if path.name.startswith(".") and path.name != LOCK]

    def print_of(self) -> list[tuple[Any, ...]]:
        """What would differ if anything under the root had been touched, but for reading times."""
        rows = []
        for path in sorted(self.root.rglob("*")):
            about = path.lstat()
            link = os.readlink(path) if path.is_symlink() else ""
            rows.append((str(path), about.st_ino, about.st_mode, about.st_size, about.st_mtime_ns, link))
        return rows


def install_killed(bench: Bench) -> None:
    site = Site(bench)
    _killed(bench, site, lambda name: site.install(name))
    site.apart(lambda: site.install(site.other()))
    bench.check(site.running() in site.packs, "the install after the kills did not bring its bundle")
    bench.check(not site.leftovers(), f"an install leaves {site.leftovers()} behind")


def rollback_killed(bench: Bench) -> None:
    """A rollback spends the way back, so an install comes before each."""
    site = Site(bench)

    def ready() -> None:
        if not status(site.root)["previous"]:
            site.apart(lambda: site.install(site.other()))

    _killed(bench, site, lambda name: rollback(site.root), ready)
    ready()
    site.apart(lambda: rollback(site.root))
    site.running()


def _killed(bench: Bench, site: Site, act: Callable[[str], object], ready: Callable[[], None] = lambda: None) -> None:
    """In turns killed by the clock and before one of the changes on disk; each starts from the wreck of the last."""
    ready()
    begun, changes = time.monotonic(), _changes(bench, site, act)
    whole_s = time.monotonic() - begun
    bench.figures |= {"changes_on_disk": changes, "seconds_undisturbed": round(whole_s, 3)}
    bench.check(changes > 2, "nothing was written, so nothing was shown")
    for number in bench.each():
        for missed in range(_MOST_MISSES):
            by_clock = not number % 2 and missed < _MOST_MISSES // 2
            if _met(bench, site, act, ready, None if by_clock else bench.rng.randrange(changes), whole_s):
                break
            bench.count("kills_too_late")
        else:
            raise NotHere(f"the fault could not be brought about: {_MOST_MISSES} kills of round {number + 1} came too late")


def _met(
    bench: Bench, site: Site, act: Callable[[str], object], ready: Callable[[], None], step: int | None, whole_s: float
) -> bool:
    """One try, by the clock or before change number ``step``: whether the kill came before the work was done."""
    ready()
    before, wanted = site.running(), site.other()
    pause_s = bench.rng.uniform(0.0, whole_s)
    with forked(partial(_stopped_at, site, step, partial(act, wanted))) as pid:
        if step is None:
            time.sleep(pause_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    bench.check(code in (0, -signal.SIGKILL), f"it ended by itself, with an error (exit code {code})")
    bench.count("kills", int(code != 0))
    now = site.running()
    if code:
        bench.count("kept_the_old" if now == before else "had_the_new")
    return code != 0


def _changes(bench: Bench, site: Site, act: Callable[[str], object]) -> int:
    """How many changes on disk it makes where nobody disturbs it."""
    reading, writing = os.pipe()
    wanted = site.other()

    def counted() -> None:
        count = [0]
        _at_each_change(site.root, lambda: count.__setitem__(0, count[0] + 1))
        act(wanted)
        os.write(writing, f"{count[0]}".encode())

    site.apart(counted)
    os.close(writing)
    found = int(os.read(reading, 100) or b"0")
    os.close(reading)
    return found


def _stopped_at(site: Site, step: int | None, act: Callable[[], object]) -> None:
    """``act``, killed before its change number ``step``."""
    left = [step]

    def one() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] is not None:
            left[0] -= 1

    _at_each_change(site.root, one)
    act()


def _at_each_change(root: Path, act: Callable[[], None]) -> None:
    """``act`` before each change under ``root`` of this process, for good."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES and arguments and str(arguments[0]).startswith(str(root)):
            act()

    sys.addaudithook(hook)


def install_disk_full(bench: Bench) -> None:
    site = Site(bench)
    for _ in bench.each():
        before, wanted = site.running(), site.other()
        limit = bench.rng.randrange(1, site.packs[wanted].stat().st_size)

        with forked(partial(_install_below, site, wanted, limit)) as pid:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        bench.check(code == _FULL, f"an install on a full disk was not refused (exit code {code})")
        bench.check(site.running() == before, "an install on a full disk has changed what runs")
        bench.check(not site.leftovers(), f"an install on a full disk leaves {site.leftovers()} behind")
        bench.count("refused")
    wanted = site.other()
    site.apart(lambda: site.install(wanted))
    bench.check(site.running() == wanted, "the install with room again did not bring its bundle")


def _install_below(site: Site, name: str, limit: int) -> None:
    """Install where no file grows beyond ``limit`` bytes; ends the process with `_FULL` where that is refused."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        site.install(name)
    except (OSError, EdgekitError):
        os._exit(_FULL)


def golden_fails(bench: Bench) -> None:
    def other_answers(name: str, data: bytes) -> bytes:
        if name != GOLDEN:
            return data
        inputs, outputs = parse_golden(data)
        return save_golden(inputs, {key: value * 0 - value.max() - 7 for key, value in outputs.items()})

    site = Site(bench)
    liar = site.packed(bundle_of(bench, "chaos-liar", other_answers), site.key)
    for _ in bench.each():
        before, name = site.print_of(), site.running()
        try:
            site.install_pack(liar)
        except GoldenError:
            bench.count("refused")
        else:
            raise Broken("a bundle that answers otherwise was installed")
        bench.check(site.running() == name, "what runs has changed")
        differs = {row[0] for row in set(before) ^ set(site.print_of())} - {str(site.root)}
        bench.check(not differs, f"the refused install has changed {sorted(differs)[:3]}")


def slot_damaged(bench: Bench) -> None:
    site = Site(bench)
    for _ in bench.each():
        if not status(site.root)["previous"]:
            wanted = site.other()
            site.apart(partial(site.install, wanted))
        name = site.running()
        files = sorted(Bundle.open(site.root / "current").manifest.files)
        file = site.root / "current" / bench.rng.choice(files)
        flip(file, bench.rng.randrange(file.stat().st_size), bench.rng.randrange(8))
        bench.count("flips")
        bench.check(not status(site.root)["healthy"], "status does not see a flipped bit in the running slot")
        try:
            with Model.open(site.root / "current"):
                raise Broken("a slot with a flipped bit was opened")
        except BundleError:
            pass
        rollback(site.root)
        bench.check(site.running() != name, "rollback did not lead to the older bundle")


def starts_fail(bench: Bench) -> None:
    """A start counts once it is noted under the root, so it is killed no earlier than that."""
    if bench.bundle is not None and Bundle.open(bench.bundle).manifest.task not in SCANNED:
        raise NotHere("the bundle takes no pictures, so no scan starts with it")
    site = Site(bench)
    for number in bench.each():
        old, new = site.running(), site.other()
        if number == 0:
            _healthy_scan(bench, site, old, number)
        site.apart(partial(site.install, new))
        starts = 0
        while site.running() != old and starts < _MOST_STARTS:
            starts += 1
            before = os.readlink(site.root / "current")
            process = _scan(bench, site, "pattern:64x48@50")
            with contextlib.suppress(Broken):
                bench.wait_for(partial(_noted, site, before), "a start is not noted", 15)
            process.kill()
            process.communicate()
        bench.longest("starts_until_back", starts)
        bench.check(starts <= STARTS + 1, f"it took {starts} starts, of which {STARTS} may fail")
        bench.check(site.running() == old, f"after {starts} failed starts the bundle that never worked still runs")
        _healthy_scan(bench, site, old, number + 1)


def _scan(bench: Bench, site: Site, source: str) -> subprocess.Popen[bytes]:
    lines, outbox = bench.folder / "events.jsonl", bench.folder / "outbox.sqlite"
    return start_scan(site.root / "current", source, [f"jsonl:{lines}"], outbox)


def _noted(site: Site, before: str) -> bool:
    """Whether a start has noted itself and runs, or is through with going back: what it writes on the way is neither."""
    trial = read_state(site.root).trial
    noted = trial is not None and any(lives(site.root, start) for start in trial.starts)
    return noted or os.readlink(site.root / "current") != before


def _healthy_scan(bench: Bench, site: Site, name: str, number: int) -> None:
    process = _scan(bench, site, "pattern:64x48@50,60")
    out, _ = process.communicate(timeout=120)
    bench.check(process.returncode == 0, f"a scan with {name} ended with exit code {process.returncode}")
    bench.check(json.loads(out)["inferred"], f"a scan with {name} read nothing")
    bench.check(site.running() == name, f"a healthy scan has changed what runs, in round {number}")


def flip(path: Path, at: int, bit: int) -> None:
    """Turn one bit of a file over, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1 << bit]))
