"""An int8 graph from frozen ranges: no data, no search, the same bytes on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, MANIFEST, Bundle
from edgekit.errors import DataError, GraphError
from edgekit.runtime.golden import parse_golden

from . import record
from .calibrate import Result, culprit
from .graph import insert
from .placement import RECURRENT, Placement, place, weights_of
from .prepare import prepare
from .record import Calibration
from .simulate import signal_to_noise, with_reference
from .weight_only import stored_small

__all__ = ["RANDOM", "rebuild", "rebuild_result"]

RANDOM = "random golden inputs"  # of the importer: nothing was calibrated for them


def rebuild(graph: bytes, calibration: Calibration) -> bytes:
    """Float ONNX bytes and frozen ranges -> the bytes of ``model.int8.onnx``.

    Raises `DataError` where the calibration belongs to another graph, `GraphError` where the result is not the recorded one.
    """
    found = hashlib.sha256(graph).hexdigest()
    if found != calibration.graph:
        raise DataError(
            f"the calibration was made for the float graph {calibration.graph[:12]}, this one is {found[:12]}",
            "calibrate this model: leave out --calib, or give it data",
        )
    if calibration.recovery.endswith(record.TRAINED):
        raise DataError(
            "the graph of this calibration was trained further (--qat): its numbers are in the graph alone",
            "keep the bundle itself, or calibrate again without --qat",
        )
    prepared = prepare(graph)
    placement = place(prepared)
    _check_fit(calibration, placement, prepared)
    placement = placement._replace(groups=calibration.groups)  # as they were then: the table may have been bettered since
    try:
        model = insert(prepared, placement, calibration.parameters(prepared, placement), calibration.chosen)
        if calibration.stored:
            model, _ = stored_small(model, calibration.stored)
    except (ValueError, ZeroDivisionError):  # a factor of another size than its channels
        raise DataError("the calibration does not fit: its sizes are not the graph's", "calibrate again, with data") from None
    data: bytes = model.SerializeToString(deterministic=True)
    if hashlib.sha256(data).hexdigest() != calibration.int8_graph:
        versions = ", ".join(f"{name} {version}" for name, version in calibration.versions.items())
        raise GraphError(
            "the rebuilt int8 graph differs from the recorded one", f"it was made with {versions}; or calibrate again"
        )
    return data


def rebuild_result(bundle: Bundle, path: Path) -> tuple[Result, bytes]:
    """`rebuild` for a bundle, with the figures, and the golden arrays on which their SNR is measured.

    An imported bundle's own are random, until it is quantized with samples. Where ``path`` lies in a bundle that was, of the
    same float graph, they are that one's.
    """
    if not path.is_file():
        raise DataError(f"there is no calibration at {path}", "take the calibration.json that edgekit quantize wrote")
    calibration = record.decode(path)
    if calibration.preprocessing != bundle.manifest.preprocessing:
        raise DataError(
            f"{path} was calibrated with other preprocessing than {bundle.path} has", "calibrate this model with its data"
        )
    graph = bundle.file(FLOAT_GRAPH).read_bytes()
    data = rebuild(graph, calibration)
    golden, real = bundle.read(GOLDEN), _holds_samples(bundle)
    if not real and (path.parent / MANIFEST).is_file():  # a calibration need not lie in a bundle
        beside = Bundle.open(path.parent)
        if _holds_samples(beside) and beside.manifest.files.get(FLOAT_GRAPH) == bundle.manifest.files.get(FLOAT_GRAPH):
            golden, real = beside.read(GOLDEN), True
    inputs, _ = parse_golden(golden)
    reference = onnx.load_model_from_string(graph)
    snr = signal_to_noise(onnx.load_model_from_string(data), with_reference(reference, [inputs]))
    total = sum(layer.macs for layer in calibration.layers)
    figures = {
        "snr_db": round(snr, 2),
        "measured_on": "golden inputs" if real else RANDOM,
        "share": round(sum(layer.macs for layer in calibration.layers if layer.int8) / max(total, 1), 6),
        "size_bytes": len(data),
        "method": calibration.method,
        "recovery": calibration.recovery,
        "layers": {"int8": len(calibration.chosen), "float": len(calibration.layers) - len(calibration.chosen)},
        "recurrent": sum(layer.op in RECURRENT for layer in calibration.layers),
        "culprit": culprit(calibration),
    }
    return Result(data, path.read_bytes(), figures, ""), golden


def _holds_samples(bundle: Bundle) -> bool:
    """Whether golden inputs are what the model sees: `edgekit import` makes random ones, `quantize` replaces them."""
    quantized = (entry for entry in bundle.manifest.history if entry.stage == "quantize")
    return bundle.manifest.task != "tensor" or any(entry.figures.get("measured_on") != RANDOM for entry in quantized)


def _check_fit(calibration: Calibration, placement: Placement, prepared: onnx.ModelProto) -> None:
    """Raises `DataError` where names or sizes are not this graph's."""
    shapes = {name: weight.shape for name, weight in weights_of(prepared, placement).items()}
    layers = {layer.name: layer for layer in placement.layers}
    cause = ""
    for entry in calibration.layers:
        if entry.int8 and entry.name not in placement.names:
            cause = f"the graph has no layer {entry.name!r} to quantize"
        elif entry.int8 and entry.name in layers and len(entry.weights) != shapes[entry.name][layers[entry.name].axis]:
            cause = (
                f"{entry.name!r} needs {shapes[entry.name][layers[entry.name].axis]} weight scales, not {len(entry.weights)}"
            )
        elif entry.bias is not None and entry.name not in layers:
            cause = f"{entry.name!r} has no bias to correct"
    if calibration.groups.keys() != placement.groups.keys() or not {*calibration.groups.values()} <= {*calibration.tensors}:
        cause = cause or "its tensors are not those of the graph"
    if cause:
        raise DataError(f"the calibration does not fit: {cause}", "calibrate again, with data")
