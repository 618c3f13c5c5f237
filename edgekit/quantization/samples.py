"""Where calibration samples come from: a labelled data set's train split, or a folder of ``.npz`` files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, TOKENIZER, Bundle
from edgekit.data import MAX_DAMAGED_SHARE, SOURCES, known_specs, load
from edgekit.errors import DataError, GraphError, UsageError
from edgekit.files import npz_arrays, npz_problem
from edgekit.manifest import TensorSpec
from edgekit.preprocess import make_preprocessor
from edgekit.progress import say, track
from edgekit.runtime.golden import compare_arrays, signal_names

from .record import digest
from .simulate import Array, Feeds, Simulator

__all__ = ["Pool", "Samples", "gather", "training_data"]

HELD_OUT = 256  # for the SNR
LABELLED = 2000  # for accuracy: half a point is ten of them
MAX_BATCH = 64
BATCH_BYTES = 64 << 20
PROVED = 16  # samples among which two of one shape are looked for
SAME = 1e-3  # of an output's largest value: what another order of sums may change
KEPT_BYTES = 16 << 20  # samples up to this size in all stay in memory between passes


@dataclass(frozen=True)
class Samples:
    """Inputs by index: ``read(i)`` gives name -> array with the batch axis. ``targets`` are indices of model labels."""

    ids: tuple[str, ...]
    read: Callable[[int], Feeds]
    batchable: bool
    targets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: range | list[int]) -> Samples:
        chosen, read = list(indices), self.read
        targets = None if self.targets is None else self.targets[chosen]
        return Samples(tuple(self.ids[i] for i in chosen), lambda i: read(chosen[i]), self.batchable, targets)

    def spread(self, count: int) -> Samples:
        """At most ``count`` of them, drawn at random from all, in their order; the same ones each time.

        Not every so-manieth: samples often come in turns, class after class, and a stride would see but one of two.
        """
        if len(self) <= count:
            return self
        return self.take(sorted(np.random.default_rng(0).permutation(len(self))[:count].tolist()))

    def batches(self, most: int = MAX_BATCH) -> Iterator[Feeds]:
        """Neighbours of equal shape together, at most ``most``, as far as the graph takes batches and memory stays flat."""
        held: list[Feeds] = []
        for i in range(len(self)):
            feeds = self.read(i)
            size = sum(array.nbytes for array in feeds.values())
            full = not self.batchable or len(held) >= min(most, max(1, BATCH_BYTES // max(size, 1)))
            if held and (full or any(held[0][name].shape[1:] != feeds[name].shape[1:] for name in feeds)):
                yield _stack(held)
                held = []
            held.append(feeds)
        if held:
            yield _stack(held)


def _stack(held: list[Feeds]) -> Feeds:
    return held[0] if len(held) == 1 else {name: np.concatenate([feeds[name] for feeds in held]) for name in held[0]}


class Pool(NamedTuple):
    """Disjoint samples: ``calibration`` gives ranges and choices, ``held_out`` the SNR, ``labelled`` the accuracy."""

    source: str
    data_digest: str | None
    split: str
    calibration: Samples
    held_out: Samples
    labelled: Samples


def training_data(bundle: Bundle) -> str | None:
    """The data that the bundle was trained on, as its history says."""
    for entry in reversed(bundle.manifest.history):
        found = entry.config.get("data")  # evaluations name data too, of any kind
        if entry.stage in ("train", "prune") and isinstance(found, str) and found.split(":")[0] in SOURCES:
            return found
    return None


def gather(bundle: Bundle, calib: str | os.PathLike[str] | None, count: int, seed: int, *, labelled: bool = True) -> Pool:
    """``count`` samples for ``calib``: a data spec, a folder of ``.npz``, or None for what the bundle was trained on.

    ``labelled``: also read the samples that accuracy is measured on; else ``labelled`` only says whether labels are known.
    Raises `UsageError` where there is nothing to calibrate with, `DataError` for samples that do not fit the model.
    """
    if calib is None:
        calib = training_data(bundle)
    if calib is None:
        raise UsageError(
            f"{bundle.path} was not trained here, so there is no calibration data",
            "add --calib DIR with one .npz a sample, one array an input name",
        )
    spec = os.fspath(calib)
    if spec.split(":")[0] in SOURCES:  # also where a folder of that name lies here: ./digits names the folder
        return _looked_over(from_dataset(bundle, spec, count, seed, labelled=labelled))
    if Path(spec).is_dir():
        return _looked_over(_from_folder(bundle, Path(spec), count))
    raise UsageError(
        f"--calib {spec!r} is neither a folder of .npz, nor a calibration.json, nor a data set",
        f"a data set is one of: {known_specs()}",
    )


def _looked_over(pool: Pool) -> Pool:
    """``pool``; says which inputs hold one value in all calibration samples. Integers (masks, kinds of tokens) may, beside
    others that do not."""
    constant: dict[str, Any] = {name: array.flat[0] for name, array in pool.calibration.read(0).items()}
    floats = {name for name, value in constant.items() if value.dtype.kind == "f"}
    for i in range(len(pool.calibration)):
        feeds = pool.calibration.read(i)
        constant = {name: value for name, value in constant.items() if (feeds[name] == value).all()}
        if not constant:
            break
    every = len(constant) == len(pool.calibration.read(0))
    for name, value in constant.items():
        if every or name in floats:
            say(
                f"{name} is {value!s} everywhere in all {len(pool.calibration)} calibration samples: ranges and dB that come "
                "of it mean little; give samples as the model will see them"
            )
    return pool


def from_dataset(bundle: Bundle, spec: str, count: int, seed: int, *, labelled: bool = True) -> Pool:
    """A stratified, seeded draw from the train split, class after class in turn; damaged images are named and skipped."""
    preprocessing, labels = bundle.manifest.preprocessing, bundle.manifest.labels
    if preprocessing is None or len(bundle.manifest.inputs) != 1:
        raise UsageError(
            f"{bundle.path} has no preprocessing, so it cannot be calibrated with the samples of {spec}",
            "add --calib DIR with one .npz a sample, one array an input name",
        )
    try:
        dataset = load(spec)
    except DataError as error:
        raise DataError(error.message, "name the data: --calib SPEC, or a folder of .npz") from None
    # A fourth beside ``count`` keeps `_parted` from shortening the calibration: the same samples with and without labels.
    rest = max(LABELLED if labelled else HELD_OUT, -(-count // 4))
    if dataset.task != bundle.manifest.task:
        raise UsageError(f"{bundle.path} does {bundle.manifest.task}, {spec} is for {dataset.task}", "name data of its kind")
    reads = dataset.task == "text-recognition"  # lines have no classes
    classes = np.zeros(len(dataset.train), np.int64) if reads else dataset.train.targets
    order = _stratified(classes, seed)[: count + rest]
    tokenizer = bundle.read(TOKENIZER) if bundle.has(TOKENIZER) else None
    split, preprocess = dataset.train.take(order), make_preprocessor(preprocessing, tokenizer)
    name = bundle.manifest.inputs[0].name
    read = _remembering(lambda i: {name: preprocess(split.read(i))})
    kept: list[int] = []
    for i in track(range(len(split)), "reading samples"):
        try:
            read(i)
        except DataError as error:
            say(f"skipped {split.ids[i]}: {error.message}")
        else:
            kept.append(i)
    if len(split) - len(kept) > MAX_DAMAGED_SHARE * len(split):
        raise DataError(
            f"{len(split) - len(kept)} of {len(split)} samples cannot be read, over {MAX_DAMAGED_SHARE:.0%}",
            "repair or remove them",
        )
    known = not reads and all(label in labels for label in dataset.labels)
    targets = np.array([labels.index(label) for label in dataset.labels])[split.targets] if known else None
    every = _proved(bundle, Samples(split.ids, read, _batchable(bundle.manifest.inputs), targets).take(kept))
    return _parted(spec, dataset.digest, "train", every, count)


def _parted(source: str, data_digest: str | None, split: str, every: Samples, count: int) -> Pool:
    """The first ``count`` calibrate, at most four fifths of all; the rest is held out."""
    total = len(every)
    first = min(count, max(1, total * 4 // 5))
    held = every.take(range(first, min(total, first + HELD_OUT)))
    labelled = every.take(range(first, min(total, first + LABELLED)))
    return Pool(source, data_digest, split, every.take(range(first)), held, labelled)


def _stratified(targets: NDArray[np.int64], seed: int) -> list[int]:
    """All indices, shuffled within each class, classes in turn: any prefix is balanced."""
    ranked: list[tuple[int, int, int]] = []
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        np.random.default_rng([seed, int(label)]).shuffle(members)
        ranked += [(rank, int(label), int(i)) for rank, i in enumerate(members)]
    return [i for _, _, i in sorted(ranked)]


def _remembering(read: Callable[[int], Feeds]) -> Callable[[int], Feeds]:
    kept: dict[int, Feeds] = {}
    used = [0]

    def remembered(i: int) -> Feeds:
        if i in kept:
            return kept[i]
        feeds = read(i)
        size = sum(array.nbytes for array in feeds.values())
        if used[0] + size <= KEPT_BYTES:
            kept[i] = feeds
            used[0] += size
        return feeds

    return remembered


def _batchable(inputs: tuple[TensorSpec, ...]) -> bool:
    """Whether every input's first axis is the same dynamic one, and so may be a batch."""
    first = {spec.shape[0] if spec.shape else 0 for spec in inputs}
    return len(first) == 1 and isinstance(next(iter(first)), str)


def _proved(bundle: Bundle, samples: Samples) -> Samples:
    """Not batchable, unless the float graph answers two samples together as it does apart: the axis may be time."""
    if not samples.batchable or len(samples) < 2:
        return samples
    first = samples.read(0)
    shapes = {name: array.shape for name, array in first.items()}
    alike = (samples.read(i) for i in range(1, min(len(samples), PROVED)))
    fits = (x for x in alike if {name: array.shape for name, array in x.items()} == shapes)
    second = next((x for x in fits if any((x[name] != first[name]).any() for name in x)), None)  # equal ones prove nothing
    return samples if second is not None and _row_by_row(bundle, first, second) else replace(samples, batchable=False)


def _row_by_row(bundle: Bundle, first: Feeds, second: Feeds) -> bool:
    """Whether all outputs that are measured are so: the indices of NonZero are never one sample after the other.

    A graph into which a batch of 1 is baked refuses two, or answers one.
    """
    run = Simulator(onnx.load_model_from_string(bundle.file(FLOAT_GRAPH).read_bytes()))
    apart = [run(first), run(second)]
    try:
        together = run(_stack([first, second]))
    except GraphError:
        return False
    for name in signal_names(together, quantized=True):
        found, parts = together[name], [answers[name] for answers in apart]
        if not all(isinstance(part, np.ndarray) and part.ndim for part in parts):
            return False
        if len({part.shape[1:] for part in parts}) > 1:
            return False
        if compare_arrays(np.concatenate(parts), found).relative > SAME:
            return False
    return True


def _from_folder(bundle: Bundle, folder: Path, count: int) -> Pool:
    """Every fifth file is held out. All are read once now, so that a wrong one is named before any work."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise UsageError(
            f"{folder} holds no .npz files",
            f"write one a sample with numpy.savez, or, for class folders, --calib folder:{folder}",
        )
    inputs = bundle.manifest.inputs
    held = [file for i, file in enumerate(files) if i % 5 == 4][:HELD_OUT]
    order = [file for file in files if file not in set(held)][:count]
    if not held and len(order) > 1:
        held = [order.pop()]

    def samples(chosen: list[Path]) -> Samples:
        read = _remembering(lambda i: read_npz(chosen[i], inputs))
        return Samples(tuple(file.name for file in chosen), read, _batchable(inputs))

    @functools.cache
    def run() -> Simulator:
        return Simulator(onnx.load_model_from_string(bundle.file(FLOAT_GRAPH).read_bytes()))

    calibration, held_out = samples(order), samples(held)
    for part, chosen in ((calibration, order), (held_out, held)):
        for i in range(len(part)):
            _check_named_axes(inputs, chosen[i], part.read(i), run)
    calibration = _proved(bundle, calibration)
    held_out = replace(held_out, batchable=calibration.batchable)
    return Pool(folder.name, None, "folder", calibration, held_out, held_out.take([]))


def read_npz(path: Path, inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """One sample. Raises `DataError` that names the file and what does not fit: name, dtype, shape, or NaN."""
    wanted = ", ".join(f"{spec.name} {spec.dtype} {_shape(spec.shape)}" for spec in inputs)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is no regular file", f"write it with numpy.savez; wanted: {wanted}")
    try:
        # numpy leaves a file that it opened itself open where the zip in it is damaged
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = npz_arrays(file)
    except Exception as error:  # noqa: BLE001  numpy and zipfile raise many types on damaged files
        why = npz_problem(path, error)
        raise DataError(f"{path} cannot be read: {why}", f"write it with numpy.savez; wanted: {wanted}") from None
    names = {spec.name for spec in inputs}
    if set(arrays) != names:
        raise DataError(f"{path} holds the arrays {', '.join(sorted(arrays)) or 'none'}", f"wanted: {wanted}")
    for spec in inputs:
        array = arrays[spec.name]
        fits = array.ndim == len(spec.shape) and all(
            isinstance(axis, str) or axis == size for axis, size in zip(spec.shape, array.shape, strict=False)
        )
        if str(array.dtype) != spec.dtype or not fits or not array.size:
            got = f"{array.dtype} {_shape(array.shape)}"
            raise DataError(
                f"{path}: {spec.name} is {got}, the model takes {spec.dtype} {_shape(spec.shape)}",
                "save each sample as the model sees it, with the batch axis",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{path}: {spec.name} holds NaN or Inf", "repair or remove the sample")
    return arrays


def _check_named_axes(inputs: tuple[TensorSpec, ...], path: Path, feeds: Feeds, run: Callable[[], Simulator]) -> None:
    """Raise `DataError` where an axis of one name has two sizes, and the graph does not take that: the importer names what
    has no name, and may name two axes alike that are not."""
    sizes: dict[str, set[int]] = {}
    for spec in inputs:
        for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if isinstance(axis, str):
                sizes.setdefault(axis, set()).add(size)
    if not (differing := [axis for axis, found in sizes.items() if len(found) > 1]):
        return
    try:
        run()(feeds)
    except GraphError:
        got, wanted = (
            ", ".join(f"{spec.name} {_shape(shape)}" for spec, shape in zip(inputs, shapes, strict=True))
            for shapes in ([feeds[spec.name].shape for spec in inputs], [spec.shape for spec in inputs])
        )
        raise DataError(
            f"{path}: {' and '.join(differing)} must be one size in a sample, it holds {got}", f"the model takes {wanted}"
        ) from None


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def digests(samples: Samples) -> tuple[str, ...]:
    return tuple(digest(samples.read(i)) for i in range(len(samples)))
