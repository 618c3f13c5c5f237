"""What a runner is given: checked by name, type and shape before it reaches native code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError
from edgekit.manifest import TensorSpec

__all__ = ["check_feeds"]


def check_feeds(inputs: Sequence[TensorSpec], feeds: Mapping[str, NDArray[Any]]) -> None:
    """Raise `InputError` that names the first input which does not fit the model."""
    expected = {spec.name: spec for spec in inputs}
    if set(feeds) != set(expected):
        raise InputError(f"inputs {sorted(feeds)} arrived, {sorted(expected)} were expected", "name every input of the model")
    for name, spec in expected.items():
        array = np.asarray(feeds[name])
        shape = "x".join(map(str, spec.shape))
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
