"""ONNX's reference evaluator behind the three methods of an ONNX Runtime session that an import uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edgekit.runtime.onnxruntime import DTYPES

from .passes import dims

__all__ = ["Evaluator"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Value(NamedTuple):
    """As ONNX Runtime's NodeArg."""

    name: str
    type: str
    shape: list[int | str | None]


class Evaluator:
    """Runs a graph node by node in numpy. Raises whatever ONNX raises for operators that it does not know."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._run = ReferenceEvaluator(model)
        inferred = onnx.shape_inference.infer_shapes(model)
        self._inputs = [_value(value) for value in inferred.graph.input]
        self._outputs = [_value(value) for value in inferred.graph.output]

    def get_inputs(self) -> list[_Value]:
        return self._inputs

    def get_outputs(self) -> list[_Value]:
        return self._outputs

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        found: Any = self._run.run(list(names) if names else None, dict(feeds))
        return list(found)


def _value(value: onnx.ValueInfoProto) -> _Value:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return _Value(value.name, _NAMES[dtype.name], dims(value))
