"""ONNX graph passes that more than one stage needs. They work in place and say what they did. numpy and onnx.

editing.py      small tools: attributes, constants, names, element types, consumers, pruning
insertion.py    new nodes and constants, under free names
opset.py        the opset raised
single.py       float16 and float64 graphs computed in float32
dequantize.py   quantized graphs brought back to float
rewriter.py     the walk behind it: what each integer tensor stands for
operators.py    what each quantized operator of the ONNX standard computes, in float
microsoft.py    the same for ONNX Runtime's own
weights.py      what constants stand for
sparsity.py     which layers hold 2:4 weights
"""

from edgekit.errors import MissingExtra

try:  # once, in front of every module of this room
    import onnx as _onnx  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtra("onnx", error.name or "onnx") from None

from .dequantize import MICROSOFT_OPERATORS, exact_reference, float_biases, is_explicit, quantized_nodes, to_float
from .opset import opset, raise_opset, with_opset
from .single import to_single
from .sparsity import dense_layers

__all__ = [
    "MICROSOFT_OPERATORS",
    "dense_layers",
    "exact_reference",
    "float_biases",
    "is_explicit",
    "opset",
    "quantized_nodes",
    "raise_opset",
    "to_float",
    "to_single",
    "with_opset",
]
