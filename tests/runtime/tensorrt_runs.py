"""What every test of the TensorRT runner does."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.runtime.onnxruntime import session


def truth(bundle: Bundle, x: Any) -> Any:
    return session(bundle.read(FLOAT_GRAPH)).run(None, {"x": x})[0]


def samples(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


def nothing_left(simulation: Any) -> None:
    gc.collect()
    assert simulation.cuda.left == {}
    assert simulation.trt.alive == 0
