"""A sensor series of any length -> a normalised tensor of one length, with a channel that marks what is padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError
from edgekit.manifest import SeriesPreprocessing

__all__ = ["SeriesPreprocessor"]


class SeriesPreprocessor:
    """Call with a series, get float32 (1, length, channels + 1)."""

    def __init__(self, spec: SeriesPreprocessing) -> None:
        self.spec = spec
        self._mean = np.array(spec.mean, np.float32)
        self._std = np.array(spec.std, np.float32)

    def __call__(self, series: NDArray[Any]) -> NDArray[np.float32]:
        """Float or integer (T, channels), or (T,) of one channel. Raises `InputError` for what is no such series."""
        spec = self.spec
        array = np.asarray(series)
        if array.ndim == 1 and spec.channels == 1:
            array = array[:, None]
        if array.ndim != 2 or array.shape[1] != spec.channels or array.dtype.kind not in "fiu":
            raise InputError(
                f"a series of {array.dtype} {array.shape} arrived, the model takes float32 (T, {spec.channels})",
                "one row a time step, one column a channel",
            )
        array = array[: spec.length].astype(np.float32)
        if not len(array) or not np.isfinite(array).all():
            raise InputError("the series is empty or holds NaN or Inf", "drop or fill the missing values first")
        out = np.zeros((1, spec.length, spec.channels + 1), np.float32)
        out[0, : len(array), :-1] = (array - self._mean) / self._std
        out[0, : len(array), -1] = 1
        return out
