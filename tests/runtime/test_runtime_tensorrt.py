"""The TensorRT runner on a simulated GPU and TensorRT: the calls are the real ones, and so are the rules."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import BackendError
from edgekit.runtime import Model, check_golden, open_runner
from edgekit.runtime.tensorrt import TensorRtRtxRunner, TensorRtRunner

from .tensorrt_runs import nothing_left, samples, truth


def runner_of(simulation: Any, bundle: Bundle, **options: Any) -> TensorRtRunner:
    kind = TensorRtRtxRunner if simulation.backend == "tensorrt-rtx" else TensorRtRunner
    return kind(bundle, FLOAT_GRAPH, 1, **options)


# What it answers, on every TensorRT


def test_every_release_answers_as_the_graph_does(simulation: Any, tiny_bundle: Bundle) -> None:
    bundle = simulation.engine(tiny_bundle)
    with open_runner(bundle, simulation.backend) as runner:
        assert [(s.name, s.dtype, s.shape) for s in runner.inputs] == [("x", "float32", ("n", 3, 32, 32))]
        assert runner.outputs[0].shape == ("n", 10)
        assert runner.batches == (1, 4)
        for count in (1, 1, 1, 4, 2, 2, 2, 4):  # up and down: memory grows once, graphs are made anew
            x = samples(count, seed=count)
            np.testing.assert_allclose(runner.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)
        about = runner.describe()
        assert about["version"] == simulation.trt.__version__
        assert about["gpu"] == "Simulated GPU"
        assert about["sm"] == "8.6"
    nothing_left(simulation)
    assert check_golden(bundle, backend=simulation.backend).snr_db > 100  # 4 samples in one run
    nothing_left(simulation)


def test_every_release_is_given_what_it_has(simulation: Any, tiny_bundle: Bundle) -> None:
    """The calls that matter were made, whatever the release: names it lacks raise `AttributeError` in the simulation."""
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        runner.run({"x": samples(1)})
    used = {name for _, name in simulation.trt.used}
    assert {"execute_async_v3", "set_input_shape", "set_tensor_address", "deserialize_cuda_engine"} <= used
    rtx = simulation.backend == "tensorrt-rtx"
    assert ({"get_engine_validity", "cuda_graph_strategy", "set_runtime_cache"} <= used) == rtx
    assert ("create_runtime_config" in used) == (simulation.release in ("10.13", "10.16", "11.4", "rtx1.7"))


def test_answers_are_the_callers_own(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        first = runner.run({"x": samples(1, 1)})["y"]
        kept = first.copy()
        runner.run({"x": samples(1, 2)})
        np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, kept)


# CUDA graphs


def test_the_second_run_of_a_shape_is_a_graph(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.16")
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        assert "second run" in runner.describe()["cuda_graph"]
        runner.run({"x": samples(1)})
        assert runner.describe()["cuda_graph"] is True
        simulation.cuda.log.clear()
        x = samples(1, 7)
        np.testing.assert_allclose(runner.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)
        assert simulation.cuda.log == ["GraphLaunch"]
        runner.run({"x": samples(2)})  # another shape: no graph of the old one may run
        assert simulation.cuda.log[1:3] == ["HostToDevice", "DeviceToHost"]
        assert len(simulation.cuda.graphs) == 1
    nothing_left(simulation)


@pytest.mark.parametrize(("case", "words"), [("breaks_capture", "cudaErrorStreamCaptureInvalidated"), ("off", "switched off")])
def test_without_a_graph_it_says_why_and_runs(simulate: Any, tiny_bundle: Bundle, case: str, words: str) -> None:
    simulation = simulate("11.4")
    simulation.trt.breaks_capture = case == "breaks_capture"
    with runner_of(simulation, simulation.engine(tiny_bundle), cuda_graph=case != "off") as runner:
        for seed in range(3):
            x = samples(1, seed)
            np.testing.assert_allclose(runner.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)
        assert words in runner.describe()["cuda_graph"]
        assert "GraphLaunch" not in simulation.cuda.log
    nothing_left(simulation)


@pytest.mark.parametrize(("wish", "last"), [(True, "specialized in a graph"), (False, "specialized")])
def test_tensorrt_rtx_makes_its_graphs_when_its_kernels_are_there(
    simulate: Any, tiny_bundle: Bundle, wish: bool, last: str
) -> None:
    """A graph of the runner's own would keep the kernels of the second run, on which TensorRT-RTX falls back at first."""
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle)
    with runner_of(simulation, bundle, cuda_graph=wish) as runner, runner.share() as other:
        for shape in (1, 2, 1):
            for seed in range(4):
                x = samples(shape, seed)
                for each in (runner, other):
                    np.testing.assert_allclose(each.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)
            assert simulation.trt.ran[:2] == ["fallback"] * 2
            assert simulation.trt.ran[-2:] == [last] * 2
        assert other.describe()["cuda_graph"] == ("by TensorRT-RTX" if wish else "switched off")
        assert "GraphLaunch" not in simulation.cuda.log
    nothing_left(simulation)


def test_a_tensorrt_rtx_without_graphs_of_its_own_is_captured(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    del simulation.trt.CudaGraphStrategy
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        runner.run({"x": samples(1)})
        assert runner.describe()["cuda_graph"] is True


# What TensorRT said of it


def out_of_tricks(simulation: Any, meanwhile: Callable[[], Any] = lambda: None) -> Callable[..., bool]:
    """For ``trt.execute``: a run that fails and says why; ``meanwhile`` happens before the caller can ask."""

    def execute(places: Any, stream: int) -> bool:
        simulation.trt.execute = None
        simulation.trt.logger.log(1, "Error Code 2: Internal Error (out of tricks)")
        meanwhile()
        return False

    return execute


def test_a_failure_is_not_told_by_what_a_refused_capture_said(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.16")
    simulation.trt.breaks_capture = True
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        runner.run({"x": samples(1)})
        simulation.trt.execute = out_of_tricks(simulation)
        with pytest.raises(BackendError, match=r"did not run: Error Code 2: Internal Error \(out of tricks\)"):
            runner.run({"x": samples(1)})


def test_another_camera_does_not_take_the_reason(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.16")

    def camera(shared: TensorRtRunner) -> None:
        with shared:
            shared.run({"x": samples(2)})

    with runner_of(simulation, simulation.engine(tiny_bundle), cuda_graph=False) as runner:

        def in_thread() -> None:
            thread = threading.Thread(target=camera, args=(runner.share(),))
            thread.start()
            thread.join()

        runner.run({"x": samples(1)})
        simulation.trt.execute = out_of_tricks(simulation, in_thread)
        with pytest.raises(BackendError, match="out of tricks"):
            runner.run({"x": samples(1)})


def test_what_a_thread_of_tensorrt_says_is_told(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.16")

    def execute(places: Any, stream: int) -> bool:
        thread = threading.Thread(target=simulation.trt.logger.log, args=(1, "no memory for a kernel"))
        thread.start()
        thread.join()
        return False

    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        simulation.trt.execute = execute
        with pytest.raises(BackendError, match="no memory for a kernel"):
            runner.run({"x": samples(1)})


# Memory


def test_an_integrated_gpu_copies_nothing(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.3", sm="8.7", integrated=True)
    with open_runner(simulation.engine(tiny_bundle), "tensorrt") as runner:
        for count in (1, 1, 4):
            x = samples(count, count)
            np.testing.assert_allclose(runner.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)
        assert set(simulation.cuda.log) == {"GraphLaunch"}
        assert not simulation.cuda.memory
        assert runner.describe()["zero_copy"] is True
    nothing_left(simulation)


@pytest.fixture(params=["cuda-bindings", "pycuda"])
def either(request: pytest.FixtureRequest, simulate: Any) -> Any:
    """A simulation with one of the two libraries."""
    return simulate("10.16", library=request.param)


def test_a_full_gpu_is_one_line_and_leaves_nothing(either: Any, tiny_bundle: Bundle) -> None:
    simulation = either
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        runner.run({"x": samples(1)})
        simulation.cuda.limit = 1 << 12
        with pytest.raises(BackendError, match="cudaErrorMemoryAllocation") as caught:
            runner.run({"x": samples(4)})
        assert "smaller batch" in caught.value.hint
        del caught  # its traceback holds the context
        simulation.cuda.limit = 1 << 30
        x = samples(1, 3)
        np.testing.assert_allclose(runner.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)  # and goes on
    nothing_left(simulation)


def test_no_context_for_want_of_memory(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    runner = open_runner(simulation.engine(tiny_bundle, plan={"no_context": True}), simulation.backend)
    with pytest.raises(BackendError, match=r"no context.*OutOfMemory"):
        runner.__enter__()
    nothing_left(simulation)


# The simulation has the rules: a runner that breaks one is found out


def test_reading_before_synchronizing_gives_garbage(
    simulate: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate()
    monkeypatch.setattr("edgekit.runtime.cuda._Bindings.synchronize", lambda self, stream: None)
    with runner_of(simulation, simulation.engine(tiny_bundle), cuda_graph=False) as runner:
        found = runner.run({"x": samples(1)})["y"]
    assert set(found.view(np.uint8).ravel()) == {0xA5}


def test_an_address_that_is_not_set_is_refused(simulate: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate()
    with runner_of(simulation, simulation.engine(tiny_bundle)) as runner:
        monkeypatch.setattr(type(runner._context), "set_tensor_address", lambda self, name, address: True)
        with pytest.raises(BackendError, match="Address is not set for tensor"):
            runner.run({"x": samples(1)})
    nothing_left(simulation)


@pytest.mark.parametrize("refuses", [False, True])
def test_freed_memory_is_an_illegal_address(either: Any, tiny_bundle: Bundle, refuses: bool) -> None:
    if either.runtime is None:
        either.driver.refuses = refuses
    with runner_of(either, either.engine(tiny_bundle), cuda_graph=False) as runner:
        runner.run({"x": samples(1)})
        either.cuda.memory.clear()
        for _ in range(2):  # it stays: a CUDA context does not recover
            with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
                runner.run({"x": samples(1)})
    gc.collect()
    assert either.trt.alive == 0  # closing goes to its end all the same


def test_a_fault_is_seen_and_not_what_closing_meets(either: Any, tiny_bundle: Bundle) -> None:
    def fault() -> None:
        with runner_of(either, either.engine(tiny_bundle), cuda_graph=False) as runner, runner.share() as other:
            other.run({"x": samples(1)})
            either.cuda.memory.clear()
            other.run({"x": samples(1)})

    with pytest.raises(BackendError, match="cudaStreamSynchronize failed: cudaErrorIllegalAddress") as caught:
        fault()
    del caught  # its traceback holds the contexts
    gc.collect()
    assert either.trt.alive == 0


# Several cameras


def test_contexts_share_an_engine_and_outlive_the_first(simulate: Any, digits_bundle: Bundle) -> None:
    simulation = simulate()
    bundle = simulation.engine(digits_bundle)
    frames = [np.random.default_rng(i).integers(0, 256, (28, 28), np.uint8) for i in range(3)]
    with Model.open(bundle.path, "onnxruntime") as cpu:
        expected = [cpu(frame).label for frame in frames]
        with cpu.share() as other:
            assert [other(frame).label for frame in frames] == expected
    first = Model.open(bundle.path, simulation.backend).__enter__()
    second, third = first.share().__enter__(), first.share()
    assert len(simulation.cuda.streams) == 2
    assert [first(frames[0]).label, second(frames[1]).label, first(frames[2]).label] == expected
    first.__exit__(None, None, None)
    assert [second(frame).label for frame in frames] == expected
    second.__exit__(None, None, None)
    with pytest.raises(BackendError, match="was closed"):
        third.__enter__()
    nothing_left(simulation)
    assert [name for _, name in simulation.trt.used].count("deserialize_cuda_engine") == 1


def test_the_gpu_times_its_own_steps(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    with runner_of(simulation, simulation.engine(tiny_bundle)) as runner:
        assert runner.device_ms({"x": samples(1)}) == {"upload": 0.25, "compute": 0.25, "download": 0.25}
    nothing_left(simulation)


# TensorRT-RTX's runtime cache


@pytest.fixture
def cached(simulate: Callable[..., Any], tiny_bundle: Bundle) -> tuple[Any, Callable[[], int]]:
    """(simulation, a function that opens the bundle, runs it, and says how many kernels had to be compiled)."""
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle)

    def compiled() -> int:
        simulation.trt.compiled = 0
        with open_runner(bundle, simulation.backend) as runner:
            runner.run({"x": samples(1)})
        return int(simulation.trt.compiled)

    return simulation, compiled


def test_the_second_start_compiles_nothing_under_the_umask_of_ubuntu(cached: Any, tmp_path: Path) -> None:
    _, compiled = cached
    (tmp_path / "cache/edgekit").mkdir(parents=True)
    before = os.umask(0o002)
    try:
        assert [compiled(), compiled()] == [1, 0]
        (tmp_path / "cache/edgekit/rtx").chmod(0o775)  # as earlier versions made it
        assert [compiled(), compiled()] == [1, 0]
    finally:
        os.umask(before)


def test_the_second_start_compiles_nothing(cached: Any, tmp_path: Path) -> None:
    _, compiled = cached
    assert [compiled(), compiled()] == [1, 0]
    (file,) = (tmp_path / "cache/edgekit/rtx").iterdir()
    file.chmod(0o666)  # anyone could have put machine code in: not read, and written anew
    assert [compiled(), compiled()] == [1, 1]
    file.unlink()
    assert [compiled(), compiled()] == [1, 0]


def test_a_cache_that_cannot_be_kept_costs_time_only(cached: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    assert [cached[1](), cached[1]()] == [1, 1]


def test_less_than_full_speed_is_said(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle, plan={"validity": "SUBOPTIMAL"})
    with open_runner(bundle, simulation.backend) as runner:
        assert "SUBOPTIMAL" in runner.describe()["suboptimal"]
