"""What `Incidents` keeps in memory of the last seconds, until it is forgotten or written as a recording."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .png import encode_png
from .recording import FRAME, Came, Model, Round, StepState
from .sinks import without_secrets
from .sources.address import shown

__all__ = ["Chunk", "Kept", "Turn", "model_of", "plain", "recordable", "rounds_of", "state_of"]

_SECRET = re.compile(r"pass|secret|token|key|credential|user", re.IGNORECASE)


class Kept:
    """A frame in memory: as it came, then packed. ``waits``: to be packed by and by, not only where a file is written."""

    def __init__(self, frame: NDArray[np.uint8], waits: bool = False) -> None:
        self.waits = waits
        self.frame: NDArray[np.uint8] | None = frame if frame.base is None else np.array(frame)
        self.png = b""
        self.size = frame.nbytes

    def pack(self) -> bytes:
        if (frame := self.frame) is not None:
            self.png = encode_png(frame)
            self.frame, self.size, self.waits = None, len(self.png), False
        return self.png


@dataclass
class Turn:
    """A `Round` while it is made, and its events."""

    came: list[dict[str, Any]] = field(default_factory=list)
    frames: list[Kept] = field(default_factory=list)
    fires: list[tuple[int, str | None, str, float]] = field(default_factory=list)
    due: tuple[float, float] | None = None
    events: list[bytes] = field(default_factory=list)


@dataclass
class Chunk:
    """Some rounds; before the first of them the steps' states, the frames in these, and the models that read."""

    states: tuple[StepState, ...]
    kept: list[Kept]
    models: tuple[Model | None, Model | None]
    first: int
    begin: float
    turns: list[Turn] = field(default_factory=list)
    text: int = 0  # bytes of what is no picture, about
    frames: int = 0
    _settled: int = 0  # bytes of frames whose size is final
    _waiting: deque[Kept] = field(default_factory=deque)

    def add(self, kept: Kept) -> None:
        self.frames += 1
        self._waiting.append(kept)

    def size(self) -> int:
        """In bytes; asked with every frame, so it looks at those only that are still to be packed."""
        while self._waiting and not self._waiting[0].waits:
            self._settled += self._waiting.popleft().size
        return self._settled + self.text + sum(kept.size for kept in self._waiting)


def recordable(frame: Any) -> bool:
    """Whether it is of the kinds that a recording holds: uint8 (H, W) or (H, W, 3)."""
    return bool(frame.dtype == np.uint8 and (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)))


def rounds_of(turns: Sequence[Turn], before: int) -> list[Round]:
    """``before``: how many frames lie in the file before those of the turns."""
    found = []
    for turn in turns:
        came = [{**each, "frame": before + each["frame"]} if "frame" in each else each for each in turn.came]
        before += len(turn.frames)
        monotonic, wall = turn.due or (0.0, 0.0)
        monotonic = monotonic if math.isfinite(monotonic) else -1.0  # JSON has no infinity
        found.append(Round(tuple(Came(**each) for each in came), monotonic, wall, len(turn.events), tuple(turn.fires)))
    return found


def model_of(model: Any) -> Model | None:
    if model is None:
        return None
    bundle, runner = model.bundle, getattr(model, "runner", None)
    backend = runner.name if runner is not None else "auto"
    graph = runner.graph if runner is not None else bundle.graph
    return Model(str(bundle.path), bundle.digest, backend, graph, getattr(model, "beam", 1))


def state_of(step: Any, keep: Callable[[NDArray[np.uint8]], int]) -> StepState:
    """``keep`` takes a frame and gives its number in the file."""
    options = getattr(step, "options", None)
    known = hasattr(step, "state") and hasattr(step, "resume")
    return StepState(
        step.name,
        plain(msgspec.to_builtins(options)) if isinstance(options, msgspec.Struct) else None,
        _lifted(step.state(), keep) if known else None,
        known,
    )


def _lifted(value: Any, keep: Callable[[NDArray[np.uint8]], int]) -> Any:
    if isinstance(value, np.ndarray):
        return {FRAME: keep(value)} if recordable(value) else None
    if isinstance(value, dict):
        return {key: _lifted(each, keep) for key, each in value.items()}
    return [_lifted(each, keep) for each in value] if isinstance(value, list | tuple) else value


def plain(value: Any, name: str = "") -> Any:
    """A config without its passwords."""
    if isinstance(value, dict):
        return {str(key): plain(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, name) for each in value]
    if isinstance(value, str):
        return "..." if _SECRET.search(name) else shown(without_secrets(value) if "://" in value else value)
    return value
