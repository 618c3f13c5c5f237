"""What `edgekit build` asks of TensorRT beyond the graph: set by name, written down, refused where it cannot be."""

from __future__ import annotations

import errno
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import onnx
import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import build, build_engine
from edgekit.compiler.build_options import counted, fallback_text
from edgekit.compiler.kit import make_kit
from edgekit.errors import GoldenError, UsageError
from edgekit.runtime.engines import records
from edgekit.targets import target_named

Builder = Callable[..., Any]


def record(bundle: Bundle, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Bundle.open(bundle.path).file(f"engines/{target}.json").read_bytes())
    return found


def in_kit(kit: Path | None, name: str = "build.json") -> str:
    assert kit is not None
    with zipfile.ZipFile(kit) as archive:
        return archive.read(name).decode()


def compile_with(simulated: Any, bundle: Bundle, **spec: Any) -> Any:
    """The kit's own function, with a simulated TensorRT, on a bundle's float graph."""
    wanted = {"precision": "fp16", "profiles": {}, "flags": [], **spec}
    return build_engine.build(simulated.module, bundle.read(FLOAT_GRAPH), wanted)


# Workspace


def test_the_workspace_limit_reaches_every_tensorrt(release: str, simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    simulated = simulated_builder(release)
    compile_with(simulated, tiny_bundle, options={"workspace_mb": 64})
    assert simulated.told["WORKSPACE"] == 64 << 20
    unlimited = simulated_builder(release)
    compile_with(unlimited, tiny_bundle)
    assert "WORKSPACE" not in unlimited.told


def test_the_workspace_limit_is_in_kit_record_and_key(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = build(tiny_bundle, target="jetson-orin-nano", workspace_mb=256)
    assert json.loads(in_kit(made.kit))["options"] == {"workspace_mb": 256}
    assert "--memPoolSize=workspace:256" in in_kit(made.kit, "README.txt")
    command = ("build", tiny_bundle.path, "--target", "rtx-ada", "--json")
    keys = set()
    for options in ((), ("--workspace-mb", 64), ("--workspace-mb", 128)):
        assert cli(*command, *options).json["cached"] is False
        assert cli(*command, *options).json["cached"] is True
        keys.add(record(tiny_bundle, "rtx-ada")["key"])
    assert len(keys) == 3
    assert record(tiny_bundle, "rtx-ada")["options"] == {"workspace_mb": 128}
    assert cli(*command, "--workspace-mb", 0).code == 2


def test_a_workspace_larger_than_the_device_is_refused(tiny_bundle: Bundle) -> None:
    for target, megabytes, why in (("jetson-orin-nano", 8193, "8 GB"), ("rtx-ada", 0, "no memory")):
        with pytest.raises(UsageError, match=why):
            build(tiny_bundle, target=target, workspace_mb=megabytes)
    assert Bundle.open(tiny_bundle.path).last("build") is None


# DLA


def test_the_dla_is_set_and_what_falls_back_is_named(release: str, simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    simulated = simulated_builder(release, cores=2, gpu_only="RELU FLATTEN")
    built = compile_with(simulated, tiny_bundle, options={"dla": 1})
    assert (simulated.told["default_device_type"], simulated.told["DLA_core"]) == ("DLA", 1)
    assert "GPU_FALLBACK" in simulated.told["flags"]
    nodes = [node.op_type.upper() for node in onnx.load_model_from_string(tiny_bundle.read(FLOAT_GRAPH)).graph.node]
    left = [layer["type"] for layer in built.dla["on_gpu"]]
    assert left == [node for node in nodes if node in ("RELU", "FLATTEN")] != []
    assert (built.dla["core"], built.dla["layers"]) == (1, len(nodes))
    text = fallback_text(built.dla)
    assert text == f"DLA core 1: {len(left)} of {len(nodes)} layers fall back to the GPU: {counted(left)}"


def test_a_device_without_that_dla_refuses_the_kit(simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    for cores, why in ((0, "has no DLA"), (1, "has 1 DLA cores")):
        with pytest.raises(build_engine.BuildError, match=why):
            compile_with(simulated_builder("10.16", cores=cores), tiny_bundle, options={"dla": 1})


def test_a_tensorrt_that_cannot_tell_is_not_made_to(simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    assert "does not say" in fallback_text({"core": 0, "layers": 3, "on_gpu": None})


def test_a_kit_for_the_dla(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    made = cli("build", tiny_bundle.path, "--target", "jetson-agx-orin", "--dla", "--json")
    assert json.loads(in_kit(Path(made.json["kit"])))["options"] == {"dla": 0}
    assert "--useDLACore=0 --allowGPUFallback" in in_kit(Path(made.json["kit"]), "README.txt")
    assert made.json["precision"] == "fp16"
    assert "falls back to the GPU" in made.json["note"]
    assert "not for JetPack 7.2: TensorRT 10.16.2 has no DLA" in made.json["note"]
    assert "11.4.1 (JetPack 7.2.2 and later)" in made.json["tensorrt"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target": "jetson-orin-nano", "dla": 0}, "jetson-orin-nano has no DLA"),
        ({"target": "rtx-ada", "dla": 0}, "rtx-ada has no DLA"),
        ({"target": "jetson-orin-nx", "dla": 2}, "has 2 DLA cores"),
        ({"target": "jetson-orin-nx", "dla": 0, "precision": "fp32"}, "fp16 and int8, not fp32"),
        ({"target": "jetson-orin-nx", "dla": 0, "batch": "1..4"}, "one shape only; x goes from 1x3x32x32 to 4x3x32x32"),
    ],
)
def test_what_no_dla_does_is_refused(tiny_bundle: Bundle, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        build(tiny_bundle, **options)
    assert Bundle.open(tiny_bundle.path).last("build") is None


def test_best_that_comes_to_fp32_is_not_given_to_the_dla(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"precision": "fp32", "notes": ["fp32, because fp16 did not hold: 20 dB"]}
    monkeypatch.setattr("edgekit.compiler.child.call", lambda *_, **__: dict(answer))
    with pytest.raises(GoldenError, match="came to fp32: fp32, because fp16 did not hold"):
        build(tiny_bundle, target="jetson-orin-nx", dla=0)
    assert Bundle.open(tiny_bundle.path).last("build") is None


# Compatibility


def test_version_compatibility_is_a_flag_of_every_tensorrt(
    release: str, simulated_builder: Builder, tiny_bundle: Bundle
) -> None:
    simulated = simulated_builder(release)
    compile_with(simulated, tiny_bundle, options={"compatible": "version"})
    assert "VERSION_COMPATIBLE" in simulated.told["flags"]


def test_hardware_compatibility_is_ampere_plus_or_several_gpus(
    release: str, simulated_builder: Builder, tiny_bundle: Bundle
) -> None:
    simulated = simulated_builder(release)
    compile_with(simulated, tiny_bundle, options={"compatible": "hardware"}, compute_capability="8.9")
    if hasattr(simulated.module, "ComputeCapability"):
        assert simulated.told["gpus"] == ["SM89", "SM120", "SM121", "SM80", "SM86"]
    else:
        assert simulated.told["hardware_compatibility_level"] == "AMPERE_PLUS"


def test_what_a_tensorrt_lacks_or_ignores_is_named(simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    lacking, ignoring = simulated_builder("10.3"), simulated_builder("10.3")
    del lacking.module.HardwareCompatibilityLevel
    ignoring.ignored.add("hardware_compatibility_level")
    for simulated, why in ((lacking, "10.3 has no HardwareCompatibilityLevel.AMPERE_PLUS"), (ignoring, "does not support it")):
        with pytest.raises(build_engine.BuildError, match=f"--compatible hardware: .*{why}"):
            compile_with(simulated, tiny_bundle, options={"compatible": "hardware"})


def test_one_rtx_engine_for_all_gpus(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = cli("build", tiny_bundle.path, "--target", "rtx-ada", "--compatible", "hardware", "--json")
    assert made.code == 0
    assert "one engine for all GPUs" in made.json["note"]
    assert record(tiny_bundle, "rtx-ada")["options"] == {"compatible": "hardware"}


def test_a_kit_states_what_compatibility_costs(tiny_bundle: Bundle) -> None:
    for kind, price, word in (
        ("version", "can be slower, the file is larger", "--versionCompatible"),
        ("hardware", "slower: 48 KiB", "--hardwareCompatibilityLevel=ampere+"),
    ):
        made = build(tiny_bundle, target="jetson-agx-orin", precision="fp32", compatible=kind)
        assert price in made.note
        assert any(price in note for note in record(tiny_bundle, "jetson-agx-orin")["notes"])
        assert word in in_kit(made.kit, "README.txt")


@pytest.mark.parametrize(
    ("target", "kind", "why"),
    [
        ("rtx-ada", "version", "no version-compatible engine without a GPU"),
        ("rtx-turing", "hardware", r"is SM 7\.5"),
        ("jetson-xavier-nx", "hardware", r"is SM 7\.2"),
        ("jetson-thor", "both", "is not known"),
    ],
)
def test_compatibility_that_cannot_be_is_refused(tiny_bundle: Bundle, target: str, kind: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        build(tiny_bundle, target=target, compatible=kind)
    assert Bundle.open(tiny_bundle.path).last("build") is None


# Timing caches


@pytest.fixture
def script(
    simulated_builder: Builder, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., Any]:
    """``script(*words, release=..., kit=..., **options)``: the kit's script as a device runs it, on a simulated TensorRT."""
    target = target_named("jetson-agx-orin")

    def run(*words: Any, simulated: Any = None, release: str = "10.16", kit: bytes | None = None, **options: Any) -> Any:
        simulated = simulated or simulated_builder(release, cores=2)
        record = {"target": target.name, "precision": "fp32", "profiles": {}, "flags": [], "golden": None, "key": "k" * 64}
        data = kit or make_kit(target, target.tensorrt, {**record, "options": options}, tiny_bundle.read(FLOAT_GRAPH), None)
        zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path / "kit")
        monkeypatch.setitem(sys.modules, "tensorrt", simulated.module)
        capsys.readouterr()
        code = build_engine.main(["--kit", str(tmp_path / "kit"), "--no-check", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(code=code, json=json.loads(out) if out else None, err=err, told=simulated.told)

    return run


def engine_of(folder: Path) -> Path:
    return folder / "jetson-agx-orin.engine"


def test_a_timing_cache_is_read_and_written_and_editable_where_it_can_be(
    script: Callable[..., Any], tmp_path: Path, release: str
) -> None:
    cache = tmp_path / "cache"
    assert script("--timing-cache", cache, release=release).code == 0
    second = script("--timing-cache", cache, release=release)
    if release == "rtx1.7":
        assert "does nothing" in second.err or "documented" in second.err
        assert not cache.exists()
        return
    assert (second.told["timing_cache"], cache.read_bytes()) == (b"timings", b"timingstimings")
    assert second.json["timing_cache"]["unused"] == ""
    editable = release in ("10.13", "10.16", "11.4")
    assert ("EDITABLE_TIMING_CACHE" in second.told["flags"]) == editable


def test_a_read_only_timing_cache_is_never_written(script: Callable[..., Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    missing = script("--timing-cache", cache, "--timing-cache-read-only")
    assert missing.code == 1
    assert f"there is no timing cache {cache}" in missing.err
    assert not engine_of(tmp_path / "kit").exists()
    cache.write_bytes(b"mine")
    cache.chmod(0o444)
    assert script("--timing-cache", cache, "--timing-cache-read-only").told["timing_cache"] == b"mine"
    assert cache.read_bytes() == b"mine"
    assert "needs --timing-cache FILE" in script("--timing-cache-read-only").err


@pytest.mark.parametrize(("content", "why"), [(b"damaged", "Failed to deserialize"), (b"other", "another TensorRT")])
def test_a_timing_cache_that_does_not_fit_is_named_and_made_again(
    script: Callable[..., Any], tmp_path: Path, content: bytes, why: str
) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(content)
    done = script("--timing-cache", cache)
    assert done.code == 0
    assert why in done.err
    assert why in done.json["timing_cache"]["unused"]
    assert cache.read_bytes() == b"timings"


def test_no_disk_for_the_timing_cache_costs_the_cache_only(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"before")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == ".cache.tmp":
            write(path, data[:3])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = script("--timing-cache", cache)
    assert done.code == 1
    assert "is written, the timing cache is not" in done.json["error"]
    assert "No space left on device" in done.err
    assert engine_of(tmp_path / "kit").exists()
    assert cache.read_bytes() == b"before"
    assert not list(tmp_path.rglob("*.tmp"))
    nowhere = script("--timing-cache", tmp_path / "nowhere" / "cache")
    assert nowhere.code == 1
    assert "its folder is not there" in nowhere.err


def test_a_timing_cache_goes_along_with_the_kit(script: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_bytes(b"from the device")
    made = build(tiny_bundle, target="jetson-agx-orin", precision="fp32", timing_cache=given).kit
    assert "--timingCacheFile=timing.cache" in in_kit(made, "README.txt")
    assert made is not None
    for words in (("--timing-cache", tmp_path / "cache"), ()):
        assert script(*words, kit=made.read_bytes()).told["timing_cache"] == b"from the device"
    assert "timing_cache" not in script().told


def test_a_timing_cache_for_rtx_is_a_stated_no_op(cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    cache = tmp_path / "cache"
    command = ("build", tiny_bundle.path, "--target", "rtx-ada", "--precision", "fp32", "--json")
    assert cli(*command, "--timing-cache", cache).code == 2
    cache.write_bytes(b"x")
    cli(*command)
    again = cli(*command, "--timing-cache", cache)
    assert again.json["cached"] is True
    assert "does nothing for TensorRT-RTX" in again.json["note"]


# Layers


def test_a_device_reports_the_layers_of_its_engine(
    script: Callable[..., Any], tmp_path: Path, simulated_builder: Builder, release: str
) -> None:
    done = script(release=release, verbose=True)
    report = json.loads((tmp_path / "kit/jetson-agx-orin.layers.json").read_text())
    assert (report["source"], [layer["Name"] for layer in report["layers"]]) == ("engine", ["fused", "out"])
    assert "2 layers: 1 CaskConvolution, 1 Reformat" in done.err
    assert (done.told.get("profiling_verbosity") == "DETAILED") == (release != "rtx1.7")
    blind = simulated_builder(release)
    blind.module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    script(simulated=blind, verbose=True)
    report = json.loads((tmp_path / "kit/jetson-agx-orin.layers.json").read_text())
    assert report["source"] == "network"
    assert report["layers"][0] == {"name": ANY, "type": "CONV", "precision": "half", "inputs": [], "outputs": [[-1, 4]]}


def test_an_rtx_build_reports_the_layers_of_the_network(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ("build", tiny_bundle.path, "--target", "rtx-ada", "--json")
    plain = cli(*command)
    assert (plain.json["layers"], plain.json["layer_summary"]) == (None, "")
    engine = Path(plain.json["engine"]).read_bytes()
    made = cli(*command, "--verbose").json
    assert Path(made["layers"]).name == "rtx-ada.layers.json"
    assert Path(made["engine"]).read_bytes() == engine  # a report changes nothing
    report = json.loads(Path(made["layers"]).read_text())
    assert (report["source"], report["summary"]) == ("network", made["layer_summary"])
    convolution = next(layer for layer in report["layers"] if layer["type"] == "CONVOLUTION")
    assert (convolution["precision"], convolution["inputs"][0]) == ("half", [-1, 3, 32, 32])
    again = cli(*command, "--verbose").json
    assert (again["cached"], again["layer_summary"]) == (True, made["layer_summary"])
    other = cli(*command, "--precision", "fp32").json  # a report that is there is kept true
    assert "float" in other["layer_summary"]
    assert "half" not in other["layer_summary"]
    assert [found.target for found in records(Bundle.open(tiny_bundle.path), "tensorrt_rtx")] == ["rtx-ada"]


def test_a_kit_is_told_to_report(tiny_bundle: Bundle) -> None:
    made = build(tiny_bundle, target="jetson-orin-nano", precision="fp32", verbose=True)
    assert json.loads(in_kit(made.kit))["options"] == {"verbose": True}
    assert "jetson-orin-nano.layers.json" in made.note
    assert made.layers is None
