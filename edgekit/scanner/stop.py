"""Stopping: finish the frame in hand, flush, leave in time."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from edgekit.progress import say

__all__ = ["STOP_S", "Stop", "stop_on_signals"]

#: From SIGTERM to exit at the latest, in seconds.
STOP_S = 1.7
_STEP_S = 0.25
_LAST_S = 0.1
#: Then, for what must not stay behind where the disk is slow; systemd's unit allows 5 s in all.
_ACTS_S = 2.5
_ENDING = (signal.SIGTERM, signal.SIGINT)
_END = b"E"  # above every signal's number


class Stop:
    """A flag that any thread or signal handler may set.

    Not a `threading.Event`: its lock is not reentrant, so setting one in a handler that interrupted ``wait`` can deadlock.
    """

    def __init__(self) -> None:
        self._set = False
        #: The signal that set it, 0 where it was none.
        self.signal = 0
        #: Called where the process is ended by force: what must not stay behind, a terminal in another mode.
        self.at_force: list[Callable[[], None]] = []

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> bool:
        """Sleep for ``seconds``, or until it is set, noticed within a quarter of a second; returns whether it is set."""
        end = time.monotonic() + seconds
        while not self._set and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _STEP_S))
        return self._set


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and SIGINT set while the block runs; a second SIGINT interrupts at once.

    If a frame or a sink hangs, the process ends with 0 `STOP_S` seconds after the first of them all the same: what a sink has
    taken is out of the process by then. `Stop.at_force` is waited for first, up to `_ACTS_S`: within milliseconds on a disk
    that works. Outside the main thread, where Python takes no handlers, signals are left alone.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watchdog = threading.Thread(target=_watch, args=(reader, stop), name="stop watchdog", daemon=True)
    watchdog.start()

    handled: list[int] = []  # the watchdog may have set the flag before the first signal is handled here

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (handled or (stop.is_set() and not stop.signal)):
            raise KeyboardInterrupt
        if not handled:
            os.write(writer, bytes([number]))
        handled.append(number)
        stop.signal = stop.signal or number
        stop.set()

    # Python's handler waits for the main thread, which may have gone into a write that never returns: the interpreter's own
    # note of the signal does not. An event loop that takes these notes already keeps them.
    notes = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if notes != -1:
        signal.set_wakeup_fd(notes)
    before = {number: signal.signal(number, on_signal) for number in _ENDING}
    try:
        yield stop
    finally:
        if notes == -1:
            signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, _END)
        watchdog.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, stop: Stop) -> None:
    """Wait for the block's end or a signal, a byte of its number; after one, give the block `STOP_S` seconds."""
    while (note := os.read(reader, 1)) != _END and note[0] not in _ENDING:
        pass
    if note == _END:
        return
    stop.signal = stop.signal or note[0]
    stop.set()
    end = time.monotonic() + STOP_S
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        if os.read(reader, 1) == _END:
            return
    # In threads: stderr may be a pipe that nobody empties, or locked by the thread that hangs; a disk may be slow or gone.
    # One each: a terminal that takes nothing keeps nobody from the disk.
    acts = [threading.Thread(target=_act, args=(act,), name="last act", daemon=True) for act in list(stop.at_force)]
    last = threading.Thread(target=_last_words, name="last words", daemon=True)
    for each in (*acts, last):
        each.start()
    last.join(_LAST_S)
    end = time.monotonic() + _ACTS_S
    for each in acts:
        each.join(max(0.0, end - time.monotonic()))
    os._exit(0)


def _act(act: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        act()


def _last_words() -> None:
    say("stopped while a frame or a sink was still busy", "warning", life="ended", forced=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
