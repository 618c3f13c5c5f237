"""What `bench` asks of an engine besides latencies: its layers' times, and what it takes of the GPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.runtime import Model

from . import simulated_tensorrt

Cli = Callable[..., Any]


@pytest.mark.parametrize("release", simulated_tensorrt.VERSIONS)
def test_layers_are_timed_by_the_engines_profiler(
    release: str, simulate: Any, tiny_bundle: Bundle, cli: Cli, tmp_path: Path
) -> None:
    simulation = simulate(release)
    bundle = simulation.engine(tiny_bundle)
    options = ["--backend", simulation.backend, "--seconds", "0.02", "--plot", tmp_path / "layers.svg", "--json"]
    found = cli("bench", bundle.path, *options).json
    nodes = [node.name or node.output[0] for node in onnx.load_model(str(bundle.file(FLOAT_GRAPH))).graph.node]
    rows = found["profile"]["layers"]
    assert [row["layer"] for row in rows] == nodes[::-1]  # simulated: 10 us for the first, 20 for the next, and so on
    assert [row["us"] for row in rows] == pytest.approx([10.0 * (i + 1) for i in range(len(nodes))][::-1])
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert nodes[-1][:20] in (tmp_path / "layers.svg").read_text()
    assert found["cuda_graph"] is True or release == simulated_tensorrt.RTX  # the measured runs are as they were
    assert simulation.cuda.left == {}


@pytest.mark.parametrize("library", ["cuda-bindings", "pycuda"])
def test_what_a_model_takes_of_the_gpu_is_in_the_result(library: str, simulate: Any, tiny_bundle: Bundle, cli: Cli) -> None:
    simulation = simulate(library=library)
    bundle = simulation.engine(tiny_bundle)
    found = cli("bench", bundle.path, "--backend", simulation.backend, "--seconds", "0.02", "--json").json
    with Model.open(bundle.path, simulation.backend) as model:
        sizes = [4 * 3 * 32 * 32, 4 * 10]  # of one sample, in and out
        assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["x", "y"]
    assert found["memory"]["gpu_mb"] == pytest.approx(sum(sizes) / 1e6)
    assert cli("bench", bundle.path, "--backend", "onnxruntime", "--seconds", "0.02", "--json").json["memory"]["gpu_mb"] is None
