"""The operator set that a graph states, and raising it."""

from __future__ import annotations

import onnx

__all__ = ["MIN_OPSET", "WANTED_OPSET", "opset", "raise_opset"]

MIN_OPSET, WANTED_OPSET = 13, 17  # 13 has a scale per channel, 17 is what TensorRT 8.6 reads


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operator set that a model states, 0 for none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def raise_opset(model: onnx.ModelProto) -> tuple[bool, str]:
    """Opsets below 13 become 17, else 13, in place. Returns (changed, why it could not be done or "")."""
    if opset(model) >= MIN_OPSET:
        return False, ""
    reason = ""
    for wanted in (WANTED_OPSET, MIN_OPSET):
        try:
            converted = onnx.version_converter.convert_version(model, wanted)
            onnx.checker.check_model(converted)
        except Exception as error:  # noqa: BLE001  the converter raises plain RuntimeErrors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            continue
        model.CopyFrom(converted)
        model.ir_version = max(model.ir_version, 8)
        return True, ""
    return False, reason
