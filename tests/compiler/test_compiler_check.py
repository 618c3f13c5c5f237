"""The check of a kit's engine on its device: golden samples cut to the profile, errors in TensorRT's words, both simulated."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.compiler import build, build_engine
from edgekit.runtime.golden import compare_arrays

DOUBLED = "(float[n,3] x, float[2,n,3] s) => (float[n,3] y, float[3,n] turned)"
DOUBLED += " { d = Add(x, x) t = ReduceSum<keepdims=0>(s, first) y = Add(d, t) turned = Transpose<perm=[1,0]>(y) }"
DOUBLED = DOUBLED.replace("{ d", "{ first = Constant<value_ints=[0]>() d")
AXES = {"x": 0, "s": 1, "y": 0, "turned": 1}


def doubled() -> tuple[dict[str, Any], dict[str, Any]]:
    """Golden inputs and outputs of four samples, the batch on another axis of each."""
    r = np.random.default_rng(0)
    x, s = r.normal(size=(4, 3)).astype(np.float32), r.normal(size=(2, 4, 3)).astype(np.float32)
    y = x + x + s.sum(axis=0)
    return {"x": x, "s": s}, {"y": y, "turned": np.ascontiguousarray(y.T)}


def profiles(low: int, high: int) -> dict[str, Any]:
    return {"x": [[low, 3], [high, 3], [high, 3]], "s": [[2, low, 3], [2, high, 3], [2, high, 3]]}


@pytest.mark.parametrize("batch", [(1, 8), (1, 2), (3, 3), (8, 8), (1, 1)])
def test_the_check_on_the_device_compares_every_golden_sample(device: Callable[..., Any], batch: tuple[int, int]) -> None:
    here = device()
    plan, (inputs, outputs) = here.plan(DOUBLED, profiles(*batch)), doubled()
    assert here.check(plan, inputs, outputs, AXES)["snr_db"] > 120
    assert here.gpu.left == {}
    last = outputs["y"] * [[1], [1], [1], [0.9]]
    for wrong in ({"y": outputs["y"] * 1.05}, {"y": outputs["y"] * np.nan}, {"turned": -outputs["turned"]}, {"y": last}):
        with pytest.raises(build_engine.BuildError, match=r"misses|finite"):
            here.check(plan, inputs, outputs | wrong, AXES)
    with pytest.raises(build_engine.BuildError, match=r"output y is 4x3, in golden\.npz it is 4x1"):
        here.check(plan, inputs, outputs | {"y": outputs["y"][:, :1]}, AXES)


def test_the_check_asks_every_tensorrt_for_what_it_has(device: Callable[..., Any], release: str) -> None:
    here = device(release)
    assert here.check(here.plan(DOUBLED, profiles(1, 3)), *doubled(), AXES)["snr_db"] > 120


def test_the_check_says_why_an_engine_does_not_run(device: Callable[..., Any]) -> None:
    here = device()
    inputs, outputs = doubled()

    def why(plan: bytes, axes: dict[str, int] = AXES) -> str:
        with pytest.raises(build_engine.BuildError) as caught:
            here.check(plan, inputs, outputs, axes)
        return str(caught.value)

    plan = here.plan(DOUBLED, profiles(1, 4))
    assert "no memory to run the engine in" in (said := why(here.plan(DOUBLED, profiles(1, 4), no_context=True)))
    assert "OutOfMemory (Requested size was 1 bytes.)" in said
    assert "does not load on this device: IRuntime::deserializeCudaEngine" in why(b"damaged")
    assert "refuses input x of shape 4x3: IExecutionContext::setInputShape" in why(here.plan(DOUBLED, profiles(1, 2)), {})
    open_size = "(float[n,3] x, float[2,n,3] s) => (float[m,3] y) { y = Identity(x) }"
    assert "output y has a size that its data decides, -1x3" in why(here.plan(open_size, profiles(1, 4)))
    assert here.gpu.left == {}

    def fault(places: Any, stream: int) -> bool:
        here.gpu.error = 700  # and every call after it, as in a real context
        here.trt.logger.log(1, "Error Code 1: Cuda Runtime (an illegal memory access was encountered)")
        return False

    here.trt.execute = fault
    assert "the engine did not run: Error Code 1: Cuda Runtime (an illegal memory" in why(plan)


def test_choices_of_an_int8_engine_are_not_held_beside_floats(device: Callable[..., Any]) -> None:
    here, ids = device(), np.arange(4)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    both = "(float[n,3] x, int64[n] i) => (float[n,3] y, int64[n] ids) { y = Identity(x) ids = Identity(i) }"
    alone = "(int64[n] i) => (int64[n] ids) { ids = Identity(i) }"

    def check(golden: dict[str, Any], found: dict[str, Any], quantized: bool) -> float:
        graph, many = both if "x" in found else alone, {"x": [[1, 3], [99, 3], [99, 3]], "i": [[1], [99], [99]]}
        return here.check(here.plan(graph, many), found, golden, {}, 10.0, quantized)["snr_db"]

    wrong = {"x": x * np.float32(1.1), "i": ids[::-1]}
    assert check({"y": x, "ids": ids}, wrong, True) == pytest.approx(20.0, abs=0.1)
    assert check({"ids": np.arange(40)}, {"i": np.append(np.arange(39), 10**6)}, True) == pytest.approx(16.02, abs=0.1)
    for golden, found, quantized in [
        ({"y": x, "ids": ids}, {"x": x, "i": ids[::-1]}, False),
        ({"ids": ids}, {"i": ids[::-1]}, True),
        ({"y": x, "ids": ids}, {"x": x * np.float32(2), "i": ids}, True),
    ]:
        with pytest.raises(build_engine.BuildError, match="misses"):
            check(golden, found, quantized)


@pytest.mark.parametrize(
    ("golden", "found"),
    [
        ([3.0, -4.0, -np.inf], [3.0, -4.5, -np.inf]),
        ([3e-35, -4e-35], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 1e-12]),
        ([0.0, 1e-40], [0.0, 0.0]),
        ([1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_the_kit_measures_as_the_runtime_does(golden: list[float], found: list[float], device: Callable[..., Any]) -> None:
    truth, answer, here = np.array(golden, np.float32), np.array(found, np.float32), device()
    plan = here.plan("(float[n] x) => (float[n] y) { y = Identity(x) }", {"x": [[1], [4], [4]]})
    result = here.check(plan, {"x": answer}, {"y": truth}, {"x": 0, "y": 0}, limit=-1.0)
    wanted = compare_arrays(truth, answer)
    assert (result["relative"], result["snr_db"]) == (pytest.approx(wanted.relative), pytest.approx(wanted.snr_db))


@pytest.mark.usefixtures("in_process")
def test_a_kit_checks_its_engine_whatever_its_axes_are(
    odd_bundle: Bundle, device: Callable[..., Any], simulated_builder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit of `build`, its script, and an engine of the sizes that the kit asks for."""
    result = build(odd_bundle, target="jetson-orin-nano", precision="fp32")
    assert result.kit is not None
    kit = odd_bundle.path.parent / "kit"
    zipfile.ZipFile(result.kit).extractall(kit)
    here, maker = device(), simulated_builder("10.16")
    here.trt.Builder, here.trt.OnnxParser = maker.module.Builder, maker.module.OnnxParser
    here.trt.NetworkDefinitionCreationFlag = maker.module.NetworkDefinitionCreationFlag
    graph = (kit / "graph.onnx").read_bytes()
    maker._build = lambda network, config: here.plan(graph, maker.told.get("shapes"))
    monkeypatch.setitem(sys.modules, "tensorrt", here.trt)
    assert build_engine.main(["--kit", str(kit)]) == 0
    assert json.loads((kit / "jetson-orin-nano.json").read_text())["golden"]["snr_db"] > 120
    made = odd_bundle.manifest.name in ("steps", "points", "anchors")  # whose parts do not answer as the whole does
    assert ("golden outputs for this engine were made at its sizes" in result.note) == made
    if made:
        assert Bundle.open(odd_bundle.path).read("engines/jetson-orin-nano.golden.npz") == (kit / "golden.npz").read_bytes()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("odd_bundle", ["four"], indirect=True)
def test_where_no_golden_input_fits_the_engine_the_note_says_that_nobody_checks_it(odd_bundle: Bundle) -> None:
    result = build(odd_bundle, target="jetson-orin-nano", precision="fp32")
    assert "no golden input fits this engine, so nobody checks it: " in result.note
    assert result.kit is not None
    with zipfile.ZipFile(result.kit) as kit:
        assert "golden.npz" not in kit.namelist()
        assert "nobody checks the engine" in kit.read("README.txt").decode()
    assert build(odd_bundle, target="jetson-orin-nano", precision="fp32", batch=4).note.count("nobody") == 0


def test_a_scalar_input_goes_along_with_every_batch(device: Callable[..., Any]) -> None:
    here, x = device(), np.ones((4, 3), np.float32)
    plan = here.plan("(float[n,3] x, float t) => (float[n,3] y) { y = Mul(x, t) }", {"x": [[1, 3], [2, 3], [2, 3]]})
    assert here.check(plan, {"x": x, "t": np.float32(2)}, {"y": x * 2}, {"x": 0, "y": 0})["snr_db"] == 200.0
