"""What a model is fed while it is measured: its own golden inputs, which are real data, or seeded noise without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import GOLDEN, Bundle
from edgekit.errors import DataError, UsageError
from edgekit.files import npz_arrays, npz_problem
from edgekit.manifest import ImagePreprocessing, TensorSpec
from edgekit.preprocess import denormalised
from edgekit.runtime.backends import Runner
from edgekit.runtime.feeds import as_taken
from edgekit.runtime.golden import load_golden

__all__ = ["Feeds", "batchable", "feeds_for", "frame_for", "golden_or_none", "least_batch", "read_folder", "runner_feeds"]

Feeds = dict[str, NDArray[Any]]

MAX_FILES = 64


def golden_or_none(bundle: Bundle) -> Feeds | None:
    """The golden inputs by name; None where the bundle has none (a packed one may not)."""
    return load_golden(bundle)[0] if bundle.has(GOLDEN) else None


def read_folder(folder: Path, inputs: Sequence[TensorSpec]) -> Feeds:
    """The ``.npz`` of a folder, each one array (samples, ...) for every input name, joined along the first axis.

    Of more than 64 files, 64 evenly from first to last by name. Arrays take the inputs' types; one without axes is taken
    from the first file. Raises `DataError` where there are none, one cannot be read or holds NaN or Inf, or shapes differ.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise DataError(f"{folder} holds no .npz", "one file a sample (or batch), one array an input name")
    count = min(len(paths), MAX_FILES)
    files = [_read_npz(paths[i * len(paths) // count], inputs) for i in range(count)]
    joined = {}
    for spec in inputs:
        arrays = [file[spec.name] for file in files]
        if len({array.shape[1:] for array in arrays}) > 1 or len({array.ndim for array in arrays}) > 1:
            shapes = sorted({str(array.shape) for array in arrays})
            raise DataError(f"{folder} has {spec.name} in several shapes: {', '.join(shapes)[:120]}", "give all one shape")
        joined[spec.name] = np.concatenate(arrays) if arrays[0].ndim else arrays[0]
        if not joined[spec.name].size:
            raise DataError(f"{folder} has no samples of {spec.name}", "each .npz holds one or more")
    return joined


def _read_npz(path: Path, inputs: Sequence[TensorSpec]) -> Feeds:
    names = [spec.name for spec in inputs]
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is no regular file", "write it with numpy.savez")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = npz_arrays(file)
    except Exception as error:  # noqa: BLE001  zip and npy readers raise many types on damaged bytes
        raise DataError(f"{path} cannot be read: {npz_problem(path, error)}", "write it with numpy.savez") from None
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"{path} has no array {missing[0]!r}; it has: {', '.join(arrays) or 'none'}", "name it as the input")
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            taken = {spec.name: np.asarray(arrays[spec.name], None if spec.dtype == "str" else spec.dtype) for spec in inputs}
        except ValueError as error:
            wanted = ", ".join(f"{spec.name} {spec.dtype}" for spec in inputs)
            raise DataError(f"{path}: {error}", f"wanted: {wanted}") from None
    for name, array in taken.items():
        if not all(np.isfinite(values).all() for values in (arrays[name], array) if values.dtype.kind == "f"):
            raise DataError(f"{path}: {name} holds NaN or Inf", "repair or remove the sample")
    return taken


def batchable(inputs: Sequence[TensorSpec]) -> bool:
    """Whether every input's first axis is dynamic."""
    return all(spec.shape and isinstance(spec.shape[0], str) for spec in inputs)


def least_batch(runner: Runner) -> int:
    """The samples of one run: one; of an engine the fewest that it takes; of a fixed graph the first axis that all its inputs
    and outputs share."""
    if runner.batches:
        return runner.batches[0]
    firsts = {spec.shape[0] if spec.shape else None for spec in (*runner.inputs, *runner.outputs)}
    (first,) = firsts if len(firsts) == 1 else (1,)
    return first if isinstance(first, int) and first > 0 else 1


def feeds_for(inputs: Sequence[TensorSpec], golden: Feeds | None, batch: int) -> Feeds:
    """Input name -> array of the model's shape; a dynamic first axis gets ``batch``, golden samples repeat in turn.

    Raises `UsageError` where a dynamic axis other than the first is left and no golden input says how long it is.
    """
    feeds = {}
    for spec in inputs:
        sample = golden.get(spec.name) if golden else None
        if sample is None:
            sample = _noise(spec)
        if spec.shape:
            first = batch if isinstance(spec.shape[0], str) else spec.shape[0]
            sample = np.resize(sample, (first, *sample.shape[1:]))
        feeds[spec.name] = np.ascontiguousarray(sample)
    return feeds


def runner_feeds(runner: Runner, golden: Feeds | None, batch: int) -> Feeds:
    """`feeds_for` what an entered runner takes: its engine may take frames of bytes, where the golden inputs are tensors."""
    return feeds_for(runner.inputs, None if golden is None else as_taken(runner.frames, golden), batch)


def _noise(spec: TensorSpec) -> NDArray[Any]:
    """Normal noise for floats, zeros for all else (as indices they are always valid)."""
    if any(isinstance(axis, str) for axis in spec.shape[1:]):
        shape = "x".join(map(str, spec.shape))
        raise UsageError(
            f"input {spec.name} is {shape} and the bundle has no golden inputs to say how large",
            "import it again with --shape, which stores golden inputs",
        )
    shape_of_one = tuple(axis if isinstance(axis, int) else 1 for axis in spec.shape)
    if spec.dtype.startswith("float"):
        return np.random.default_rng(0).normal(size=shape_of_one).astype(spec.dtype)
    return np.zeros(shape_of_one, spec.dtype)


def frame_for(spec: ImagePreprocessing, golden: Feeds | None) -> NDArray[np.uint8]:
    """A frame of the model's own size: the first golden input with its normalisation undone, else seeded noise.

    uint8 (height, width) for one channel, (height, width, 3) for three.
    """
    tensor = next(iter(golden.values())) if golden else None
    if tensor is None or tensor.shape[1:] != (spec.channels, spec.height, spec.width):
        frame = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, spec.channels), np.uint8)
    else:
        frame = denormalised(spec, tensor[:1])[0]
    return frame[:, :, 0] if spec.channels == 1 else frame
