"""CUDA behind one interface: both libraries, simulated, and the real one where there is a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.errors import BackendError, EdgekitError
from edgekit.manifest import FORMAT, Manifest, TensorSpec
from edgekit.runtime import open_runner
from edgekit.runtime.cuda import CaptureRefused, Cuda, open_cuda
from edgekit.runtime.golden import save_golden
from edgekit.runtime.tensorrt import DTYPES, TensorRtRtxRunner, TensorRtRunner


@pytest.fixture
def real_cuda() -> Cuda:
    try:
        return open_cuda()
    except EdgekitError as error:
        pytest.skip(f"no GPU to use: {error.message}")


def round_trip(cuda: Cuda, stream: int) -> None:
    """Up and down again, plain and as a graph; pinned memory is only written by what was launched."""
    size = 1 << 16
    source, target = cuda.pin(size, mapped=True), cuda.pin(size, mapped=False)
    address = cuda.allocate(size)
    source.host[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)

    def work() -> None:
        cuda.upload(address, source, size, stream)
        cuda.download(target, address, size, stream)

    work()
    cuda.synchronize(stream)
    np.testing.assert_array_equal(source.host, target.host)
    assert source.device
    try:
        target.host[:] = 0
        graph = cuda.capture(work, stream)
        assert not target.host.any()
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        np.testing.assert_array_equal(source.host, target.host)
        cuda.free_graph(graph)
        with pytest.raises(CaptureRefused, match="Unsupported"):
            cuda.capture(lambda: cuda.synchronize(stream), stream)
    except CaptureRefused as refused:
        assert "pycuda" in cuda.library, refused  # noqa: PT017
    work()  # a refused capture leaves nothing behind
    cuda.synchronize(stream)
    start, end = cuda.event(), cuda.event()
    cuda.record(start, stream)
    cuda.record(end, stream)
    assert cuda.elapsed_ms(start, end) >= 0
    for event in (start, end):
        cuda.free_event(event)
    cuda.unpin(source)
    cuda.unpin(target)
    cuda.free(address)


def test_cuda_bindings(simulate: Any) -> None:
    simulation = simulate(integrated=True)
    cuda = open_cuda()
    assert cuda.library == "cuda-bindings 13.0.0"
    about = cuda.device()
    assert (about.name, about.sm, about.driver, about.integrated) == ("Simulated GPU", "8.6", "13.0", True)
    with cuda.current():
        stream = cuda.stream()
        round_trip(cuda, stream)
        cuda.free_stream(stream)
        with pytest.raises(BackendError, match="cudaErrorInvalidValue"):
            cuda.free(12345)
    assert simulation.cuda.left == {}


# pycuda


@pytest.fixture
def pycuda(simulate: Any) -> Any:
    """A simulation in which cuda-bindings is absent and pycuda is there."""
    return simulate("10.3", library="pycuda", sm="8.7")


def test_pycuda(pycuda: Any) -> None:
    cuda = open_cuda()
    assert (cuda.library, cuda.device().driver, cuda.device().sm) == ("pycuda 2026.1", "12.6", "8.7")
    with cuda.current():
        stream = cuda.stream()
        round_trip(cuda, stream)
        cuda.free_stream(stream)
    assert pycuda.driver.depth == 0
    assert pycuda.cuda.left == {}


def test_every_call_of_pycuda_fails_in_words(pycuda: Any) -> None:
    """Inside of `current`, so that who closes a runner after a fault goes on with the rest."""
    cuda = open_cuda()
    with cuda.current():
        stream, address, pinned = cuda.stream(), cuda.allocate(8), cuda.pin(8, mapped=False)
        pycuda.cuda.error = pycuda.cuda.cudaError_t.cudaErrorIllegalAddress
        calls: list[Any] = [
            cuda.stream,
            lambda: cuda.synchronize(stream),
            lambda: cuda.allocate(1),
            lambda: cuda.pin(1, mapped=True),
            lambda: cuda.upload(address, pinned, 8, stream),
            lambda: cuda.download(pinned, address, 8, stream),
            lambda: cuda.unpin(pinned),
            lambda: cuda.free(address),
        ]
        for call in calls:
            with pytest.raises(BackendError, match="failed: cudaErrorIllegalAddress"):
                call()
    assert pycuda.driver.depth == 0


@pytest.mark.parametrize("integrated", [False, True])
def test_the_runner_on_pycuda(pycuda: Any, tiny_bundle: Bundle, integrated: bool) -> None:
    pycuda.cuda.integrated = integrated
    x = np.random.default_rng(5).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with open_runner(tiny_bundle, "onnxruntime") as cpu:
        truth = cpu.run({"x": x})["y"]
    with open_runner(pycuda.engine(tiny_bundle), "tensorrt") as runner:
        for _ in range(3):
            np.testing.assert_allclose(runner.run({"x": x})["y"], truth, rtol=1e-6)
        assert "cannot capture" in runner.describe()["cuda_graph"]
        assert pycuda.driver.depth == 0
    assert pycuda.cuda.left == {}


# The names that are used exist in the real libraries


def test_every_name_asked_of_tensorrt_rtx_exists(simulate: Any, tiny_bundle: Bundle) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    simulation = simulate()
    with open_runner(simulation.engine(tiny_bundle), "tensorrt-rtx") as runner:
        for _ in range(3):
            runner.run({"x": np.zeros((1, 3, 32, 32), np.float32)})
    assert len(simulation.trt.used) >= 20
    assert [name for name in sorted(simulation.trt.used) if not hasattr(getattr(real, name[0]), name[1])] == []
    for name in (
        "ILogger.ERROR",
        "Runtime",
        "TensorIOMode.INPUT",
        "TensorLocation.DEVICE",
        "EngineValidity.INVALID",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    ):
        thing = real
        for part in name.split("."):
            thing = getattr(thing, part)
    assert set(DTYPES) <= set(real.DataType.__members__)


def test_every_name_asked_of_cuda_bindings_exists(simulate: Any, tiny_bundle: Bundle) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    simulation = simulate("11.4")
    with TensorRtRunner(simulation.engine(tiny_bundle), "model.onnx", 1) as runner:
        for _ in range(3):
            runner.run({"x": np.zeros((1, 3, 32, 32), np.float32)})
        runner.device_ms({"x": np.zeros((1, 3, 32, 32), np.float32)})
    with pytest.raises(BackendError):
        open_cuda().free(1)
    used = simulation.cuda.used
    assert len(used) > 25
    assert sorted(name for name in used if not hasattr(real, name)) == []
    for kind in (simulation.cuda.cudaMemcpyKind, simulation.cuda.cudaStreamCaptureMode, simulation.cuda.cudaError_t):
        members = getattr(real, kind.__name__).__members__
        assert {m.name: int(m) for m in kind} == {m.name: int(members[m.name]) for m in kind}


# On a real GPU


@pytest.mark.gpu
def test_a_real_gpu(real_cuda: Cuda) -> None:
    with real_cuda.current():
        stream = real_cuda.stream()
        round_trip(real_cuda, stream)
        with pytest.raises(BackendError, match="cudaErrorMemoryAllocation") as caught:
            real_cuda.allocate(1 << 50)
        assert "free GPU memory" in caught.value.hint
        real_cuda.free_stream(stream)


def identity(path: Path) -> Bundle:
    """x (n, 3, 64, 64) -> y = x."""
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 64, 64]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [inputs], [outputs])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    x = np.zeros((1, 3, 64, 64), np.float32)
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, data)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": x}))
        specs = tuple(TensorSpec(name, "float32", ("n", 3, 64, 64)) for name in "xy")
        draft.manifest = Manifest(format=FORMAT, name="identity", task="tensor", inputs=specs[:1], outputs=specs[1:])
    return Bundle.open(path)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cuda_graph": False}, {"zero_copy": True}])
def test_the_runner_on_a_real_gpu_without_tensorrt(stand_in: Any, tmp_path: Path, options: dict[str, bool]) -> None:
    """All of the runner but TensorRT: memory, stream, copies, graphs, and four threads on one "engine"."""
    bundle = stand_in.engine(identity(tmp_path / "identity.edge"))
    wrong: list[int] = []

    def work(runner: TensorRtRunner, seed: int) -> None:
        random = np.random.default_rng(seed)
        for i in range(40):
            x = random.normal(size=(1 + (i // 4) % 4, 3, 64, 64)).astype(np.float32)
            if not np.array_equal(runner.run({"x": x})["y"], x):
                wrong.append(seed)

    def in_thread(shared: TensorRtRunner, seed: int) -> None:
        with shared:
            work(shared, seed)

    with TensorRtRtxRunner(bundle, FLOAT_GRAPH, 1, **options) as runner:
        threads = [threading.Thread(target=in_thread, args=(runner.share(), seed)) for seed in range(1, 4)]
        for thread in threads:
            thread.start()
        work(runner, 0)
        for thread in threads:
            thread.join()
        about = runner.describe()
        spans = runner.device_ms({"x": np.ones((4, 3, 64, 64), np.float32)})
    assert not wrong
    assert (about["cuda_graph"] is True) == options.get("cuda_graph", True)
    assert about["zero_copy"] == options.get("zero_copy", False)
    assert all(span >= 0 for span in spans.values())
