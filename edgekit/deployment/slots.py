"""Two slots under a root, switched by one rename: an update is there whole or not at all.

    ROOT/current, slots/a, slots/b, state.json      see `edgekit.installed`
    ROOT/.incoming-*                                an install at work; left by a crash, removed by the next install

An install never touches the slot that ``current`` leads to; where that is on trial and the older one has proved itself,
``current`` is switched back first. The way back is only ever an older install (a lower sequence number), so a second rollback
cannot lead to the bundle that the first one left; and a bundle that was confirmed is not given up for one that still has to
prove itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError, EdgekitError, SignatureError, UsageError
from edgekit.files import locked, sync_path
from edgekit.installed import (
    CURRENT,
    LOCK,
    PATIENCE_S,
    SLOTS,
    STATE,
    Faults,
    Record,
    Return,
    Slot,
    State,
    Trial,
    current_slot,
    fault,
    hold,
    leads_to,
    lives,
    now,
    other_slot,
    read_state,
    state_again,
    switch,
    way_back,
    write_state,
)
from edgekit.progress import say

from .archive import make_readable
from .checks import explained
from .trusted import memory

__all__ = ["answer", "incoming", "place", "renew", "rollback", "same", "status"]

INCOMING = ".incoming"
_ATTEMPTS = 20


def rollback(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Switch ``current`` to the bundle that was installed before; its hashes are checked first.

    Returns ``bundle``, ``slot``, ``name``, ``digest``, ``sequence``, ``installed``, ``confirmed``, ``key_id``, ``key_ids``,
    ``pack_digest``, ``release`` and ``left`` (the digest of the bundle that ran until now).
    Raises `BundleError` where there is no older bundle, or it is damaged; what runs then runs on.
    """
    folder = _existing(root)
    if leads_to(folder) is None:
        raise BundleError(f"nothing is installed in {folder}", "install first: edgekit install F.zip --root DIR")
    faults = Faults(folder)
    with explained(folder), hold(folder, PATIENCE_S):
        faults.ahead()
        with hold(folder / SLOTS, PATIENCE_S):
            slot, before, left = _gone_back(folder, faults)
    return {**answer(folder, slot, before), "left": left.digest if left else None}


def _gone_back(root: Path, faults: Faults) -> tuple[Slot, Record, Record | None]:
    """Switch to the older bundle, noted first; the locks are held. The slot and record of it, and of what ran until now."""
    running, state = leads_to(root), read_state(root)
    slot, before = other_slot(running), way_back(state, running)
    left = state.slots.get(running) if running else None
    if before is None:
        known = "" if state.slots else f", as far as its {STATE} tells, which knows of none"
        raise BundleError(f"{root} holds no older bundle to go back to{known}", "install one: edgekit install F.zip --root DIR")
    if reason := _unfit(root, slot, before, faults):
        raise BundleError(f"the older bundle cannot run: {reason}", "install one: edgekit install F.zip --root DIR")
    if left is not None:
        note = Return(now(), "asked for by edgekit rollback", left, before.sequence)
        try:
            write_state(root, msgspec.structs.replace(state.leaving(left), returned=note))
        except OSError as error:  # a full disk does not keep anybody from going back
            say(f"the rollback cannot be noted in {root}: {error.strerror}", level="warning")
    switch(root, slot)
    return slot, before, left


def _unfit(folder: Path, slot: Slot, record: Record, faults: Faults) -> str:
    """Why a bundle is no way back for who asks for it; empty where it is one. A way back that a start takes by itself asks for
    whole files only: a revoked model that works is better than none, and `status` says what runs."""
    try:
        revoked = memory(folder).revoked
    except SignatureError as error:  # nobody is kept from going back by it
        say(f"{error.message}: what is revoked is not asked", level="warning")
        return faults(slot, record)
    if {record.digest, record.pack_digest} & revoked.digests:
        return "its makers have revoked it"
    signers = record.key_ids or ((record.key_id,) if record.key_id else ())
    if signers and set(signers) <= revoked.keys:
        return f"its key {', '.join(signers)} is revoked"
    return faults(slot, record)


def status(root: str | os.PathLike[str]) -> dict[str, Any]:
    """What runs under ``root``, whether its files are whole, and whether it has proved itself.

    Returns ``slot`` (None where nothing is installed), ``bundle``, ``name``, ``digest``, ``sequence``, ``installed``,
    ``confirmed``, ``key_id``, ``key_ids``, ``pack_digest``, ``release``,
    ``healthy``, ``reason`` (None where healthy), ``previous`` (the bundle a rollback leads to, or None), ``trial`` (None, or
    ``start`` of ``allowed``, how many ``failed``, ``running`` (None: not known, as after `mark`) and the last ``error``),
    ``returned`` (the last way back: ``time``, ``reason``, ``left``; None where there was none since), ``left`` (digests of the
    bundles that were given up here, the newest last: an install takes them only where it is told ``again``) and
    ``free_bytes``.
    """
    folder = _existing(root)
    running, disk = current_slot(folder), os.statvfs(folder)
    free = {"free_bytes": disk.f_bavail * disk.f_frsize}
    if running is None:
        link = folder / CURRENT
        reason = "nothing is installed"
        if link.is_symlink() or link.exists():
            reason = f"{link} leads to no slot"
        elif any((folder / SLOTS / slot).exists() for slot in ("a", "b")):
            reason = f"{link} is gone, what was installed lies in {folder / SLOTS}"
        nothing = {"healthy": False, "reason": reason, "previous": None, "trial": None, "returned": None, "left": []}
        if (named := leads_to(folder)) and (older := way_back(read_state(folder), named)):
            nothing["previous"] = {"slot": other_slot(named), **msgspec.to_builtins(older)}
        return {**answer(folder, None, None), **nothing, **free}
    state = read_state(folder)
    record, before = state.slots.get(running), way_back(state, running)
    reason = fault(folder / SLOTS / running, record)
    gone = state.returned if state.returned and record and state.returned.left.sequence != record.sequence else None
    return {
        **answer(folder, running, record),
        "healthy": not reason,
        "reason": reason or None,
        "previous": {"slot": other_slot(running), **msgspec.to_builtins(before)} if before else None,
        "trial": _trial(folder, state.trial_of(running)),
        "returned": msgspec.to_builtins(gone),
        "left": [digest for digest in state.left if record is None or digest != record.digest],
        **free,
    }


def _trial(folder: Path, trial: Trial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    running, unknown = sum(lives(folder, start) for start in trial.starts), trial.starts.count("")
    failed = trial.failed + len(trial.starts) - running - unknown
    about = {"start": failed + bool(running or unknown), "allowed": trial.allowed, "failed": failed}
    return {**about, "running": bool(running) or (None if unknown else False), "error": trial.error}


@contextlib.contextmanager
def incoming(root: Path) -> Iterator[Path]:
    """An empty work folder on the root's file system, this process's alone and gone afterwards.

    Those that a crash has left behind go first; a root that was made for it and holds nothing goes with it.
    """
    made = _make(root)
    for left in root.glob(f"{INCOMING}*"):
        with contextlib.suppress(EdgekitError, OSError), _ours(left):  # another install's, or just removed by one
            _remove(left)
    with contextlib.ExitStack() as stack:
        work = _worked(root, stack)
        try:
            yield work
        finally:
            _remove(work)
            if made and not (root / SLOTS).exists():
                with contextlib.suppress(OSError, EdgekitError):  # a list of revocations stays, and another install's root
                    with hold(root, 0.0):
                        (root / LOCK).unlink()
                    for each in made:
                        each.rmdir()


def _worked(root: Path, stack: contextlib.ExitStack) -> Path:
    """A new work folder, locked. One that another install takes for a crash's before the lock is on it is made anew."""
    for _ in range(_ATTEMPTS):
        work = root / f"{INCOMING}-{secrets.token_hex(4)}"
        work.mkdir(mode=0o700)
        with contextlib.suppress(EdgekitError, FileNotFoundError):
            stack.enter_context(_ours(work))
            if work.exists():
                return work
    raise EdgekitError(f"other installs in {root} remove what this one makes", "wait for them, then try again")


@contextlib.contextmanager
def _ours(work: Path) -> Iterator[None]:
    """Held for as long as its process lives. Raises `EdgekitError` where another's does."""
    if work.is_file() or work.is_symlink():
        yield
    else:
        with locked(work, wait=False):
            yield


def _remove(work: Path) -> None:
    if work.is_dir() and not work.is_symlink():
        shutil.rmtree(work, ignore_errors=True)
    else:
        work.unlink(missing_ok=True)


def _make(root: Path) -> list[Path]:
    """Make a root and the folders above it, each entry on disk when this returns; those that were made, the root first."""
    missing = [each for each in (root.absolute(), *root.absolute().parents) if not each.exists()]
    for each in reversed(missing):
        make_readable(each)
    for each in missing:
        sync_path(each.parent)
    return missing


def place(root: Path, fresh: Path, work: Path, record: Record, starts: int) -> tuple[Slot, Record]:
    """Move a tested bundle into the slot that does not run, record it under the next number, put it on trial, and switch to it.

    ``work``: where the bundle that lay in the slot goes.
    """
    for path in sorted(fresh.rglob("*")):
        sync_path(path)
    sync_path(fresh)
    slots = root / SLOTS
    make_readable(slots)
    faults = Faults(root)
    before = state_again(root)  # where notes were lost it hashes what runs, as `faults` does
    if before.trial:
        faults.ahead()
    with hold(slots, PATIENCE_S):
        state = state_again(root, before)
        slot = _free_slot(root, state, faults)
        others: dict[Slot, Record] = {name: each for name, each in state.slots.items() if name != slot}
        if slot in state.slots:  # from here on the slot is no way back
            state = msgspec.structs.replace(state, slots=others)
            write_state(root, state)
        home = slots / slot
        if home.exists() or home.is_symlink():
            os.rename(home, work / "old")
        os.rename(fresh, home)
        sync_path(slots)
        record = msgspec.structs.replace(record, sequence=state.sequence + 1, installed=now())
        left = tuple(digest for digest in state.left if digest != record.digest)
        slots_now = {**others, slot: record}
        trial = Trial(record.sequence, starts)
        write_state(root, State(sequence=record.sequence, slots=slots_now, trial=trial, returned=state.returned, left=left))
        switch(root, slot)
    return slot, record


def renew(root: Path, slot: Slot, record: Record, told: dict[str, Any]) -> Record:
    """The same bundle came in another pack: its record says so from now on, for who asks by whom it was signed."""
    fresh = msgspec.structs.replace(record, **told)
    if fresh != record:
        with hold(root / SLOTS, PATIENCE_S):
            state = read_state(root)
            if state.slots.get(slot) == record:
                write_state(root, msgspec.structs.replace(state, slots={**state.slots, slot: fresh}))
    return fresh


def _free_slot(root: Path, state: State, faults: Faults) -> Slot:
    """Where an install goes: not to what runs. Where that has not proved itself and the older one has, the older one runs
    again first, and stays the way back."""
    running = current_slot(root)
    if running is None:  # a slot that is named and not there, else the one that holds less
        sequence = {slot: record.sequence for slot, record in state.slots.items()}
        return leads_to(root) or ("a" if sequence.get("a", 0) <= sequence.get("b", 0) else "b")
    other = other_slot(running)
    before = way_back(state, running)
    unproven = state.trial_of(running) is not None
    if unproven and before and before.confirmed and not faults(other, before):
        say(f"{state.slots[running].name} never proved itself: {before.name} stays the way back")
        switch(root, other)
        return running
    return other


def same(current: Path, manifest: bytes) -> bool:
    """Whether a bundle with this very manifest runs already, whole."""
    try:
        return (current / MANIFEST).read_bytes() == manifest and bool(Bundle.open(current))
    except BundleError:
        return False


def answer(root: Path, slot: Slot | None, record: Record | None) -> dict[str, Any]:
    known = msgspec.to_builtins(record) if record else dict.fromkeys(Record.__struct_fields__)
    return {"bundle": str(root / CURRENT) if slot else None, "slot": slot, **known}


def _existing(root: str | os.PathLike[str]) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise BundleError(f"there is no folder {folder}", "install first: edgekit install F.zip --root DIR")
    if (folder / MANIFEST).is_file():
        above = folder.parent if folder.name == CURRENT else "DIR"
        raise UsageError(f"{folder} is a bundle, and no root of installs", f"name the folder above it: --root {above}")
    return folder
