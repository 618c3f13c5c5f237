"""What a root holds: its slots, ``state.json`` and the one link that says what runs."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError
from edgekit.files import replace_note, sync_path
from edgekit.progress import say

__all__ = [
    "CURRENT",
    "SLOTS",
    "STARTS",
    "STATE",
    "Faults",
    "Record",
    "Return",
    "Slot",
    "State",
    "Trial",
    "current_slot",
    "fault",
    "leads_to",
    "now",
    "other_slot",
    "read_state",
    "root_of",
    "state_again",
    "switch",
    "way_back",
    "write_state",
]

CURRENT = "current"
SLOTS = "slots"
STATE = "state.json"
#: Starts that a new bundle has to prove itself, where an install says nothing else.
STARTS = 3
#: Bundles that were given up are remembered, so many of them.
MOST_LEFT = 100
Slot = Literal["a", "b"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one slot holds. ``sequence`` grows with every install under this root; ``key_id`` is None for unsigned packs.

    ``confirmed``: when an application said that it works; None while none has. ``release``, ``pack_digest`` and ``key_ids``: of
    the signed pack that it came in, its digest without the trailer and all keys that were believed.
    """

    name: str
    digest: str
    sequence: int
    installed: str
    key_id: str | None = None
    confirmed: str | None = None
    release: int | None = None
    pack_digest: str | None = None
    key_ids: tuple[str, ...] = ()


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the install with this ``sequence``: ``failed`` of ``allowed`` starts, and the tokens (`lives`) of those that have not
    ended yet as far as is known. ``error``: what the last one that could still speak said."""

    sequence: int
    allowed: int = STARTS
    failed: int = 0
    starts: tuple[str, ...] = ()
    error: str | None = None


class Return(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A way back that was taken: ``left`` is the bundle that ran, ``sequence`` the install that was gone back to."""

    time: str
    reason: str
    left: Record
    sequence: int


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``state.json``. ``sequence`` is the highest ever given, so that it is never given twice. ``left``: digests of the bundles
    that a way back has led away from, the newest last."""

    version: Literal[1] = 1
    sequence: int = 0
    slots: dict[Slot, Record] = {}
    trial: Trial | None = None
    returned: Return | None = None
    left: tuple[str, ...] = ()

    def leaving(self, record: Record) -> State:
        """With a bundle that was given up: no install takes it again unasked."""
        kept = tuple(digest for digest in self.left if digest != record.digest)
        return msgspec.structs.replace(self, left=(*kept, record.digest)[-MOST_LEFT:])

    def trial_of(self, slot: Slot | None) -> Trial | None:
        """The trial of what is in ``slot``; one that was cut off before its switch is of nothing that runs."""
        record = self.slots.get(slot) if slot else None
        return self.trial if record and self.trial and self.trial.sequence == record.sequence else None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def other_slot(slot: Slot | None) -> Slot:
    """Where an install goes while ``slot`` runs."""
    return "b" if slot == "a" else "a"


def leads_to(root: Path) -> Slot | None:
    """The slot that ``current`` names, whatever is in it."""
    link = root / CURRENT
    slots: tuple[Slot, Slot] = ("a", "b")
    target = os.readlink(link) if link.is_symlink() else ""
    return next((slot for slot in slots if target == f"{SLOTS}/{slot}"), None)


def current_slot(root: Path) -> Slot | None:
    """The slot that ``current`` leads to, where that is one of ours and there."""
    slot = leads_to(root)
    return slot if slot and (root / SLOTS / slot / MANIFEST).is_file() else None


def root_of(bundle: str | os.PathLike[str]) -> Path | None:
    """The root, where ``bundle`` is the ``current`` of one."""
    path = Path(bundle)
    return path.parent if path.name == CURRENT and path.is_symlink() and leads_to(path.parent) else None


def switch(root: Path, slot: Slot) -> None:
    """Let ``current`` lead to a slot: a link made beside, then one rename."""
    beside = root / f".{CURRENT}.new"
    beside.unlink(missing_ok=True)
    beside.symlink_to(Path(SLOTS) / slot)
    os.replace(beside, root / CURRENT)
    sync_path(root)


def read_state(root: Path) -> State:
    """``state.json``, or an empty state where there is none. Raises `BundleError` where it is damaged."""
    path = root / STATE
    try:
        return msgspec.convert(_as_now(msgspec.json.decode(path.read_bytes())), State)
    except FileNotFoundError:
        return State()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged: {error}", f"install again, which writes a new one; {root / CURRENT} runs on meanwhile"
        ) from None


def _as_now(found: Any) -> Any:
    """Notes of 0.1.0 before its release named a start by its process: those have ended, but for 0, which was no process of
    ours."""
    trial = found.get("trial") if isinstance(found, dict) else None
    if isinstance(trial, dict) and isinstance(starts := trial.get("starts"), list):
        trial["starts"] = [("gone" if each.get("pid") else "") if isinstance(each, dict) else each for each in starts]
    return found


def state_again(root: Path, before: State | None = None) -> State:
    """`read_state` for who is about to write it: where it is damaged, or was removed, the bundle that runs is noted anew, so
    that there is a way back to it. Its number is the clock's seconds, which no count of installs has reached: a start that was
    noted before does not speak for what comes after. ``before``: what this found a moment ago, which then stands."""
    try:
        state = read_state(root)
        if state.sequence or not leads_to(root):
            return state
        if before:
            return before
        say(f"{root / STATE} is gone: what it knew of the slots is given up", level="warning")
    except BundleError as error:
        if before:
            return before
        say(f"{error.message}; what it knew of the slots is given up", level="warning")
    sequence, slots = max(1, int(time.time())), dict[Slot, Record]()
    if running := current_slot(root):
        try:
            opened = Bundle.open(root / SLOTS / running)
            slots[running] = Record(opened.manifest.name, opened.digest, sequence, now())
        except BundleError as error:
            say(f"what runs is no way back: {error.message}", level="warning")
    return State(sequence=sequence, slots=slots)


def write_state(root: Path, state: State) -> None:
    """The caller holds the lock of the slots."""
    replace_note(root / STATE, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")


def fault(slot: Path, record: Record | None) -> str:
    """Why a slot's bundle cannot be trusted to run; empty where all is well. Every file is hashed."""
    try:
        digest = Bundle.open(slot).digest
    except (BundleError, OSError) as error:
        return str(error)
    if record is None:
        return f"{STATE} does not know what {slot} holds"
    return "" if digest == record.digest else f"{slot} is not the bundle that was installed"


class Faults:
    """`fault` of what lies in the slots of a root, asked once for each record.

    Who will need it under the lock of the slots asks before (`ahead`): gigabytes take seconds to hash, and a start waits two
    for that lock. A slot changes hands with a new record only.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._found: dict[tuple[Slot, Record], str] = {}

    def ahead(self) -> None:
        """Ask for what the running bundle can be left for, as it stands before the lock."""
        with contextlib.suppress(BundleError):  # damaged notes are the business of who holds the lock
            slot = leads_to(self._root)
            if before := way_back(read_state(self._root), slot):
                self(other_slot(slot), before)

    def __call__(self, slot: Slot, record: Record) -> str:
        if (slot, record) not in self._found:
            self._found[slot, record] = fault(self._root / SLOTS / slot, record)
        return self._found[slot, record]


def way_back(state: State, slot: Slot | None) -> Record | None:
    """The older bundle that what is in ``slot`` can be left for: never a newer install."""
    running, before = (state.slots.get(slot) if slot else None), state.slots.get(other_slot(slot))
    return before if before and (running is None or before.sequence < running.sequence) else None
