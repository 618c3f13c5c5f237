"""A graph run stretch by stretch over many samples: what later stretches need waits on disk, so memory stays flat.

Two streams of one graph, float and quantized, show every layer both of its inputs; each node runs once a sample, where
running the graph anew for each layer would cost the square of its depth.
"""

from __future__ import annotations

import bisect
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edgekit.graphs.editing import constants, reads

from .simulate import Feeds, Simulator

__all__ = ["Spool", "Stream", "sequence_lives"]

Array = NDArray[Any]
KEPT_BYTES = 8 << 20  # held in memory; the rest on disk
Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Space:
    """Which bytes of a file are free: an array takes the first gap that is long enough, so the file is as long as it must."""

    def __init__(self) -> None:
        self.end = 0
        self._gaps: list[tuple[int, int]] = []  # (start, end) in order; none touches another, or the end

    def take(self, size: int) -> int:
        """Where ``size`` bytes go."""
        for i, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        self.end += size
        return self.end - size

    def give(self, start: int, size: int) -> None:
        """What `take` gave is free again."""
        if not size:
            return
        end, i = start + size, bisect.bisect(self._gaps, (start, start))
        if i < len(self._gaps) and self._gaps[i][0] == end:
            end = self._gaps.pop(i)[1]
        if i and self._gaps[i - 1][1] == start:
            i -= 1
            start = self._gaps.pop(i)[0]
        if end == self.end:
            self.end = start
        else:
            self._gaps.insert(i, (start, end))


class Spool:
    """Arrays of each sample by name: in memory while they are small, then in a file of `tempfile`'s folder (``TMPDIR``).

    The file has no name, so nothing of it stays when the process is killed. Each array is written once.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="edgekit-calibration-")  # noqa: SIM115  `close` does
        self._space = _Space()
        self._bytes = 0
        self._samples: dict[int, dict[str, Array | _Place]] = {}

    def put(self, index: int, arrays: Feeds) -> None:
        """More arrays of a sample, under new names."""
        held = self._samples.setdefault(index, {})
        for name, array in arrays.items():
            if self._bytes + array.nbytes <= KEPT_BYTES or array.dtype.hasobject:
                self._bytes += array.nbytes
                held[name] = array
                continue
            held[name] = place = _Place(self._space.take(array.nbytes), array.shape, array.dtype)
            self._file.seek(place.start)
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def get(self, index: int, names: Iterable[str]) -> dict[str, Array]:
        """Those of the named arrays that the sample has."""
        held = self._samples.get(index, {})
        return {name: self._read(held[name]) for name in names if name in held}

    def drop(self, index: int, names: Iterable[str]) -> None:
        """Forget these arrays of a sample."""
        for name in names:
            found = self._samples[index].pop(name, None)
            if isinstance(found, _Place):
                self._space.give(found.start, math.prod(found.shape) * found.dtype.itemsize)
            elif found is not None:
                self._bytes -= found.nbytes

    def close(self) -> None:
        self._file.close()
        self._samples.clear()

    def _read(self, found: Array | _Place) -> Array:
        if not isinstance(found, _Place):
            return found
        array = np.empty(found.shape, found.dtype)
        self._file.seek(found.start)
        self._file.readinto(array.reshape(-1).view(np.uint8).data)
        return array


class Stream:
    """One graph on its way over a list of batches. Use as a context manager: the spool is closed at the end."""

    def __init__(self, model: onnx.ModelProto, batches: Iterable[Feeds]) -> None:
        self.model, self.position, self.count = model, 0, 0
        self._nodes, self._weights = list(model.graph.node), constants(model.graph)
        self._last = {name: i for i, node in enumerate(self._nodes) for name in reads(node)}  # who reads it last
        read = {*self._last, *(value.name for value in model.graph.output)}
        self._held = [value.name for value in model.graph.input if value.name in read]
        self._spool = Spool()
        try:
            for feeds in batches:
                self._spool.put(self.count, {name: array for name, array in feeds.items() if name in read})
                self.count += 1
        except BaseException:  # nobody will leave the context
            self._spool.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def advance(self, end: int, rewrite: Rewrite) -> None:
        """Run all nodes before index ``end``; ``rewrite`` turns the stretch into what is really run (its Q/DQ form)."""
        if end <= self.position:
            return
        live = self.live(end)
        before, after = set(self._held), set(live)
        fresh, dead = [name for name in live if name not in before], [name for name in self._held if name not in after]
        for i, found in enumerate(self.look(end, fresh, rewrite)):
            self._spool.drop(i, dead)
            self._spool.put(i, found)
        self.position, self._held = end, live

    def look(self, end: int, tensors: Sequence[str], rewrite: Rewrite) -> Iterator[dict[str, Array]]:
        """The named tensors of each batch, as the nodes before ``end`` make them, without moving on."""
        stretch = self._nodes[self.position : end]
        made = {name for node in stretch for name in node.output}
        outputs = list(dict.fromkeys(name for name in tensors if name in made))
        waiting = [name for name in tensors if name not in made]
        read = dict.fromkeys(name for node in stretch for name in reads(node))
        run: Simulator | None = None
        for i in range(self.count):
            found = self._spool.get(i, waiting)
            if run is None and outputs:
                run = Simulator(rewrite(self.cut(self.position, end, self._spool.get(i, read), outputs)))
            if run is not None:
                found |= run(self._spool.get(i, run.inputs))
            yield {name: found[name] for name in tensors}

    def live(self, end: int) -> list[str]:
        """Tensors made before ``end``, which is not behind the position, that a node from there on reads."""
        made = [name for node in self._nodes[self.position : end] for name in node.output]
        return [name for name in (*self._held, *made) if self._last.get(name, -1) >= end]

    def cut(self, start: int, end: int, feeds: Feeds, outputs: Sequence[str]) -> onnx.ModelProto:
        """A model of the nodes ``start`` to ``end``; of ``feeds``, what they read from before is its inputs."""
        stretch = self._nodes[start:end]
        wanted = dict.fromkeys(name for node in stretch for name in reads(node))
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in feeds.items()
            if name in wanted
        ]
        part = helper.make_graph(
            stretch,
            "stretch",
            inputs,
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [self._weights[name] for name in wanted if name in self._weights],
        )
        return helper.make_model(
            part,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=self.model.functions,
        )


#: Operators that make a list of tensors, or perhaps none at all.
_LISTS = {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceMap", "Optional"}


def sequence_lives(model: onnx.ModelProto) -> list[range]:
    """Node indices in front of which a sequence or optional lives: a stretch cannot begin there, for a spool holds arrays."""
    nodes = model.graph.node
    if not any(node.op_type in _LISTS for node in nodes):
        return []
    made = {name: i for i, node in enumerate(nodes) if node.op_type in _LISTS for name in node.output}
    try:
        typed = onnx.shape_inference.infer_shapes(model).graph.value_info
    except Exception:  # noqa: BLE001  inference raises types of its own; the operators above are known without it
        typed = []
    named = {value.name for value in typed if value.type.WhichOneof("value") in ("sequence_type", "optional_type")}
    made |= {name: i for i, node in enumerate(nodes) for name in node.output if name in named}
    last = {name: i for i, node in enumerate(nodes) for name in reads(node) if name in made}
    return [range(i + 1, last[name] + 1) for name, i in made.items() if name in last]
