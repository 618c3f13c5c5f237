"""Post-training static int8: a float bundle in, an explicit Q/DQ graph for TensorRT out. numpy, onnx, onnxruntime.

prepare.py      the graph made ready: opset, constants, BatchNormalization folded
placement.py    the table that says where Q/DQ goes
samples.py      calibration samples: data set, folder of .npz
statistics.py   streaming histograms; the methods mse, entropy, percentile, minmax
simulate.py     runs graphs exactly as their Q/DQ says; SNR
graph.py        inserts Q/DQ
recovery.py     weight clips, bias correction
sensitivity.py  what each layer loses, and why
budget.py       which layers stay float
calibrate.py    all of the above in order
record.py       calibration.json
frozen.py       the same graph again from calibration.json
quantize.py     the verb
"""

from edgekit.errors import MissingExtra

try:  # once, in front of every module of this room
    import onnx as _onnx  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtra("onnx", error.name or "onnx") from None

from .frozen import rebuild
from .quantize import layer_table, quantize
from .record import Calibration
from .record import decode as read_calibration

__all__ = ["Calibration", "layer_table", "quantize", "read_calibration", "rebuild"]
