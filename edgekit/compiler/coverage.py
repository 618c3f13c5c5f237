"""Which target takes a graph, and why another does not: what `build` would find out, said before."""

from __future__ import annotations

from typing import Any

import onnx

from edgekit.graphs.editing import all_nodes
from edgekit.targets import JetPack, Target, load_targets

from .faults import stated_attributes
from .passes import opset
from .precision import HALF_SCALE_OPSET
from .reading import UNBUILDABLE, UNBUILDABLE_BY_RTX

__all__ = ["coverage", "refused", "said_of"]

#: Integer operators that TensorRT's parser refuses as well; `import` computes them in float.
_INTEGER = frozenset(("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"))
_SHOWN = 3


def coverage(model: onnx.ModelProto, form: str) -> list[dict[str, Any]]:
    """A row a target: ``target``, ``builds`` ("engine", "kit" or None), ``runs``, ``precision``, ``tensorrt``, ``why``.

    ``form``: "float", or how the graph is quantized (`Bundle.form`). ``precision`` is what ``build --precision best`` would
    begin with, ``tensorrt`` the versions that read the graph, ``why`` what stands against the others.
    """
    names = {kind: refused(model, kind) for kind in ("rtx", "device", "cpu")}
    return [_row(target, form, opset(model), names[target.kind]) for target in load_targets().values()]


def refused(model: onnx.ModelProto, kind: str = "rtx") -> list[str]:
    """Nodes of operators that TensorRT does not build, as "operator (node)"; ONNX Runtime runs most of them.

    ``kind``: of the target; a device's classic TensorRT builds more than TensorRT-RTX. Where an attribute is at fault, it is
    there as well: "ScatterND (node, reduction='add')".
    """
    return sorted({_named(node) for node in all_nodes(model.graph) if _refused(node, kind)})


def said_of(names: list[str], builder: str = "TensorRT") -> str:
    """``names`` (`refused`) in words, the first few."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{builder} does not build {', '.join(names[:_SHOWN])}{more}"


def _named(node: onnx.NodeProto) -> str:
    stated = stated_attributes(node, "reduction", others=False) if node.op_type == "ScatterND" else ""
    return f"{node.op_type} ({', '.join(filter(None, (node.name or next(iter(node.output), '?'), stated)))})"


def _refused(node: onnx.NodeProto, kind: str) -> bool:
    if node.op_type == "ScatterND":
        return any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)
    by_rtx = kind == "rtx" and node.op_type in UNBUILDABLE_BY_RTX
    return by_rtx or node.op_type in UNBUILDABLE or node.op_type in _INTEGER


def _row(target: Target, form: str, version: int, names: list[str]) -> dict[str, Any]:
    precision = form if form != "float" else "fp16" if "fp16" in target.precisions else "fp32"
    row = {"target": target.name, "builds": None, "runs": True, "precision": precision, "tensorrt": None}
    if target.kind == "cpu":
        return {**row, "why": "by ONNX Runtime, nothing to build"}
    reasons = []
    if names:
        reasons.append(said_of(names))
    if form == "fp8" and "fp8" not in target.precisions:
        reasons.append(f"SM {target.sm} has no fp8")
    runs = not reasons
    able = [entry for entry in target.tensorrt if _needed(entry, form, version) <= entry.opset]
    reasons += [_unread(entry, form, version) for entry in target.tensorrt if entry not in able]
    runs = runs and (bool(able) or target.kind == "rtx")
    row |= {
        "builds": {"rtx": "engine", "device": "kit"}[target.kind] if runs else None,
        "runs": runs,
        "tensorrt": (", ".join(entry.tensorrt for entry in able) or "RTX") if runs else None,
    }
    return {**row, "why": "; ".join(reasons) or None}


def _needed(entry: JetPack, form: str, version: int) -> int:
    """The opset of the graph that `build` gives this TensorRT: float16 around Q/DQ raises it where the graph states types."""
    return max(version, HALF_SCALE_OPSET) if form != "float" and entry.strongly_typed else version


def _unread(entry: JetPack, form: str, version: int) -> str:
    if not entry.opset:
        return f"{entry.release}: TensorRT {entry.tensorrt} is older than the kit's 8.6"
    return (
        f"{entry.release}: TensorRT {entry.tensorrt} reads opset {entry.opset}, the graph has {_needed(entry, form, version)}"
    )
