"""`compare`: the same golden inputs through every graph and backend, each output held against the golden one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BudgetNotMet, BundleError, InputError, UsageError
from edgekit.files import atomic_write, given_path
from edgekit.manifest import Tolerance
from edgekit.runtime import BACKENDS, compare_arrays, open_runner
from edgekit.runtime.backends import runnable_graphs
from edgekit.runtime.golden import compare_choices, engine_golden, is_choice, load_golden, run_samples, signal_names

from .chart import check_picture, layer_chart
from .inputs import Feeds, read_folder

__all__ = ["compare", "errors_between"]

#: Where tensors inside of a graph can be read: other backends fuse them away.
LAYERS_BACKEND = "onnxruntime"

Source = Bundle | str | os.PathLike[str]


def compare(
    bundle: Source,
    *,
    backends: str = "onnxruntime",
    threads: int = 1,
    other: Source | None = None,
    data: str | os.PathLike[str] | None = None,
    layers: bool = False,
    diverge: float = 20.0,
    plot: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Errors of every output, for each graph of the bundle (float, int8) on each of ``backends`` (comma-separated).

    ``other``: the graphs of this bundle instead, held against the answers of ``bundle``. ``data``: a folder of ``.npz``,
    each an array for every input, instead of the golden inputs; the float graph's answers are golden then. With either, no
    tolerance is held. ``layers``: also every layer's errors on ONNX Runtime, of the int8 graph (of ``other`` the float one
    where it has no int8) against the float graph of ``bundle``; below ``diverge`` dB a layer counts as diverging. ``plot``:
    draw them to this .svg, which implies ``layers``; an earlier chart there is replaced.

    Returns ``bundle``, ``other``, ``samples`` and ``outputs`` (one row each: ``backend``, ``graph``, ``output``, ``snr_db``
    (200 for equal), ``relative`` (max |error| over max |golden|), ``max_abs``, ``cosine``, ``agree`` (share of samples with
    the same largest entry; None for outputs that are no (N, classes)), ``tolerance`` and ``within_tolerance`` (None where
    the manifest states no tolerance for the graph), and ``note`` where an output is missing, misshapen or not finite,
    and its figures are None). Integer outputs of the int8 graph are choices: `agree` is the share of equal values,
    `relative` that of the others, `snr_db` all over those, and beside float outputs no tolerance is held. Where layers were
    asked for also what `layers.compare_layers` returns, and with a plot its path.

    TensorRT backends run the graphs that have an engine, and owe what its build states. Raises `UsageError` for an unknown
    backend, for ``layers`` without onnxruntime and a ``plot`` that is no .svg, `OutputExists` for another file at ``plot``,
    `BackendError` and `MissingExtra` where one cannot run here, `DataError` for samples that do not fit, `InputError` where
    ``other`` takes other inputs, `BundleError` without golden outputs or, for ``layers``, an int8 graph, `GraphError` where
    no layer has its like, `BudgetNotMet` with all rows where one misses its tolerance.
    """
    names = _backends(backends)
    layers = layers or plot is not None
    reference = _opened(bundle)
    candidate = reference if other is None else _opened(other)
    if layers:
        _check_layers(candidate, other is not None, names, diverge)
    picture = None if plot is None else check_picture(given_path(plot, "plot"))
    inputs, golden = load_golden(reference) if data is None else _answered(reference, given_path(data, "data"), threads)
    tolerances = candidate.manifest.golden if other is None and data is None else {}
    with _naming_both(reference, candidate):
        rows = [row for name in names for row in _output_rows(candidate, name, inputs, golden, tolerances, threads)]
    samples = len(next(iter(golden.values()))) if golden else 0
    answer: dict[str, Any] = {"bundle": str(reference.path), "other": None if other is None else str(candidate.path)}
    answer |= {"samples": samples, "outputs": rows}
    if layers:
        from .layers import compare_layers

        graph = INT8_GRAPH if candidate.has(INT8_GRAPH) else FLOAT_GRAPH
        answer |= compare_layers((reference, FLOAT_GRAPH), (candidate, graph), inputs, threads=threads, diverge=diverge)
        if picture:
            of = FLOAT_GRAPH if other is None else f"{reference.path.name}/{FLOAT_GRAPH}"
            atomic_write(picture, layer_chart(answer, f"{candidate.path.name}/{graph} against {of}").encode())
            answer["plot"] = str(picture)
    _hold(answer)
    return answer


def _opened(bundle: Source) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


@contextmanager
def _naming_both(reference: Bundle, candidate: Bundle) -> Iterator[None]:
    """An `InputError` of ``candidate``, where that is another bundle, says whose inputs it was given."""
    try:
        yield
    except InputError as error:
        if candidate is reference:
            raise
        raise InputError(
            f"{candidate.path} does not take the inputs of {reference.path}: {error.message}",
            "compare bundles whose inputs have the same names, types and shapes",
        ) from None


def _output_rows(
    bundle: Bundle, backend: str, inputs: Feeds, golden: Feeds, tolerances: Mapping[str, Tolerance], threads: int
) -> list[dict[str, Any]]:
    rows = []
    for graph in runnable_graphs(bundle, backend) or (bundle.graph,):  # without an engine the runner says how to make one
        with open_runner(bundle, backend, graph, threads) as runner:
            if tolerances:  # the bundle's own, and so perhaps the engine's
                inputs, golden = engine_golden(runner)
            found = run_samples(runner, inputs)
            stated = runner.tolerance if tolerances else None
        about = {"backend": backend, "graph": graph}
        quantized = graph == INT8_GRAPH
        owed = signal_names(golden, quantized=quantized)
        for name, truth in golden.items():
            tolerance = (stated or tolerances.get(graph)) if name in owed else None
            rows.append({**about, **_row(name, truth, found.get(name), tolerance, quantized and is_choice(truth))})
    return rows


def _answered(bundle: Bundle, folder: Path, threads: int) -> tuple[Feeds, Feeds]:
    """The samples of a folder, and what the float graph of ``bundle`` answers."""
    with open_runner(bundle, LAYERS_BACKEND, FLOAT_GRAPH, threads) as runner:
        inputs = read_folder(folder, runner.inputs)
        return inputs, run_samples(runner, inputs)


def _backends(backends: str) -> list[str]:
    names = [name.strip() for name in backends.split(",") if name.strip()]
    if unknown := [name for name in names if name not in BACKENDS]:
        raise UsageError(f"there is no backend {unknown[0]!r}", f"choose among: {','.join(BACKENDS)}")
    if not names:
        raise UsageError("no backend was named", f"choose among: {','.join(BACKENDS)}")
    return names


def _check_layers(candidate: Bundle, other: bool, backends: list[str], diverge: float) -> None:
    if LAYERS_BACKEND not in backends:
        raise UsageError(
            f"layers are compared on {LAYERS_BACKEND} only, which is not among {','.join(backends)}",
            f"add it: --backends {','.join([*backends, LAYERS_BACKEND])}",
        )
    if not -200 <= diverge <= 200:
        raise UsageError(f"layers cannot diverge below {diverge} dB", "name an SNR in dB, for example --diverge 20")
    if not other and not candidate.has(INT8_GRAPH):
        raise BundleError(
            f"{candidate.path} has no {INT8_GRAPH}, so there are no layers to compare with the float graph",
            "make one: edgekit quantize B --out B2; or compare with another bundle: --with B2",
        )


def _hold(answer: dict[str, Any]) -> None:
    rows = answer["outputs"]
    if missed := [row for row in rows if row["within_tolerance"] is False]:
        worst = missed[0]
        raise BudgetNotMet(
            f"{len(missed)} of {len(rows)} outputs miss their tolerance; the first is {worst['output']} of {worst['graph']} "
            f"on {worst['backend']}: {worst['note'] or _found(worst)}, allowed {worst['tolerance']}",
            "make the graph again: edgekit import, or edgekit quantize with more calibration samples or a smaller --share",
            answer,
        )


def errors_between(golden: NDArray[Any], found: NDArray[Any]) -> dict[str, float | None]:
    """``snr_db`` (-200 to 200, for equal ones), ``relative``, ``max_abs``, ``cosine`` of two arrays of one shape.

    All None where one is not finite and the other is not equal to it there; ``cosine`` is None where one is all zeros.
    """
    result = compare_arrays(golden, found)
    if not np.isfinite(result.relative):
        return dict.fromkeys(("snr_db", "relative", "max_abs", "cosine"))
    finite = np.isfinite(golden)
    a, b = golden[finite].astype(np.float64), found[finite].astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return {
        "snr_db": result.snr_db,
        "relative": result.relative,
        "max_abs": float(np.abs(a - b).max(initial=0.0)),
        "cosine": float(a @ b / length) if length else None,
    }


def _row(
    output: str, golden: NDArray[Any], found: NDArray[Any] | None, tolerance: Tolerance | None, choice: bool
) -> dict[str, Any]:
    sign = {"relative": "relative <=", "snr_db": "SNR dB >="}
    row: dict[str, Any] = {"output": output}
    row |= dict.fromkeys(("snr_db", "relative", "max_abs", "cosine", "agree"))
    row["tolerance"] = f"{sign[tolerance.kind]} {tolerance.limit:g}" if tolerance else None
    row["note"] = _unusable(golden, found)
    if row["note"] or found is None:
        return {**row, "within_tolerance": False if tolerance else None}
    if choice:
        result = compare_choices(golden, found)
        row |= {"snr_db": result.snr_db, "relative": result.relative, "agree": 1 - result.relative}
        return {**row, "within_tolerance": result.within(tolerance) if tolerance else None}
    row |= errors_between(golden, found)
    if golden.ndim == 2 and golden.shape[1] > 1:
        row["agree"] = float((golden.argmax(1) == found.argmax(1)).mean())
    within = compare_arrays(golden, found).within(tolerance) if tolerance else None
    return {**row, "within_tolerance": within}


def _unusable(golden: NDArray[Any], found: NDArray[Any] | None) -> str | None:
    if found is None:
        return "the graph has no such output"
    if found.shape != golden.shape:
        return f"shape {found.shape}, golden {golden.shape}"
    if not np.isfinite(compare_arrays(golden, found).relative):
        return "not finite"
    return None


def _found(row: dict[str, Any]) -> str:
    return f"{row['relative']:.2g} relative, {row['snr_db']:.1f} dB"
