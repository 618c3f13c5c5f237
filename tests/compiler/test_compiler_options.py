"""What `edgekit build` asks of TensorRT beyond the graph: set by name, written down, refused where it cannot be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import build, build_engine, build_options, builder
from edgekit.compiler.build_options import counted, fallback_text
from edgekit.compiler.changes import changes, difference
from edgekit.compiler.memory import COPIES, build_memory
from edgekit.errors import GoldenError, UsageError
from edgekit.runtime.engines import records

Builder = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("in_process")


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
    for target, megabytes, why in (
        ("jetson-orin-nano", 8193, "8 GB"),
        ("rtx-ada", 0, "no memory"),
        ("rtx-ada", 10**14, "than any GPU"),
    ):
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


def test_the_parser_adjusts_a_graph_for_the_dla_alone(release: str, simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    """The flag came with TensorRT 10.16, and must be set before the graph is read."""
    for options in ({"dla": 0}, {}):
        simulated = simulated_builder(release, cores=2)
        compile_with(simulated, tiny_bundle, options=options)
        has = release in ("10.16", "11.4", "rtx1.7") and "dla" in options
        assert simulated.told["parsed_with"] == (["ADJUST_FOR_DLA"] if has else [])


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


# Layers


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


# Memory


def test_the_estimate_grows_with_weights_shapes_and_workspace(tiny_bundle: Bundle) -> None:
    graph = tiny_bundle.read(FLOAT_GRAPH)
    one, eight = (build_memory(graph, {"x": [[1, 3, 32, 32], [n, 3, 32, 32], [n, 3, 32, 32]]}, None) for n in (1, 8))
    assert one["weights"] == COPIES * len(graph)
    assert eight["tensors"] == 8 * one["tensors"] == 8 * 3 * 16 * 32 * 32 * 4  # Add: two in, one out, 16 channels
    assert eight["workspace"] == eight["tensors"]
    limited = build_memory(graph, {}, 64)
    assert limited["workspace"] == 64 << 20
    assert limited["total"] == sum(size for name, size in limited.items() if name != "total")


def test_a_kit_for_too_small_a_device_says_so(tiny_bundle: Bundle) -> None:
    made = build(tiny_bundle, target="jetson-orin-nano", precision="fp32", workspace_mb=6000)
    assert "building needs about 6.4 GB, by estimate, of the device's 8: a smaller --batch, or swap" in made.note
    assert json.loads(in_kit(made.kit))["memory"] == record(tiny_bundle, "jetson-orin-nano")["memory"]
    assert "building needs" not in build(tiny_bundle, target="jetson-orin-nano", precision="fp32").note


# Builds compared


def test_what_changed_since_the_build_before_is_named(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    command = ("build", tiny_bundle.path, "--target", "jetson-orin-nano", "--precision", "fp32", "--json")
    assert cli(*command, "--batch", 1).json["changed"] == []
    changed = cli(*command, "--batch", "1..8", "--workspace-mb", 64).json
    assert changed["changed"] == ["profile of x 1x3x32x32 -> 1..8x3x32x32", "--workspace-mb none -> 64"]
    assert changed["note"].rpartition("rebuilt: ")[2] == ", ".join(changed["changed"])
    assert cli(*command, "--batch", "1..8", "--workspace-mb", 64).json["changed"] == []
    fp16 = cli(*command[:4], "--batch", "1..8", "--json").json
    assert fp16["changed"] == ["--precision fp32 -> best", "--workspace-mb 64 -> none"]


def test_every_input_of_a_build_has_words() -> None:
    before: dict[str, Any] = {"tensorrt": "1.7.0", "edgekit": "0.1", "recipe": 4, "requested": "fp16"}
    before |= {"sources": {"model.onnx": "a" * 64}, "profiles": {}, "options": {"timing_cache": "c" * 64}}
    before |= {"script": "s", "golden": {}, "target": "t"}
    after = {"tensorrt": "1.7.1", "edgekit": "0.2", "recipe": 5, "requested": "int8"}
    after |= {"sources": {"model.onnx": "b" * 64, "model.int8.onnx": "d" * 64}, "profiles": {"x": [[1, 4], [2, 4], [2, 4]]}}
    after |= {"options": {"dla": 0}, "script": "S", "golden": {"model.onnx": 1}, "target": "T"}
    assert changes(before, before) == []
    assert changes(before, after) == [
        "TensorRT 1.7.0 -> 1.7.1",
        "edgekit 0.1 -> 0.2",
        "recipe 4 -> 5",
        "--precision fp16 -> int8",
        "model.int8.onnx none -> dddddddd",
        "model.onnx aaaaaaaa -> bbbbbbbb",
        "profile of x fixed -> 1..2x4",
        "--dla none -> 0",
        "--timing-cache cccccccc -> none",
        "the kit's script changed",
        "golden outputs' tolerances changed",
        "the target's description changed",
    ]
    assert "did not write down" in changes(None, after)[0]


def test_the_same_inputs_give_the_same_bytes(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ("build", tiny_bundle.path, "--target", "rtx-ada", "--precision", "fp32", "--json")
    first = cli(*command).json
    assert first["reproduced"] is None
    again = cli(*command, "--again").json
    assert (again["cached"], again["reproduced"], again["changed"]) == (False, True, [])


def test_bytes_that_the_same_inputs_do_not_give_again_are_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(tiny_bundle, target="jetson-thor", precision="fp32")
    make = builder.make_kit
    monkeypatch.setattr(builder, "make_kit", lambda *given: make(*given)[:-1] + b"?")
    made = build(plain.bundle, target="jetson-thor", precision="fp32", again=True)
    assert made.reproduced is False
    size = plain.size_bytes
    assert made.changed == [
        "the same inputs gave another result: TensorRT compiled one graph to other bytes; "
        f"1 of {size} bytes differ, the first at {size - 1}"
    ]
    assert difference(b"abc", b"abc", same_graph=True) == ""
    assert "another typed graph; 2 of 3 bytes differ, the first at 1" in difference(b"a", b"abc", same_graph=False)


def test_the_file_of_a_build_that_is_gone_is_named(tiny_bundle: Bundle) -> None:
    made = build(tiny_bundle, target="jetson-thor", precision="fp32")
    assert made.kit is not None
    made.kit.write_bytes(b"damaged")
    again = build(Bundle.open(tiny_bundle.path, verify=False), target="jetson-thor", precision="fp32")
    assert (again.cached, again.changed) == (False, ["the file of the earlier build is gone or damaged"])


def test_the_names_that_are_used_exist_in_the_real_tensorrt(simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    simulated = simulated_builder("rtx1.7", cores=1)
    options = {"workspace_mb": 64, "dla": 0, "compatible": "version", "verbose": True}
    built = compile_with(simulated, tiny_bundle, options=options, compute_capability="8.9")
    engine = build_options.load(simulated.module, None, built.plan, options)
    assert build_options.engine_layers(simulated.module, engine)
    assert len(simulated.used) > 25
    assert sorted(name for name in simulated.used if not hasattr(getattr(real, name[0]), name[1])) == []
