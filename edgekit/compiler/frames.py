"""A graph that takes frames of bytes: what the host does to a resized frame before inference goes in front of the graph.

The input keeps its name and becomes uint8 (n, H, W, C), as the frame lies in memory: Cast to float32, Transpose to
(n, C, H, W), times a scale, plus a shift. That is `edgekit.preprocess.normalisation`, number by number, and so in float32
whatever the graph behind it computes in: where it begins with a Cast to float16 or with QuantizeLinear, that follows.
Resizing and grey stay on the host.

TensorRT and its ONNX parser have uint8 inputs since 8.5 (changelog of onnx-tensorrt), for one kind of reader only, a cast to
float32 or float16 (`DataType` in the documentation of 8.6 to 11): the parser of TensorRT-RTX 1.7 refuses a Transpose of bytes.
So the cast is the first node, and the input's one reader. TensorRT 8.6 types weakly: with its FP16 flag it may normalise in
float16, which holds every byte and has 11 bits for the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GoldenError
from edgekit.graphs.editing import all_nodes, free_name, subgraphs, tensor_names
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import Preprocessor, denormalised, normalisation
from edgekit.runtime.golden import parse_golden, save_golden

from .precision import against_golden, answers

__all__ = ["Framed", "take_frames", "with_normalisation"]

#: How far the graph with the normalisation inside may be from the graph that is given normalised tensors, relative to the
#: largest output. ONNX Runtime gives the same bits; a build of it that fuses a product and a sum would round once less.
SAME = 1e-5
#: The golden outputs are those of float tensors. Rounded to bytes their inputs must answer this well, or as the graph does on
#: the tensors themselves, less `MARGIN_DB`: what is further off was no picture.
LEAST_DB, MARGIN_DB = 20.0, 3.0


class Framed(NamedTuple):
    """``golden``: the golden file with frames for inputs, None where there is none to make it from. ``snr_db``: the graph's
    answers to these frames against the golden outputs, which are those of the float tensors."""

    graph: bytes
    golden: Path | None
    snr_db: float | None
    note: str


def take_frames(graph: bytes, request: Mapping[str, Any], folder: Path, *, quantized: bool) -> Framed:
    """A typed graph -> the same taking the frames that ``request["frames"]`` normalises; writes ``golden.npz`` to ``folder``.

    Raises `GoldenError` where it does not answer as the graph does on what the host normalises, or where its golden inputs
    lose too much as bytes.
    """
    spec = msgspec.convert(request["frames"], ImagePreprocessing)
    made = with_normalisation(graph, spec)
    what = f"takes frames of bytes (uint8, {spec.height}x{spec.width}x{spec.channels}) and normalises them"
    if request["golden"] is None:
        return Framed(made, None, None, f"{what}; without golden outputs nobody checks that")
    inputs, outputs = parse_golden(Path(request["golden"]).read_bytes())
    (name,) = inputs
    frames = denormalised(spec, inputs[name])
    _check_same(graph, made, name, frames, spec, quantized=quantized)
    tensors = against_golden(graph, inputs, outputs, quantized=quantized).snr_db
    found = against_golden(made, {name: frames}, outputs, quantized=quantized).snr_db
    if found < min(tensors, LEAST_DB) - MARGIN_DB:
        raise GoldenError(
            f"the golden inputs answer at {found:.1f} dB as bytes, at {tensors:.1f} dB as float tensors",
            "they are no pictures of 8 bits in this normalisation: leave --uint8-input out",
        )
    golden = folder / "golden.npz"
    golden.write_bytes(save_golden({name: frames}, outputs))
    exact = np.array_equal(_normalised(spec, frames), inputs[name])
    cost = "are exact as bytes" if exact else f"answer at {found:.1f} dB as bytes, at {tensors:.1f} dB as float tensors"
    return Framed(made, golden, round(found, 2), f"{what}; the golden inputs {cost}")


def with_normalisation(graph: bytes, spec: ImagePreprocessing) -> bytes:
    """The graph behind Cast, Transpose, Mul and Add; its one input is uint8 (n, H, W, C) then, by the same name."""
    model = onnx.load_model_from_string(graph)
    taken = {tensor.name for tensor in model.graph.initializer}
    (source,) = (value for value in model.graph.input if value.name not in taken)
    name = source.name
    base = free_name(tensor_names(model.graph), f"{name}/frame", ("single", "planes", "scaled", "normalised", "scale", "shift"))
    _read_instead(model.graph, name, f"{base}/normalised")
    for part, values in zip(("scale", "shift"), normalisation(spec), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(values.reshape(-1, 1, 1), f"{base}/{part}"))
    steps = [
        helper.make_node("Cast", [name], [f"{base}/single"], name=f"{base}/cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", [f"{base}/single"], [f"{base}/planes"], name=f"{base}/transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", [f"{base}/planes", f"{base}/scale"], [f"{base}/scaled"], name=f"{base}/mul"),
        helper.make_node("Add", [f"{base}/scaled", f"{base}/shift"], [f"{base}/normalised"], name=f"{base}/add"),
    ]
    nodes = [*steps, *(onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    tensor = source.type.tensor_type
    tensor.elem_type = TensorProto.UINT8
    for axis, size in zip(list(tensor.shape.dim)[1:], (spec.height, spec.width, spec.channels), strict=True):
        axis.dim_value = size
    made: bytes = model.SerializeToString(deterministic=True)
    return made


def _read_instead(graph: onnx.GraphProto, name: str, other: str) -> None:
    """Everything that reads ``name``, in subgraphs too, reads ``other``."""
    for node in all_nodes(graph):
        for index, read in enumerate(node.input):
            if read == name:
                node.input[index] = other
        for value in (value for inner in subgraphs(node) for value in inner.output):
            if value.name == name:
                value.name = other


def _normalised(spec: ImagePreprocessing, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W), by the function that a host uses, frame by frame."""
    preprocess = Preprocessor(spec)
    return np.concatenate([preprocess(frame) for frame in frames])


def _check_same(
    graph: bytes, made: bytes, name: str, frames: NDArray[np.uint8], spec: ImagePreprocessing, *, quantized: bool
) -> None:
    truth = answers(graph, {name: _normalised(spec, frames)})
    worst = against_golden(made, {name: frames}, truth, quantized=quantized).relative
    if not worst <= SAME:
        raise GoldenError(f"normalising in the graph changes its answers by {worst:.2g} relative", "report this with the model")
