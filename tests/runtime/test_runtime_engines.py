"""Which engine of a bundle runs, which is refused and in what words, and that none is loaded before it was checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit import trust
from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.deployment import install, pack
from edgekit.errors import BackendError, BudgetNotMet, BundleError, GoldenError, MissingExtra
from edgekit.runtime import Model, check_golden, open_runner
from edgekit.runtime.cuda import Device
from edgekit.runtime.engines import choose
from edgekit.runtime.selftest import tiny_plan
from edgekit.trust import TRUST_ALL, check_private, is_trusted, local_builds, trust_engine

Cli = Callable[..., Any]


def refusal(simulation: Any, bundle: Bundle) -> BackendError:
    """The error of a runner that must not open; nothing was loaded for it."""
    with pytest.raises(BackendError) as caught:
        open_runner(bundle, simulation.backend).__enter__()
    assert "deserialize_cuda_engine" not in {name for _, name in simulation.trt.used}
    assert simulation.cuda.left == {}
    return caught.value


# Refusals


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"tensorrt": "9.9"}, r"was built by TensorRT 9\.9, here is ", "edgekit build"),
        ({"sources": {FLOAT_GRAPH: "0" * 64}}, "was made from another graph", "build it again"),
        ({"engine_sha256": "0" * 64}, "is not the one that its record describes", "build it again"),
        ({"module": "tensorrt_other"}, "has no tensorrt.* engine of model.onnx", "build one: edgekit build"),
        ({"precision": "int8"}, "has no tensorrt.* engine of model.onnx", "build one: edgekit build"),
        ({"trusted": False}, "neither built here nor installed from a pack", TRUST_ALL),
        (
            {"compute_capability": "8.9", "plan": {"sm": "8.9"}},
            r"is for SM 8\.9, this Simulated GPU is SM 8\.6",
            "",
        ),
    ],
)
def test_an_engine_that_may_not_run_is_refused(
    simulation: Any, tiny_bundle: Bundle, changes: dict[str, Any], message: str, hint: str
) -> None:
    error = refusal(simulation, simulation.engine(tiny_bundle, **changes))
    with pytest.raises(BackendError, match=message):
        raise error
    assert hint in error.hint


def test_the_hint_names_the_target_of_this_gpu(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate(sm="8.9")
    bundle = simulation.engine(tiny_bundle, compute_capability="8.6", plan={"sm": "8.6"}, target="rtx-ampere")
    assert refusal(simulation, bundle).hint.endswith("--target rtx-ada")
    other = simulate(sm="9.0")
    assert "no tensorrt_rtx target of SM 9.0: choose --backend onnxruntime" in refusal(other, bundle).hint


def test_of_several_engines_the_one_for_this_gpu_runs(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate(sm="8.9")
    bundle = simulation.engine(tiny_bundle, compute_capability="8.6", plan={"sm": "8.6"}, target="rtx-ampere")
    bundle = simulation.engine(bundle, target="rtx-ada")
    with open_runner(bundle, simulation.backend) as runner:
        assert runner.describe()["engine"] == "rtx-ada"


def test_what_tensorrt_itself_calls_valid_runs_on_another_sm(simulate: Any, tiny_bundle: Bundle) -> None:
    """An engine for several GPUs: TensorRT-RTX knows, so its word counts and not the record's."""
    simulation = simulate(sm="12.1")
    with open_runner(simulation.engine(tiny_bundle, compute_capability="12.0"), simulation.backend) as runner:
        assert runner.describe()["sm"] == "12.1"


def test_what_tensorrt_itself_calls_invalid_is_refused(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle, plan={"validity": "INVALID"})
    assert "TensorRT calls the engine for rtx-ampere invalid here: INVALID" in refusal(simulation, bundle).message


def test_a_damaged_engine_is_refused_by_its_hash(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle)
    file = bundle.path / "engines/rtx-ampere.engine"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="is damaged"):
        open_runner(bundle, simulation.backend).__enter__()
    assert "deserialize_cuda_engine" not in {name for _, name in simulation.trt.used}


@pytest.mark.parametrize("text", [b"not json", b"{}", b'{"target": 3}', b"\xff\xfe"])
def test_a_record_that_is_none_is_named(simulate: Any, tiny_bundle: Bundle, text: bytes) -> None:
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle).extend({"engines/rtx-ampere.json": text})
    with pytest.raises(BundleError, match=r"engines/rtx-ampere\.json is not a record of a build"):
        open_runner(bundle, simulation.backend).__enter__()


def test_an_engine_that_does_not_load_says_why(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.3")
    bundle = simulation.engine(tiny_bundle, plan={"sm": "7.5"})
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 does not load the engine .*: .*incompatible device"):
        open_runner(bundle, "tensorrt").__enter__()
    with pytest.raises(BackendError, match="incompatible device"):  # again: TensorRT keeps the process's first logger
        open_runner(bundle, "tensorrt").__enter__()


@pytest.mark.parametrize(
    ("hide", "count", "message"),
    [
        ("cuda.bindings.runtime", 1, r"'cuda\.bindings', which is not installed"),
        ("", 0, "this machine has no CUDA device"),
        ("", -1, "no CUDA device can be used here: cudaGetDeviceCount failed: cudaErrorInsufficientDriver"),
        ("tensorrt_rtx", 1, "'tensorrt_rtx', which is not installed|tensorrt_rtx does not load"),
    ],
)
def test_what_is_missing_is_named(
    simulate: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, hide: str, count: int, message: str
) -> None:
    simulation = simulate(count=count)
    bundle = simulation.engine(tiny_bundle)
    if hide:
        monkeypatch.setitem(sys.modules, hide, None)
        monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises((BackendError, MissingExtra), match=message) as caught:
        open_runner(bundle, simulation.backend).__enter__()
    assert caught.value.hint
    with open_runner(bundle, "auto") as runner:  # and auto goes on to what works
        assert runner.name == "onnxruntime"


# Trust


def test_build_trusts_what_it_built(tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgekit.compiler import build

    made = build(tiny_bundle, target="rtx-ampere").bundle
    record = json.loads(made.file("engines/rtx-ampere.json").read_text())
    assert is_trusted(record["engine_sha256"])
    assert not is_trusted("0" * 64)


def test_a_copied_bundle_is_not_trusted_until_it_is_installed(
    simulate: Any, digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate()
    bundle = simulation.engine(digits_bundle, trusted=False)
    refusal(simulation, bundle)
    packed = pack(bundle, out=tmp_path / "digits.edge.zip")
    answer = install(packed, root=tmp_path / "device", unsigned=True)
    assert answer["golden"]["snr_db"] > 40
    with Model.open(answer["bundle"]) as model:
        assert model.runner.name == simulation.backend
    shutil.rmtree(tmp_path / "state")
    refusal_again = pytest.raises(BackendError, match="neither built here nor installed")
    with refusal_again:
        Model.open(answer["bundle"], simulation.backend).__enter__()
    monkeypatch.setenv(TRUST_ALL, "1")
    with Model.open(answer["bundle"], simulation.backend) as model:
        assert model.runner.name == simulation.backend


def test_a_note_that_others_could_write_counts_for_nothing(simulate: Any, tmp_path: Path) -> None:
    simulate()
    digest = "ab" * 32
    trust_engine(digest)
    folder = tmp_path / "state/edgekit/trusted"
    assert is_trusted(digest)
    folder.chmod(0o777)
    assert not is_trusted(digest)
    folder.chmod(0o755)
    (folder / digest).unlink()
    (folder / digest).symlink_to("/dev/null")
    assert not is_trusted(digest)
    with pytest.raises(ValueError, match="not a sha256"):
        trust_engine("../../etc/passwd")
    with pytest.raises(FileNotFoundError):
        check_private(folder / "nothing")


# Build kits


@pytest.fixture
def kit(simulate: Any, tiny_bundle: Bundle) -> tuple[Any, Bundle, dict[str, Any], bytes]:
    """(simulation of a Jetson, a bundle with its kit, the record of what the device compiled, that engine)."""
    simulation = simulate("10.3", sm="8.7", integrated=True)
    bundle = simulation.engine(tiny_bundle, trusted=False, target="jetson-orin-nano")
    plan = bundle.read("engines/jetson-orin-nano.engine")
    record = json.loads(bundle.read("engines/jetson-orin-nano.json"))
    made = {name: record[name] for name in ("target", "tensorrt", "module", "engine_sha256", "graph_sha256", "key")}
    record |= {"kind": "device", "tensorrt": "10.3.0 (JetPack 6.2)", "file": "engines/jetson-orin-nano.kit.zip"}
    del record["engine_sha256"]
    files = {"engines/jetson-orin-nano.kit.zip": b"zip", "engines/jetson-orin-nano.json": msgspec.json.encode(record)}
    return simulation, bundle.extend(files), made, plan


def compile_here(made: dict[str, Any], plan: bytes, key: str = "k" * 64) -> Path:
    folder = local_builds(key)[0]
    folder.mkdir(parents=True)
    (folder / "jetson-orin-nano.engine").write_bytes(plan)
    (folder / "jetson-orin-nano.json").write_text(json.dumps(made))
    return folder


def test_a_kit_that_is_not_compiled_yet_gives_the_command(kit: Any) -> None:
    simulation, bundle, _, _ = kit
    error = refusal(simulation, bundle)
    assert "has a build kit for jetson-orin-nano, which this device has not compiled yet" in error.message
    assert f"python3 kit/build_engine.py --out {local_builds('k' * 64)[0]}" in error.hint
    with open_runner(bundle) as runner:
        assert runner.name == "onnxruntime"
        assert "not compiled yet" in runner.describe()["passed_over"]["tensorrt"]


def test_what_the_device_compiled_runs(kit: Any) -> None:
    _, bundle, made, plan = kit
    compile_here(made, plan)
    assert check_golden(bundle, backend="tensorrt").snr_db > 100
    with open_runner(bundle) as runner:
        assert runner.name == "tensorrt"
        assert runner.describe()["zero_copy"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt": "8.6.2"}, r"was built by TensorRT 8\.6\.2, here is 10\.3\.0"),  # the JetPack was upgraded
        ({"key": "0" * 64}, "not compiled yet"),
        ({"engine_sha256": "0" * 64}, "is not the one that its record describes"),
    ],
)
def test_what_the_device_compiled_for_something_else_is_refused(kit: Any, change: dict[str, Any], words: str) -> None:
    simulation, bundle, made, plan = kit
    compile_here({**made, **change}, plan)
    with pytest.raises(BackendError, match=words):
        raise refusal(simulation, bundle)


def test_an_engine_for_a_dla_runs_on_the_core_it_was_built_for(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate("10.3", sm="8.7", integrated=True)
    bundle = simulation.engine(tiny_bundle, target="jetson-agx-orin", options={"dla": 1}, plan={"dla": 1})
    assert check_golden(bundle, backend="tensorrt").snr_db > 100


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("8.6.1.0", "10.3", True),
        ("10.3.0", "10.16", True),
        ("10.3.0", "11.4", True),
        ("8.6.1.0", "11.4", False),
        ("10.16.0", "10.3", False),
        ("unknown", "10.3", False),
    ],
)
def test_a_version_compatible_engine_runs_with_later_tensorrt(
    simulate: Any, tiny_bundle: Bundle, built: str, here: str, runs: bool
) -> None:
    simulation = simulate(here)
    options = {"options": {"compatible": "version"}, "tensorrt": built}
    bundle = simulation.engine(tiny_bundle, plan={"version": built, "host_code": True}, **options)
    if runs:
        assert check_golden(bundle, backend="tensorrt").snr_db > 100
    else:
        assert f"was built by TensorRT {built}, here is {here}.0" in refusal(simulation, bundle).message


@pytest.mark.parametrize(("sm", "runs"), [("8.9", True), ("7.5", False)])
def test_a_hardware_compatible_engine_runs_on_other_gpus(simulate: Any, tiny_bundle: Bundle, sm: str, runs: bool) -> None:
    simulation = simulate("10.3", sm=sm)
    options = {"options": {"compatible": "hardware"}, "compute_capability": "8.6"}
    bundle = simulation.engine(tiny_bundle, plan={"sm": "8.6", "ampere_plus": True}, **options)
    if runs:
        assert check_golden(bundle, backend="tensorrt").snr_db > 100
    else:
        assert "is for SM 8.6" in refusal(simulation, bundle).message


def test_a_local_build_that_others_could_write_is_refused(kit: Any) -> None:
    simulation, bundle, made, plan = kit
    folder = compile_here(made, plan)
    (folder / "jetson-orin-nano.engine").chmod(0o666)
    error = refusal(simulation, bundle)
    assert "can be written by another user" in error.message
    assert error.hint.startswith("chmod go-w")


def test_what_the_kits_own_script_writes_is_found(simulate: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The real kit, compiled by its script where the runtime's hint says; TensorRT-RTX stands for the device's TensorRT."""
    trt = pytest.importorskip("tensorrt_rtx")
    from edgekit.compiler import build

    made = build(tiny_bundle, target="jetson-orin-nano")
    bundle, key = made.bundle, json.loads(made.bundle.read("engines/jetson-orin-nano.json"))["key"]
    device = Device("Orin", "8.7", "12.6", True, 8 << 30)
    with pytest.raises(BackendError, match="not compiled yet") as caught:
        choose(bundle, FLOAT_GRAPH, "tensorrt", trt.__version__, device)
    out = caught.value.hint.rpartition("--out ")[2]
    assert Path(out) == local_builds(key)[0]
    zipfile.ZipFile(bundle.file("engines/jetson-orin-nano.kit.zip")).extractall(tmp_path / "kit")
    script = [sys.executable, tmp_path / "kit/build_engine.py", "--out", out]
    options = ["--module", "tensorrt_rtx", "--compute-capability", "8.6", "--no-check"]
    subprocess.run([*script, *options], check=True, capture_output=True)
    choice = choose(bundle, FLOAT_GRAPH, "tensorrt", trt.__version__, device)
    assert choice.plan == (Path(out) / "jetson-orin-nano.engine").read_bytes()
    with pytest.raises(BackendError, match=r"was built by TensorRT 1\.7.*, here is 10\.3\.0"):
        choose(bundle, FLOAT_GRAPH, "tensorrt", "10.3.0", device)
    with pytest.raises(BackendError, match=r"is for SM 8\.7, this Orin is SM 11\.0"):
        choose(bundle, FLOAT_GRAPH, "tensorrt", trt.__version__, device._replace(sm="11.0"))


# auto, compare, bench, golden outputs


def test_auto_prefers_the_gpu_and_loads_nothing_without_an_engine(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    with open_runner(tiny_bundle) as runner:
        assert runner.name == "onnxruntime"
        assert "passed_over" not in runner.describe()
    assert not simulation.cuda.used
    bundle = simulation.engine(tiny_bundle)
    with open_runner(bundle) as runner:
        assert runner.name == "tensorrt-rtx"
        assert runner.inputs[0].name == "x"
        shared = runner.share()
        with shared as other:
            x = np.ones((1, 3, 32, 32), np.float32)
            np.testing.assert_array_equal(other.run({"x": x})["y"], runner.run({"x": x})["y"])
    with Model.open(bundle.path) as model:
        assert model.runner.name == "tensorrt-rtx"
    assert simulation.cuda.left == {}


def test_compare_holds_an_engine_to_its_own_tolerance(simulate: Any, tiny_bundle: Bundle, cli: Cli) -> None:
    simulation = simulate()
    bundle = simulation.engine(tiny_bundle)
    rows = cli("compare", bundle.path, "--backends", "onnxruntime,tensorrt-rtx", "--json").json["outputs"]
    assert [(row["backend"], row["tolerance"]) for row in rows] == [
        ("onnxruntime", "relative <= 0.0001"),
        ("tensorrt-rtx", "SNR dB >= 40"),
    ]
    assert all(row["within_tolerance"] for row in rows)
    strict = simulation.engine(tiny_bundle, golden={"kind": "snr_db", "limit": 250.0})
    with pytest.raises(GoldenError, match="misses the golden outputs"):
        check_golden(strict, backend="tensorrt-rtx")
    assert cli("compare", bundle.path, "--backends", "tensorrt-rtx").code == BudgetNotMet.exit_code


def test_compare_without_an_engine_says_how_to_make_one(simulate: Any, tiny_bundle: Bundle, cli: Cli) -> None:
    simulate()
    done = cli("compare", tiny_bundle.path, "--backends", "tensorrt-rtx")
    assert done.code == 1
    assert f"edgekit build {tiny_bundle.path} --target rtx-ampere" in done.err


def test_bench_measures_within_the_engines_batches(simulate: Any, tiny_bundle: Bundle, cli: Cli) -> None:
    bundle = simulate().engine(tiny_bundle)
    options = ["--backend", "tensorrt-rtx", "--seconds", "0.02", "--json"]
    found = cli("bench", bundle.path, *options).json
    assert (found["backend"], found["engine"], found["cuda_graph"]) == ("tensorrt-rtx", "rtx-ampere", "by TensorRT-RTX")
    assert cli("bench", bundle.path, "--scenario", "offline", *options).json["batch"] in (1, 4)
    done = cli("bench", bundle.path, "--scenario", "offline", "--batch", "16", *options)
    assert done.code == 2
    assert "takes 1 to 4" in done.json["error"]


def test_eval_through_the_engine(simulate: Any, digits_bundle: Bundle, cli: Cli) -> None:
    bundle = simulate().engine(digits_bundle)
    found = cli("eval", bundle.path, "--data", "digits", "--backend", "tensorrt-rtx", "--no-save", "--json").json
    assert found["top1"] > 0.9


def test_an_int8_engine_runs_the_int8_graph(
    simulate: Any, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path
) -> None:
    from edgekit.quantization import quantize

    bundle = quantize(tiny_bundle, out=tmp_path / "q.edge", calib=calibration_folder, method="minmax")
    simulation = simulate()
    bundle = simulation.engine(bundle, INT8_GRAPH)
    with open_runner(bundle, "tensorrt-rtx") as runner:
        assert runner.describe()["engine_precision"] == "int8"
    error = pytest.raises(BackendError, match=r"has no tensorrt_rtx engine of model\.onnx")
    with error, open_runner(bundle, "tensorrt-rtx", FLOAT_GRAPH):
        pass


# doctor


def test_a_tiny_engine_is_compiled_for_the_gpu_at_hand() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert len(tiny_plan(trt, "8.6")) > 1000
    with pytest.raises(BackendError, match=r"does not run on SM 9\.0"):
        tiny_plan(trt, "9.0")


def test_doctor_runs_the_gpu_and_writes_what_it_found(
    simulate: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate()
    addition = b64decode("CAc6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAmIPCgF5EgoKCAgBEgQKAggCQgQKABAN")
    plan = simulation.plan(addition, simulation.trt, sm="8.6", profiles={})
    monkeypatch.setattr("edgekit.runtime.selftest.tiny_plan", lambda trt, sm: plan)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = cli("doctor", "--selftest", tmp_path / "machine.json", "--json")
    rows = {row["backend"]: row for row in json.loads((tmp_path / "machine.json").read_text())["backends"]}
    assert rows == {row["backend"]: row for row in done.json["backends"]}
    assert rows["tensorrt-rtx"]["works"], rows
    assert rows["tensorrt-rtx"]["latency_ms"] > 0
    assert not rows["tensorrt"]["works"]
    assert "JetPack brings it" in rows["tensorrt"]["install"]
    assert cli("doctor", "--selftest", tmp_path / "machine.json" / "x").code == 2
    assert simulation.cuda.left == {}


def test_notes_of_trust_without_a_home_or_in_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [f"{number:064x}" for number in range(8)]
    for number in range(10):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"{number}"))
        with ThreadPoolExecutor(len(digests)) as threads:
            list(threads.map(trust.trust_engine, digests))
        assert all(map(trust.is_trusted, digests))
        assert not trust.is_trusted("")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(trust, "SYSTEM", tmp_path / "system")
    trust.trust_engine(digests[0])
    assert trust.is_trusted(digests[0])
