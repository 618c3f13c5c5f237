"""A split as model inputs: in memory while it is small, else decoded anew each time, by threads, ahead of their use.

Threads, not processes: Pillow's decoders and numpy's products release the interpreter, and nothing has to be copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, EdgekitError, InputError
from edgekit.preprocess import Preprocess
from edgekit.progress import say, track

__all__ = ["KEEP_BYTES", "Rows", "Streamed", "Tensors", "batches", "read_tensors"]

#: A split up to this size in all stays in memory.
KEEP_BYTES = 2 << 30
_CHUNK = 32  # samples a task: fewer would spend the time on handing over


class Streamed:
    """Like an array (N, ...) that is indexed along its first axis, but decoded when it is asked for."""

    def __init__(self, read: Callable[[int], NDArray[Any]], rows: Sequence[int], shape: tuple[int, ...], dtype: Any) -> None:
        self._read, self._rows = read, np.asarray(rows)
        self.shape, self.dtype = (len(rows), *shape), np.dtype(dtype)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """A slice or an array of indices -> an array of that many samples."""
        chosen = self._rows[index]
        if chosen.ndim == 0:
            return self._read(int(chosen))
        out: NDArray[Any] = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for place, i in enumerate(chosen):
            out[place] = self._read(int(i))
        return out


Rows = NDArray[Any] | Streamed


class Tensors(NamedTuple):
    """A split as model inputs.

    ``x`` (N, ...): float32 (N, C, H, W), int64 (N, T), float32 (N, T, C + 1), or what the preprocessing gives; an array, or
    `Streamed` where it would not fit into memory. ``y`` int64 (N,) or (N, L), ``ids`` of the N, ``damaged`` ids left out.
    """

    x: Rows
    y: NDArray[np.int64]
    ids: tuple[str, ...]
    damaged: tuple[str, ...]


def read_tensors(
    ids: tuple[str, ...],
    targets: NDArray[np.int64],
    read: Callable[[int], Any],
    preprocess: Preprocess,
    keep_bytes: int = KEEP_BYTES,
) -> Tensors:
    """Read all samples once, so that the damaged ones are known; keep them where they fit into ``keep_bytes``."""

    def sample(i: int) -> NDArray[Any]:
        row: NDArray[Any] = preprocess(read(i))[0]
        return row

    def attempt(chunk: range) -> list[NDArray[Any] | EdgekitError]:
        found: list[NDArray[Any] | EdgekitError] = []
        for i in chunk:
            try:
                found.append(sample(i))
            except (DataError, InputError) as error:
                found.append(error)
        return found

    chunks = [range(i, min(i + _CHUNK, len(ids))) for i in range(0, len(ids), _CHUNK)]
    kept: list[int] = []
    damaged: list[str] = []
    x: NDArray[Any] | None = None
    shape: tuple[int, ...] = (0,)
    dtype: Any = np.float32
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk, found in zip(chunks, _ahead(pool, attempt, _shown(chunks, len(ids))), strict=True):
            for i, got in zip(chunk, found, strict=True):
                if isinstance(got, EdgekitError):
                    damaged.append(ids[i])
                    say(f"skipped {ids[i]}: {got.message}")
                    continue
                if not kept:
                    shape, dtype = got.shape, got.dtype
                    if got.nbytes * len(ids) <= keep_bytes:
                        x = np.empty((len(ids), *shape), dtype)
                if x is not None:
                    x[len(kept)] = got
                kept.append(i)
    rows: Rows = x[: len(kept)] if x is not None else Streamed(sample, kept, shape, dtype)
    if not kept:
        rows = np.empty((0, *shape), dtype)
    return Tensors(rows, targets[kept], tuple(ids[i] for i in kept), tuple(damaged))


def _shown(chunks: list[range], count: int) -> Iterable[range]:
    """A bar only where one would wait for it."""
    return track(chunks, f"reading {count:,} samples") if count > 1000 else chunks


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """``work`` of each item in order, up to ``depth`` of them under way: memory stays flat."""
    waiting: list[Future[Any]] = []
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for task in waiting:
            task.cancel()


def batches(x: Rows, orders: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[Any]]:
    """``x[order]`` for each of ``orders``; where samples are decoded on demand, the next batches are decoded meanwhile."""
    if isinstance(x, np.ndarray):
        yield from (x[order] for order in orders)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from _ahead(pool, x.__getitem__, orders)
