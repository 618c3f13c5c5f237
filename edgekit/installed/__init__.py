"""What is installed under a root, and whether it has proved itself: what install, the scanner and other applications share.

    ROOT/current        -> slots/a or slots/b, replaced by rename: the one truth about what runs
    ROOT/slots/a, b     bundles; the one that does not run is the way back, and the place of the next install
    ROOT/state.json     what is in each slot; the trial of the one that runs; the last way back that was taken, and why

After a switch the new bundle is on trial: each start is noted here before anything of it is loaded, and struck off when it
was stopped in order. Once one has worked, it is confirmed and the trial is over; after so many starts that ended otherwise
(a crash, a kill, the watchdog, no memory) the next one goes back to the older bundle first.

A start holds a lock (flock) on a file of its own for as long as its process lives, ``ROOT/slots/.start-TOKEN``: the kernel
lets go of it however the process ends, across reboots, reused process ids and containers that share a root.

Every change is one file or link made beside and renamed, in an order that leaves a whole bundle in ``current`` wherever the
power goes. Changes are made under the lock of ``slots``, held for as long as a few renames take; installs and rollbacks hold
that of the root beside it.
"""

from .lock import LOCK, PATIENCE_S, START_S, hold
from .starts import Start, lives, mark, starting
from .state import (
    CURRENT,
    SLOTS,
    STARTS,
    STATE,
    Faults,
    Record,
    Return,
    Slot,
    State,
    Trial,
    current_slot,
    fault,
    leads_to,
    now,
    other_slot,
    read_state,
    root_of,
    state_again,
    switch,
    way_back,
    write_state,
)

__all__ = [
    "CURRENT",
    "LOCK",
    "PATIENCE_S",
    "SLOTS",
    "STARTS",
    "START_S",
    "STATE",
    "Faults",
    "Record",
    "Return",
    "Slot",
    "Start",
    "State",
    "Trial",
    "current_slot",
    "fault",
    "hold",
    "leads_to",
    "lives",
    "mark",
    "now",
    "other_slot",
    "read_state",
    "root_of",
    "starting",
    "state_again",
    "switch",
    "way_back",
    "write_state",
]
