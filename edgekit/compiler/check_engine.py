"""Does an engine answer as the golden outputs say? Part of every build kit, beside build_engine.py, and with the same rules:
features by name, never by version; Python 3.8, numpy and nothing else."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from . import build_options as asked
else:  # in a kit
    import build_options as asked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["GOLDEN", "Cuda", "check", "cut", "join"]

BuildError = asked.BuildError
GOLDEN = "golden.npz"  # the file of a kit


class Cuda:
    """The few calls of the CUDA runtime that a check needs, so that a kit needs no further package."""

    def __init__(self) -> None:
        for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"):
            try:
                self.library = ctypes.CDLL(name)
                return
            except OSError:
                continue
        raise OSError("libcudart.so was not found")

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise BuildError(f"{name} failed with CUDA error {code}: {asked.CUDA_CURES.get(code, 'see cudaError_t')}")

    def release(self, name: str, what: Any) -> None:
        """Give something back. After a fault CUDA refuses even this; the fault's own error is the one to be seen."""
        getattr(self.library, name)(what)

    def capability(self) -> str:
        """Of the first GPU: "8.7"."""
        found = []
        for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor and Minor
            value = ctypes.c_int()
            self.call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
            found.append(str(value.value))
        return ".".join(found)

    def malloc(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def copy(self, target: Any, source: Any, size: int, kind: int) -> None:
        self.call("cudaMemcpy", target, source, ctypes.c_size_t(size), ctypes.c_int(kind))


def _failed(what: str, said: list[str]) -> BuildError:
    return BuildError(f"{what}: {asked.first_error(said) or 'TensorRT gave no reason'}")


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "()"


def _run(trt: Any, engine: Any, feeds: dict[str, Any], cuda: Any, said: list[str]) -> dict[str, Any]:
    """One inference: input name -> array, to output name -> array, through device memory of its own.

    ``said``: where the engine's logger puts its errors.
    """
    del said[:]  # what it said of other calls would mislead
    context = engine.create_execution_context()
    if context is None:
        raise _failed("there is no memory to run the engine in, stop other programs", said)
    held: dict[str, tuple[ctypes.c_void_p, Any]] = {}
    stream = ctypes.c_void_p()
    cuda.call("cudaStreamCreate", ctypes.byref(stream))
    try:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            array = np.ascontiguousarray(feeds[name], trt.nptype(engine.get_tensor_dtype(name))).reshape(feeds[name].shape)
            if not context.set_input_shape(name, tuple(array.shape)):
                raise _failed(f"the engine refuses input {name} of shape {_shape(array.shape)}", said)
            held[name] = (cuda.malloc(max(array.nbytes, 1)), array)
            cuda.copy(held[name][0], ctypes.c_void_p(array.ctypes.data), array.nbytes, 1)
        for name in names:
            if name not in held:
                shape = tuple(context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    raise BuildError(f"output {name} has a size that its data decides, {_shape(shape)}: add --no-check")
                array = np.empty(shape, trt.nptype(engine.get_tensor_dtype(name)))
                held[name] = (cuda.malloc(max(array.nbytes, 1)), array)
            if not context.set_tensor_address(name, held[name][0].value):
                raise _failed(f"the engine refuses the memory of {name}", said)
        if not context.execute_async_v3(stream.value or 0):
            raise _failed("the engine did not run", said)
        cuda.call("cudaStreamSynchronize", stream)
        outputs = [name for name in names if name not in inputs]
        for name in outputs:
            pointer, array = held[name]
            cuda.copy(ctypes.c_void_p(array.ctypes.data), pointer, array.nbytes, 2)
        return {name: held[name][1] for name in outputs}
    finally:
        for pointer, _ in held.values():
            cuda.release("cudaFree", pointer)
        cuda.release("cudaStreamDestroy", stream)


def _errors(truth: Any, found: Any, quantized: bool) -> tuple[float, float]:
    """(relative, SNR in dB) as `edgekit.runtime.golden` has them; of a quantized engine's integers, which are choices, by
    the share that differs."""
    if quantized and truth.dtype.kind not in "fc":
        wrong = int((truth != found).sum())
        return wrong / max(truth.size, 1), float(10 * np.log10(truth.size / wrong)) if wrong else 200.0
    judged = ~(np.isinf(truth) & (truth == found))  # infinities that agree are right
    wide = truth[judged].astype(np.float64)
    error = found[judged].astype(np.float64) - wide
    if not np.isfinite(error).all():
        return float("inf"), float("-inf")
    if not error.any():
        return 0.0, 200.0
    normal, zero = float(np.finfo(np.float32).tiny), 1e-6  # GPUs flush what is smaller; the size of an output of zeros
    largest, signal = float(np.abs(wide).max()), float(np.square(wide).sum())
    signal = signal if signal >= normal**2 else zero**2
    snr = 10 * (np.log10(signal) - np.log10(np.square(error).sum()))
    return float(np.abs(error).max()) / (largest if largest >= normal else zero), float(np.clip(snr, -200.0, 200.0))


def cut(inputs: dict[str, Any], axes: dict[str, int], least: int, most: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Golden inputs -> (feeds, how many samples of them count) for runs of ``least`` to ``most`` samples.

    ``axes``: which axis of a tensor is the batch. An input without one goes along with every run; the last sample fills up a
    batch that is too small.
    """
    along = {name: axes[name] for name in inputs if name in axes}
    samples = min([inputs[name].shape[axis] for name, axis in along.items()] or [1])
    for start in range(0, samples, max(most, 1)):
        count = min(most, samples - start)
        rows = np.minimum(np.arange(start, start + max(least, count)), samples - 1)
        yield {name: array.take(rows, along[name]) if name in along else array for name, array in inputs.items()}, count


def join(parts: list[tuple[dict[str, Any], int]], axes: dict[str, int], least: int) -> dict[str, Any]:
    """(outputs, how many samples of them count) of every run of `cut` -> the outputs of all samples.

    An output without an axis in ``axes`` may have its samples along the first one all the same, where its file does not say
    so; it has where that is as long as what was fed.
    """
    found = {}
    for name, array in parts[0][0].items():
        axis = axes.get(name, 0)
        if array.shape[axis : axis + 1] == (max(least, parts[0][1]),):
            array = np.concatenate([part[name].take(np.arange(count), axis) for part, count in parts], axis)
        found[name] = array
    return found


def limits(engine: Any, inputs: dict[str, Any], axes: dict[str, int]) -> tuple[int, int]:
    """The least and the most samples that one run of an engine takes."""
    shapes = [(engine.get_tensor_profile_shape(name, 0), axes[name]) for name in inputs if name in axes]
    return max([int(s[0][axis]) for s, axis in shapes] or [1]), min([int(s[2][axis]) for s, axis in shapes] or [1])


def check(
    trt: Any,
    plan: bytes,
    golden: Path,
    tolerance: dict[str, Any],
    axes: dict[str, int],
    cuda: Any = None,
    quantized: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Run the engine on the golden inputs, one profile-sized batch at a time; returns the worst output's errors.

    Of a ``quantized`` engine, integer outputs beside float ones are choices, and are not held against the golden ones.

    ``axes`` and ``options``: ``batch_axes`` and ``options`` of build.json. Raises `BuildError` where the engine does not load
    or run, or misses ``tolerance`` ({"kind": "snr_db" | "relative", "limit"}).
    """
    cuda = cuda or Cuda()
    said: list[str] = []
    engine = asked.load(trt, asked.make_logger(trt, said), plan, options or {})
    if engine is None:
        raise _failed("the engine does not load on this device", said)
    with np.load(golden, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    inputs = {name[6:]: array for name, array in arrays.items() if name.startswith("input/")}
    least, most = limits(engine, inputs, axes)
    parts = [(_run(trt, engine, part, cuda, said), count) for part, count in cut(inputs, axes, least, most)]
    found = join(parts, axes, least)
    relative, snr = 0.0, 200.0
    floats = {name for name in found if arrays["output/" + name].dtype.kind in "fc"}
    for name in floats if quantized and floats else found:
        truth = arrays["output/" + name]
        if found[name].shape != truth.shape:
            raise BuildError(f"output {name} is {_shape(found[name].shape)}, in {GOLDEN} it is {_shape(truth.shape)}")
        worst = _errors(truth, found[name], quantized)
        if worst[0] == float("inf"):
            raise BuildError(f"output {name} is not finite")
        relative, snr = max(relative, worst[0]), min(snr, worst[1])
    missed = snr < tolerance["limit"] if tolerance["kind"] == "snr_db" else relative > tolerance["limit"]
    if missed:
        raise BuildError(f"the engine misses the golden outputs: {snr:.1f} dB, {relative:.2g} relative; allowed {tolerance}")
    return {"snr_db": snr, "relative": relative}
