"""Quantization: a float bundle in, an explicit, strongly typed Q/DQ graph for TensorRT out. numpy, onnx, onnxruntime.

prepare.py      the graph made ready: quantized ones brought back to float, opset, constants, BatchNormalization folded
placement.py    the table that says where Q/DQ goes
samples.py      calibration samples: data set, folder of .npz
statistics.py   streaming histograms; the methods mse, entropy, percentile, minmax
simulate.py     runs graphs exactly as their Q/DQ says; SNR
graph.py        inserts Q/DQ, and Sub, Mul, Pad in front of Q
unfold.py       a layer as a matrix product
ranges.py       scale, shift and factor of a layer's input
rounding.py     weights fitted and rounded on second moments
streams.py      a graph run stretch by stretch, in flat memory
reconstruct.py  the four above, layer by layer
sensitivity.py  what each layer costs, and why; picture.py draws it
bench.py        the graph, what was seen of it and the samples: what every candidate is made from and measured with
recovery.py     where ranges come from, and which error recovery is worth having
budget.py       which layers stay float
store.py        tables and recurrent weights in int8, where the output stays
journal.py      what was done, kept in a file: an interrupted calibration goes on
speed.py        int8 against float, timed
calibrate.py    all of the above in order
record.py       calibration.json
frozen.py       the same graph again from calibration.json
formats.py      fp8.py and weight_only.py: the forms beside int8
qat.py          quantization-aware training, on torch_graph.py, which runs an ONNX graph in PyTorch
quantize.py     the verb
"""

from edgekit.errors import MissingExtra

try:  # once, in front of every module of this room
    import onnx as _onnx  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtra("onnx", error.name or "onnx") from None

from .frozen import rebuild
from .picture import check_picture, draw_layers
from .quantize import layer_table, quantize
from .record import Calibration
from .record import decode as read_calibration

__all__ = ["Calibration", "check_picture", "draw_layers", "layer_table", "quantize", "read_calibration", "rebuild"]
