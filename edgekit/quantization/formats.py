"""The forms beside int8: fp8 for targets from SM 8.9, and weights alone in int8 or int4."""

from __future__ import annotations

import numpy as np
import onnx

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import GraphError
from edgekit.progress import say

from .bench import BATCH_BYTES
from .calibrate import Result
from .fp8 import to_fp8
from .placement import Placement, multiply_accumulates, place, shape_tensors
from .prepare import attribute, prepare
from .samples import Pool
from .simulate import measured_shapes, observe, signal_to_noise, with_reference
from .weight_only import weight_only

__all__ = ["FORMATS", "WEIGHTS", "other_format"]

#: Weights alone: bits and block (0: a scale per channel). TensorRT 10 documents blocks of 64 and 128 for int4.
WEIGHTS = {"weights8": (8, 0), "weights4": (4, 64)}
FORMATS = ("int8", "fp8", *WEIGHTS)


def other_format(bundle: Bundle, pool: Pool, form: str) -> Result:
    """The graph in one of the forms but int8, measured on held-out samples. It has no ``calibration.json``.

    Raises `GraphError` where nothing can be quantized, or where the result cannot be run.
    """
    data = bundle.file(FLOAT_GRAPH).read_bytes()
    prepared = prepare(data)
    placement = place(prepared)
    feeds = pool.calibration.read(0)
    macs = multiply_accumulates(prepared, placement, measured_shapes(prepared, shape_tensors(prepared, placement), feeds))
    if form in WEIGHTS:
        bits, block = WEIGHTS[form]
        model, figures = weight_only(prepared, bits=bits, block=block)
        share, count = 0.0, len(figures["layers"])
        say(f"{count} weights in {bits} bits: {figures['bytes_before']} bytes became {figures['bytes_after']}")
    else:
        model, names = _fp8(prepared, placement, pool)
        share, count = sum(macs[name] for name in names) / max(sum(macs.values()), 1), len(names)
    graph: bytes = model.SerializeToString(deterministic=True)
    judges = pool.held_out if len(pool.held_out) else pool.calibration
    snr = signal_to_noise(model, with_reference(onnx.load_model_from_string(data), judges.batches(1)))
    return Result(
        graph,
        b"",
        {
            "snr_db": round(snr, 2),
            "measured_on": f"{len(judges)} {'held-out' if len(pool.held_out) else 'calibration'} samples",
            "share": round(share, 6),
            "size_bytes": len(graph),
            "format": form,
            "method": "minmax" if form == "fp8" else "mse",
            "layers": {form: count, "float": len(placement.names) + len(placement.unquantized) - count},
            "culprit": None,
        },
        "",
    )


def _fp8(prepared: onnx.ModelProto, placement: Placement, pool: Pool) -> tuple[onnx.ModelProto, list[str]]:
    """E4M3 for all layers but grouped ones: TensorRT expands their weights, and gains nothing."""
    ranks = {tensor.name: len(tensor.dims) for tensor in prepared.graph.initializer}
    depthwise = {node.name for node in prepared.graph.node if attribute(node, "group", 1) > 1}
    layers = [x for x in placement.layers if x.name not in depthwise and ranks[x.weight] != 3 and x.position == 1]
    if not layers:
        raise GraphError("no layer can be fp8", "use --format int8")
    feeds = pool.calibration.read(0)
    shapes = measured_shapes(prepared, [layer.data for layer in layers], feeds)
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    seen = observe(prepared, sizes, lambda: pool.calibration.batches(1), BATCH_BYTES)
    return to_fp8(prepared, layers, {name: max(found.amax, 1e-6) for name, found in seen.items()}), [x.name for x in layers]
