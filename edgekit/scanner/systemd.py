"""systemd's notifications (sd_notify(3)), without a library: ready, stopping, a status line, the watchdog's ping."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Mapping

__all__ = ["Systemd"]

#: A ping three times a period: one that is late is no reason to be killed.
PINGS = 3


class Systemd:
    """Does nothing where no ``NOTIFY_SOCKET`` is set. Pings come from the scanning thread: a loop that hangs sends none."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)  # an abstract socket starts with a zero byte
        self.active = bool(self._address)
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = int(found) / 1e6 if ours and (found := environment.get("WATCHDOG_USEC", "")).isdigit() else 0.0
        self.every_s = period / PINGS if period else math.inf
        self._next = -math.inf

    def send(self, *states: str) -> None:
        """``READY=1``, ``STOPPING=1``, ``STATUS=...``: one message. It never waits, and never fails."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.setblocking(False)
            to.sendto("\n".join(states).encode(), self._address)

    def round(self, monotonic: float) -> None:
        """The loop went round: ping, if it is time."""
        if monotonic >= self._next:
            self._next = monotonic + self.every_s
            if self.every_s < math.inf:
                self.send("WATCHDOG=1")
