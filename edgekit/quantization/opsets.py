"""Formats that need a newer opset than the graph has."""

from __future__ import annotations

import onnx
from onnx import version_converter

from edgekit.errors import GraphError

__all__ = ["at_opset"]

#: Operators that mean something else, or need another form, from that opset on, without the checker seeing it.
_CHANGED = {"RoiAlign": 16, "Split": 18, "GridSample": 20, "GroupNormalization": 21}


def at_opset(model: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """A copy of the model at opset ``wanted`` or later: the same nodes where they are valid there, else as ONNX converts them.

    Raises `GraphError` where ONNX cannot convert it.
    """
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    entry = next((entry for entry in copy.opset_import if entry.domain in ("", "ai.onnx")), None)
    if entry is None:
        raise GraphError("the graph states no opset", "export the model again with opset 17")
    before = entry.version
    if before >= wanted:
        return copy
    if not any(before < _CHANGED.get(node.op_type, 0) <= wanted for node in copy.graph.node):
        entry.version, copy.ir_version = wanted, max(copy.ir_version, 10)
        try:
            onnx.checker.check_model(copy, full_check=True)
            return copy
        except Exception:  # noqa: BLE001, S110  the checker raises several types; the converter is tried next
            pass
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, wanted)
    except Exception as error:  # noqa: BLE001  the converter raises plain RuntimeErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]
        raise GraphError(
            f"the graph has opset {before}, this format needs {wanted}, and it cannot be converted: {reason}",
            f"export the model again with opset {wanted}",
        ) from None
    converted.ir_version = max(converted.ir_version, 10)
    return converted
