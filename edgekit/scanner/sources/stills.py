"""Picture files are decoded in a process of their own: one that crashes its decoder, hangs it or asks for all memory costs that
picture, not the scan. A folder's files come from cameras, shares and people; the scan would read the same file again after
every start.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from edgekit.children import calling, go_first, start
from edgekit.errors import DataError
from edgekit.files import printable
from edgekit.preprocess import MAX_PIXELS, Frame, decode_image, open_image

from .slots import Link, new_memory

__all__ = ["LIMIT_S", "decoding", "main", "read_apart"]

#: Seconds for one picture, of which a large one takes two; the first has the process's start in it.
LIMIT_S = 30.0
#: What decoding may map: some copies of a picture, in four bytes a pixel or more, and the libraries' own.
_PIXEL_BYTES, _LIBRARY_BYTES = 32, 512 << 20
_CHILD = calling(__name__)
_CURE = "look at the file: it is damaged, or made to do this"


def read_apart(path: Path, max_pixels: int = MAX_PIXELS) -> Frame:
    """`edgekit.preprocess.read_image` in a process of its own, which stays for the next picture (see `decoding`).

    Raises `DataError` as `read_image` does, and where the process died of the picture or took longer than `LIMIT_S`;
    `MemoryError` where it is too large.
    """
    with open_image(path) as file, _LOCK:
        answer = _DECODER.read(file, printable(path.name), max_pixels)
    if isinstance(answer, Exception):
        raise answer
    return answer


class _Decoder:
    """The process, if there is one by now, and the memory that its pictures come in."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: mmap.mmap | None = None
        self._owner = self._pixels = 0

    def read(self, file: BinaryIO, name: str, max_pixels: int) -> Frame | Exception:
        if self._owner != os.getpid():  # after a fork the other process's
            self._process = None
        try:
            self._ready(max_pixels)
        except OSError as error:
            return DataError(f"{name}: no process to decode it can be started: {error.strerror or error}", "free some memory")
        try:
            return self._answer(file, name, max_pixels)
        except (OSError, msgspec.DecodeError, ValueError, LookupError, TypeError) as error:
            how = self._fate(error)
            self.close()
            return DataError(f"{name}: {how}", _CURE)
        except BaseException:
            self.close()  # its answer would be taken for the next picture's
            raise

    def _ready(self, max_pixels: int) -> None:
        """One that went while nothing was asked of it (it goes first where memory is short) costs no picture."""
        if self._process is None or self._process.poll() is not None or max_pixels > self._pixels:
            self.close()
            self._start(max_pixels)

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._link.close()
            self._process.kill()
            self._process.wait()
        self._process = self._memory = None

    def _start(self, max_pixels: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = start(_CHILD, theirs, max_pixels)
            except BaseException:
                ours.close()
                raise
        self._link, self._owner, self._pixels = Link(ours), os.getpid(), max_pixels

    def _answer(self, file: BinaryIO, name: str, max_pixels: int) -> Frame | Exception:
        end = time.monotonic() + LIMIT_S
        self._link.send({"name": name, "pixels": max_pixels}, file.fileno())
        while True:
            if not select.select([self._link.socket], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            received = self._link.receive()
            if received is None:
                raise BrokenPipeError
            message, fds = received
            if fds:
                with os.fdopen(fds[0], "rb") as file:
                    self._memory = mmap.mmap(file.fileno(), message["memory"], access=mmap.ACCESS_READ)
            elif "shape" in message:
                count = math.prod(message["shape"])
                if self._memory is None or not 0 < count <= len(self._memory):
                    raise ValueError("it answers with a picture that is not there")
                return np.frombuffer(self._memory, np.uint8, count).reshape(message["shape"]).copy()
            elif "error" in message:
                return DataError(*message["error"])
            elif "large" in message:
                return MemoryError()
            else:
                raise ValueError("it answers with something else")

    def _fate(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"it was not decoded within {LIMIT_S:g} s"
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"the process that decodes it broke down: {error}"
        if code == -signal.SIGKILL:
            return "the process that decoded it was killed (SIGKILL), as systems do where memory is short"
        return f"the process that decoded it {f'crashed (signal {-code})' if code < 0 else f'ended with exit code {code}'}"


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """The process of `read_apart` ends with the last of these blocks: a program that has scanned has no process left."""
    global _users
    with _LOCK:
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if not _users:
                _DECODER.close()


def _forked() -> None:
    """In a forked child: another thread of the parent may have been at a picture, and nobody here would end that."""
    global _LOCK
    _LOCK = threading.Lock()


_LOCK = threading.Lock()
_DECODER = _Decoder()
_users = 0
atexit.register(_DECODER.close)
os.register_at_fork(after_in_child=_forked)


def main(fd: int, max_pixels: int) -> None:
    """The child: answers until the scan closes its end, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    go_first()  # before the scan does
    import PIL.Image

    PIL.Image.preinit()
    _limit_memory(_LIBRARY_BYTES + _PIXEL_BYTES * max_pixels)
    link = Link(socket.socket(fileno=fd))
    memory: mmap.mmap | None = None
    with contextlib.suppress(OSError):
        while (received := link.receive()) is not None:
            signal.alarm(int(LIMIT_S) + 5)  # nobody may be left to end what hangs
            try:
                request, fds = received
                with os.fdopen(fds[0], "rb") as file:
                    frame = decode_image(file, request["name"], request["pixels"])
                if memory is None or len(memory) < frame.nbytes:
                    memory = _grown(link, frame.nbytes)
                np.frombuffer(memory, np.uint8)[: frame.nbytes] = frame.ravel()
                link.send({"shape": list(frame.shape)})
            except DataError as error:
                link.send({"error": [error.message[:4000], error.hint[:4000]]})
            except MemoryError:
                link.send({"large": True})
            signal.alarm(0)


def _grown(link: Link, size_bytes: int) -> mmap.mmap:
    fd = new_memory(size_bytes)
    try:
        link.send({"memory": size_bytes}, fd)
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)


def _limit_memory(more_bytes: int) -> None:
    """What is mapped by now, and so much more."""
    with contextlib.suppress(OSError, ValueError):
        now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > now + more_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, hard))
