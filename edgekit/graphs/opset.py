"""The operator set that a graph states, and raising it."""

from __future__ import annotations

import onnx
from onnx import version_converter

from edgekit.errors import GraphError, first_line

from .light import refit, without_weights

__all__ = ["MIN_OPSET", "WANTED_OPSET", "opset", "raise_opset", "with_opset"]

MIN_OPSET, WANTED_OPSET = 13, 17  # 13 has a scale per channel, 17 is what TensorRT 8.6 reads
#: Operators that mean something else, or need another form, from that opset on, without the checker seeing it.
_CHANGED = {"RoiAlign": 16, "Split": 18, "GridSample": 20, "GroupNormalization": 21}


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operator set that a model states, 0 for none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def raise_opset(model: onnx.ModelProto) -> tuple[bool, str]:
    """Opsets below 13 become 17, else 13, in place. Returns (changed, why it could not be done or "")."""
    if opset(model) >= MIN_OPSET:
        return False, ""
    reason = ""
    for wanted in (WANTED_OPSET, MIN_OPSET):
        # The converter copies four times what it gets, and seldom needs large weights.
        for source in (without_weights(model), model):
            converted, reason = _converted(source, wanted)
            if converted is not None:
                refit(model, converted) if source is not model else model.CopyFrom(converted)
                model.ir_version = max(model.ir_version, 8)
                return True, ""
    return False, reason


def with_opset(model: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """A copy of the model at opset ``wanted`` or later: the same nodes where they are valid there, else as ONNX converts them.

    Raises `GraphError` where ONNX cannot convert it.
    """
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    entry = next((entry for entry in copy.opset_import if entry.domain in ("", "ai.onnx")), None)
    if entry is None:
        raise GraphError("the graph states no opset", f"export the model again with opset {WANTED_OPSET}")
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
    converted, reason = _converted(model, wanted)
    if converted is None:
        raise GraphError(
            f"the graph has opset {before}, this format needs {wanted}, and it cannot be converted: {reason}",
            f"export the model again with opset {wanted}",
        )
    converted.ir_version = max(converted.ir_version, 10)
    return converted


def _converted(model: onnx.ModelProto, wanted: int) -> tuple[onnx.ModelProto | None, str]:
    """(the valid model that ONNX's converter makes, "") or (None, why it makes none)."""
    try:
        converted = version_converter.convert_version(model, wanted)
        onnx.checker.check_model(converted)
    except Exception as error:  # noqa: BLE001  the converter raises plain RuntimeErrors
        return None, first_line(error)[:160]
    return converted, ""
