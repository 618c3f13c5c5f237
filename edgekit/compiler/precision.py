"""Precision is decided in the graph: a float32 graph becomes a float16 graph by casts, well typed by construction.

TensorRT 10 and later read types from the graph alone ("strong typing", NVIDIA TensorRT migration guide 10.x to 11.x),
so an fp16 engine needs an fp16 graph. Which nodes stay float32 follows the rule of NVIDIA ModelOpt's AutoCast: where an
activation exceeds 512 or a weight exceeds 65504, the largest float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra
from edgekit.runtime.golden import GoldenResult, compare_arrays
from edgekit.runtime.onnxruntime import session

from .reading import check_model

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingExtra("onnx", "onnx") from None

__all__ = ["HALF_OPS", "activation_peaks", "against_golden", "kept_float32", "to_fp16"]

MAX_ACTIVATION = 512.0
MAX_WEIGHT = 65504.0
#: Operators that run in float16. Left out on purpose: BatchNormalization (its variances underflow; fold it first),
#: recurrent ones (ONNX Runtime crashed on a float16 LSTM), and sums, powers and exponentials, which overflow.
HALF_OPS = frozenset(
    """Add AveragePool Clip Concat Conv ConvTranspose DepthToSpace Div Elu Expand Flatten Gather Gelu Gemm
    GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu
    MatMul Max MaxPool Min Mul Neg PRelu Pad Relu Reshape Resize Sigmoid Slice Softmax SpaceToDepth Split Squeeze Sub
    Tanh Tile Transpose Unsqueeze Where""".split()  # noqa: SIM905
)
_FLOAT_ONLY_INPUTS = {"Resize": {1, 2}}  # roi and scales have types of their own


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor name -> ONNX element type, as far as type inference knows."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return found | {i.name: i.data_type for i in graph.initializer}


def activation_peaks(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Largest |value| of every float32 tensor that a node makes, on the given inputs (one run of ONNX Runtime)."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    types = _types(model)
    outer = {o.name for o in model.graph.output}
    names = [n for node in model.graph.node for n in node.output if n and types.get(n) == TensorProto.FLOAT]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outer)
    run = session(probe.SerializeToString())
    values = run.run(names, dict(inputs))
    return {name: float(np.abs(value).max(initial=0.0)) for name, value in zip(names, values, strict=True)}


class _Caster:
    """Rewrites one graph. A float16 tensor goes by ``NAME_fp16``; ``NAME`` stays its float32 form, made when needed."""

    def __init__(self, model: onnx.ModelProto, peaks: Mapping[str, float], twin: bool) -> None:
        self.model, self.peaks, self.types, self.twin = model, peaks, _types(model), twin
        self.weights = {i.name: i for i in model.graph.initializer}
        self.taken = set(self.types) | {n for node in model.graph.node for n in node.output}
        self.half: dict[str, str] = {}  # original name -> its float16 form
        self.single: set[str] = set()  # float16 by nature, with a float32 form already made
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
            elif self.peaks.get(name, 0.0) > MAX_ACTIVATION:
                return False
        return True

    def _as_half(self, name: str) -> str:
        if name not in self.half:
            self.half[name] = self._fresh(name)
            if name in self.weights:
                values = numpy_helper.to_array(self.weights[name]).astype(np.float16)
                self.added.append(numpy_helper.from_array(values.astype(np.float32) if self.twin else values, self.half[name]))
            else:
                self._round(name, self.half[name])
        return self.half[name]

    def _round(self, source: str, target: str) -> None:
        """Cast to float16; in a twin, and back to float32."""
        middle = self._fresh(source) if self.twin else target
        self.nodes.append(helper.make_node("Cast", [source], [middle], to=TensorProto.FLOAT16))
        if self.twin:
            self.nodes.append(helper.make_node("Cast", [middle], [target], to=TensorProto.FLOAT))

    def _as_single(self, name: str) -> None:
        if name in self.born_half and name not in self.single:
            self.single.add(name)
            if self.twin:
                self.nodes.append(helper.make_node("Identity", [self.half[name]], [name]))
            else:
                self.nodes.append(helper.make_node("Cast", [self.half[name]], [name], to=TensorProto.FLOAT))

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            if self.fits(node):
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

    ``peaks``: from `activation_peaks`. The model must hold no external data. The result is checked for its types
    (`onnx.checker`, strict inference). ``twin`` gives a float32 graph instead that rounds every such tensor to float16 and
    back: ONNX Runtime's CPU computes a chain of float16 nodes in float32 throughout, and so hides the rounding (seen with
    1.32: (x + 500) - 500 came back exact); the twin shows it, with sums in float32 as on tensor cores.
    """
    made = _Caster(model, peaks, twin).run()
    check_model(made)
    onnx.shape_inference.infer_shapes(made, strict_mode=True)
    return made


def kept_float32(model: onnx.ModelProto, peaks: Mapping[str, float]) -> int:
    """How many nodes `to_fp16` leaves computing float32: by their operator, or for their range."""
    caster = _Caster(model, peaks, twin=False)
    return sum(
        node.op_type not in ("Cast", "Constant")
        and any(caster.types.get(name) == TensorProto.FLOAT for name in node.output)
        and not caster.fits(node)
        for node in model.graph.node
    )


def against_golden(graph: bytes, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> GoldenResult:
    """The worst output's errors of a graph on ONNX Runtime against golden outputs."""
    run = session(graph)
    names = [o.name for o in run.get_outputs()]
    found = dict(zip(names, run.run(names, dict(inputs)), strict=True))
    results = [compare_arrays(golden, found[name]) for name, golden in outputs.items()]
    return GoldenResult(max(r.relative for r in results), min(r.snr_db for r in results))
