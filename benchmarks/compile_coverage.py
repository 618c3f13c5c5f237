"""How much of ONNX becomes an engine: TensorRT-RTX's parser on the file as it is, beside edgekit's import and build.

    python benchmarks/compile_coverage.py [--groups light pytorch-converted node] [--cases NAME ...] [--folder MODELS]
                                          [--workers 2] [--out FILE] [--explain]

The cases are those of the installed ``onnx`` (`onnx.backend.test`): the ``light`` models, the ``pytorch-converted`` and the
``node`` cases; ``--folder`` adds every .onnx below a folder, as group ``folder``. Each case runs in a process of its own, so
that a crash of the parser is a figure, too.

- ``raw``: the parser, then the builder, with a profile of 1 for each axis that the file leaves open, and the case's own values
  for inputs that TensorRT takes for shapes.
- ``edgekit``: `import_onnx`, then `build` in float32 for ``rtx-ada``. Inputs that are really parameters (axes, shapes,
  pads, scales) are bound to the values that the case itself states, but only where the import
  without them does not build: ``bound`` says so.

``lost``: cases that the raw parser takes and edgekit does not; there must be none. The others are counted by reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.loader as loader
import tensorrt_rtx
from _machine import machine
from onnx import numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.compiler import build_options, child, compilation, foreign
from edgekit.errors import EdgekitError
from edgekit.files import atomic_write

TARGET, TIMEOUT_S = "rtx-ada", 120
GROUPS = ("light", "pytorch-converted", "node")
MAX_BYTES = 80 << 20  # of a file of --folder
MAX_PARAMETER = 64  # numbers that an input may hold to be a parameter
MAX_SCALES = 8  # the same of floats
Answer = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """``values``: what the case states for its inputs, by name."""

    group: str
    name: str
    model: bytes
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


def cases(groups: list[str], folder: Path | None) -> Iterator[Case]:
    data = Path(loader.DATA_DIR)
    if "light" in groups:
        for path in sorted((data / "light").glob("*.onnx")):
            yield Case("light", path.stem, path.read_bytes())
    for kind in set(groups) & {"pytorch-converted", "pytorch-operator", "simple"}:
        for path in sorted((data / kind).glob("*/model.onnx")):
            yield Case(kind, path.parent.name, path.read_bytes(), _stated(path.parent / "test_data_set_0", path.read_bytes()))
    if "node" in groups:
        for test in loader.load_model_tests(kind="node"):
            names = [value.name for value in test.model.graph.input]
            given = {n: _plain(v) for n, v in zip(names, test.data_sets[0][0], strict=False)}
            values = {n: v for n, v in given.items() if v is not None}
            yield Case("node", test.name, test.model.SerializeToString(), values)
    if folder:
        for path in sorted(p for p in folder.rglob("*.onnx") if p.stat().st_size < MAX_BYTES):
            yield Case("folder", str(path.relative_to(folder)), path.read_bytes())


def _plain(value: Any) -> np.ndarray | None:
    """The array of a case's value; None for sequences, optionals and types that numpy lacks."""
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else None


def _stated(folder: Path, model: bytes) -> dict[str, np.ndarray]:
    """The inputs of a case on disk."""
    graph = onnx.load_model_from_string(model).graph
    weights = {one.name for one in graph.initializer}
    names = [value.name for value in graph.input if value.name not in weights]
    found = {}
    for index, name in enumerate(names):
        file = folder / f"input_{index}.pb"
        if file.is_file():
            with contextlib.suppress(Exception):
                found[name] = numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
    return found


def raw(case: Case) -> Answer:
    """The parser and the builder, nothing before them. Inputs that TensorRT takes for shapes get the values of the case."""
    trt, lines = tensorrt_rtx, []
    logger = build_options.make_logger(trt, lines)
    builder = trt.Builder(logger)
    network = builder.create_network(build_options.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(case.model):
        return {"ok": False, "reason": build_options.parser_error(parser)[:300]}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for tensor in map(network.get_input, range(network.num_inputs)):
        if tensor.is_shape_tensor and tensor.name in case.values:
            profile.set_shape_input(tensor.name, *[case.values[tensor.name].ravel().tolist()] * 3)
        elif -1 in tensor.shape:
            profile.set_shape(tensor.name, *[tuple(max(axis, 1) for axis in tensor.shape)] * 3)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"ok": False, "reason": " ".join(" ".join(lines[-1:]).split())[:300] or "TensorRT gave no reason"}
    return {"ok": True, "bytes": plan.nbytes}


def parameters(case: Case) -> dict[str, np.ndarray]:
    """Inputs behind the first that say how, not what: few integers or bools, or a handful of floats such as scales."""
    behind = list(case.values.items())[1:]
    return {n: v for n, v in behind if n and v.size <= (MAX_PARAMETER if v.dtype.kind in "iub" else MAX_SCALES)}


def by_edgekit(case: Case) -> Answer:
    """`import_onnx` and `build`; with the parameters bound where it does not go without."""
    answer = _attempt(case, {})
    values = parameters(case)
    if not answer["ok"] and values:
        second = _attempt(case, values)
        return {**second, "bound": sorted(values)} if second["ok"] else {**answer, "with_parameters": second["reason"]}
    return answer


def _attempt(case: Case, values: Mapping[str, np.ndarray]) -> Answer:
    with tempfile.TemporaryDirectory() as name:
        folder, step = Path(name), "import"
        (folder / "model.onnx").write_bytes(case.model)
        try:
            bundle = edgekit.import_onnx(folder / "model.onnx", out=folder / "b.edge", constants=values)
            step = "build"
            result = edgekit.build(bundle, target=TARGET, precision="fp32")
        except EdgekitError as error:
            return {"ok": False, "step": step, "reason": f"{error.message}"[:300], "hint": error.hint[:200]}
        notes = Bundle.open(folder / "b.edge").manifest.history[0].figures.get("notes", [])
        return {"ok": True, "bytes": result.size_bytes, "notes": [*notes, *([result.note] if result.note else [])]}


def _inline(function: str, request: Mapping[str, Any], folder: Path, timeout_s: float, address_space: int = 0) -> Answer:
    """What `child.call` does, without a process more: the case has one already."""
    module, name = function.split(":")
    try:
        return getattr({"foreign": foreign, "compilation": compilation}[module], name)(request, folder)
    except EdgekitError:
        raise
    except Exception as error:  # noqa: BLE001  as `child.main`
        raise child._rebuilt(child._described(error)) from None


def _run(case: Case, sender: multiprocessing.connection.Connection) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    child.call = _inline
    for tool, run in (("raw", raw), ("edgekit", by_edgekit)):
        started = time.perf_counter()
        try:
            answer = run(case)
        except Exception as error:  # noqa: BLE001  as `child.main`
            answer = {"ok": False, "reason": f"{type(error).__name__}: {error}"[:300], "step": "unforeseen"}
        sender.send((tool, {**answer, "seconds": round(time.perf_counter() - started, 2)}))
    sender.close()
    os._exit(0)


def judged(todo: Iterator[Case], workers: int) -> Iterator[Answer]:
    """A row a case. A tool that took its process down, or too long, failed with that."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Case, Any, float, Answer]] = {}
    todo, more = iter(todo), True
    while more or running:
        while more and len(running) < workers:
            case = next(todo, None)
            if case is None:
                more = False
                break
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(case, sender))
            process.start()
            sender.close()
            running[receiver] = (case, process, time.perf_counter(), {})
        for receiver in multiprocessing.connection.wait(list(running), timeout=1):
            case, process, started, row = running[receiver]
            try:
                tool, answer = receiver.recv()
                row[tool] = answer
                continue
            except EOFError:
                process.join()
            del running[receiver]
            yield _row(case, row, f"crashed (exit code {process.exitcode})")
        for receiver, (case, process, started, row) in list(running.items()):
            if time.perf_counter() - started > 2 * TIMEOUT_S:
                process.kill()
                process.join()
                del running[receiver]
                yield _row(case, row, "took too long")


def _row(case: Case, row: Answer, fate: str) -> Answer:
    lost = {"ok": False, "reason": fate, "step": "crash", "seconds": None}
    return {"group": case.group, "case": case.name, **{tool: row.get(tool, lost) for tool in ("raw", "edgekit")}}


#: (what the reason holds, the class it belongs to); the first that fits counts.
CLASSES = (
    (r"is not a tensor of numbers", "strings, sequences, optionals, or types that numpy lacks at the border"),
    (r"outside ONNX opset", "operators outside ONNX: classical machine learning, training, previews"),
    (r"has no inputs", "no inputs: a constant"),
    (r"gives other outputs on the same inputs", "random by design: no golden outputs"),
    (r"not finite", "outputs that are not finite: no golden outputs"),
    (
        r"NOT_IMPLEMENTED|Could not find an implementation|cannot load the graph",
        "no kernel in ONNX Runtime nor in ONNX's evaluator",
    ),
    (r"Got invalid dimensions|empty tensor|zero", "tensors without elements"),
    (
        r"ONNX Runtime fails on the graph|reference evaluator|no number|cannot be imported",
        "random inputs are not what it takes",
    ),
    (r"shape inputs, but no optimization", "its only input is a shape"),
    (r"convertDtype|datatype|data type|Unsupported reduction|kINT|getType\(\)", "a type or reduction that TensorRT lacks"),
    (r"refuses the graph: \w+ \(node", "an operator that TensorRT lacks, or not in this form"),
    (r"refuses the graph: an operator", "an operator that TensorRT lacks, or not in this form"),
    (r"buildSerializedNetwork|tacticSupply|Error Code|crashed|took too long", "TensorRT parses it and fails to build it"),
)


def reason_class(answer: Answer) -> str:
    for pattern, name in CLASSES:
        if re.search(pattern, answer["reason"], re.IGNORECASE):
            return name
    return "other"


def summary(rows: list[Answer]) -> Answer:
    found: Answer = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        same = [row for row in rows if row["group"] == group]
        refused = [row for row in same if not row["edgekit"]["ok"]]
        found[group] = {
            "cases": len(same),
            "raw": sum(row["raw"]["ok"] for row in same),
            "edgekit": len(same) - len(refused),
            "bound": sum("bound" in row["edgekit"] for row in same),
            "lost": [row["case"] for row in refused if row["raw"]["ok"]],
            "refused": dict(Counter(reason_class(row["edgekit"]) for row in refused).most_common()),
        }
    return found


def _short(row: Answer) -> Answer:
    """What a case came to: the reason where it was refused, what was bound where it was built."""
    ours = row["edgekit"]
    about = {key: ours[key] for key in ("reason", "bound") if ours.get(key)}
    return {"group": row["group"], "case": row["case"], "raw": row["raw"]["ok"], "edgekit": ours["ok"], **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "compile_coverage.json")
    parser.add_argument("--explain", action="store_true", help="print each refusal")
    options = parser.parse_args()
    chosen = [c for c in cases(options.groups, options.folder) if not options.cases or c.name in options.cases]
    rows = []
    for row in judged(iter(chosen), options.workers):
        rows.append(row)
        if len(rows) % 50 == 0:
            print(f"{len(rows)} of {len(chosen)}", file=sys.stderr)
        if options.explain and not row["edgekit"]["ok"]:
            print(f"{row['case']}: raw {row['raw'].get('reason', 'ok')} | {row['edgekit']['reason']}")
    rows.sort(key=lambda row: (row["group"], row["case"]))
    found = summary(rows)
    print(json.dumps(found, indent=1))
    told = [row for row in map(_short, rows) if "reason" in row or "bound" in row]
    figures = {"summary": found, "rows": told, "machine": machine()}
    atomic_write(options.out, json.dumps(figures, indent=1, allow_nan=False).encode() + b"\n")


if __name__ == "__main__":
    main()
