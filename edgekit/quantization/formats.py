"""The forms beside int8: fp8 for targets from SM 8.9, and weights alone in int8 or int4."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import GraphError
from edgekit.progress import say

from .bench import BATCH_BYTES
from .calibrate import Result
from .fp8 import to_fp8
from .placement import multiply_accumulates, place, shape_tensors
from .prepare import attribute, prepare
from .samples import Pool
from .simulate import measured_shapes, observe, signal_to_noise, with_reference
from .weight_only import weight_only

__all__ = ["FORMATS", "WEIGHTS", "other_format"]

#: Weights alone: bits and block (0: a scale per channel). TensorRT 10 documents blocks of 64 and 128 for int4.
WEIGHTS = {"weights8": (8, 0), "weights4": (4, 64)}
_COUNTED = ("tensors", "weights", "bytes_before", "bytes_after")
FORMATS = ("int8", "fp8", *WEIGHTS)


def other_format(bundle: Bundle, pool: Pool, form: str) -> Result:
    """The graph in one of the forms but int8, measured on held-out samples. It has no ``calibration.json``.

    Raises `GraphError` where nothing can be quantized, or where the result cannot be run.
    """
    data = bundle.file(FLOAT_GRAPH).read_bytes()
    prepared = prepare(data)
    model, about = _weights(prepared, form) if form in WEIGHTS else _fp8(prepared, pool)
    graph: bytes = model.SerializeToString(deterministic=True)
    judges = pool.held_out if len(pool.held_out) else pool.calibration
    snr = signal_to_noise(model, with_reference(onnx.load_model_from_string(data), judges.batches(1)))
    return Result(
        graph,
        b"",
        {
            "snr_db": round(snr, 2),
            "measured_on": f"{len(judges)} {'held-out' if len(pool.held_out) else 'calibration'} samples",
            "size_bytes": len(graph),
            "format": form,
            "method": "minmax" if form == "fp8" else "mse",
            "culprit": None,
            **about,
        },
        "",
    )


def _weights(prepared: onnx.ModelProto, form: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Weights alone, and its figures. No product is computed in integers: ``share`` is 0.

    ``layers`` counts float32 constants of two axes or more. ``stored``: for int8 and int4, those stored so: ``tensors``,
    ``weights`` (their elements), ``bytes_before``, ``bytes_after``.
    """
    bits, block = WEIGHTS[form]
    model, made = weight_only(prepared, bits=bits, block=block)
    stored: dict[str, dict[str, int]] = {}
    for layer in made["layers"]:
        sums = stored.setdefault(layer["form"].split(",")[0], dict.fromkeys(_COUNTED, 0))
        numbers = (1, layer["bytes_before"] // 4, layer["bytes_before"], layer["bytes_after"])
        for key, value in zip(_COUNTED, numbers, strict=True):
            sums[key] += value
    for width, sums in sorted(stored.items()):
        tensors = f"{sums['tensors']} tensor{'' if sums['tensors'] == 1 else 's'}"
        say(f"{width}: {sums['weights']} weights in {tensors}, {sums['bytes_before']} bytes became {sums['bytes_after']}")
    matrices = sum(tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 for tensor in prepared.graph.initializer)
    count = len(made["layers"])
    return model, {"share": 0.0, "layers": {form: count, "float": matrices - count}, "stored": stored}


def _fp8(prepared: onnx.ModelProto, pool: Pool) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """E4M3 for all layers but grouped ones, and its figures: TensorRT expands grouped weights, and gains nothing."""
    placement = place(prepared)
    ranks = {tensor.name: len(tensor.dims) for tensor in prepared.graph.initializer}
    depthwise = {node.name for node in prepared.graph.node if attribute(node, "group", 1) > 1}
    layers = [x for x in placement.layers if x.name not in depthwise and ranks[x.weight] != 3 and x.position == 1]
    if not layers:
        raise GraphError("no layer can be fp8", "use --format int8, or weights8 for recurrent layers")
    feeds = pool.calibration.read(0)
    macs = multiply_accumulates(prepared, placement, measured_shapes(prepared, shape_tensors(prepared, placement), feeds))
    shapes = measured_shapes(prepared, [layer.data for layer in layers], feeds)
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    seen = observe(prepared, sizes, lambda: pool.calibration.batches(1), BATCH_BYTES)
    share = sum(macs[layer.name] for layer in layers) / max(sum(macs.values()), 1)
    every = len(placement.names) + len(placement.unquantized)
    return to_fp8(prepared, layers, {name: max(found.amax, 1e-6) for name, found in seen.items()}), {
        "share": round(share, 6),
        "layers": {"fp8": len(layers), "float": every - len(layers)},
    }
