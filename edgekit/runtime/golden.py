"""Golden outputs: a few real inputs with the float model's answers, held against every graph and every device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import GOLDEN, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, GoldenError, first_line
from edgekit.files import npz_arrays
from edgekit.manifest import Tolerance, batch_axes

from .backends import Runner, open_runner
from .feeds import as_taken

__all__ = [
    "MAX_DB",
    "Distance",
    "Golden",
    "GoldenResult",
    "check_golden",
    "compare_arrays",
    "compare_choices",
    "compare_outputs",
    "decibel",
    "distance",
    "engine_golden",
    "is_choice",
    "load_golden",
    "parse_golden",
    "run_samples",
    "save_golden",
    "signal_names",
]

MAX_DB = 200.0  # of equal arrays
#: What an output has for its size where all of it is zero, so that the last digits of float32 are no error there. Zero is
#: also what lies below float32's normal range: GPUs flush it.
ZERO = 1e-6
_NORMAL = float(np.finfo(np.float32).tiny)


class GoldenResult(NamedTuple):
    """``relative``: max |error| / max |golden|, the worst output. ``snr_db``: the lowest output's, 200 for equal ones."""

    relative: float
    snr_db: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.relative <= tolerance.limit if tolerance.kind == "relative" else self.snr_db >= tolerance.limit


class _GoldenOf(msgspec.Struct, frozen=True):
    """Of the record of a build."""

    golden_file: str | None = None


class Distance(NamedTuple):
    """Of two arrays: the largest |golden| and |error|, and their squared sums."""

    largest: float
    worst: float
    signal: float
    noise: float


def distance(golden: NDArray[Any], found: NDArray[Any]) -> Distance:
    """How far ``found`` is from ``golden`` of the same shape, in float64.

    Infinities that agree (a masked logit) are left out; where a NaN is on either side, or an infinity on one, ``noise`` is
    not finite.
    """
    judged = ~(np.isinf(golden) & (golden == found))
    with np.errstate(over="ignore", invalid="ignore"):
        values = golden[judged].astype(np.float64)
        errors = found[judged].astype(np.float64) - values
        largest, worst = (float(np.abs(array).max(initial=0.0)) for array in (values, errors))
        return Distance(largest, worst, float(np.square(values).sum()), float(np.square(errors).sum()))


def decibel(signal: float, noise: float) -> float:
    """The signal-to-noise ratio of two powers, -200 to 200 dB. A signal of zero counts as one of 1e-6 in all."""
    if noise == 0:
        return MAX_DB
    if not math.isfinite(noise):
        return -MAX_DB
    signal = signal if signal >= _NORMAL**2 else ZERO**2
    return min(max(10 * (math.log10(signal) - math.log10(noise)), -MAX_DB), MAX_DB)


def compare_arrays(golden: NDArray[Any], found: NDArray[Any]) -> GoldenResult:
    """Errors of ``found`` against ``golden`` of the same shape.

    Infinities that agree (a masked logit) count as right; a NaN on either side, or another shape, as infinitely far. Where
    all of ``golden`` is zero, errors are held against 1e-6.
    """
    if golden.shape == found.shape:
        off = distance(golden, found)
        if math.isfinite(off.noise):
            size = off.largest if off.largest >= _NORMAL else ZERO
            return GoldenResult(off.worst / size, decibel(off.signal, off.noise))
    return GoldenResult(float("inf"), float("-inf"))


def is_choice(output: NDArray[Any]) -> bool:
    """Whether an output holds integers or bools: indices, labels, masks. They are chosen by floats, and are no signal."""
    return output.dtype.kind not in "fc"


def signal_names(outputs: Mapping[str, NDArray[Any]], *, quantized: bool) -> list[str]:
    """The outputs that a graph owes the golden ones: all of a float graph; of a quantized one those of float type.

    A quantized graph's choices may differ, and their shapes with them (NonZero, NonMaxSuppression), where their floats are
    near: the float outputs answer for them. A graph with no float output owes its choices (`compare_choices`).
    """
    floats = [name for name, array in outputs.items() if not is_choice(array)]
    return floats if quantized and floats else list(outputs)


def compare_choices(golden: NDArray[Any], found: NDArray[Any]) -> GoldenResult:
    """Choices of a quantized graph, of one shape: ``relative`` is the share that differs, ``snr_db`` all over those.

    So 10 dB is one in 10, 20 dB one in 100: how far an index is from another means nothing.
    """
    if golden.shape != found.shape:
        return GoldenResult(float("inf"), float("-inf"))
    wrong = int((golden != found).sum())
    return GoldenResult(wrong / max(golden.size, 1), decibel(golden.size, wrong))


def compare_outputs(golden: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]], *, quantized: bool) -> GoldenResult:
    """Errors of the worst output that the graph owes (`signal_names`). Raises `KeyError` where ``found`` lacks one."""
    worst = GoldenResult(0.0, MAX_DB)
    for name in signal_names(golden, quantized=quantized):
        compared = compare_choices if quantized and is_choice(golden[name]) else compare_arrays
        result = compared(golden[name], found[name])
        worst = GoldenResult(max(worst.relative, result.relative), min(worst.snr_db, result.snr_db))
    return worst


def save_golden(inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> bytes:
    """Bytes of ``golden.npz``: arrays named ``input/NAME`` and ``output/NAME``."""
    import io

    buffer = io.BytesIO()
    arrays = {f"input/{k}": v for k, v in inputs.items()} | {f"output/{k}": v for k, v in outputs.items()}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def load_golden(bundle: Bundle) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """(inputs, outputs) by tensor name, several samples along their batch axis. Raises `BundleError` on a damaged file."""
    return parse_golden(bundle.read(GOLDEN), str(bundle.path / GOLDEN))


def parse_golden(data: bytes, name: str = GOLDEN) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """`load_golden` from the bytes of a file; ``name`` is what an error calls it."""
    import io

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = npz_arrays(file, len(data))  # `save_golden` packs nothing
    except Exception as error:  # noqa: BLE001  zip and npy readers raise many types on damaged bytes
        raise BundleError(f"{name} cannot be read: {first_line(error)}", "make the bundle again") from None
    inputs = {key.removeprefix("input/"): array for key, array in arrays.items() if key.startswith("input/")}
    outputs = {key.removeprefix("output/"): array for key, array in arrays.items() if key.startswith("output/")}
    return inputs, outputs


def engine_golden(runner: Runner) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """`load_golden` for an entered runner: at the sizes of its engine, where `build` had to make it new for those."""
    bundle, target = runner.bundle, runner.describe().get("engine")
    if target is not None and bundle.has(about := f"engines/{target}.json"):
        name = msgspec.json.decode(bundle.read(about), type=_GoldenOf).golden_file
        if name and bundle.has(name):
            return parse_golden(bundle.read(name), str(bundle.path / name))
    return load_golden(bundle)


def run_samples(runner: Runner, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Outputs for golden ``inputs``, in one run, or in several where a run takes fewer samples than they are.

    A runner that takes no fewer than some number gets the last sample several times, one that takes frames their bytes.
    """
    inputs = as_taken(runner.frames, inputs)
    axes = batch_axes(runner.bundle.manifest.inputs, runner.bundle.manifest.outputs)
    fixed = [
        size
        for spec in runner.inputs
        if len(spec.shape) > axes.get(spec.name, len(spec.shape))
        if isinstance(size := spec.shape[axes[spec.name]], int)
    ]
    samples = min((a.shape[axes[name]] for name, a in inputs.items() if a.ndim > axes.get(name, a.ndim)), default=1)
    least, most = runner.batches or (1, min(fixed, default=samples))
    if runner.batches is None and not (0 < most < samples and samples % most == 0):
        return runner.run(inputs)
    if not samples or least <= samples <= most or most < 1:
        return runner.run(inputs)
    return _run_in_parts(runner, inputs, axes, samples, (least, most))


def _run_in_parts(
    runner: Runner, inputs: dict[str, NDArray[Any]], axes: Mapping[str, int], samples: int, batches: tuple[int, int]
) -> dict[str, NDArray[Any]]:
    """Cut, filled up and joined along each tensor's own batch axis; what has none goes along with every run."""
    least, most = batches
    parts: dict[str, list[NDArray[Any]]] = {}
    along: dict[str, int] = {}
    for start in range(0, samples, most):
        count = min(most, samples - start)
        rows = np.minimum(np.arange(start, start + max(count, least)), samples - 1)
        feeds = {name: a.take(rows, axes[name]) if a.ndim > axes.get(name, a.ndim) else a for name, a in inputs.items()}
        for name, array in runner.run(feeds).items():
            # an output whose file states it wrongly may hold one sample a row all the same
            axis = axes.get(name, 0 if array.shape[:1] == rows.shape else array.ndim)
            parts.setdefault(name, []).append(array.take(np.arange(count), axis) if axis < array.ndim else array)
            along[name] = axis
    return {n: np.concatenate(found, along[n]) if along[n] < found[0].ndim else found[0] for n, found in parts.items()}


class Golden(NamedTuple):
    """Golden arrays in memory: a test that runs every hour needs the bundle's files no more."""

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, runner: Runner) -> Golden:
        """Those of an entered runner. Raises `BundleError`."""
        return cls(*engine_golden(runner))

    def check(self, runner: Runner) -> GoldenResult:
        """Run an entered runner on them. Raises `GoldenError` beyond the tolerance, with the ``result`` that was found."""
        bundle, graph = runner.bundle, runner.graph
        found = run_samples(runner, self.inputs)
        if missing := [name for name in self.outputs if name not in found]:
            raise GoldenError(f"{graph} has no output {missing[0]}", "make the bundle again")
        worst = compare_outputs(self.outputs, found, quantized=graph == INT8_GRAPH)
        tolerance = runner.tolerance or bundle.manifest.golden.get(graph)
        if tolerance and not worst.within(tolerance):
            text = f"{worst.relative:.2g} relative" if tolerance.kind == "relative" else f"{worst.snr_db:.1f} dB"
            error = GoldenError(
                f"{graph} on {runner.name} misses the golden outputs: {text}, allowed {tolerance.limit:g} ({tolerance.kind})",
                "the file or the backend differs from what was tested; make the bundle again",
            )
            error.result = worst
            raise error
        return worst


def check_golden(bundle: Bundle, graph: str | None = None, backend: str = "onnxruntime") -> GoldenResult:
    """Run a graph on the golden inputs. Raises `GoldenError` beyond the tolerance that is stated for it.

    The manifest states it for a graph, the record of its build for an engine. The int8 graph owes what `signal_names` names.
    """
    graph = graph or bundle.graph
    quantized = graph == INT8_GRAPH
    _, outputs = load_golden(bundle)
    if not any(outputs[name].size for name in signal_names(outputs, quantized=quantized)):
        raise BundleError(f"{bundle.path / GOLDEN} holds no golden outputs", "make the bundle again")
    with open_runner(bundle, backend, graph) as runner:
        return Golden.of(runner).check(runner)
