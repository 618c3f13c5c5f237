"""An application starts with what is installed, and says that it works; where it never does, the older bundle runs again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from edgekit.errors import BundleError, EdgekitError

from .lock import START_S, hold
from .state import (
    SLOTS,
    Faults,
    Return,
    Slot,
    State,
    Trial,
    leads_to,
    now,
    other_slot,
    read_state,
    switch,
    way_back,
    write_state,
)

__all__ = ["Start", "lives", "mark", "starting"]

_PREFIX = ".start-"
_TOKEN = re.compile("[0-9a-f]{16}")


@dataclass
class Start:
    """One start of an application with the bundle under a root; made by `starting`. Its end is told once, by the thread that
    comes first; the others wait until that is on disk. One that could not be written (``open``) may be told again.

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
    _file: _StartFile = field(default_factory=lambda: _StartFile(), repr=False)
    _open: bool = field(default=True, repr=False)
    _ending: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def confirm(self) -> bool:
        """It works: the trial is over, and what runs is a bundle that later ones may be left for.

        False where it cannot be written, where the bundle that this start runs is not the one installed any more (that one's
        trial is its own), and in a forked child: the start is the parent's.
        """

        def confirmed(state: State) -> State:
            if all(record.sequence != self.sequence for record in state.slots.values()):
                raise EdgekitError("another bundle was installed meanwhile", "restart, which takes it")
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
        if trial is None or trial.sequence != self.sequence or self._file.name not in trial.starts:
            return state
        left = list(trial.starts)
        left.remove(self._file.name)
        return msgspec.structs.replace(state, trial=msgspec.structs.replace(trial, starts=tuple(left)))

    @property
    def open(self) -> bool:
        """Whether its end is still to be told. One that is open when its process has gone counts as failed."""
        return self._open and self.sequence is not None and not self._file.lost

    def _end(self, change: Callable[[State], State]) -> bool:
        with self._ending:
            return self._end_once(change)

    def _end_once(self, change: Callable[[State], State]) -> bool:
        """Only once, and only where there is something to change."""
        if self._file.lost:
            self.doubt = "this process was forked: the start is its parent's, to be ended there"
            return False
        if not self.open:
            return True
        try:
            with hold(self.root / SLOTS, START_S):
                state = read_state(self.root)
                if (changed := self._changed(change, state)) != state:
                    write_state(self.root, changed)
        except (OSError, EdgekitError) as error:
            self.doubt = _words(error)
            return False
        self._open = False
        self._file.release()
        return True

    def _changed(self, change: Callable[[State], State], state: State) -> State:
        try:
            return change(state)
        except EdgekitError:  # no later attempt finds that otherwise
            self._open = False
            raise


def starting(root: str | os.PathLike[str]) -> Start:
    """Note that an application starts with what is installed under ``root``, before it loads anything of it.

    Durable when it returns. Where the bundle on trial has had all its starts and never worked, ``current`` is switched back
    to the older one first, if that is whole. Several processes may start on one root: one that still runs is no failure.

    A root that this user cannot write, or whose ``state.json`` is damaged, is used all the same; ``doubt`` then says why
    nothing was noted. Raises `BundleError` where nothing is installed.
    """
    return _started(Path(root), own=True)


def mark(root: str | os.PathLike[str], what: Literal["start", "healthy", "stopped"]) -> Start:
    """`starting`, `Start.confirm` and `Start.withdraw` for an application that is no Python: each from a process of its own.

    A start without an end counts as failed at the next one that is marked. One that cannot be noted is a ``doubt``, as with
    `starting`: the application starts all the same. Where nothing is on trial an end changes nothing.

    Raises `BundleError` where nothing is installed, or ``state.json`` is damaged at an end; `EdgekitError` where something is
    to be healthy of which no start is open, or the end cannot be written.
    """
    folder = Path(root)
    slot = leads_to(folder)
    if slot is None or what == "start":
        return _started(folder, own=False)
    state = read_state(folder)
    record, trial = state.slots.get(slot), state.trial_of(slot)
    start = Start(folder, folder / SLOTS / slot, record.sequence if record and trial else None)
    if what == "healthy" and trial is not None and "" not in trial.starts:
        raise EdgekitError(
            f"no start of what is on trial in {folder} is open: it was installed since, or its start was never marked",
            f"start the application anew, after edgekit status --root {folder} --mark start",
        )
    if not (start.confirm() if what == "healthy" else start.withdraw()):
        cure = f"run it as the user that {folder} belongs to; edgekit status --root {folder} says what is on trial"
        raise EdgekitError(f"what became of the start cannot be noted in {folder}: {start.doubt}", cure)
    return start


def _started(root: Path, own: bool) -> Start:
    slot = leads_to(root)
    if slot is None:
        raise BundleError(f"nothing is installed in {root}", "install first: edgekit install F.zip --root DIR")
    try:
        faults = Faults(root)
        trial = read_state(root).trial_of(slot)
        if trial and trial.failed + len(trial.starts) >= trial.allowed:
            faults.ahead()
        with hold(root / SLOTS, START_S):
            return _noted(root, own, faults)
    except (OSError, EdgekitError) as error:
        return Start(root, root / SLOTS / slot, doubt=_words(error))


def _noted(root: Path, own: bool, faults: Faults) -> Start:
    state, slot = read_state(root), leads_to(root)
    assert slot is not None  # nothing takes it away
    trial, doubt, token = state.trial_of(slot), "", _StartFile()
    if trial is not None:
        # Whether one that is no process of ours still runs is told by the next of its kind alone.
        alive = tuple(start for start in trial.starts if (own if not start else lives(root, start)))
        trial = msgspec.structs.replace(trial, failed=trial.failed + len(trial.starts) - len(alive), starts=alive)
        _tidy(root, alive)
        if trial.failed >= trial.allowed:
            if taken := _returned(root, state, slot, trial, faults):
                return Start(root, root / SLOTS / other_slot(slot), taken.sequence, returned=taken)
            doubt = f"{trial.failed} starts without a sign of health, and there is no whole older bundle to go back to"
        token = _StartFile(root) if own else token
        trial = msgspec.structs.replace(trial, starts=(*alive, token.name))
        try:
            write_state(root, msgspec.structs.replace(state, trial=trial))
        except BaseException:
            token.release()
            raise
    record = state.slots.get(slot)
    return Start(root, root / SLOTS / slot, record.sequence if record else None, trial, doubt=doubt, _file=token)


def _returned(root: Path, state: State, slot: Slot, trial: Trial, faults: Faults) -> Return | None:
    """Switch back, where there is a whole bundle to go back to. The note is written first: a switch that is cut off is made at
    the next start."""
    before = way_back(state, slot)
    if before is None or faults(other_slot(slot), before):
        return None
    said = f"; the last said: {trial.error}" if trial.error else ""
    reason = f"{trial.failed} starts without a sign of health" + said
    taken = Return(now(), reason, state.slots[slot], before.sequence)
    with contextlib.suppress(OSError):  # a full disk takes no note, and needs the way back no less
        write_state(root, msgspec.structs.replace(state.leaving(state.slots[slot]), returned=taken, trial=trial))
    switch(root, other_slot(slot))
    return taken


class _StartFile:
    """A start's file, locked by the process that holds this; ``name`` is its token. Without a root there is none: for an
    application that is no process of ours (``edgekit status --mark start``), of which nobody knows whether it still runs."""

    def __init__(self, root: Path | None = None) -> None:
        self.name, self._fd, self.lost = "", -1, False
        if root is not None:
            self.name = secrets.token_hex(8)
            self._path = _start_path(root, self.name)
            # Not for everybody to open: who reads a file can lock it, and pass for a start that lives.
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            _HELD.add(self)
            try:
                owner = os.stat(self._path.parent)
                if os.geteuid() == 0 and owner.st_uid != 0:  # the user of the scan has to see when it has ended
                    os.fchown(self._fd, owner.st_uid, owner.st_gid)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                self.release()
                raise

    def release(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._let_go()

    def _let_go(self) -> None:
        os.close(self._fd)
        self._fd = -1
        _HELD.discard(self)

    @staticmethod
    def forked() -> None:
        """In a forked child: a lock belongs to the open file, so a child that outlives its parent would hold it on."""
        for held in list(_HELD):
            held._let_go()
            held.lost = True  # the start is the parent's to end


#: Of this process: they hold their locks until it ends, whether or not anybody keeps the `Start`.
_HELD: set[_StartFile] = set()
os.register_at_fork(after_in_child=_StartFile.forked)


def _start_path(root: Path, token: str) -> Path:
    return root / SLOTS / f"{_PREFIX}{token}"


def lives(root: Path, token: str) -> bool:
    """Whether the process that noted a start still runs. One of another user that may not be looked at counts as running; of a
    start without a file nobody knows (False)."""
    if not _TOKEN.fullmatch(token):
        return False
    try:
        handle = os.open(_start_path(root, token), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return isinstance(error, PermissionError)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _tidy(root: Path, kept: Iterable[str]) -> None:
    """Files of starts that have ended. The caller holds the lock on the slots."""
    names = {f"{_PREFIX}{token}" for token in kept}
    for path in (root / SLOTS).glob(f"{_PREFIX}*"):
        if path.name not in names and not lives(root, path.name.removeprefix(_PREFIX)):
            with contextlib.suppress(OSError):
                path.unlink()


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return str(error)
