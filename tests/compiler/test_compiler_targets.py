"""targets.toml: what it states, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.compiler import build, estimate
from edgekit.errors import EdgekitError, UsageError
from edgekit.targets import TARGETS, USER_TARGETS, JetPack, Target, load_targets, target_named


def test_every_jetson_and_server_gets_a_kit_and_every_other_gpu_an_engine() -> None:
    targets = load_targets()
    jetsons = {n for n in targets if n.startswith("jetson-")}
    assert {n for n, t in targets.items() if t.kind == "device"} == jetsons | {"l4", "a2"}
    assert {n for n, t in targets.items() if t.kind == "cpu"} == {"x86-cpu"}
    assert {"jetson-xavier-nx", "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor"} <= jetsons
    assert targets["rtx-ada"].sm == "8.9"
    for name in jetsons:
        assert all(entry.jetpack for entry in targets[name].tensorrt), name
        assert targets[name].memory_gb, name
        assert targets[name].bandwidth_gbs, name
        assert all(targets[name].peak(precision) for precision in ("fp32", "fp16", "int8")), name


def test_every_tensor_core_states_its_alignment() -> None:
    for name, target in load_targets().items():
        if target.kind != "cpu":
            assert set(target.precisions) - {"fp32"} <= set(target.alignment), name
            assert target.alignment["int8"].value == 32


def test_orin_has_neither_fp8_nor_fp4() -> None:
    for name, target in load_targets().items():
        if target.sm == "8.7":
            assert target.precisions == ("fp32", "fp16", "int8"), name


def test_a_near_miss_is_answered_with_the_near_name() -> None:
    with pytest.raises(UsageError) as caught:
        target_named("jetson-orin-nan")
    assert "jetson-orin-nano" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('sm = "8.9"', 'sm = "ada"', "sm"),
        ('kind = "rtx"', 'kind = "phone"', "kind"),
        ('title = "DGX', 'colour = "gold"\ntitle = "DGX', "colour"),
        ("value = 8,", "value = -8,", "value"),
        ("[rtx-ada]", "[rtx-ada", "targets"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = tmp_path / "targets.toml"
    shutil.copy(TARGETS, path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(EdgekitError, match=why):
        load_targets(path)


@pytest.mark.parametrize(("tensorrt", "opset"), [("8.5.2", 0), ("8.6.2", 17), ("10.3.0", 21), ("10.16.2", 22), ("11.4.1", 22)])
def test_each_tensorrt_reads_its_opsets(tensorrt: str, opset: int) -> None:
    entry = JetPack(tensorrt=tensorrt, cuda="12", python="3.10", source="a test's own", jetpack="1")
    assert (entry.opset, entry.release) == (opset, "JetPack 1")


BOARD = """
[my-board]
like = "jetson-orin-nano"
title = "Orin Nano at 15 W"
int8_tops = { value = 20, source = "unconfirmed: 33 at 1.02 GHz, 0.62 GHz here" }
launch_us = { value = 9, source = "measured on the board with trtexec" }
"""


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "boards.toml"
    path.write_text(BOARD, encoding="utf-8")
    return path


def test_a_users_file_adds_a_target_everywhere(
    board: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    monkeypatch.setenv(USER_TARGETS, str(board))
    mine, shipped = target_named("my-board"), target_named("jetson-orin-nano")
    assert (mine.int8_tops.value, mine.bandwidth_gbs, mine.tensorrt) == (20, shipped.bandwidth_gbs, shipped.tensorrt)  # type: ignore[union-attr]
    assert (mine.file, mine.replaces, shipped.file) == (str(board), False, "")
    found = estimate(tiny_bundle, target="my-board", precision="int8")
    assert any(str(board) in caveat for caveat in found["caveats"])
    assert found["latency_ms"] > estimate(tiny_bundle, target="jetson-orin-nano", precision="int8")["latency_ms"]
    assert mine.kernel_us(0, 0, "fp16") == 9
    assert f"my-board: from {board}" in cli("targets").out
    made = build(tiny_bundle, target="my-board")
    assert made.kit is not None
    board.write_text(BOARD.replace("value = 20", "value = 21"), encoding="utf-8")
    assert build(made.bundle, target="my-board").cached  # what an engine depends on is the same
    board.write_text(BOARD.replace("[my-board]", "[its-board]"), encoding="utf-8")
    assert cli("estimate", tiny_bundle.path, "--target", "my-board").code == 2  # the file is read anew


def test_the_option_holds_for_one_command(board: Path, cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    wanted = ("estimate", tiny_bundle.path, "--target", "my-board", "--json")
    assert cli(*wanted, "--targets", board).json["target"] == "my-board"
    assert cli(*wanted).code == 2
    assert cli("prune", "--help").out.count("--targets") == cli("build", "--help").out.count("--targets") == 1


def test_a_replaced_target_is_named(tmp_path: Path, cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(BOARD.replace("my-board", "jetson-orin-nano"), encoding="utf-8")
    done = cli("targets", "--targets", path)
    assert f"jetson-orin-nano: in place of the shipped table, from {path}" in done.out
    row = next(r for r in cli("targets", "--targets", path, "--json").json["targets"] if r["name"] == "jetson-orin-nano")
    assert (row["replaces"], row["file"], row["int8_tops"]["value"]) == (True, str(path), 20)
    caveats = cli("estimate", tiny_bundle.path, "--target", "jetson-orin-nano", "--targets", path, "--json").json["caveats"]
    assert any("replaced by" in caveat for caveat in caveats)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1", "x stands outside of a table"),
        ("[My_Board]\ntitle = 'a'", "My_Board"),
        ("[a]\nlike = 'jetson-orin'", "[a] like: there is no 'jetson-orin' above it"),
        ("[a]\nlike = 'b'\n[b]\nlike = 'a'", "[a] like"),
        ("[a]\nlike = 'jetson-orin-nano'\nname = 'b'", "[a] name"),
        ("[a]\nlike = 'jetson-orin-nano'\nint8_tops = 5", "[a] int8_tops"),
        ("[a]\nlike = 'jetson-orin-nano'\nint8_tops = { value = 5 }", "[a] int8_tops: Object missing required field `source`"),
        ("[a]\nlike = 'jetson-orin-nano'\nint8_tops = { value = nan, source = 'measured' }", "[a] int8_tops.value"),
        ("[a]\nlike = 'jetson-orin-nano'\nbandwidth_gbs = { value = inf, source = 'measured' }", "[a] bandwidth_gbs.value"),
        ("[a]\nlike = 'jetson-orin-nano'\npeak_share = { value = 5, source = 'measured' }", "peak_share"),
        ("[a]\nlike = 'jetson-orin-nano'\nprecisions = ['int3']", "[a] precisions"),
        ("[a]\nlike = 'jetson-orin-nano'\nclock = 5", "[a] Object contains unknown field `clock`"),
        ("[a]\nlike = 'jetson-orin-nano'\nkind = 'rtx'", "[a] tensorrt"),
        ("[a]\nlike = 'jetson-orin-nano'\nsm = ''", "[a] sm"),
        ("[a]\nlike = 'jetson-orin-nano'\ntensorrt = [{ tensorrt = '10' }]", "[a] tensorrt[0]"),
        ("[a", "no TOML"),
        ("\x00", "no TOML"),
        ("[a]\nb = " + "[" * 20_000, "no TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_table_and_field(tmp_path: Path, cli: Callable[..., Any], text: str, why: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text, encoding="utf-8")
    done = cli("targets", "--targets", path, "--json")
    assert done.code == 1
    assert str(path) in done.json["error"]
    assert why in done.json["error"]
    assert done.json["hint"]


def test_a_file_that_is_not_there(tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert cli("targets", "--targets", tmp_path / "none.toml").code == 2
    assert cli("targets", "--targets", tmp_path).code == 2
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert cli("targets", "--targets", tmp_path / "bytes.toml").code == 1


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["value", "source", "x"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*Target.__struct_fields__, "like"]), _VALUES, max_size=6))
def test_any_table_is_a_target_or_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]) -> None:
    path = tmp_path / "any.toml"
    text = "[a]\nlike = 'jetson-orin-nano'\n" + "".join(
        f"{k} = {_toml(v)}\n" for k, v in table.items() if k != "like" and v is not None
    )
    path.write_text(text, encoding="utf-8")
    monkeypatch.setenv(USER_TARGETS, str(path))
    refused = None
    try:
        found = load_targets()["a"]
    except EdgekitError as error:
        refused = error
    if refused:
        assert str(path) in refused.message
        assert refused.hint
    else:
        assert found.name == "a"
        assert found.kernel_us(1e6, 1e6, "fp16") > 0


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value if v is not None) + "]"
    return json.dumps(value, ensure_ascii=True) if isinstance(value, str | bool) else repr(value)


def test_a_cpu_compiles_nothing_and_says_what_does(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    done = cli("build", tiny_bundle.path, "--target", "x86-cpu", "--json")
    assert done.code == 2
    assert "ONNX Runtime" in done.json["error"]
    assert "edgekit bench" in done.json["hint"]
    assert "x86-cpu has no fp32 peak" in cli("estimate", tiny_bundle.path, "--target", "x86-cpu", "--json").json["error"]


def test_a_cpu_with_figures_of_its_own_is_estimated(tmp_path: Path, cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    path = tmp_path / "cpu.toml"
    path.write_text(
        "[my-cpu]\nlike = 'x86-cpu'\n"
        "fp32_tflops = { value = 0.3, source = 'two cores, AVX2, 3 GHz' }\n"
        "bandwidth_gbs = { value = 20, source = 'measured by stream' }\n"
        "launch_us = { value = 1, source = 'measured with onnxruntime' }\n"
        "peak_share = { value = 0.5, source = 'measured with onnxruntime' }\n",
        encoding="utf-8",
    )
    found = cli("estimate", tiny_bundle.path, "--target", "my-cpu", "--targets", path, "--json").json
    assert (found["precision"], found["kernels"]) == ("fp32", 4)
    assert not any("GPU" in caveat or "Orin" in caveat for caveat in found["caveats"])
    assert found["bound_ms"] * 2 + 4e-3 == pytest.approx(found["latency_ms"], abs=2e-4)


def test_a_server_gets_a_kit_of_its_containers(tiny_bundle: Bundle) -> None:
    made = build(tiny_bundle, target="l4", precision="fp32")
    assert made.tensorrt == "10.8.0 (container 25.01), 10.13.2 (container 25.08)"
    assert made.kit is not None


def test_the_table_of_the_docs_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/targets.md").read_text(encoding="utf-8")
    path = tmp_path / "docs.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(USER_TARGETS, str(path))
        assert target_named("nano-15w").kernel_us(1e6, 1e6, "int8") > target_named("jetson-orin-nano").kernel_us(
            1e6, 1e6, "int8"
        )
        assert target_named("our-cpu").kind == "cpu"


def test_a_family_of_cards_is_estimated_by_the_one_it_names(
    tiny_bundle: Bundle, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rtx-turing", "rtx-ampere", "rtx-ada", "rtx-blackwell"):
        card = target_named(name).figures_of
        assert card.startswith("GeForce RTX "), name
        found = estimate(tiny_bundle, target=name, precision="int8")
        assert found["latency_ms"] > 0
        assert any(f"figures of {card} stand for" in caveat and "--targets FILE" in caveat for caveat in found["caveats"]), name
    assert "rtx-ada: figures of GeForce RTX 4090; --targets FILE for another card" in cli("targets").out
    assert estimate(tiny_bundle, target="dgx-spark")["latency_ms"] > 0
    own = '[mine]\nlike = "rtx-ada"\nbandwidth_gbs = { value = 100, source = "our own board" }\n'
    (tmp_path / "own.toml").write_text(own, encoding="utf-8")
    monkeypatch.setenv(USER_TARGETS, str(tmp_path / "own.toml"))
    assert target_named("mine").figures_of == ""
    assert not any("stand for" in caveat for caveat in estimate(tiny_bundle, target="mine")["caveats"])


def test_what_a_table_lacks_for_a_prediction_is_named_by_field(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError) as caught:
        estimate(tiny_bundle, target="x86-cpu")
    assert 'state fp32_tflops and bandwidth_gbs in a table with like = "x86-cpu"' in caught.value.hint
    assert "--targets FILE" in caught.value.hint
