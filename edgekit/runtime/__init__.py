"""The part that ships to the device: open a bundle, call it with frames. numpy and one backend; nothing heavy.

with Model.open("parcel.edge") as model:
    prediction = model(frame)
"""

from .backends import BACKENDS, Runner, open_runner
from .golden import GoldenResult, check_golden, compare_arrays
from .model import Model, Prediction

__all__ = ["BACKENDS", "GoldenResult", "Model", "Prediction", "Runner", "check_golden", "compare_arrays", "open_runner"]
