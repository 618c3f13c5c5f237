"""What a runner is given: checked by name, type and shape before it reaches native code.

An engine may normalise by itself: it takes frames of bytes, uint8 (n, H, W, C), where the bundle's graph takes float32
(n, C, H, W). Such a runner has ``frames``, the preprocessing that its engine does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError
from edgekit.manifest import ImagePreprocessing, TensorSpec
from edgekit.preprocess import denormalised

__all__ = ["as_taken", "check_feeds"]


def as_taken(frames: ImagePreprocessing | None, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Inputs of the bundle's graph -> inputs of a runner with these ``frames``: float tensors become the bytes that they
    were made from. All else stays as it is, for `check_feeds` to judge."""
    if frames is None:
        return dict(feeds)
    planes = (frames.channels, frames.height, frames.width)
    return {
        name: denormalised(frames, array) if array.dtype.kind == "f" and array.shape[1:] == planes else array
        for name, array in feeds.items()
    }


def check_feeds(
    inputs: Sequence[TensorSpec], feeds: Mapping[str, NDArray[Any]], frames: ImagePreprocessing | None = None
) -> None:
    """Raise `InputError` that names the first input which does not fit the model."""
    expected = {spec.name: spec for spec in inputs}
    if set(feeds) != set(expected):
        raise InputError(f"inputs {sorted(feeds)} arrived, {sorted(expected)} were expected", "name every input of the model")
    for name, spec in expected.items():
        array = np.asarray(feeds[name])
        shape = "x".join(map(str, spec.shape))
        if frames is not None and array.dtype != spec.dtype:
            raise InputError(
                f"input {name} is {array.dtype}, this engine normalises by itself and takes the frame's bytes: uint8 {shape}",
                "give it model.preprocess(frame), or build it again without --uint8-input",
            )
        if str(array.dtype) != spec.dtype and spec.dtype != "str":
            raise InputError(
                f"input {name} is {array.dtype}, the model takes {spec.dtype} {shape}", f"convert: x.astype('{spec.dtype}')"
            )
        fits = array.ndim == len(spec.shape) and all(
            isinstance(want, str) or want == got for want, got in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            got = "x".join(map(str, array.shape))
            raise InputError(f"input {name} has shape {got}, the model takes {spec.dtype} {shape}", "reshape it")
