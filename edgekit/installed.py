"""What is installed under a root, and whether it has proved itself: what install, the scanner and other applications share.

    ROOT/current        -> slots/a or slots/b, replaced by rename: the one truth about what runs
    ROOT/slots/a, b     bundles; the one that does not run is the way back, and the place of the next install
    ROOT/state.json     what is in each slot; the trial of the one that runs; the last way back that was taken, and why

After a switch the new bundle is on trial: each start is noted here before anything of it is loaded, and struck off when it
was stopped in order. Once one has worked, it is confirmed and the trial is over; after so many starts that ended otherwise
(a crash, a kill, the watchdog, no memory) the next one goes back to the older bundle first.

Every change is one file or link made beside and renamed, in an order that leaves a whole bundle in ``current`` wherever the
power goes. Changes are made under a lock on ``slots``, held for as long as a few renames take.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from .bundle import MANIFEST, Bundle
from .errors import BundleError, EdgekitError
from .files import locked, sync_path

__all__ = [
    "CURRENT",
    "SLOTS",
    "STARTS",
    "Record",
    "Return",
    "Slot",
    "Start",
    "State",
    "Trial",
    "current_slot",
    "fault",
    "leads_to",
    "mark",
    "now",
    "other_slot",
    "read_state",
    "root_of",
    "starting",
    "switch",
    "way_back",
    "write_state",
]

CURRENT = "current"
SLOTS = "slots"
STATE = "state.json"
#: Starts that a new bundle has to prove itself, where an install says nothing else.
STARTS = 3
_BOOT = Path("/proc/sys/kernel/random/boot_id")
Slot = Literal["a", "b"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one slot holds. ``sequence`` grows with every install under this root; ``key_id`` is None for unsigned packs.

    ``confirmed``: when an application said that it works; None while none has.
    """

    name: str
    digest: str
    sequence: int
    installed: str
    key_id: str | None = None
    confirmed: str | None = None


class Starter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process that has started with the bundle on trial: its number, when it began (clock ticks since boot), which boot.

    ``pid`` 0 stands for an application that is no process of ours (``edgekit status --mark start``).
    """

    pid: int
    began: int
    boot: str

    def alive(self) -> bool:
        """Whether that very process still runs. One of another user that may not be looked at counts as alive."""
        if not self.pid or self.boot != _boot():
            return False
        if (began := _began(self.pid)) is not None:
            return began == self.began
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return not self.began


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the install with this ``sequence``: ``failed`` of ``allowed`` starts, and those that have not ended yet as far as is
    known. ``error``: what the last one that could still speak said."""

    sequence: int
    allowed: int = STARTS
    failed: int = 0
    starts: tuple[Starter, ...] = ()
    error: str | None = None

    def failures(self) -> int:
        """Starts that ended without a confirmation."""
        return self.failed + sum(not start.alive() for start in self.starts)


class Return(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A way back that was taken: ``left`` is the bundle that ran, ``sequence`` the install that was gone back to."""

    time: str
    reason: str
    left: Record
    sequence: int


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``state.json``. ``sequence`` is the highest ever given, so that it is never given twice."""

    version: Literal[1] = 1
    sequence: int = 0
    slots: dict[Slot, Record] = {}
    trial: Trial | None = None
    returned: Return | None = None

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
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged: {error}", f"remove it and install again; {root / CURRENT} runs on meanwhile"
        ) from None


def write_state(root: Path, state: State) -> None:
    """One name beside, so that a crash leaves one file for the next write to take; the caller holds the lock."""
    beside = root / f".{STATE}.new"
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, root / STATE)
    sync_path(root)


def fault(slot: Path, record: Record | None) -> str:
    """Why a slot's bundle cannot be trusted to run; empty where all is well. Every file is hashed."""
    try:
        digest = Bundle.open(slot).digest
    except (BundleError, OSError) as error:
        return str(error)
    if record is None:
        return f"{STATE} does not know what {slot} holds"
    return "" if digest == record.digest else f"{slot} is not the bundle that was installed"


def way_back(state: State, slot: Slot | None) -> Record | None:
    """The older bundle that what is in ``slot`` can be left for: never a newer install."""
    running, before = (state.slots.get(slot) if slot else None), state.slots.get(other_slot(slot))
    return before if before and (running is None or before.sequence < running.sequence) else None


@dataclass
class Start:
    """One start of an application with the bundle under a root; made by `starting`, used from one thread.

    ``bundle``: the slot to open, which no later switch changes. ``trial``: None where nothing is to be proved.
    ``returned``: the way back that this start took. ``doubt``: what is wrong with the trial, in words: it could not be noted
    (the start counts for nothing then), or there is nothing whole to go back to.
    """

    root: Path
    bundle: Path
    sequence: int | None = None
    trial: Trial | None = None
    returned: Return | None = None
    doubt: str = ""
    _starter: Starter = field(default_factory=lambda: _own(), repr=False)
    _open: bool = field(default=True, repr=False)

    def confirm(self) -> bool:
        """It works: the trial is over, and what runs is a bundle that later ones may be left for.

        False where it cannot be written.
        """

        def confirmed(state: State) -> State:
            slots = {
                slot: msgspec.structs.replace(record, confirmed=record.confirmed or now())
                if record.sequence == self.sequence
                else record
                for slot, record in state.slots.items()
            }
            over = state.trial is not None and state.trial.sequence == self.sequence
            return msgspec.structs.replace(state, slots=slots, trial=None if over else state.trial)

        return self._end(confirmed)

    def withdraw(self) -> bool:
        """It was stopped in order before it could prove anything: the start counts for nothing."""
        return self._end(self._struck_off)

    def fail(self, reason: str) -> bool:
        """It did not work, and can still say why; who is killed need not, the next start sees that."""

        def failed(state: State) -> State:
            trial = self._struck_off(state).trial
            if trial is None or trial.sequence != self.sequence:
                return state
            told = msgspec.structs.replace(trial, failed=trial.failed + 1, error=reason[:500] or None)
            return msgspec.structs.replace(state, trial=told)

        return self._end(failed)

    def _struck_off(self, state: State) -> State:
        trial = state.trial
        if trial is None or trial.sequence != self.sequence or self._starter not in trial.starts:
            return state
        left = list(trial.starts)
        left.remove(self._starter)
        return msgspec.structs.replace(state, trial=msgspec.structs.replace(trial, starts=tuple(left)))

    def _end(self, change: Callable[[State], State]) -> bool:
        """Only once, and only where there is something to change."""
        if not self._open or self.sequence is None:
            return True
        self._open = False
        try:
            with locked(self.root / SLOTS):
                state = read_state(self.root)
                if (changed := change(state)) != state:
                    write_state(self.root, changed)
        except (OSError, EdgekitError) as error:
            self.doubt = _words(error)
            return False
        return True


def starting(root: str | os.PathLike[str]) -> Start:
    """Note that an application starts with what is installed under ``root``, before it loads anything of it.

    Durable when it returns. Where the bundle on trial has had all its starts and never worked, ``current`` is switched back
    to the older one first, if that is whole. Several processes may start on one root: one that still runs is no failure.

    A root that this user cannot write, or whose ``state.json`` is damaged, is used all the same; ``doubt`` then says why
    nothing was noted. Raises `BundleError` where nothing is installed.
    """
    folder = Path(root)
    slot = leads_to(folder)
    if slot is None:
        raise BundleError(f"nothing is installed in {folder}", "install first: edgekit install F.zip --root DIR")
    try:
        with locked(folder / SLOTS):
            return _noted(folder, _own())
    except (OSError, EdgekitError) as error:
        return Start(folder, folder / SLOTS / slot, doubt=_words(error))


def mark(root: str | os.PathLike[str], what: Literal["start", "healthy", "stopped"]) -> Start:
    """`starting`, `Start.confirm` and `Start.withdraw` for an application that is no Python: each from a process of its own.

    A start without an end counts as failed at the next one. Raises `BundleError` where nothing is installed or ``state.json``
    is damaged, `OSError` where it cannot be written.
    """
    folder = Path(root)
    slot = leads_to(folder)
    if slot is None:
        return starting(folder)  # which says so
    if what == "start":
        with locked(folder / SLOTS):
            return _noted(folder, _FOREIGN)
    record = read_state(folder).slots.get(slot)
    start = Start(folder, folder / SLOTS / slot, record.sequence if record else None, _starter=_FOREIGN)
    if not (start.confirm() if what == "healthy" else start.withdraw()):
        raise EdgekitError(f"{folder} cannot be written: {start.doubt}", "run it as the user that the root belongs to")
    return start


def _noted(root: Path, starter: Starter) -> Start:
    state, slot = read_state(root), leads_to(root)
    assert slot is not None  # nothing takes it away
    trial, doubt = state.trial_of(slot), ""
    if trial is not None:
        alive = tuple(start for start in trial.starts if start.alive())
        trial = msgspec.structs.replace(trial, failed=trial.failures(), starts=alive)
        if trial.failed >= trial.allowed:
            if taken := _returned(root, state, slot, trial):
                return Start(root, root / SLOTS / other_slot(slot), taken.sequence, returned=taken)
            doubt = f"{trial.failed} starts without a sign of health, and there is no whole older bundle to go back to"
        trial = msgspec.structs.replace(trial, starts=(*alive, starter))
        write_state(root, msgspec.structs.replace(state, trial=trial))
    record = state.slots.get(slot)
    return Start(root, root / SLOTS / slot, record.sequence if record else None, trial, doubt=doubt, _starter=starter)


def _returned(root: Path, state: State, slot: Slot, trial: Trial) -> Return | None:
    """Switch back, where there is a whole bundle to go back to. The note is written first: a switch that is cut off is made at
    the next start."""
    before, place = way_back(state, slot), root / SLOTS / other_slot(slot)
    if before is None or fault(place, before):
        return None
    said = f"; the last said: {trial.error}" if trial.error else ""
    reason = f"{trial.failed} starts without a sign of health" + said
    taken = Return(now(), reason, state.slots[slot], before.sequence)
    with contextlib.suppress(OSError):  # a full disk takes no note, and needs the way back no less
        write_state(root, msgspec.structs.replace(state, returned=taken, trial=trial))
    switch(root, other_slot(slot))
    return taken


def _own() -> Starter:
    return Starter(os.getpid(), _began(os.getpid()) or 0, _boot())


_FOREIGN = Starter(0, 0, "")


def _boot() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:  # no Linux: a process's number has to do
        return ""


def _began(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, field 22 of /proc/PID/stat (proc_pid_stat(5)); None without one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return str(error)
