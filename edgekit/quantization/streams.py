"""A graph run stretch by stretch over many samples: what later stretches need waits on disk, so memory stays flat.

Two streams of one graph, float and quantized, show every layer both of its inputs; each node runs once a sample, where
running the graph anew for each layer would cost the square of its depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edgekit.graphs.editing import consumers, reads

from .simulate import Feeds, Simulator

__all__ = ["Spool", "Stream", "sequence_lives"]

Array = NDArray[Any]
KEPT_BYTES = 8 << 20  # held in memory; the rest on disk
Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]


class Spool:
    """Lists of arrays by name, in memory while they are small."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        self._held: dict[int, Feeds] = {}
        self._files: dict[int, tuple[Path, tuple[str, ...]]] = {}

    def put(self, index: int, arrays: Feeds) -> None:
        size = sum(array.nbytes for array in arrays.values())
        self._drop(index)
        if self._bytes + size <= KEPT_BYTES:
            self._held[index] = arrays
            self._bytes += size
            return
        file = self._folder / str(index)
        with file.open("wb") as stream:  # plain arrays one after the other: npz would checksum them all
            for array in arrays.values():
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)
        self._files[index] = (file, tuple(arrays))

    def get(self, index: int) -> Feeds:
        if index in self._held:
            return self._held[index]
        file, names = self._files[index]
        with file.open("rb") as stream:
            return {name: np.lib.format.read_array(stream, allow_pickle=False) for name in names}

    def _drop(self, index: int) -> None:
        if index in self._held:
            self._bytes -= sum(array.nbytes for array in self._held.pop(index).values())


class Stream:
    """One graph on its way over a list of batches. Use as a context manager: the spool is removed at the end."""

    def __init__(self, model: onnx.ModelProto, batches: Iterable[Feeds]) -> None:
        self.model, self.position = model, 0
        self._folder = tempfile.TemporaryDirectory(prefix="edgekit-calibration-")
        self._spool = Spool(Path(self._folder.name))
        self.count = 0
        wanted = set(consumers(model.graph))
        self._nodes = list(model.graph.node)
        self._last = {name: i for i, node in enumerate(self._nodes) for name in reads(node)}  # who reads it last
        self._held = [value.name for value in model.graph.input if value.name in wanted]
        try:
            for feeds in batches:
                self._spool.put(self.count, {name: array for name, array in feeds.items() if name in wanted})
                self.count += 1
        except BaseException:  # nobody will leave the context
            self._folder.cleanup()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def advance(self, end: int, rewrite: Rewrite) -> None:
        """Run all nodes before index ``end``; ``rewrite`` turns the stretch into what is really run (its Q/DQ form)."""
        if end <= self.position:
            return
        live = self.live(end)
        for i, _, found in self._run(end, live, rewrite):
            self._spool.put(i, found)
        self.position, self._held = end, live

    def look(self, end: int, tensors: Sequence[str], rewrite: Rewrite) -> Iterator[Feeds]:
        """The named tensors of each batch, as the nodes before ``end`` make them, without moving on."""
        for _, held, found in self._run(end, tensors, rewrite):
            yield {name: found[name] if name in found else held[name] for name in tensors}

    def live(self, end: int) -> list[str]:
        """Tensors made before ``end``, which is not behind the position, that a node from there on reads."""
        made = [name for node in self._nodes[self.position : end] for name in node.output]
        return [name for name in (*self._held, *made) if self._last.get(name, -1) >= end]

    def _run(self, end: int, tensors: Sequence[str], rewrite: Rewrite) -> Iterator[tuple[int, Feeds, Feeds]]:
        stretch = list(self.model.graph.node[self.position : end])
        made = {name for node in stretch for name in node.output}
        outputs = [name for name in tensors if name in made]
        run: Simulator | None = None
        for i in range(self.count):
            held = self._spool.get(i)
            if run is None and outputs:
                run = Simulator(rewrite(self._cut(stretch, held, outputs)))
            found = dict(run({name: held[name] for name in run.inputs})) if run else {}
            for name in tensors:
                if name not in made and name in held:
                    found[name] = held[name]
            yield i, held, found

    def _cut(self, stretch: list[onnx.NodeProto], held: Feeds, outputs: list[str]) -> onnx.ModelProto:
        """A model of some nodes, with what they read from before as its inputs."""
        graph = self.model.graph
        wanted = {name for node in stretch for name in reads(node)}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in held.items()
            if name in wanted
        ]
        part = helper.make_graph(
            stretch,
            "stretch",
            inputs,
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [tensor for tensor in graph.initializer if tensor.name in wanted],
        )
        return helper.make_model(
            part, opset_imports=self.model.opset_import, ir_version=self.model.ir_version, functions=self.model.functions
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
