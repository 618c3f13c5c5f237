"""`compare`: the same golden inputs through every graph and backend, each output held against the golden one."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BudgetNotMet, UsageError
from edgekit.runtime import BACKENDS, compare_arrays, open_runner
from edgekit.runtime.golden import load_golden, run_samples

__all__ = ["compare"]


def compare(bundle: Bundle | str | os.PathLike[str], *, backends: str = "onnxruntime", threads: int = 1) -> dict[str, Any]:
    """Errors of every output, for each graph of the bundle (float, int8) on each of ``backends`` (comma-separated).

    Returns ``bundle``, ``samples`` and ``outputs``, one row each: ``backend``, ``graph``, ``output``, ``snr_db`` (200 for
    equal), ``relative`` (max |error| over max |golden|), ``max_abs``, ``cosine``, ``agree`` (share of samples with the
    same largest entry; None for outputs that are no (N, classes)), ``tolerance`` and ``within_tolerance`` (None where
    the manifest states no tolerance for the graph), and ``note`` where an output is missing, misshapen or not finite,
    and its figures are None.

    Raises `UsageError` for an unknown backend, `BackendError` and `MissingExtra` where one cannot run here, `BundleError`
    without golden outputs, `BudgetNotMet` with all rows where one misses its tolerance.
    """
    names = [name.strip() for name in backends.split(",") if name.strip()]
    if unknown := [name for name in names if name not in BACKENDS]:
        raise UsageError(f"there is no backend {unknown[0]!r}", f"choose among: {','.join(BACKENDS)}")
    if not names:
        raise UsageError("no backend was named", f"choose among: {','.join(BACKENDS)}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    inputs, golden = load_golden(opened)
    rows = []
    for name in names:
        for graph in filter(opened.has, (FLOAT_GRAPH, INT8_GRAPH)):
            with open_runner(opened, name, graph, threads) as runner:
                found = run_samples(runner, inputs)
            rows += [_row(opened, name, graph, output, golden[output], found.get(output)) for output in golden]
    samples = len(next(iter(golden.values()))) if golden else 0
    answer = {"bundle": str(opened.path), "samples": samples, "outputs": rows}
    if missed := [row for row in rows if row["within_tolerance"] is False]:
        worst = missed[0]
        raise BudgetNotMet(
            f"{len(missed)} of {len(rows)} outputs miss their tolerance; the first is {worst['output']} of {worst['graph']} "
            f"on {worst['backend']}: {worst['note'] or _found(worst)}, allowed {worst['tolerance']}",
            "make the graph again: edgekit import, or edgekit quantize with more calibration samples or a smaller --share",
            answer,
        )
    return answer


def _row(
    bundle: Bundle, backend: str, graph: str, output: str, golden: NDArray[Any], found: NDArray[Any] | None
) -> dict[str, Any]:
    tolerance = bundle.manifest.golden.get(graph)
    sign = {"relative": "relative <=", "snr_db": "SNR dB >="}
    row: dict[str, Any] = {"backend": backend, "graph": graph, "output": output}
    row |= dict.fromkeys(("snr_db", "relative", "max_abs", "cosine", "agree"))
    row["tolerance"] = f"{sign[tolerance.kind]} {tolerance.limit:g}" if tolerance else None
    row["note"] = _unusable(golden, found)
    if row["note"] or found is None:
        return {**row, "within_tolerance": False if tolerance else None}
    result = compare_arrays(golden, found)
    a, b = golden.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    row |= {"snr_db": result.snr_db, "relative": result.relative, "max_abs": float(np.abs(a - b).max(initial=0.0))}
    row["cosine"] = float(a @ b / length) if length else None
    if golden.ndim == 2 and golden.shape[1] > 1:
        row["agree"] = float((golden.argmax(1) == found.argmax(1)).mean())
    return {**row, "within_tolerance": result.within(tolerance) if tolerance else None}


def _unusable(golden: NDArray[Any], found: NDArray[Any] | None) -> str | None:
    if found is None:
        return "the graph has no such output"
    if found.shape != golden.shape:
        return f"shape {found.shape}, golden {golden.shape}"
    if not np.isfinite(found).all():
        return "not finite"
    return None


def _found(row: dict[str, Any]) -> str:
    return f"{row['relative']:.2g} relative, {row['snr_db']:.1f} dB"
