"""How many cameras' frames go through the model at once: what measures faster on this device, at the start."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, UsageError
from edgekit.manifest import ImagePreprocessing

__all__ = ["fastest_batch", "refuse_fixed_batch"]

SHAPE = (480, 640, 3)
ROUNDS = 7
#: Of all sizes together; a model that is slower than this is measured once.
BUDGET_S = 2.0
#: A batch makes its first frame wait: it must be that much faster a frame.
WORTH = 0.95


def refuse_fixed_batch(model: Any) -> None:
    """Raise `UsageError` for an open `Model` that answers several frames at once only: a scan gives it one."""
    if not isinstance(model.bundle.manifest.preprocessing, ImagePreprocessing):
        return  # `Reading` refuses it
    size, batches = model.inputs[0].shape[0], model.runner.batches
    least = batches[0] if batches is not None else size if isinstance(size, int) else 1
    if least > 1:
        raise UsageError(
            f"{model.bundle.path} takes {least} frames at a time, a scan gives it one",
            "export it with a first axis of 1 or an open one, and import it again",
        )


def fastest_batch(model: Any, cameras: int) -> tuple[int, dict[str, float]]:
    """The size to read with, and milliseconds a frame by size, the best of some rounds; (1, {}) where there is no choice.

    ``model`` is an open `Model`; sizes are powers of two up to the number of ``cameras``, and that number.
    """
    if cameras < 2 or not isinstance(model.inputs[0].shape[0], str):
        return 1, {}
    sizes = sorted({*(2**i for i in range(cameras.bit_length())), cameras})
    frames = [np.zeros(SHAPE, np.uint8)] * cameras
    best: dict[int, float] = {}
    end = time.perf_counter() + BUDGET_S
    for number in range(ROUNDS):
        for size in list(sizes):
            begun = time.perf_counter()
            try:
                model.predict_batch(frames[:size])
            except EdgekitError:  # beyond what the engine was built for
                sizes.remove(size)
                continue
            took = (time.perf_counter() - begun) * 1e3 / size
            if number:  # the first round warms up
                best[size] = min(took, best.get(size, took))
        if time.perf_counter() > end and best:
            break
    fastest = min(best, key=lambda size: best[size]) if best else 1
    chosen = fastest if 1 in best and best[fastest] < WORTH * best[1] else 1
    return chosen, {str(size): round(ms, 4) for size, ms in best.items()}
