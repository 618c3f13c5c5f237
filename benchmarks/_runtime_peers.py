"""Runs in a peer's own environment: what one call of its runtime costs over the bare session it wraps.

    python _runtime_peers.py PEER MODEL.onnx FEEDS.npz ROUNDS [BUNDLE]      prints JSON

Needs numpy, onnxruntime and the peer. `runtime_peers.py` calls it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import numpy as np

#: What an application imports to run a model.
IMPORTS = {
    "onnxruntime": "import numpy, onnxruntime",
    "edgekit": "from edgekit.runtime import Model; import edgekit.runtime.onnxruntime",
    "polygraphy": "from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx; import onnxruntime",
}


def bare(path: str, feeds: dict[str, Any]) -> Callable[[], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def peer_call(peer: str, path: str, feeds: dict[str, Any], bundle: str) -> Callable[[], Any]:
    """The peer's call on tensors; both sides run the same file with one thread."""
    if peer == "edgekit":
        from edgekit.runtime import Model

        model = Model.open(bundle).__enter__()
        return lambda: model.runner.run(feeds)
    if peer == "polygraphy":
        import onnxruntime as ort
        from polygraphy.backend.onnxrt import OnnxrtRunner

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        runner = OnnxrtRunner(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])).__enter__()
        return lambda: runner.infer(feeds)
    return bare(path, feeds)


def main() -> None:
    peer, path, file, rounds = sys.argv[1:5]
    feeds = dict(np.load(file, allow_pickle=False))
    calls = [bare(path, feeds), peer_call(peer, path, feeds, sys.argv[5] if len(sys.argv) > 5 else "")]
    taken: list[list[int]] = [[], []]
    for _ in range(200):
        for call in calls:
            call()
    gc.collect()
    gc.disable()
    for number in range(int(rounds)):
        for which in (0, 1) if number % 2 else (1, 0):
            start = perf_counter_ns()
            calls[which]()
            taken[which].append(perf_counter_ns() - start)
    plain, wrapped = (float(np.median(each)) / 1e3 for each in taken)
    print(json.dumps({"bare_us": plain, "call_us": wrapped, "overhead_us": wrapped - plain}))


if __name__ == "__main__":
    main()
