"""An install: a pack is checked, unpacked beside the slots, tried on this very device, then switched to.

Killed anywhere, it leaves ``current`` on a complete bundle: the old one until the rename, the new one after.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError, SignatureError, TurnedDown, UsageError
from edgekit.files import locked, sync_path
from edgekit.installed import CURRENT, SLOTS, STARTS, State, current_slot, read_state
from edgekit.trust import trust_engine

from .apart import Apart
from .archive import Archive, open_archive
from .checks import Steps, check_links, check_room, explained, room_for
from .fetching import fetch, fetch_beside, from_folder, is_url, readable, unbroken
from .packing import checked, open_pack
from .revoking import MAX_BYTES, REVOKED
from .signing import Checked, PathOrPaths
from .slots import INCOMING, answer, place, same
from .trusted import Trust, admit, believe, remember

__all__ = ["install"]


def install(
    pack: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str],
    pub: PathOrPaths | None = None,
    unsigned: bool = False,
    revoked: PathOrPaths | None = None,
    allow_older: bool = False,
    again: bool = False,
    backend: str = "auto",
    max_latency_ms: float | None = None,
    starts: int = STARTS,
) -> dict[str, Any]:
    """Put a packed bundle into the free slot under ``root``, test it there, then switch ``current`` to it.

    ``pack``: a file, a folder of packs (a stick), the http(s) address of one, or of a folder (``https://host/packs/``); of
    several the newest. In order: signature by ``pub`` (or, with ``unsigned``, hashes only), expiry, lists of what is
    ``revoked`` (as `verify`), releases accepted before (``allow_older``: take an older one all the same), bundles that a
    way back has led away from (``again``: take such a one all the same), disk space, a
    private copy that is checked again (a stick may answer otherwise the second time), extraction, the golden outputs on
    ``backend`` on this very device, the time that an answer takes there, and only then the switch. Installing what runs
    already changes nothing (``"unchanged": True``). The new bundle is on trial for ``starts`` starts (`edgekit.installed`).

    Returns ``bundle`` (path of ``current``), ``slot``, ``name``, ``digest``, ``sequence``, ``key_id``, ``golden``,
    ``latency_ms`` and ``latency_before_ms`` (p50 and p99 of single answers, of the new and of what ran), ``pack`` (where it
    came from), ``seconds`` by step. Raises `SignatureError` for an untrusted pack, `BundleError` for a damaged one,
    `GoldenError` where this device answers otherwise than training did, `BudgetNotMet` where p99 is above
    ``max_latency_ms``, `TurnedDown` for a bundle that was left here; the running slot then stays as it is.
    """
    if pub is None and not unsigned:
        raise SignatureError(
            "no public key was given to check the pack with", "add --pub edgekit.pub, or --unsigned for a pack of your own"
        )
    folder, steps = Path(root), Steps()
    _refuse_odd(folder, max_latency_ms, starts)
    remote = is_url(pack)
    trust = None if pub is None else _trust(pack, pub, folder, revoked)
    check = functools.partial(_checked, trust=trust, root=folder, allow_older=allow_older, again=again)
    if not remote:
        with steps("check"):
            pack = _looked_at(pack, folder, check)
    with explained(folder):
        _make(folder)
        with locked(folder), _incoming(folder) as work:
            with steps("fetch" if remote else "copy"):
                copy, pack = _copied(pack, folder, work, unsigned)
            with steps("extract"), open_pack(copy) as file, check(file, where=pack) as (archive, signed):
                running = current_slot(folder)
                known = _known(folder).slots.get(running) if running else None
                if known and same(folder / CURRENT, archive.manifest_bytes):
                    _remember(folder, trust, signed, archive.manifest.name)
                    return {**answer(folder, running, known), "unchanged": True, "pack": pack, "seconds": steps.seconds}
                if remote:
                    check_room(folder, *_needed(archive, folder, 0))
                fresh = work / "bundle"
                fresh.mkdir()
                archive.extract(fresh)
            tried = _tried(fresh, folder, backend, max_latency_ms, steps)
            with steps("switch"):
                # Before the switch: killed between, the device asks for no less.
                _remember(folder, trust, signed, archive.manifest.name)
                slot, record = place(folder, fresh, signed.key_ids[0] if signed else None, starts)
    return {**answer(folder, slot, record), **tried, "unchanged": False, "pack": pack, "seconds": steps.seconds}


def _make(folder: Path) -> None:
    """Make a root and the folders above it, each entry on disk when this returns."""
    missing = [each for each in (folder.absolute(), *folder.absolute().parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_path(each.parent)


def _trust(pack: str | os.PathLike[str], pub: PathOrPaths, folder: Path, revoked: PathOrPaths | None) -> Trust:
    """Whom this device believes, after a look at the list of revocations that lies where the pack does."""
    with tempfile.TemporaryDirectory() as near:
        if is_url(pack):
            fetch_beside(os.fspath(pack), Path(near) / REVOKED, MAX_BYTES + 1)
            return believe(pub, root=folder, revoked=revoked, pack=Path(near) / "F.zip")
        return believe(pub, root=folder, revoked=revoked, pack=Path(pack) / "F.zip" if Path(pack).is_dir() else pack)


def _copied(pack: str | os.PathLike[str], folder: Path, work: Path, unsigned: bool) -> tuple[Path, str]:
    """The private copy, and where it came from."""
    check_links(folder, work)
    copy = work / "pack.zip"
    if is_url(pack):
        return copy, fetch(os.fspath(pack), copy, check_room(folder, 0, 1), unsigned)
    with open_pack(pack) as file, copy.open("xb") as target:
        shutil.copyfileobj(unbroken(file, pack), target, 1 << 20)
    return copy, os.fspath(pack)


def _refuse_odd(folder: Path, max_latency_ms: float | None, starts: int) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "name a folder: --root DIR")
    if not 1 <= starts <= 1000:
        raise UsageError(f"{starts} starts", "a trial has 1 to 1000 starts: --starts 3")
    if max_latency_ms is not None and not 0 < max_latency_ms < 1e9:
        raise UsageError(f"a latency of {max_latency_ms} ms", "give milliseconds above 0: --max-latency-ms 20")


def _looked_at(pack: str | os.PathLike[str], folder: Path, check: Callable[..., Any]) -> Path:
    """The pack's file, checked where it lies, and room made sure of: all before anything is written."""

    def release(path: Path) -> int:  # one that was left is the newest all the same: no older one takes its place
        with open_pack(path) as file, check(file, where=os.fspath(path), again=True) as (_, signed):
            return signed.statement.release if signed else 0  # without a statement names decide

    with readable(pack):
        found = (
            from_folder(Path(pack), release) if Path(pack).is_dir() and not (Path(pack) / MANIFEST).is_file() else Path(pack)
        )
        with open_pack(found) as file, check(file, where=os.fspath(found)) as (archive, _):
            archive.check()
            needed = _needed(archive, folder, os.fstat(file.fileno()).st_size)
    with explained(folder):
        check_room(folder, *needed)
    return found


def _needed(archive: Archive, folder: Path, copy_bytes: int) -> tuple[int, int]:
    """Bytes and files that an install writes: a private copy, the bundle's files, its folders, links and notes."""
    folders = {entry.name.rpartition("/")[0] for entry in archive.entries}
    sizes = [copy_bytes, len(archive.manifest_bytes), *(entry.size_bytes for entry in archive.entries)]
    extra = len(folders) + 8
    return room_for(folder, sizes + [1] * extra), len(sizes) + extra


def _tried(fresh: Path, folder: Path, backend: str, max_latency_ms: float | None, steps: Steps) -> dict[str, Any]:
    """What an unpacked bundle answers here, and how fast; raises where it may not run."""
    for name, digest in Bundle.open(fresh).manifest.files.items():
        if name.endswith(".engine"):  # the signature was checked, or the user vouched for it
            trust_engine(digest)
    with Apart() as ask:
        with steps("golden"):
            golden = ask("self_test", fresh, backend)
        running = current_slot(folder)
        with steps("latency"):
            times = ask("check_latency", fresh, folder / SLOTS / running if running else None, backend, max_latency_ms)
    return {"golden": golden, **times}


@contextlib.contextmanager
def _checked(
    file: Any, *, where: str, trust: Trust | None, root: Path, allow_older: bool, again: bool
) -> Iterator[tuple[Archive, Checked | None]]:
    """The archive in an open file and who signed it, all checked before any parsing; without ``trust`` nobody is asked."""
    if trust is None:
        with open_archive(file, where) as archive:
            _refuse_left(root, archive, again)
            yield archive, None
    else:
        with checked(file, where, trust) as (archive, signed):
            admit(root, signed, archive.manifest.name, allow_older=allow_older)
            _refuse_left(root, archive, again)
            yield archive, signed


def _known(root: Path) -> State:
    """What ``state.json`` says; a damaged one says nothing, and is replaced with the switch."""
    try:
        return read_state(root)
    except BundleError:
        return State()


def _refuse_left(root: Path, archive: Archive, again: bool) -> None:
    """A bundle that did not work here, or that an operator went back from, is not taken a second time by whoever updates."""
    digest, state = Bundle(Path(archive.where), archive.manifest).digest, _known(root)
    running = state.slots.get(slot) if (slot := current_slot(root)) else None
    if not again and digest in state.left and not (running and running.digest == digest):  # a way back was cut off
        raise TurnedDown(
            f"{archive.manifest.name} ({digest[:12]}) was installed here before, and left by a way back; nothing was changed",
            f"install a newer one; to try it once more add --again (edgekit status --root {root} says what was left)",
        )


def _remember(root: Path, trust: Trust | None, signed: Checked | None, name: str) -> None:
    if trust is not None and signed is not None:
        remember(root, trust, signed, name)


@contextlib.contextmanager
def _incoming(root: Path) -> Iterator[Path]:
    """An empty work folder on the root's file system, gone afterwards."""
    work = root / INCOMING
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
