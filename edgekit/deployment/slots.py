"""Two slots under a root, switched by one rename: an update is there whole or not at all.

    ROOT/current        -> slots/a or slots/b, replaced by rename: the one truth about what runs
    ROOT/slots/a, b     bundles; the one that does not run is the way back, and the place of the next install
    ROOT/state.json     what is in each slot: name, digest, sequence number, time, key
    ROOT/.incoming      an install at work; left by a crash, removed by the next install

An install never touches the running slot. Killed anywhere, it leaves ``current`` on a complete bundle: the old one
until the rename, the new one after. The way back is only ever an older install (a lower sequence number), so a second
rollback cannot lead to the bundle that the first one left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError, EdgekitError, GoldenError, SignatureError, UsageError
from edgekit.files import atomic_write, locked, sync_path
from edgekit.progress import say
from edgekit.runtime import check_golden
from edgekit.trust import trust_engine

from .archive import Archive, open_archive
from .packing import checked, open_pack
from .signing import Checked, PathOrPaths
from .trusted import Trust, admit, believe, remember

__all__ = ["CURRENT", "install", "rollback", "status"]

CURRENT = "current"
STATE = "state.json"
INCOMING = ".incoming"
#: Bytes kept free beyond what an install writes: a device whose disk is full to the last block does not boot well.
RESERVE = 16 << 20
Slot = Literal["a", "b"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one slot holds. ``sequence`` grows with every install under this root; ``key_id`` is None for unsigned packs."""

    name: str
    digest: str
    sequence: int
    installed: str
    key_id: str | None = None


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``state.json``. ``sequence`` is the highest ever given, so that it is never given twice."""

    version: Literal[1] = 1
    sequence: int = 0
    slots: dict[Slot, Record] = {}


def install(
    pack: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str],
    pub: PathOrPaths | None = None,
    unsigned: bool = False,
    revoked: PathOrPaths | None = None,
    allow_older: bool = False,
    backend: str = "auto",
) -> dict[str, Any]:
    """Put a packed bundle into the free slot under ``root``, test it there, then switch ``current`` to it.

    In order: signature by ``pub`` (or, with ``unsigned``, hashes only), expiry, lists of what is ``revoked`` (as `verify`),
    releases accepted before (``allow_older``: take an older one all the same), disk space, a private copy that is checked
    again (a stick may answer otherwise the second time), extraction, the golden outputs on ``backend`` on this very
    device, and only then the switch. Installing what runs already changes nothing (``"unchanged": True``).

    Returns ``bundle`` (path of ``current``), ``slot``, ``name``, ``digest``, ``sequence``, ``key_id``, ``golden``.
    Raises `SignatureError` for an untrusted pack, `BundleError` for a damaged one, `GoldenError` where this device
    answers otherwise than training did; the running slot then stays as it is.
    """
    if pub is None and not unsigned:
        raise SignatureError(
            "no public key was given to check the pack with", "add --pub edgekit.pub, or --unsigned for a pack of your own"
        )
    folder = Path(root)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "name a folder: --root DIR")
    trust = None if pub is None else believe(pub, root=folder, revoked=revoked, pack=pack)
    check = functools.partial(_checked, where=os.fspath(pack), trust=trust, root=folder, allow_older=allow_older)
    with open_pack(pack) as file, check(file) as (archive, signed):
        archive.check()
        needed = os.fstat(file.fileno()).st_size + archive.total_bytes + RESERVE
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), _incoming(folder) as work:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EdgekitError(
                f"{folder} has {free >> 20} MiB free, the install needs {(needed >> 20) + 1}",
                "free some space; what is installed runs on",
            )
        copy = work / "pack.zip"
        with open_pack(pack) as file, copy.open("xb") as target:
            shutil.copyfileobj(file, target, 1 << 20)
        with open_pack(copy) as file, check(file) as (archive, signed):
            running = _current(folder)
            if running and _same(folder / CURRENT, archive.manifest_bytes):
                _remember(folder, trust, signed, archive.manifest.name)
                return {**_answer(folder, running, _state(folder).slots.get(running)), "unchanged": True}
            fresh = work / "bundle"
            fresh.mkdir()
            archive.extract(fresh)
        _trust(fresh)
        golden = _self_test(fresh, backend)
        slot: Slot = "b" if running == "a" else "a"
        record = _place(folder, fresh, slot, signed.key_ids[0] if signed else None)
        _remember(folder, trust, signed, record.name)  # before the switch: killed between, the device asks for no less
        _switch(folder, slot)
    return {**_answer(folder, slot, record), "golden": golden, "unchanged": False}


def rollback(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Switch ``current`` to the bundle that was installed before; its hashes are checked first.

    Returns ``bundle``, ``slot``, ``name``, ``digest``, ``sequence``, ``key_id`` and ``left`` (the digest of the bundle that
    ran until now).
    Raises `BundleError` where there is no older bundle, or it is damaged; what runs then runs on.
    """
    folder = _existing(root)
    with locked(folder):
        running = _current(folder)
        if running is None:
            raise BundleError(f"nothing is installed in {folder}", "install first: edgekit install F.zip --root DIR")
        state = _state(folder)
        slot: Slot = "b" if running == "a" else "a"
        now, before = state.slots.get(running), state.slots.get(slot)
        if before is None or (now is not None and before.sequence > now.sequence):
            raise BundleError(f"{folder} holds no older bundle to go back to", "install one: edgekit install F.zip --root DIR")
        if reason := _fault(folder / "slots" / slot, before):
            raise BundleError(f"the older bundle cannot run: {reason}", "install one: edgekit install F.zip --root DIR")
        _switch(folder, slot)
    return {**_answer(folder, slot, before), "left": now.digest if now else None}


def status(root: str | os.PathLike[str]) -> dict[str, Any]:
    """What runs under ``root``, and whether its files are whole.

    Returns ``slot`` (None where nothing is installed), ``bundle``, ``name``, ``digest``, ``sequence``, ``installed``,
    ``key_id``, ``healthy``, ``reason`` (None where healthy) and ``previous`` (the bundle a rollback leads to, or None).
    """
    folder = _existing(root)
    running = _current(folder)
    if running is None:
        link = folder / CURRENT
        reason = f"{link} leads to no slot" if link.is_symlink() or link.exists() else "nothing is installed"
        return {**_answer(folder, None, None), "healthy": False, "reason": reason, "previous": None}
    state = _state(folder)
    slot: Slot = "b" if running == "a" else "a"
    now, before = state.slots.get(running), state.slots.get(slot)
    older = before is not None and (now is None or before.sequence < now.sequence)
    reason = _fault(folder / "slots" / running, now)
    return {
        **_answer(folder, running, now),
        "healthy": not reason,
        "reason": reason or None,
        "previous": {"slot": slot, **msgspec.to_builtins(before)} if older else None,
    }


@contextlib.contextmanager
def _checked(
    file: Any, *, where: str, trust: Trust | None, root: Path, allow_older: bool
) -> Iterator[tuple[Archive, Checked | None]]:
    """The archive in an open file and who signed it, all checked before any parsing; without ``trust`` nobody is asked."""
    if trust is None:
        with open_archive(file, where) as archive:
            yield archive, None
    else:
        with checked(file, where, trust) as (archive, signed):
            admit(root, signed, archive.manifest.name, allow_older=allow_older)
            yield archive, signed


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


def _trust(bundle: Path) -> None:
    """The pack's signature was checked, or the user vouched for it: its engines may be loaded on this machine."""
    for name, digest in Bundle.open(bundle).manifest.files.items():
        if name.endswith(".engine"):
            trust_engine(digest)


def _self_test(bundle: Path, backend: str) -> dict[str, float]:
    """Run the golden inputs on this device. Raises `GoldenError` where the answers differ or are not finite."""
    say("checking the golden outputs on this device")
    opened = Bundle.open(bundle)
    result = check_golden(opened, backend=backend)
    if not result.relative < float("inf"):
        raise GoldenError(
            f"{opened.graph} answers with NaN, infinity or a wrong shape here", "do not install it; build it again"
        )
    return {"relative": result.relative, "snr_db": result.snr_db}


def _place(root: Path, fresh: Path, slot: Slot, key_id: str | None) -> Record:
    """Move a tested bundle into the slot that does not run, and record it."""
    for path in sorted(fresh.rglob("*")):
        sync_path(path)
    sync_path(fresh)
    state = _state(root)
    others: dict[Slot, Record] = {name: record for name, record in state.slots.items() if name != slot}
    if slot in state.slots:  # from here on the slot is no way back
        _write_state(root, State(sequence=state.sequence, slots=others))
    place = root / "slots" / slot
    place.parent.mkdir(exist_ok=True)
    if place.exists() or place.is_symlink():
        os.rename(place, root / INCOMING / "old")
    os.rename(fresh, place)
    sync_path(place.parent)
    opened = Bundle.open(place, verify=False)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = Record(opened.manifest.name, opened.digest, state.sequence + 1, now, key_id)
    _write_state(root, State(sequence=record.sequence, slots={**others, slot: record}))
    return record


def _switch(root: Path, slot: Slot) -> None:
    """Let ``current`` lead to a slot: a link made beside, then one rename."""
    beside = root / f".{CURRENT}.new"
    beside.unlink(missing_ok=True)
    beside.symlink_to(Path("slots") / slot)
    os.replace(beside, root / CURRENT)
    sync_path(root)


def _current(root: Path) -> Slot | None:
    """The slot that ``current`` leads to, where that is one of ours and there."""
    link = root / CURRENT
    slots: tuple[Slot, Slot] = ("a", "b")
    target = os.readlink(link) if link.is_symlink() else ""
    return next((slot for slot in slots if target == f"slots/{slot}" and (root / target / MANIFEST).is_file()), None)


def _same(current: Path, manifest: bytes) -> bool:
    """Whether a bundle with this very manifest runs already, whole."""
    try:
        return (current / MANIFEST).read_bytes() == manifest and bool(Bundle.open(current))
    except BundleError:
        return False


def _fault(slot: Path, record: Record | None) -> str:
    """Why a slot's bundle cannot be trusted to run; empty where all is well."""
    try:
        digest = Bundle.open(slot).digest
    except (BundleError, OSError) as error:
        return str(error)
    if record is None:
        return f"{STATE} does not know what {slot} holds"
    return "" if digest == record.digest else f"{slot} is not the bundle that was installed"


def _answer(root: Path, slot: Slot | None, record: Record | None) -> dict[str, Any]:
    known = msgspec.to_builtins(record) if record else dict.fromkeys(Record.__struct_fields__)
    return {"bundle": str(root / CURRENT) if slot else None, "slot": slot, **known}


def _existing(root: str | os.PathLike[str]) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise BundleError(f"there is no folder {folder}", "install first: edgekit install F.zip --root DIR")
    return folder


def _state(root: Path) -> State:
    """``state.json``, or an empty state where there is none. Raises `BundleError` where it is damaged."""
    path = root / STATE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged: {error}", f"remove it and install again; {root / CURRENT} runs on meanwhile"
        ) from None


def _write_state(root: Path, state: State) -> None:
    """Only within an install: it writes in the work folder, so that a crash leaves no temporary file for good."""
    beside = root / INCOMING / STATE
    atomic_write(beside, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
    os.replace(beside, root / STATE)
    sync_path(root)
