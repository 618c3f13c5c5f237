"""Run graphs on the CPU exactly as their Q/DQ nodes say, sample by sample: no int8 kernels, whose rounding is the machine's.

One thread, so that the same inputs give the same sums. Memory stays flat: batches are bounded by the size of what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from edgekit.errors import GraphError, first_line
from edgekit.graphs.editing import exposed, free_name, prune, tensor_names
from edgekit.runtime.golden import MAX_DB, decibel, distance, is_choice, signal_names

from .statistics import Statistics, packed, unpacked

__all__ = ["Array", "Feeds", "Noise", "Recall", "Simulator", "measured_shapes", "observe", "signal_to_noise"]

Array = NDArray[Any]
Feeds = Mapping[str, Array]
#: Gives what a function of this name gave before, or gives now.
Recall = Callable[[str, Callable[[], dict[str, Array]]], dict[str, Array]]


class Simulator:
    """A graph, ready to run. Raises `GraphError` where ONNX Runtime refuses it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # an arena keeps the most it ever held
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
            raise GraphError(f"ONNX Runtime refuses the graph: {first_line(error)}", _cure(model, first_line(error))) from None
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        try:
            return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:  # noqa: BLE001  as above
            raise GraphError(
                f"ONNX Runtime failed on a calibration sample: {first_line(error)}",
                "check the samples' shapes against: edgekit inspect B",
            ) from None


def _cure(model: onnx.ModelProto, reason: str) -> str:
    if model.producer_name != "edgekit":
        return "import it again: edgekit import MODEL.onnx"
    node = re.search(r"""[Nn]ode(?: with name|,)? [("']+([^)"']+)""", reason)
    return (
        "edgekit made this graph: where the float graph runs (edgekit compare B --backends onnxruntime), report it as a defect "
        f"of edgekit{f', at the node {node[1]!r}' if node else ''}"
    )


def measured_shapes(model: onnx.ModelProto, tensors: Iterable[str], feeds: Feeds) -> dict[str, tuple[int, ...]]:
    """Shapes of the named tensors for one set of inputs; the tensors themselves are not kept."""
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    names = list(dict.fromkeys(tensors))
    if not names:
        return {}
    taken = tensor_names(copy.graph)
    shapes = [free_name(taken, f"{name}/shape") for name in names]
    copy.graph.node.extend(helper.make_node("Shape", [name], [shape]) for name, shape in zip(names, shapes, strict=True))
    prune(copy, shapes)
    run = Simulator(copy)
    found = run({name: array for name, array in feeds.items() if name in run.inputs})
    return {name: tuple(int(n) for n in shape) for name, shape in zip(names, found.values(), strict=True)}


def observe(
    model: onnx.ModelProto,
    tensors: Mapping[str, int],
    batches: Callable[[], Iterable[Feeds]],
    most: int,
    recall: Recall | None = None,
) -> dict[str, Statistics]:
    """Statistics of tensors over all batches, in as many passes as keep what is shown under ``most`` bytes.

    ``tensors``: names, and bytes a sample. ``recall`` remembers what each pass gave (`Journal`).
    Raises `GraphError` where one becomes NaN or Inf.
    """
    found: dict[str, Statistics] = {}
    for i, names in enumerate(_parts(tensors, most)):

        def seen(names: list[str] = names) -> dict[str, Array]:
            return packed(_observed(model, names, batches()))

        found |= zip(names, unpacked(recall(f"seen/{i}", seen) if recall else seen()), strict=True)
    return found


def _observed(model: onnx.ModelProto, names: list[str], batches: Iterable[Feeds]) -> list[Statistics]:
    found = [Statistics() for _ in names]
    run = Simulator(exposed(model, names))
    for feeds in batches:
        arrays = run({k: v for k, v in feeds.items() if k in run.inputs}).values()
        for name, statistics, array in zip(names, found, arrays, strict=True):
            try:
                statistics.update(array)
            except FloatingPointError:
                raise GraphError(
                    f"the float model gives NaN or Inf in the tensor {name!r}",
                    "check the calibration samples and the model: edgekit compare B --backends onnxruntime",
                ) from None
    return found


def _parts(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    held: list[str] = []
    for name in sizes:
        if held and sum(sizes[other] for other in held) + sizes[name] > most:
            yield held
            held = []
        held.append(name)
    if held:
        yield held


class Noise:
    """Signal and noise power of each output that a quantized graph owes (`runtime.golden`), summed over batches."""

    def __init__(self) -> None:
        self._power: dict[str, tuple[float, float]] = {}

    def add(self, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        for name in signal_names(expected, quantized=True):
            reference = expected[name]
            if found[name].shape != reference.shape:
                raise GraphError(
                    f"the output {name!r} has another shape in int8: its size depends on the data",
                    "cut the graph in front of NonZero or NonMaxSuppression, and import it again",
                )
            signal, noise = self._power.get(name, (0.0, 0.0))
            if is_choice(reference):  # a signal of 1 each, and a noise of 1 where they differ: as `compare_choices` has it
                self._power[name] = signal + reference.size, noise + float((found[name] != reference).sum())
                continue
            off = distance(reference, found[name])
            self._power[name] = signal + off.signal, noise + off.noise

    def snr_db(self) -> float:
        """The lowest output's signal-to-noise ratio, at most 200 dB; -200 where an output is not finite."""
        return min((decibel(*power) for power in self._power.values()), default=MAX_DB)


def signal_to_noise(candidate: onnx.ModelProto, batches: Iterable[tuple[Feeds, Mapping[str, Array]]]) -> float:
    """Output SNR in dB of a graph over (feeds, float outputs) pairs."""
    run, noise = Simulator(candidate), Noise()
    for feeds, expected in batches:
        noise.add(expected, run(feeds))
    return noise.snr_db()


def with_reference(reference: onnx.ModelProto, batches: Iterable[Feeds]) -> Iterator[tuple[Feeds, dict[str, Array]]]:
    """Each batch with the outputs of the float graph."""
    run = Simulator(reference)
    for feeds in batches:
        yield feeds, run(feeds)
