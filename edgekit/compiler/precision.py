"""Precision is decided in the graph: a float32 graph becomes a float16 graph by casts, well typed by construction.

TensorRT 10 and later read types from the graph alone ("strong typing", NVIDIA TensorRT migration guide 10.x to 11.x),
so an fp16 engine needs an fp16 graph. Which nodes stay float32 follows the rule of NVIDIA ModelOpt's AutoCast: where an
activation exceeds 512 or a weight exceeds 65504, the largest float16.

A graph with Q/DQ becomes int8 and float16. What reads a DequantizeLinear says in which type it answers, and its scale has
that type (opset 19), so that no Cast stands between DequantizeLinear and the layer that fuses it. TensorRT-RTX 1.7 fuses
a Cast there as well (the same kernels); for TensorRT 10 ModelOpt folds it away too, and so it is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GraphError, MissingExtra
from edgekit.runtime.golden import GoldenResult, compare_outputs
from edgekit.runtime.onnxruntime import session

from .passes import opset
from .reading import check_model

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingExtra("onnx", "onnx") from None

__all__ = ["HALF_OPS", "activation_peaks", "against_golden", "answers", "kept_float32", "to_fp16", "without_rounding"]

MAX_ACTIVATION = 512.0
MAX_WEIGHT = 65504.0
HALF_SCALE_OPSET = 19  # the first in which the scales of QuantizeLinear and DequantizeLinear may be float16
#: How much rounding to float16 may change a scale: 4 half units in the last place, a gain of 0.2%. Scales below about
#: 1.5e-5 lose more, for they are subnormal; they stay float32.
MAX_SCALE_ERROR = 2.0**-9
#: Operators that run in float16. Left out on purpose: BatchNormalization (its variances underflow; fold it first),
#: recurrent ones (ONNX Runtime crashed on a float16 LSTM), and sums, powers and exponentials, which overflow.
HALF_OPS = frozenset(
    """Add AveragePool Clip Concat Conv ConvTranspose DepthToSpace Div Elu Expand Flatten Gather Gelu Gemm
    GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu
    MatMul Max MaxPool Min Mul Neg PRelu Pad Relu Reshape Resize Sigmoid Slice Softmax SpaceToDepth Split Squeeze Sub
    Tanh Tile Transpose Unsqueeze Where""".split()  # noqa: SIM905
)
QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_FLOAT_ONLY_INPUTS = {"Resize": {1, 2}}  # roi and scales have types of their own


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor name -> ONNX element type, as far as type inference knows."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return found | {i.name: i.data_type for i in graph.initializer}


def activation_peaks(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Largest |value| of every float32 input and of every float32 tensor that a node makes (one run of ONNX Runtime)."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    types = _types(model)
    outer = {o.name for o in model.graph.output}
    names = [n for node in model.graph.node for n in node.output if n and types.get(n) == TensorProto.FLOAT]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outer)
    run = session(probe.SerializeToString())
    values = run.run(names, dict(inputs)) if names else []  # no names would be all outputs
    seen = [*zip(names, values, strict=True), *((n, a) for n, a in inputs.items() if types.get(n) == TensorProto.FLOAT)]
    return {name: float(np.abs(value).max(initial=0.0)) for name, value in seen}


def _half_scale(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> NDArray[np.float32] | None:
    """The scale of a Q or DQ node, rounded to float16; None where float16 cannot hold it or the node states its own types.

    A channel whose int8 weights are all 0 gets the scale 1: it means nothing there, and is often too small for float16.
    """
    own = "precision" if node.op_type == "QuantizeLinear" else "output_dtype"  # from opset 23 on
    stated = any(a.name == own and a.i for a in node.attribute)
    if stated or node.input[1] not in weights or weights[node.input[1]].data_type != TensorProto.FLOAT:
        return None
    scale = numpy_helper.to_array(weights[node.input[1]]).copy()
    stored = weights.get(node.input[0])
    if stored is not None and stored.data_type == TensorProto.INT8 and scale.ndim == 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % len(stored.dims)
        scale[~np.moveaxis(numpy_helper.to_array(stored), axis, 0).reshape(len(scale), -1).any(1)] = 1.0
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16).astype(np.float32)
    fits = (rounded > 0) & np.isfinite(rounded) & (np.abs(rounded - scale) <= MAX_SCALE_ERROR * scale)
    return rounded if fits.all() else None


class _Caster:
    """Rewrites one graph. A float16 tensor goes by ``NAME_fp16``; ``NAME`` stays its float32 form, made when needed.

    So do the outputs of DequantizeLinear: each form is made when the first node reads it.
    """

    def __init__(self, model: onnx.ModelProto, peaks: Mapping[str, float], twin: bool) -> None:
        self.model, self.peaks, self.types, self.twin = model, peaks, _types(model), twin
        self.weights = {i.name: i for i in model.graph.initializer}
        self.dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
        self.taken = set(self.types) | {n for node in model.graph.node for n in node.output}
        self.half: dict[str, str] = {}  # original name -> its float16 form
        self.single: set[str] = set()  # float16 by nature, or dequantized, with a float32 form already made
        self.scales: dict[tuple[str, bytes, bool], str] = {}  # (scale's name, values, float16?) -> its constant
        self.born_half: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.added: list[onnx.TensorProto] = []

    def _fresh(self, name: str) -> str:
        fresh = name + "_fp16"
        while fresh in self.taken:
            fresh += "_"
        self.taken.add(fresh)
        return fresh

    def fits(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in HALF_OPS or node.domain not in ("", "ai.onnx"):
            return False
        tensors = [n for n in (*node.input, *node.output) if n]
        floats = [n for n in tensors if self.types.get(n) == TensorProto.FLOAT]
        if not floats or any(n not in self.types for n in tensors):
            return False
        for name in floats:
            if name in self.weights:
                values = numpy_helper.to_array(self.weights[name])
                if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > MAX_WEIGHT:
                    return False
            elif self.peaks.get(name, 0.0) > (MAX_WEIGHT if self._is_weight(name) else MAX_ACTIVATION):
                return False
        return True

    def _is_weight(self, name: str) -> bool:
        """Whether a tensor is dequantized from a constant."""
        return name in self.dequantized and self.dequantized[name].input[0] in self.weights

    def _as_half(self, name: str) -> str:
        if name not in self.half:
            if name in self.dequantized and (scale := _half_scale(self.dequantized[name], self.weights)) is not None:
                self.half[name] = self._dequantize(name, scale)
                return self.half[name]
            self._as_single(name)
            self.half[name] = self._fresh(name)
            if name in self.weights:
                values = numpy_helper.to_array(self.weights[name])
                self._constant(values.astype(np.float16), self.half[name])
            else:
                self._round(name, self.half[name])
        return self.half[name]

    def _constant(self, values: NDArray[np.float16], name: str) -> None:
        self.added.append(numpy_helper.from_array(values.astype(np.float32) if self.twin else values, name))

    def _scaled(self, node: onnx.NodeProto, scale: NDArray[np.float32], half: bool) -> onnx.NodeProto:
        """A copy of a Q or DQ node with this scale, stored as float16 or as the same values in float32."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        key = (node.input[1], scale.tobytes(), half)
        if key not in self.scales:
            self.scales[key] = self._fresh(node.input[1])
            if half:
                self._constant(scale.astype(np.float16), self.scales[key])
            else:
                self.added.append(numpy_helper.from_array(scale, self.scales[key]))
        made.input[1] = self.scales[key]
        return made

    def _dequantize(self, name: str, scale: NDArray[np.float32]) -> str:
        """Add the float16 form of a DequantizeLinear; returns what its output is called."""
        made = self._scaled(self.dequantized[name], scale, half=True)
        fresh = self._fresh(name)
        made.output[0] = self._fresh(name) if self.twin else fresh
        self.nodes.append(made)
        if self.twin:
            self._round(made.output[0], fresh)
        return fresh

    def _quantize(self, node: onnx.NodeProto) -> None:
        """QuantizeLinear reads its input in the type that it was made in; its scale is that of its DequantizeLinear."""
        scale = _half_scale(node, self.weights) if self.types.get(node.input[0]) == TensorProto.FLOAT else None
        half = scale is not None and node.input[0] in self.born_half
        if not half:
            self._as_single(node.input[0])
        made = node if scale is None else self._scaled(node, scale, half)
        if half:
            made.input[0] = self.half[node.input[0]]
        self.nodes.append(made)

    def _round(self, source: str, target: str) -> None:
        """Cast to float16; in a twin, and back to float32."""
        middle = self._fresh(source) if self.twin else target
        self.nodes.append(helper.make_node("Cast", [source], [middle], to=TensorProto.FLOAT16))
        if self.twin:
            self.nodes.append(helper.make_node("Cast", [middle], [target], to=TensorProto.FLOAT))

    def _as_single(self, name: str) -> None:
        if name in self.dequantized and name not in self.single:
            self.single.add(name)
            node = self.dequantized[name]
            scale = _half_scale(node, self.weights) if not self._is_weight(name) else None
            self.nodes.append(node if scale is None else self._scaled(node, scale, half=False))
        elif name in self.born_half and name not in self.single:
            self.single.add(name)
            if self.twin:
                self.nodes.append(helper.make_node("Identity", [self.half[name]], [name]))
            else:
                self.nodes.append(helper.make_node("Cast", [self.half[name]], [name], to=TensorProto.FLOAT))

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            if node.op_type == "DequantizeLinear":
                continue  # made when it is read
            if node.op_type == "QuantizeLinear":
                self._quantize(node)
            elif self.fits(node):
                self._convert(node)
            else:
                for name in (*node.input, *_captured(node)):
                    self._as_single(name)
                self.nodes.append(node)
        for output in self.model.graph.output:
            self._as_single(output.name)
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        del made.graph.node[:], made.graph.value_info[:]
        made.graph.node.extend(self.nodes)
        used = {n for node in self.nodes for n in (*node.input, *_captured(node))} | {o.name for o in made.graph.output}
        kept = [i for i in (*self.model.graph.initializer, *self.added) if i.name in used]
        del made.graph.initializer[:]
        made.graph.initializer.extend(kept)
        return made

    def _convert(self, node: onnx.NodeProto) -> None:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        single_only = _FLOAT_ONLY_INPUTS.get(node.op_type, set())
        for index, name in enumerate(node.input):
            if self.types.get(name) == TensorProto.FLOAT and index not in single_only:
                made.input[index] = self._as_half(name)
            else:
                self._as_single(name)
        for index, name in enumerate(node.output):
            if name and self.types.get(name) == TensorProto.FLOAT:
                self.half[name] = made.output[index] = self._fresh(name)
                self.born_half.add(name)
        self.nodes.append(made)
        if self.twin:
            for index, name in enumerate(made.output):
                if node.output[index] in self.born_half:
                    made.output[index] = self._fresh(name)
                    self._round(made.output[index], name)


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that the subgraphs of a node may take from the graph around them."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                found |= set(inner.input) | _captured(inner)
            found |= {o.name for o in graph.output}
    return found


def to_fp16(model: onnx.ModelProto, peaks: Mapping[str, float], *, twin: bool = False) -> onnx.ModelProto:
    """A float32 graph -> the same graph computing in float16 where that is safe; inputs and outputs stay float32.

    What is int8 by Q/DQ stays int8, with the same stored weights; scales are rounded to float16, alike in Q and its DQ, and
    the opset becomes 19 at least. ``peaks``: from `activation_peaks`. The model must hold no external data. The result is
    checked for its types (`onnx.checker`, strict inference). Raises `GraphError` where it does not pass, and where a graph
    with Q/DQ does not convert to opset 19. ``twin`` gives a float32 graph instead that rounds every such tensor to float16 and
    back: ONNX Runtime's CPU computes a chain of float16 nodes in float32 throughout, and so hides the rounding (seen with
    1.32: (x + 500) - 500 came back exact); the twin shows it, with sums in float32 as on tensor cores.
    """
    if any(node.op_type in QDQ for node in model.graph.node):
        model = _with_half_scales(model)
    made = _Caster(model, peaks, twin).run()
    _check_types(made)
    return made


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what reads a quantized activation reads the activation itself; stored weights stay as they are."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    sources = {node.output[0]: node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    for node in made.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sources:
            node.CopyFrom(helper.make_node("Identity", [sources[node.input[0]]], [node.output[0]], node.name))
    return made


def _check_types(model: onnx.ModelProto) -> None:
    """What the file states of its outputs' shapes does not count: exporters get it wrong, and the graph still computes."""
    check_model(model)
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    for output in shaped.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        onnx.shape_inference.infer_shapes(shaped, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise GraphError(f"types or shapes contradict each other: {' '.join(str(error).split())[:200]}") from None


def _with_half_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at opset 19 or later: the same nodes where they are valid there, else as ONNX converts them."""
    if opset(model) >= HALF_SCALE_OPSET:
        return model
    raised = onnx.ModelProto()
    raised.CopyFrom(model)
    for entry in raised.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = HALF_SCALE_OPSET
    raised.ir_version = max(raised.ir_version, 9)
    # Split without sizes needs an attribute from 18 on, RoiAlign has another default from 16 on.
    if not any(node.op_type in ("Split", "RoiAlign") for node in raised.graph.node):
        try:
            _check_types(raised)
            return raised
        except GraphError:
            pass
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(model, HALF_SCALE_OPSET)
    except Exception as error:  # noqa: BLE001  the converter raises plain RuntimeErrors
        reason = (str(error).strip().splitlines() or ["?"])[-1][:160]
        raise GraphError(f"float16 scales need opset {HALF_SCALE_OPSET}, and the graph does not convert: {reason}") from None
    converted.ir_version = max(converted.ir_version, 9)
    return converted


def kept_float32(model: onnx.ModelProto, peaks: Mapping[str, float]) -> int:
    """How many nodes `to_fp16` leaves computing float32: by their operator, or for their range."""
    caster = _Caster(model, peaks, twin=False)
    return sum(
        node.op_type not in ("Cast", "Constant", *QDQ)
        and any(caster.types.get(name) == TensorProto.FLOAT for name in node.output)
        and not caster.fits(node)
        for node in model.graph.node
    )


def answers(graph: bytes, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs of a graph on ONNX Runtime, by name."""
    run = session(graph)
    names = [o.name for o in run.get_outputs()]
    return dict(zip(names, run.run(names, dict(inputs)), strict=True))


def against_golden(
    graph: bytes, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]], *, quantized: bool = False
) -> GoldenResult:
    """The worst output's errors of a graph on ONNX Runtime against golden outputs; ``quantized`` as in `compare_outputs`."""
    return compare_outputs(outputs, answers(graph, inputs), quantized=quantized)
