"""How `quantization.py` measures a candidate, the same for all tools: SNR, share, top-1, and the child that made it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["Ran", "child", "decibel", "macs", "read", "session", "symmetric", "top1"]

Array = NDArray[Any]
Feeds = dict[str, Array]
#: operator -> its inputs that must be int8; the bias need not.
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
RECURRENT = ("LSTM", "GRU", "RNN")
#: An int8 value stays one through these: TensorRT and NNCF move Q/DQ over them.
MOVED = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Split", "Slice", "Flatten", "Gather", "Expand")
MOVED += ("MaxPool", "Pad", "Relu", "Dropout", "DepthToSpace", "SpaceToDepth")
POLL_S = 0.05


class Ran(NamedTuple):
    """A finished child: wall seconds, highest resident memory of it and its children, the first line of its error."""

    seconds: float
    peak_mb: float
    error: str | None
    stdout: str


def child(command: Sequence[str | Path], *, limit_s: float, limit_mb: float, env: Mapping[str, str], ok: Sequence[int]) -> Ran:
    """Run to the end, or to a limit. VmHWM is read while it lives: `ru_maxrss` would start at the parent's."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        start, peak, stopped = time.perf_counter(), 0.0, None
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=dict(env), start_new_session=True)
        while process.poll() is None:
            peak = max(peak, sum(_high_water_mb(pid) for pid in _tree(process.pid)))
            seconds = time.perf_counter() - start
            if seconds > limit_s or peak > limit_mb:
                stopped = f"stopped after {limit_s:.0f} s" if seconds > limit_s else f"stopped at {limit_mb:.0f} MB"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(POLL_S)
        seconds = time.perf_counter() - start
        out.seek(0), err.seek(0)
        error = stopped or (None if process.returncode in ok else _reason(err.read(), process.returncode))
        return Ran(round(seconds, 2), round(peak, 1), error, out.read())


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for each in children:
            yield from _tree(int(each))


def _high_water_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def _reason(stderr: str, code: int) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    found = [line.removeprefix("ERROR ") for line in lines if line.startswith(("ERROR ", "error: "))]
    return (found[-1] if found else lines[-1] if lines else f"exit code {code}")[:300]


def read(folder: Path) -> list[Feeds]:
    """A folder of ``.npz``, in order of names."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            found.append({name: file[name] for name in file.files})
    return found


def session(model: Path | bytes, *, exact: bool = True) -> ort.InferenceSession:
    """One thread. Q and DQ are computed as written, in float: int8 kernels round, and without VNNI saturate, as the CPU does.

    ``exact`` False also switches graph optimization off, so that every tensor is there to look at.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def decibel(reference: Path, candidate: Path, feeds: Sequence[Feeds]) -> float:
    """Output SNR in dB: of each float output the signal's and the noise's power summed over all samples; the lowest."""
    true, found = session(reference), session(candidate)
    names = [value.name for value in true.get_outputs()]
    asked = names if {value.name for value in found.get_outputs()} >= set(names) else None
    signal_power, noise_power = np.zeros(len(names)), np.zeros(len(names))
    floats = np.zeros(len(names), bool)
    for sample in feeds:
        pairs = zip(true.run(names, sample), found.run(asked, sample), strict=True)
        for i, (expected, got) in enumerate(pairs):
            floats[i] = expected.dtype.kind == "f"
            wide = expected.astype(np.float64)
            signal_power[i] += (wide**2).sum()
            noise_power[i] += ((got.astype(np.float64) - wide) ** 2).sum()
    ratio = np.maximum(signal_power[floats], 1e-30) / np.maximum(noise_power[floats], 1e-30)
    return round(float(np.clip(10 * np.log10(np.nan_to_num(ratio, nan=1e-20)), -200, 200).min()), 2)


def top1(model: Path, feeds: Sequence[Feeds], labels: Array) -> float:
    """Share of samples whose first output's highest entry is the label."""
    run = session(model)
    hits = [int(np.argmax(run.run(None, sample)[0])) == int(label) for sample, label in zip(feeds, labels, strict=True)]
    return round(float(np.mean(hits)), 4)


class Macs(NamedTuple):
    """Multiply-accumulates for one sample: of Conv, ConvTranspose, MatMul, Gemm; of them with int8 inputs; of LSTM and GRU."""

    total: int
    int8: int
    recurrent: int


def macs(model: Path, feeds: Feeds) -> Macs:
    """Counted on the shapes that a run with every needed tensor exposed shows."""
    graph = onnx.load(model)
    producers = {name: node for node in graph.graph.node for name in node.output}
    weighted = [node for node in graph.graph.node if node.op_type in (*WEIGHTED, *RECURRENT)]
    shapes = _shapes(graph, {name for node in weighted for name in (*node.input, *node.output) if name}, feeds)
    total = int8 = recurrent = 0
    for node in weighted:
        count = _count(node, shapes)
        if node.op_type in RECURRENT:
            recurrent += count
            continue
        total += count
        if all(_quantized(name, producers) for name in node.input[:2]):
            int8 += count
    return Macs(total, int8, recurrent)


def _quantized(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    node = producers.get(name)
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        return True
    if node.op_type == "Concat":
        return all(_quantized(each, producers) for each in node.input)
    return node.op_type in MOVED and _quantized(node.input[0], producers)


def _shapes(model: onnx.ModelProto, names: set[str], feeds: Feeds) -> dict[str, tuple[int, ...]]:
    graph = model.graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found |= {name: array.shape for name, array in feeds.items()}
    made = {name for node in graph.node for name in node.output}
    wanted = sorted((names & made) - found.keys())
    known = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    run = session(model.SerializeToString(), exact=False)
    return found | {name: array.shape for name, array in zip(wanted, run.run(wanted, feeds), strict=True)}


def _count(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    data, weight, out = shapes[node.input[0]], shapes[node.input[1]], shapes.get(node.output[0], ())
    if node.op_type == "Conv":
        return int(np.prod(out) * np.prod(weight[1:]))
    if node.op_type == "ConvTranspose":
        return int(np.prod(data) * np.prod(weight[1:]))
    if node.op_type == "MatMul":
        return int(np.prod(out) * data[-1])
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return int(np.prod(out) * data[0 if transposed else -1])
    steps = data[0] * data[1]  # (T, N, C); weights (directions, gates * H, C) and (directions, gates * H, H)
    return int(steps * (np.prod(weight) + np.prod(shapes[node.input[2]])))


def symmetric(model: Path) -> bool:
    """Whether all Q/DQ is what TensorRT takes: int8 around zero (int32 around zero for biases)."""
    graph = onnx.load(model).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    arrays |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3 or not node.input[2]:
            continue
        zero = arrays.get(node.input[2])
        if zero is None:
            return False
        if zero.data_type not in (onnx.TensorProto.INT8, onnx.TensorProto.INT32) or numpy_helper.to_array(zero).any():
            return False
    return True
