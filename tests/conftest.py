"""Fixtures: small real graphs and bundles, made without torch, and the command line in-process."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.cli import main
from edgekit.data import load
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, TensorSpec, Tolerance, history_entry
from edgekit.preprocess import Preprocessor
from edgekit.runtime.golden import save_golden
from edgekit.runtime.onnxruntime import session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: whoever got the last of them would work alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


class Outcome(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        answer = json.loads(self.out)
        assert isinstance(answer, dict)
        return answer


Cli = Callable[..., Outcome]

#: Speed is no business of tests. CI tries the same examples each time, so that a change is judged by what it changed; new ones
#: are tried at every other run.
hypothesis.settings.register_profile(
    "edgekit",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=os.environ.get("CI") == "true",
)
hypothesis.settings.load_profile("edgekit")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Layers that are timed in tests, and engines that are trusted there, must not reach the user's folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_pruning() -> Iterator[None]:
    """A fourth of the healing after a cut, few samples to judge and heal it by, a sixth of the timing: what is found is
    worse, how it is found is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekit.pruning.search.HEALING", 6)
        patch.setattr("edgekit.pruning.recover.SAMPLES", 32)
        patch.setattr("edgekit.pruning.recover.TAUGHT", 64)
        patch.setattr("edgekit.pruning.latency.SECONDS", 0.5)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_comparison() -> Iterator[None]:
    """`quantize` times its graph beside the float one for more than a second each time: here as few rounds as it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekit.quantization.speed.SECONDS", 0.01)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_export() -> Iterator[None]:
    """torch parses its library of ONNX operators anew at each export, a fourth of the time of a small one: here, once."""
    read = "torch.onnx._internal.exporter._registration.ONNXRegistry.from_torchlib"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, staticmethod(cache(pkgutil.resolve_name(read))))
        yield


@pytest.fixture(scope="module")
def short_texts() -> Iterator[None]:
    """Texts of 16 tokens in ``csv:`` data, not 128: torch exports a recurrent layer step by step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekit.data.csv_file.TOKENS", 16)
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in-process: ``cli("bench", bundle, "--json")`` -> `Outcome`. Never a traceback."""

    def run(*args: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Outcome(int(caught.value.code or 0), out, err)

    return run


def make_onnx(nodes: list[Any], weights: dict[str, Any], x: list[Any], y: list[Any], opset: int = 17) -> bytes:
    """A graph with one float32 input ``x`` and one output ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def tiny_graph() -> bytes:
    """x (n, 3, 32, 32) -> Conv 16 - ReLU - Conv 16 - Add - GlobalAveragePool - Gemm 10 -> y (n, 10)."""
    r = np.random.default_rng(0)
    weights = {
        "w1": r.normal(0, 0.2, (16, 3, 3, 3)),
        "w2": r.normal(0, 0.1, (16, 16, 3, 3)),
        "w3": r.normal(0, 0.3, (10, 16)),
        "b": r.normal(0, 0.1, 10),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], name="relu1"),
        helper.make_node("Conv", ["r", "w2"], ["c"], name="conv2", pads=[1] * 4),
        helper.make_node("Add", ["r", "c"], ["s"], name="add"),
        helper.make_node("GlobalAveragePool", ["s"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b"], ["y"], name="gemm", transB=1),
    ]
    return make_onnx(nodes, weights, ["n", 3, 32, 32], ["n", 10])


def write_bundle(path: Path, graph: bytes, inputs: np.ndarray[Any, Any], **manifest: Any) -> Bundle:
    """A bundle around a graph with ``x`` and ``y``; golden outputs by ONNX Runtime."""
    run = session(graph)
    golden = run.run(None, {"x": inputs})[0]
    x_shape = tuple(run.get_inputs()[0].shape)
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, graph)
        draft.write(GOLDEN, save_golden({"x": inputs}, {"y": golden}))
        defaults: dict[str, Any] = {
            "task": "tensor",
            "golden": {FLOAT_GRAPH: Tolerance("relative", 1e-4)},
            "history": (history_entry("import", {}, {}),),
        }
        draft.manifest = Manifest(
            format=FORMAT,
            name=path.stem,
            inputs=(TensorSpec("x", "float32", x_shape),),
            outputs=(TensorSpec("y", "float32", ("n", *golden.shape[1:])),),
            **{**defaults, **manifest},
        )
    return Bundle.open(path)


#: Graphs in which the first axis of a tensor is not the batch.
ODD_AXES = {
    "state": "(float[1,8] x, float[2,1,8] s) => (float[2,1,8] y) { y = Add(x, s) }",
    "carried": "(float[n,8] x, float[2,n,8] s) => (float[2,n,8] y) { y = Add(x, s) }",
    "turned": "(float[n,8] x) => (float[8,n] y) { y = Transpose<perm=[1,0]>(x) }",
    "steps": "(float[steps,6,8] x) => (float[steps,6,8] y) { first = Constant<value_int: int=0>() y = CumSum(x, first) }",
    "points": "(float[n,8] x, float[points,8] p) => (float[n,8] y) { m = ReduceMean<axes=[0]>(p) y = Add(x, m) }",
    # A reader's steps, the batch of one behind them; anchors whose number is that of rows of the picture.
    "letters": "(float[1,1,3] x) => (float[26,1,3] y) <int64[3] s = {26, 1, 3}> { y = Expand(x, s) }",
    "anchors": """(float[n,3] x, float[h] p) => (float[h,1] y) <int64[1] a = {1}>
        { m = ReduceMax<axes = [0, 1], keepdims = 0>(x) z = Sub(m, m) q = Add(p, z) y = Unsqueeze(q, a) }""",
}


#: And one that runs at no other number of samples than four, though its input is open.
ODD_AXES["four"] = "(float[n,8] x) => (float[4,8] y) { shape = Constant<value_ints=[4, 8]>() y = Reshape(x, shape) }"


@pytest.fixture(params=[name for name in ODD_AXES if name != "four"])
def odd_bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    """A bundle of each of `ODD_AXES`, its golden file of four samples where axes are open."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {request.param} {ODD_AXES[request.param]}')
    graph, r = model.SerializeToString(), np.random.default_rng(0)
    run = session(graph)
    inputs, outputs = (
        tuple(TensorSpec(v.name, "float32", tuple(v.shape)) for v in values) for values in (run.get_inputs(), run.get_outputs())
    )
    feeds = {s.name: r.normal(size=[4 if isinstance(a, str) else a for a in s.shape]).astype(np.float32) for s in inputs}
    with Bundle.create(tmp_path / f"{request.param}.edge") as draft:
        draft.write(FLOAT_GRAPH, graph)
        draft.write(GOLDEN, save_golden(feeds, {"y": run.run(None, feeds)[0]}))
        golden = {FLOAT_GRAPH: Tolerance("relative", 1e-4)}
        draft.manifest = Manifest(FORMAT, request.param, "tensor", inputs, outputs, golden=golden)
    return Bundle.open(tmp_path / f"{request.param}.edge")


@pytest.fixture
def tiny_onnx(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tiny_graph())
    return path


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Bundle:
    """An imported-like bundle: task ``tensor``, x (n, 3, 32, 32), y (n, 10)."""
    inputs = np.random.default_rng(1).normal(size=(4, 3, 32, 32)).astype(np.float32)
    return write_bundle(tmp_path / "tiny.edge", tiny_graph(), inputs)


@pytest.fixture
def calibration_folder(tmp_path: Path) -> Path:
    """16 .npz files for `tiny_bundle`."""
    folder = tmp_path / "calib"
    folder.mkdir()
    for i in range(16):
        np.savez(folder / f"{i:03d}.npz", x=np.random.default_rng(i).normal(size=(1, 3, 32, 32)).astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def digits_graph() -> bytes:
    """A digit classifier fitted in closed form: two random convolutions, then ridge regression. About 95% right."""
    r = np.random.default_rng(0)
    weights = {"w1": r.normal(0, 0.2, (16, 1, 5, 5)), "b1": r.normal(0, 0.1, 16)}
    weights |= {"w2": r.normal(0, 0.08, (48, 16, 3, 3)), "b2": r.normal(0, 0.1, 48)}
    features = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", strides=[2, 2], pads=[2] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Flatten", ["r2"], ["y"], name="flatten"),
    ]
    body = make_onnx(features, weights, ["n", 1, 28, 28], ["n", 48 * 49])
    dataset = load("digits")
    tensors = dataset.train.tensors(dataset.preprocessing)
    f = session(body, 0).run(None, {"x": tensors.x})[0].astype(np.float64)
    f = np.concatenate([f, np.ones((len(f), 1))], 1)
    solution = np.linalg.solve(f.T @ f + 30 * np.eye(f.shape[1]), f.T @ (np.eye(10)[tensors.y] * 10 - 1))
    features[-1] = helper.make_node("Flatten", ["r2"], ["f"], name="flatten")
    nodes = [*features, helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="gemm")]
    weights |= {"w3": solution[:-1], "b3": solution[-1]}
    return make_onnx(nodes, weights, ["n", 1, 28, 28], ["n", 10])


@pytest.fixture
def digits_bundle(tmp_path: Path, digits_graph: bytes) -> Bundle:
    """A trained-like bundle: task ``image-classification``, ten labels, preprocessing, judged on the held-out digits."""
    dataset = load("digits")
    inputs = dataset.test.take(range(0, 1000, 125)).tensors(dataset.preprocessing).x
    return write_bundle(
        tmp_path / "digits.edge",
        digits_graph,
        inputs,
        task="image-classification",
        labels=dataset.labels,
        preprocessing=dataset.preprocessing,
        history=(history_entry("train", {"data": "digits", "data_digest": dataset.digest}, {"top1": 0.95}),),
    )


@pytest.fixture(scope="session")
def coloured_digits() -> list[np.ndarray[Any, Any]]:
    """Twelve frames, uint8 (28, 28, 3) RGB; the channels differ."""
    images = [load("digits").test.read(i) for i in range(12)]
    return [np.stack([image, 255 - image, image // 2 + 40], 2) for image in images]


@pytest.fixture
def pictures_bundle(tmp_path: Path, coloured_digits: list[np.ndarray[Any, Any]]) -> Bundle:
    """RGB 32x32 in, ten labels out. Its golden inputs were resized, and so lie between the values of 8 bits."""
    spec = ImagePreprocessing(32, 32, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    inputs = np.concatenate([Preprocessor(spec)(frame) for frame in coloured_digits[:4]])
    kinds: dict[str, Any] = {"task": "image-classification", "labels": tuple("abcdefghij"), "preprocessing": spec}
    return write_bundle(tmp_path / "pictures.edge", tiny_graph(), inputs, **kinds)


@pytest.fixture
def prune_figures() -> dict[str, Any]:
    """What `edgekit prune` writes into a history: a narrower convolution, a skipped block, an attention, a layer that stays."""
    rows = [
        ("stem", "convolution", [1, 32], [1, 16], 25_000, 12_500, 20.0, 12.5),
        ("blocks.0.conv", "convolution", [32, 32], [], 900_000, 0, 40.0, 0.0),
        ("blocks.1", "attention", [64, 64], [48, 32], 460_000, 290_000, 65.0, 41.0),
        ("classifier", "linear", [64, 10], [32, 10], 640, 320, 5.0, 4.5),
    ]
    names = ("layer", "kind", "before", "after", "macs_before", "macs", "us_before", "us")
    return {
        "top1": 0.94,
        "before": {"top1": 0.95},
        "drop": 1.0,
        "speedup": 1.6,
        "latency_before_ms": 0.16,
        "latency_ms": 0.1,
        "latency_predicted_ms": 0.11,
        "macs": 302_820,
        "macs_share": 0.25,
        "parameters": 16_410,
        "parameters_before": 34_298,
        "cuts": [
            {"layer": "stem", "kind": "channels", "before": 32, "after": 16, "kl": 0.08},
            {"layer": "blocks.0", "kind": "block", "before": 1, "after": 0, "kl": 0.2},
            {"layer": "blocks.1", "kind": "heads", "before": 4, "after": 3, "kl": 0.25},
        ],
        "layers": [dict(zip(names, row, strict=True)) for row in rows],
        "kept": {"classifier": "it is the model's output", "norm": "head.* is frozen"},
        "sensitivity": {
            "blocks.1.value": [[1.0, 0.0], [0.5, 0.01], [0.25, 0.03]],
            "stem": [[1.0, 0.0], [0.75, 0.1], [0.5, 0.4]],
        },
        "sparse_share": 0.5,
        "sparse_layers": 3,
        "device": "Cortex-A78AE, onnxruntime 1.32.0, 1 thread",
        "curve": [{"epoch": 1, "loss": 1.0, "top1": 0.9}, {"epoch": 2, "loss": 0.5, "top1": 0.94}],
    }


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data spec: 400 of the digits as ``npz:``, 320 to train on; an epoch takes a fraction of a second."""
    split = load("digits").train
    chosen = range(0, len(split), 10)
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, images=np.stack([split.read(i) for i in chosen]), labels=split.targets[list(chosen)])
    return f"npz:{path}"


@pytest.fixture(scope="session")
def trained_bundle(tmp_path_factory: pytest.TempPathFactory, few_digits: str) -> Bundle:
    """The depthwise preset after a few epochs on `few_digits`; read only."""
    from edgekit.training import train

    return train(data=few_digits, out=tmp_path_factory.mktemp("trained") / "few.edge", epochs=6, batch=32, seed=1)
