"""Whether a thing is in front of a camera: what changed against the picture of the empty place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scene"]

_ROWS, _COLUMNS, _SAMPLES = 12, 16, 4  # cells, and samples a side of each: noise is a quarter in their mean
_ADAPT = 0.05  # of the difference a frame: daylight is followed, a thing that comes is not


class Scene:
    """One camera's. The first frame is taken for the empty place; `accept` says that what is there belongs there now."""

    def __init__(self, share: float, level: float) -> None:
        self._share, self._level = share, level
        self._grounds: list[NDArray[np.float32]] = []  # the empty place and what was accepted last, (12, 16) each
        self._now: NDArray[np.float32] | None = None

    def update(self, frame: NDArray[Any]) -> bool:
        """Take a frame, (H, W) or (H, W, C); True where a thing is there."""
        now = self._now = _cells(frame)
        if not self._grounds:
            self._grounds = [now]
            return False
        changed = [self._changed(now, ground) for ground in self._grounds]
        nearest = int(np.argmin(changed))
        if changed[nearest] >= self._share:
            return True
        self._grounds[nearest] = self._grounds[nearest] + np.float32(_ADAPT) * (now - self._grounds[nearest])
        return False

    def accept(self) -> None:
        """The thing stays: no longer a thing, and neither is its leaving."""
        if self._now is not None:
            self._grounds = [self._grounds[0], self._now]

    def state(self) -> dict[str, Any]:
        return {
            "grounds": [ground.tolist() for ground in self._grounds],
            "now": None if self._now is None else self._now.tolist(),
        }

    def resume(self, state: Any) -> None:
        self._grounds = [np.array(ground, np.float32) for ground in state["grounds"]]
        self._now = None if state["now"] is None else np.array(state["now"], np.float32)

    def _changed(self, now: NDArray[np.float32], ground: NDArray[np.float32]) -> float:
        """The share of cells that changed, the change of all light taken out."""
        difference = now - ground
        difference -= np.median(difference)
        return float(np.mean(np.abs(difference) > self._level))


def _cells(frame: NDArray[Any]) -> NDArray[np.float32]:
    """Mean grey levels, 0..255, of (12, 16) cells from 16 samples each: as dear on a small frame as on a large one."""
    rows = np.linspace(0, frame.shape[0] - 1, _ROWS * _SAMPLES).astype(int)
    columns = np.linspace(0, frame.shape[1] - 1, _COLUMNS * _SAMPLES).astype(int)
    samples = frame[np.ix_(rows, columns)].astype(np.float32)
    if frame.dtype == np.uint16:
        samples /= 257
    if samples.ndim == 3:
        samples = samples[:, :, :3].mean(axis=2)
    means: NDArray[np.float32] = samples.reshape(_ROWS, _SAMPLES, _COLUMNS, _SAMPLES).mean(axis=(1, 3), dtype=np.float32)
    return means
