"""Golden outputs at sizes that an engine takes.

A bundle's golden inputs have the sizes at which it was imported, an engine has a profile. Most are cut along their batch axis,
on the device and by the runtime; but an axis that looks like the batch may be time, or points of a cloud, whose parts do not
answer as the whole does. So it is tried here, on ONNX Runtime; where it does not hold, the golden file is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import GOLDEN
from edgekit.errors import GoldenError
from edgekit.runtime.golden import compare_outputs, parse_golden, save_golden
from edgekit.runtime.onnxruntime import session

from .check_engine import cut, join
from .precision import against_golden, answers
from .shapes import shape_text

__all__ = ["Fitted", "fit_golden"]

#: Runs of a float graph on the parts of its golden inputs must answer this near to the golden outputs.
SAME_DB = 40.0
Arrays = Mapping[str, NDArray[Any]]
#: input name -> (least, most) of its axes
Bounds = dict[str, tuple[list[int], list[int]]]


class Fitted(NamedTuple):
    """``golden``: "kept" (the given one does), "made" (``golden.npz`` of the folder) or "none" (nothing to check with).
    ``snr_db``: of one that was made, the graph's answers to it."""

    golden: str
    note: str = ""
    snr_db: float | None = None


def fit_golden(graph: bytes, request: Mapping[str, Any], folder: Path) -> Fitted:
    """Whether ``request["golden"]`` can be run at the sizes of ``request["profiles"]``; else writes one that can.

    ``graph`` is the typed one of ``request["precision"]``; the golden outputs are those of ``request["float_graph"]``.
    """
    if not request["golden"]:
        return Fitted("none")
    inputs, outputs = parse_golden(Path(request["golden"]).read_bytes())
    bounds, axes = _bounds(request), request["batch_axes"]
    if _fits(inputs, bounds):
        return Fitted("kept")
    try:
        least, most = _limits(bounds, axes)
        runs = list(cut(inputs, axes, least, most))
        whole = all(_fits(feeds, bounds) for feeds, _ in runs)
        if request.get("frames") or not request["float_graph"]:  # pictures, each for itself; or nothing to ask
            return Fitted("kept") if whole else Fitted("none", "no golden input fits this engine, so nobody checks it")
        source = Path(request["float_graph"]).read_bytes()
        if whole and _answers_in_parts(source, runs, axes, least, outputs):
            return Fitted("kept")
        feeds = {name: _resized(array, *bounds[name]) if name in bounds else array for name, array in inputs.items()}
        made = answers(source, feeds)
        if any(np.isnan(array).any() for array in made.values() if array.dtype.kind in "fc"):
            raise GoldenError("the graph answers NaN at its sizes")
        quantized = request["precision"] == "int8"
        snr_db = round(against_golden(graph, feeds, made, quantized=quantized).snr_db, 2)
    except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
        reason = " ".join(str(error).split())
        return Fitted("none", f"no golden input fits this engine, so nobody checks it: {reason}"[:300])
    (folder / GOLDEN).write_bytes(save_golden(feeds, made))
    sizes = ", ".join(f"{name} {shape_text(array.shape)}" for name, array in feeds.items())
    return Fitted("made", f"golden outputs for this engine were made at its sizes ({sizes})", snr_db)


def _bounds(request: Mapping[str, Any]) -> Bounds:
    """Of the inputs with a profile, and of those that are fixed."""
    fixed = {} if request.get("frames") else {name: (shape, shape) for name, shape in request["shapes"].items()}
    return fixed | {name: (shapes[0], shapes[2]) for name, shapes in request["profiles"].items()}


def _fits(feeds: Arrays, bounds: Bounds) -> bool:
    return all(
        len(least) == feeds[name].ndim
        and all(low <= size <= high for low, size, high in zip(least, feeds[name].shape, most, strict=True))
        for name, (least, most) in bounds.items()
    )


def _limits(bounds: Bounds, axes: Mapping[str, int]) -> tuple[int, int]:
    """The least and the most samples of a run."""
    batched = [(least[axes[name]], most[axes[name]]) for name, (least, most) in bounds.items() if name in axes]
    return max((low for low, _ in batched), default=1), min((high for _, high in batched), default=1)


def _answers_in_parts(
    graph: bytes, runs: list[tuple[dict[str, Any], int]], axes: dict[str, int], least: int, outputs: Arrays
) -> bool:
    run = session(graph)
    names = [value.name for value in run.get_outputs()]
    parts = [(dict(zip(names, run.run(names, feeds), strict=True)), count) for feeds, count in runs]
    return compare_outputs(outputs, join(parts, axes, least), quantized=False).snr_db >= SAME_DB


def _resized(array: NDArray[Any], least: list[int], most: list[int]) -> NDArray[Any]:
    """The nearest sizes within the bounds: cut, or repeated from the start, axis by axis."""
    for axis, size in enumerate(np.clip(array.shape, least, most)):
        if size != array.shape[axis]:
            array = array.take(np.arange(size) % array.shape[axis], axis)
    return np.ascontiguousarray(array)
