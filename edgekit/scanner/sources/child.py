"""A camera's own process: decodes, puts pictures into shared memory, and is killed where a read never returns."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from typing import Any

import msgspec

from edgekit.children import end_with_parent
from edgekit.errors import first_line

from .address import safe_words
from .decode import Item, Picture, Refused, pictures
from .options import CameraOptions
from .slots import Link, Slots, new_memory
from .trouble import Trouble

__all__ = ["Outlet", "main"]

_BEAT_S = 0.2


class Outlet:
    """Where pictures go. With ``wait`` each waits for a place; else one that finds none is counted and let go."""

    def __init__(self, link: Link, places: int, wait: bool) -> None:
        self._link, self._places, self._wait = link, places, wait
        self._slots: Slots | None = None
        self._generation = 0
        self._free: deque[int] = deque()
        self._lost: dict[str, int] = {}
        self._refused = 0
        self._said = 0.0

    def put(self, item: Item) -> None:
        """Raises `OSError` where the scan is gone."""
        if isinstance(item, Picture):
            self._deliver(item)
            return
        if isinstance(item, Refused):
            self._refused += item.packets
        elif item:
            self._lose("damaged", item)
        self._beat(pause=item == 0)

    def end(self, reason: str, final: bool) -> None:
        self._tell({"end": reason, "final": final})

    def _tell(self, message: dict[str, Any]) -> None:
        """With what was lost since the last message."""
        self._link.send({**message, "lost": self._lost, "refused": self._refused})
        self._lost, self._refused, self._said = {}, 0, time.monotonic()

    def _deliver(self, picture: Picture) -> None:
        height, width = picture.rows.shape[0], picture.rows.shape[1] // 3
        if self._slots is None or picture.rows.size > self._slots.each_bytes:
            self._grow(picture.rows.size)
        assert self._slots is not None
        self._freed(0.0)
        while self._wait and not self._free:
            self._beat(pause=True)
            self._freed(_BEAT_S)
        if not self._free:
            self._lose("queue full", 1)
            self._beat(pause=False)
            return
        slot = self._free.popleft()
        self._slots.view(slot, height, width).reshape(height, -1)[:] = picture.rows
        self._tell({"frame": [slot, self._generation, height, width, picture.monotonic, picture.at]})

    def _grow(self, size_bytes: int) -> None:
        """Places for larger pictures; what waits in the old ones stays there until it is taken.

        A source that waits does so here too: else twice as many would wait as the scan's queue holds.
        """
        while self._wait and self._slots is not None and len(self._free) < self._places:
            self._beat(pause=True)
            self._freed(_BEAT_S)
        fd = new_memory(self._places * size_bytes)
        self._generation += 1
        self._link.send({"memory": [self._places, size_bytes, self._generation]}, fd)
        self._slots = Slots(fd, self._places, size_bytes, self._generation)
        self._free = deque(range(self._places))

    def _freed(self, patience_s: float) -> None:
        """Take back the places that the scan has emptied."""
        while select.select([self._link.socket], [], [], patience_s)[0]:
            received = self._link.receive()
            if received is None:
                raise BrokenPipeError
            generation, slot = received[0]["free"]
            if generation == self._generation:
                self._free.append(slot)
            patience_s = 0.0

    def _lose(self, reason: str, count: int) -> None:
        self._lost[reason] = self._lost.get(reason, 0) + count

    def _beat(self, pause: bool) -> None:
        if time.monotonic() - self._said >= _BEAT_S:
            self._tell({"beat": pause})


def main(fd: int, parent: int) -> None:
    end_with_parent()
    if os.getppid() != parent:  # it went before the kernel was told
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    link = Link(socket.socket(fileno=fd))
    received = link.receive()
    if received is None:
        return
    request = received[0]
    spec = os.fsdecode(bytes.fromhex(request["spec"]))
    outlet = Outlet(link, request["places"], request["wait"])
    link.send({"ready": True})
    with contextlib.suppress(OSError):  # the scan is gone
        outlet.end(*_run(spec, msgspec.convert(request["options"], CameraOptions), outlet))


def _run(spec: str, options: CameraOptions, outlet: Outlet) -> tuple[str, bool]:
    """Until the source ends: why ("" where that is its end), and whether another attempt would find the same."""
    try:
        with contextlib.closing(pictures(spec, options)) as items:  # type: ignore[type-var]
            for item in items:
                outlet.put(item)
    except Trouble as trouble:
        return trouble.reason, trouble.final
    except MemoryError:
        return "its pictures do not fit into memory", False
    except ImportError as error:
        return f"what reads it cannot be loaded: {first_line(error)}", True
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  the scan tells it, and tries again
        return safe_words(f"{type(error).__name__}: {first_line(error)}", spec), False
    return "", False
