"""A new bundle is tried in a process of its own: a crash, a hang or a memory bomb in its graph is an error, what runs stays.

Both sides speak JSON lines over a socket; what native libraries print is not among them. The child says what it has to say
through the parent, and its errors are raised there as they are.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import edgekit.errors
from edgekit.children import calling, end_with_parent, go_first, start
from edgekit.errors import EdgekitError, GoldenError, MissingExtra, first_line
from edgekit.progress import say, spoken_by
from edgekit.runtime import GoldenResult

from . import checks

__all__ = ["LIMIT_S", "Apart", "main"]

#: Seconds for one check, the start of a backend included: far more than loading an engine and some hundred answers take.
LIMIT_S = 300.0
_CURE = "do not install it: build it for this device, and run it there (edgekit bench B); what is installed runs on"


class Apart:
    """``with Apart() as ask: ask("self_test", bundle, backend)`` calls a function of `checks` in one child process.

    Raises what it raised there, and `GoldenError` where the process died of it or took longer than `LIMIT_S`.
    """

    def __enter__(self) -> Apart:
        self._link, theirs = socket.socketpair()
        self._came = b""
        with theirs:
            try:
                self._process = start(calling(__name__), theirs, os.getpid(), quiet=not os.environ.get("EDGEKIT_DEBUG"))
            except BaseException:
                self._link.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()
        self._process.kill()
        self._process.wait()

    def __call__(self, function: str, *arguments: object) -> dict[str, Any]:
        end = time.monotonic() + LIMIT_S
        request = [str(each) if isinstance(each, Path) else each for each in arguments]
        try:
            self._link.settimeout(LIMIT_S)
            self._link.sendall(json.dumps([function, request]).encode() + b"\n")
            while True:
                message = json.loads(self._line(end))
                if "said" in message:
                    say(message["said"], message["level"])
                elif "error" in message:
                    raise _rebuilt(message["error"])
                else:
                    answer: dict[str, Any] = message["answer"]
                    return answer
        except TimeoutError:
            raise GoldenError(f"the model has not answered within {LIMIT_S:g} s here, and was stopped", _CURE) from None
        except (EOFError, ConnectionError, ValueError, LookupError, TypeError):
            self._died()

    def _line(self, end: float) -> bytes:
        while b"\n" not in self._came:
            self._link.settimeout(max(end - time.monotonic(), 0.001))
            more = self._link.recv(65536)
            if not more:
                raise EOFError
            self._came += more
        line, _, self._came = self._came.partition(b"\n")
        return line

    def _died(self) -> NoReturn:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            raise GoldenError("the process that tried the model on this device broke down", _CURE) from None
        if code == -signal.SIGKILL:
            how, cure = "was killed (SIGKILL), as systems do where memory is short", f"free some memory, or {_CURE}"
        else:
            how, cure = (f"crashed ({_name(-code)})" if code < 0 else f"ended with exit code {code}"), _CURE
        raise GoldenError(f"the process that tried the model on this device {how}", cure) from None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, ModuleNotFoundError):
        error = MissingExtra.of(error)
    if isinstance(error, EdgekitError):
        more = {name: value for name, value in vars(error).items() if name in ("extra", "module", "result")}
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint, "more": more}
    if isinstance(error, OSError) and error.errno:
        return {"errno": error.errno, "strerror": error.strerror or "", "filename": str(error.filename or "")}
    words = f"the model cannot be tried on this device: {type(error).__name__}: {first_line(error)}"[:400]
    return {"kind": "GoldenError", "message": words, "hint": _CURE, "more": {}}


def _rebuilt(about: Mapping[str, Any]) -> EdgekitError | OSError:
    if "errno" in about:
        return OSError(about["errno"], about["strerror"], about["filename"] or None)
    kind = getattr(edgekit.errors, about["kind"], EdgekitError)
    error: EdgekitError = kind.__new__(kind)
    EdgekitError.__init__(error, about["message"], about["hint"])
    for name, value in about["more"].items():
        setattr(error, name, GoldenResult(*value) if isinstance(error, GoldenError) else value)
    return error


def main(link: int, parent: int) -> None:
    """The child: answers requests until the parent closes the socket."""
    go_first()
    end_with_parent()
    if os.getppid() != parent:  # it went before the kernel was told
        os._exit(1)
    with socket.socket(fileno=link) as peer, spoken_by(_Voice(peer)):
        for line in _lines(peer):
            function, arguments = json.loads(line)
            try:
                message = {"answer": getattr(checks, function)(*arguments)}
            except Exception as error:  # noqa: BLE001  the parent raises it
                if os.environ.get("EDGEKIT_DEBUG"):
                    sys.excepthook(type(error), error, error.__traceback__)
                message = {"error": _described(error)}
            _tell(peer, message)
    os._exit(0)  # without the destructors of native libraries


def _lines(peer: socket.socket) -> Iterator[bytes]:
    with peer.makefile("rb") as file:
        yield from file


def _tell(peer: socket.socket, message: Mapping[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


class _Voice:
    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def __call__(self, message: str, level: str, **about: Any) -> None:
        _tell(self._peer, {"said": message, "level": level})
