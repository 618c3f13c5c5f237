"""Frames from one process to another: places in shared memory, and a socket that says which one is full.

The memory has no name: it is gone with the last process that has it open, killed or not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import tempfile
import threading
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Link", "Slots", "new_memory"]

#: The longest message; none comes near it.
_LONGEST = 16384
Pixels = NDArray[np.uint8]


def new_memory(size_bytes: int) -> int:
    """A file descriptor of shared memory that cannot shrink under its readers."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.truncate(size_bytes)
            return os.dup(file.fileno())
    fd = os.memfd_create("edgekit frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class Slots:
    """``count`` places of ``each_bytes`` in the memory behind ``fd``, which is closed here. A picture is uint8 (H, W, 3)."""

    def __init__(self, fd: int, count: int, each_bytes: int, generation: int) -> None:
        self.count, self.each_bytes, self.generation = count, each_bytes, generation
        try:
            self._memory = mmap.mmap(fd, count * each_bytes)
        finally:
            os.close(fd)
        self._pixels = np.frombuffer(self._memory, np.uint8)

    def view(self, slot: int, height: int, width: int) -> Pixels:
        """The picture at ``slot``. Raises `ValueError` where it cannot be there."""
        size = height * width * 3
        if not 0 <= slot < self.count or height < 1 or width < 1 or size > self.each_bytes:
            raise ValueError(f"no picture of {width} x {height} at {slot}")
        start = slot * self.each_bytes
        return self._pixels[start : start + size].reshape(height, width, 3)


class Link:
    """One end of the socket: small dicts, each whole, with a file descriptor where one goes along."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Raises `OSError` where the other end is gone."""
        data = msgspec.json.encode(message)
        with self._lock:
            if fd is None:
                self.socket.send(data, socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self.socket, [data], [fd], socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors; None at the end. Raises `BlockingIOError` on a socket that does not block."""
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, _LONGEST, 1)
        except ConnectionResetError:  # it went with words of ours unread; its own last ones are still to come
            data, fds, _, _ = socket.recv_fds(self.socket, _LONGEST, 1)
        except ConnectionError:
            return None
        if not data:
            return None
        message: dict[str, Any] = msgspec.json.decode(data)
        return message, fds

    def close(self) -> None:
        self.socket.close()
