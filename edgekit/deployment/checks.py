"""What is tried before a switch: room on the disk, links, the golden outputs, and how long an answer takes on this device."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import BudgetNotMet, EdgekitError, GoldenError
from edgekit.manifest import batch_axes
from edgekit.progress import say
from edgekit.runtime import Runner, check_golden, open_runner
from edgekit.runtime.feeds import as_taken
from edgekit.runtime.golden import engine_golden
from edgekit.trust import trust_here

__all__ = ["RESERVE", "SLOWER", "Steps", "check_latency", "check_links", "check_room", "explained", "room_for", "self_test"]

#: Bytes and files kept free beyond what an install writes: a device whose disk is full to the last block does not boot well.
RESERVE = 16 << 20
RESERVE_FILES = 64
#: Without a budget, an answer that takes so many times as long as before is a warning.
SLOWER = 1.5
#: Answers timed of each bundle, and the most seconds that all of them may take.
ROUNDS, SECONDS, WARM = 200, 3.0, 10


class Steps:
    """Seconds by step, in their order: ``with steps("golden"): ...``"""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + perf_counter() - begun, 3)


def room_for(root: Path, sizes: Sequence[int]) -> int:
    """Bytes that files of these sizes take on the root's disk, each in whole blocks."""
    block = max(os.statvfs(_there(root)).f_frsize, 512)
    return sum(-(-size // block) * block for size in sizes)


def check_room(root: Path, needed: int, files: int) -> int:
    """Whether ``needed`` bytes in so many files find room, with a reserve; the bytes that are free.

    Raises `EdgekitError` before anything is written. A quota is only found by writing: see `explained`.
    """
    disk = os.statvfs(_there(root))
    free = disk.f_bavail * disk.f_frsize
    hint = "free some space; what is installed runs on"
    if free < needed + RESERVE:
        raise EdgekitError(f"{root} has {free >> 20} MiB free, the install needs {((needed + RESERVE) >> 20) + 1}", hint)
    if disk.f_files and disk.f_favail < files + RESERVE_FILES:  # 0: a file system that makes them as it goes
        raise EdgekitError(
            f"the disk of {root} can take {disk.f_favail} more files, the install needs {files + RESERVE_FILES}",
            "remove small files (df -i shows where they are counted); what is installed runs on",
        )
    return free


def check_links(root: Path, work: Path) -> None:
    """Whether links can be made under ``root``. Raises `EdgekitError` on a file system without (vfat, exfat)."""
    try:
        os.symlink("slots/a", work / "link")
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise EdgekitError(
            f"the file system of {root} has no symbolic links (vfat and exfat have none)",
            "choose a root on ext4, xfs, btrfs or f2fs; a pack may lie on a stick of any kind",
        ) from None


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """An `OSError` of the block as cause and cure."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or root
        if error.errno == errno.EDQUOT:
            cause, cure = "the quota of this user is used up", "free some space, or raise the quota"
        elif error.errno == errno.ENOSPC:
            cause, cure = "the disk has no room for more bytes or files", "free some space (df -h, df -i)"
        elif error.errno == errno.EROFS:
            cause, cure = "it is mounted read-only", f"mount it for writing: mount -o remount,rw {root}"
        elif error.errno in (errno.EACCES, errno.EPERM):
            cause = f"user {_user(os.geteuid())} may not write there, it belongs to {_owner(root)}"
            cure = f"run it as the user that the scanner runs as, whom the root belongs to: chown -R USER {root}"
        elif error.errno == errno.EIO:
            cause, cure = "the disk reports an input/output error", "look into dmesg: the disk or card may be dying"
        else:
            raise
        raise EdgekitError(f"{where} cannot be written: {cause}", f"{cure}; what is installed runs on") from None


def self_test(bundle: str | Path, backend: str, engines: Sequence[str] = ()) -> dict[str, float]:
    """Run the golden inputs on this device; ``engines``: digests of those that this process may load.

    Raises `GoldenError` where the answers differ or are not finite.
    """
    say("checking the golden outputs on this device")
    for digest in engines:
        trust_here(digest)
    opened = Bundle.open(bundle)
    result = check_golden(opened, backend=backend)
    if not result.relative < float("inf"):
        raise GoldenError(
            f"{opened.graph} answers with NaN, infinity or a wrong shape here", "do not install it; build it again"
        )
    return {"relative": result.relative, "snr_db": result.snr_db}


def check_latency(fresh: str | Path, before: str | Path | None, backend: str, budget_ms: float | None) -> dict[str, Any]:
    """Time single answers to the golden inputs, those of the bundle that runs beside them, in turns.

    Returns ``latency_ms`` and ``latency_before_ms``, each ``{"p50", "p99"}`` or None where it cannot be timed. Raises
    `BudgetNotMet` where the new p99 is above ``budget_ms``; without a budget an answer that takes `SLOWER` times as long as
    before is said. What runs is left out where memory is short: the scanner needs it more.
    """
    say("timing answers on this device")
    with contextlib.ExitStack() as stack:
        timed = {}
        for name, path in (("latency_ms", fresh), ("latency_before_ms", before)):
            try:
                if path and (name == "latency_ms" or _fits(Path(path))):
                    timed[name] = _answering(stack.enter_context(open_runner(Bundle.open(path), backend)))
            except (EdgekitError, OSError, ValueError, IndexError) as error:
                if name == "latency_ms" and budget_ms is not None:
                    raise
                say(f"{path} cannot be timed: {error}", level="warning")
        found: dict[str, Any] = {"latency_ms": None, "latency_before_ms": None, **_in_turns(timed)}
    return _judged(found, budget_ms)


def _judged(found: dict[str, Any], budget_ms: float | None) -> dict[str, Any]:
    new, old = found["latency_ms"], found["latency_before_ms"]
    if budget_ms is not None and new["p99"] > budget_ms:
        raise BudgetNotMet(
            f"an answer takes {new['p99']:.3g} ms here (p99), {budget_ms:g} ms are allowed; what is installed runs on",
            "prune or quantize it, build it for this device, or raise --max-latency-ms",
            {"bundle": None, **found},
        )
    if budget_ms is None and new and old and new["p50"] > SLOWER * old["p50"]:
        say(
            f"an answer takes {new['p50']:.3g} ms here, {new['p50'] / old['p50']:.1f} times as long as before; "
            "--max-latency-ms MS would refuse what is too slow",
            level="warning",
        )
    return found


def _answering(runner: Runner) -> Any:
    """A call that runs the next golden sample, alone, in as few copies as the runner takes."""
    bundle = runner.bundle
    inputs, _ = engine_golden(runner)
    inputs = as_taken(runner.frames, inputs)
    axes = batch_axes(bundle.manifest.inputs, bundle.manifest.outputs)
    batched = {name: axes[name] for name, array in inputs.items() if name in axes and array.ndim > axes[name]}
    fixed = [
        spec.shape[axes[spec.name]] for spec in runner.inputs if spec.name in batched and len(spec.shape) > axes[spec.name]
    ]
    copies = runner.batches[0] if runner.batches else next((size for size in fixed if isinstance(size, int)), 1)
    count = min((inputs[name].shape[axis] for name, axis in batched.items()), default=1)
    feeds = [
        {name: a.take([row] * copies, batched[name]) if name in batched else a for name, a in inputs.items()}
        for row in range(min(count, 8))
    ]
    for number in range(WARM):
        runner.run(feeds[number % len(feeds)])
    return lambda number: runner.run(feeds[number % len(feeds)])


def _in_turns(timed: dict[str, Any]) -> dict[str, dict[str, float]]:
    taken: dict[str, list[float]] = {name: [] for name in timed}
    end = perf_counter() + SECONDS
    for number in range(ROUNDS):
        for name, answer in timed.items():
            begun = perf_counter_ns()
            answer(number)
            taken[name].append((perf_counter_ns() - begun) / 1e6)
        if perf_counter() > end:
            break
    return {
        name: dict(zip(("p50", "p99"), np.percentile(times, [50, 99]).round(4).tolist(), strict=True))
        for name, times in taken.items()
    }


def _fits(bundle: Path) -> bool:
    """Whether a second copy of what runs may be loaded for the comparison."""
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    try:
        words = Path("/proc/meminfo").read_text("ascii").split()
        available = int(words[words.index("MemAvailable:") + 1]) << 10
    except (OSError, ValueError, IndexError):
        return True
    return size * 8 < available


def _there(path: Path) -> Path:
    """The nearest folder that is there: the root itself is only made by the install."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _owner(root: Path) -> str:
    try:
        return _user(_there(root).stat().st_uid)
    except OSError:
        return "another"


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
