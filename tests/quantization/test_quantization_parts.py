"""The small parts of quantization: weights as text, the picture, latencies, batches of samples."""

from __future__ import annotations

import base64
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import BackendError, DataError, OutputExists, UsageError
from edgekit.quantization import check_picture, draw_layers, samples, speed
from edgekit.quantization.record import packed, unpacked
from edgekit.quantization.samples import Samples

Array = np.ndarray[Any, Any]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Array, Array]:
    """Two int8 arrays of one shape, of any values: their difference may wrap around."""
    shape = draw(array_shapes(max_dims=4, max_side=6))
    fitted, nearest = (draw(arrays(np.int8, shape)) for _ in range(2))
    return fitted, nearest


@settings(max_examples=80, deadline=None)
@given(weights())
def test_packed_weights_come_back(pair: tuple[Array, Array]) -> None:
    fitted, nearest = pair
    text = packed(fitted, nearest)
    assert text.isascii()
    np.testing.assert_array_equal(unpacked(text, nearest), fitted, strict=True)


def test_weights_at_the_ends_wrap_around() -> None:
    fitted, nearest = (part.ravel() for part in np.meshgrid(*[np.arange(-128, 128).astype(np.int8)] * 2))
    np.testing.assert_array_equal(unpacked(packed(fitted, nearest), nearest), fitted, strict=True)


def test_weights_near_the_nearest_take_little_space() -> None:
    r = np.random.default_rng(0)
    nearest = r.integers(-100, 100, (64, 64, 3, 3)).astype(np.int8)
    fitted = nearest + (r.random(nearest.shape) < 0.1).astype(np.int8)
    assert len(packed(fitted, nearest)) < 0.15 * nearest.size


NEAREST = np.arange(-30, 30, dtype=np.int8).reshape(5, 12)
TEXT = packed((NEAREST * 3).astype(np.int8), NEAREST)


@pytest.mark.parametrize(
    "text",
    [
        "", "not base64!", TEXT[:-8], TEXT[4:], TEXT + "====", "Ünïcode", TEXT[:20] + "AAAA" + TEXT[24:],
        base64.b64encode(b"plain bytes").decode(), base64.b64encode(zlib.compress(bytes(59))).decode(),
        base64.b64encode(zlib.compress(bytes(61))).decode(), base64.b64encode(zlib.compress(b"")).decode(),
    ],
)  # fmt: skip
def test_damaged_weights_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="calibration") as caught:
        unpacked(text, NEAREST)
    assert "calibrate again" in caught.value.hint


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        unpacked(text, NEAREST)


def test_unpacking_is_bounded() -> None:
    """64 MB of zeros are 64 kB of text."""
    text = base64.b64encode(zlib.compress(bytes(64 << 20), 9)).decode()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="for 60"):
            unpacked(text, NEAREST)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def row(layer: str, alone_db: float | None, kind: str = "int8", why: str = "", **other: float) -> dict[str, Any]:
    measured = {"alone_db": alone_db, "layer_db": None, "drop": None, **other}
    return {"layer": layer, "op": "Conv", "type": kind, "macs": 0.5, **measured, "why": why}


def drawn(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()  # noqa: S314  written a moment ago


def bars(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [element for element in root.iter("{http://www.w3.org/2000/svg}rect") if "bar" in element.get("class", "")]


def test_the_picture_has_a_bar_for_each_measured_layer(tiny_bundle: Bundle, tmp_path: Path) -> None:
    rows = [row("second", 26.0206, drop=0.25), row("first", 20.0), row("third", 80.0, "float"), row("lstm", None, "float")]
    path = check_picture(tmp_path / "layers.svg")
    draw_layers(tiny_bundle, rows, path)
    found = bars(drawn(path))
    assert [bar.get("class") for bar in found] == ["bar worst", "bar int8", "bar float"]
    widths = [float(bar.get("width", "0")) for bar in found]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert widths[2] == 1  # next to nothing
    text = path.read_text(encoding="utf-8")
    assert "10% (20.0 dB)" in text
    assert "+0.25 points of top-1" in text
    assert "lstm" not in text
    draw_layers(tiny_bundle, [row("a", None, layer_db=30.0)], check_picture(path))  # such a picture may be drawn anew
    assert "layer's own output, all int8" in path.read_text(encoding="utf-8")
    assert len(bars(drawn(path))) == 1


@pytest.mark.parametrize("name", ["<&>\"'", "tab\tand\nline", "nul\x00, bell\x07, escape\x1b", "\ufffe", "ё" * 200])
def test_any_name_of_a_layer_can_be_drawn(tiny_bundle: Bundle, tmp_path: Path, name: str) -> None:
    draw_layers(tiny_bundle, [row(name, 1.0, why=f"reason of {name}")], tmp_path / "layers.svg")
    assert len(bars(drawn(tmp_path / "layers.svg"))) == 1


def extents(root: ElementTree.Element) -> list[tuple[str, float, float]]:
    """(text, left, right) of all that is written, a character 0.65 em wide: DejaVu Sans' names and figures are narrower."""
    found = []
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        text, x = element.text or "", float(element.get("x", "0"))
        width = 0.65 * (17 if element.get("class") == "title" else 12) * len(text)
        found.append((text, *((x - width, x) if element.get("class") == "name" else (x, x + width))))
    return found


def test_all_text_lies_within_the_picture(tiny_bundle: Bundle, tmp_path: Path) -> None:
    named = msgspec.structs.replace(tiny_bundle.manifest, name="/home/someone/models/" + "detector" * 12)
    path = "F0::If_0_then_branch__Inline_0__/encoder/layers/{}/self_attn/out_proj"
    rows = [{**row(path.format(i), -24.0 + 3 * i), "op": "ConvTranspose"} for i in range(50)]
    draw_layers(Bundle(tiny_bundle.path, named), rows, tmp_path / "layers.svg")
    root = drawn(tmp_path / "layers.svg")
    width = float(root.get("width", "0"))
    found = extents(root)
    assert len(found) == 2 + 2 * 40 + 1
    assert [text for text, left, right in found if left < 0 or right > width] == []
    first = found[2][0]
    assert first.startswith("F0::")
    assert first.endswith("out_proj (ConvTranspose)")
    assert path.format(0) in (tmp_path / "layers.svg").read_text(encoding="utf-8")  # whole, to point at


def test_many_layers_are_cut_and_none_draws_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    draw_layers(tiny_bundle, [row(str(i), 10.0 + i) for i in range(100)], tmp_path / "many.svg")
    assert len(bars(drawn(tmp_path / "many.svg"))) == 40
    assert "the other 60 of 100 layers cost less" in (tmp_path / "many.svg").read_text(encoding="utf-8")
    draw_layers(tiny_bundle, [row(str(i), 1.0) for i in range(40)], tmp_path / "all.svg")
    assert "cost less" not in (tmp_path / "all.svg").read_text(encoding="utf-8")
    draw_layers(tiny_bundle, [row("a", None)], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.parametrize("name", ["layers.png", "layers", "svg"])
def test_other_pictures_than_svg_are_wrong_usage(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="SVG") as caught:
        check_picture(tmp_path / name)
    assert ".svg" in caught.value.hint


def test_foreign_files_are_not_overwritten(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "folder.svg").mkdir()
    for name in ("mine.svg", "folder.svg"):
        with pytest.raises(OutputExists):
            check_picture(tmp_path / name)
    with pytest.raises(UsageError):
        check_picture(tiny_bundle.path / "layers.svg")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_latencies_are_one_for_each_graph(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.02)
    graph = tiny_bundle.file(FLOAT_GRAPH).read_bytes()
    found = speed.latencies([graph] * count, {"x": np.zeros((1, 3, 32, 32), np.float32)})
    assert len(found) == count
    assert all(0 < latency < 1000 for latency in found)


def test_a_larger_batch_takes_longer(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    graph = tiny_bundle.file(FLOAT_GRAPH).read_bytes()
    one, many = (speed.latencies([graph], {"x": np.zeros((n, 3, 32, 32), np.float32)})[0] for n in (1, 64))
    assert many > 5 * one


def product(count: int) -> bytes:
    """``count`` matrix products, one after the other: microseconds."""
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    names = ["x", *(f"t{i}" for i in range(count - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_the_same_graph_twice_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second was faster in ten of ten measurements: it found the caches warm."""
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    feeds = {"x": np.ones((1, 64), np.float32)}
    measured = [speed.latencies([product(2)] * 2, feeds) for _ in range(7)]
    assert sum(speed.faster(second, first) for first, second in measured) <= 2  # on a machine that has other work too
    long, short = speed.latencies([product(200), product(2)], feeds)
    assert speed.faster(short, long)
    assert not speed.faster(long, short)


def test_graphs_that_do_not_load_have_no_latency() -> None:
    with pytest.raises(BackendError):
        speed.latencies([b"no graph"], {})


def made(sizes: list[int], batchable: bool = True) -> Samples:
    """One sample a size: x (1, size), its index in every place."""
    every = [{"x": np.full((1, size), i, np.float32), "flag": np.array([i], np.int64)} for i, size in enumerate(sizes)]
    return Samples(tuple(map(str, range(len(sizes)))), every.__getitem__, batchable)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=20), st.integers(1, 6), st.booleans())
def test_batches_hold_every_sample_once_in_order(sizes: list[int], most: int, batchable: bool) -> None:
    batches = list(made(sizes, batchable).batches(most))
    lengths = [len(batch["x"]) for batch in batches]
    assert all(1 <= length <= (most if batchable else 1) for length in lengths)
    assert [int(i) for batch in batches for i in batch["flag"]] == list(range(len(sizes)))
    for batch in batches:
        assert [len(batch["x"])] == list({len(array) for array in batch.values()})
        assert {sizes[int(i)] for i in batch["flag"]} == {batch["x"].shape[1]}
        assert (batch["x"][:, 0] == batch["flag"]).all()
    if batchable:  # none is cut short: the next sample would not have fitted
        for batch, following in pairwise(batches):
            assert len(batch["x"]) == most or batch["x"].shape[1:] != following["x"].shape[1:]


def test_batches_stay_small_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "BATCH_BYTES", 4 * (10 * 4 + 8))
    assert [len(batch["x"]) for batch in made([10] * 10).batches()] == [4, 4, 2]
    assert [len(batch["x"]) for batch in made([1000] * 3).batches()] == [1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(1, 60))
def test_spread_takes_so_many_in_order(count: int, wanted: int) -> None:
    every = made([1] * count)
    found = every.spread(wanted)
    assert len(found) == min(count, wanted)
    picked = [int(identity) for identity in found.ids]
    assert picked == sorted(set(picked))
    assert [int(found.read(i)["flag"][0]) for i in range(len(found))] == picked
    assert found.ids == every.spread(wanted).ids


@pytest.mark.parametrize("classes", [2, 4, 8, 10])
def test_spread_takes_every_class_that_comes_in_turns(classes: int) -> None:
    found = np.array([int(identity) % classes for identity in made([1] * 256).spread(64).ids])
    assert np.bincount(found, minlength=classes).min() >= 64 // classes // 3 > 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_chart_that_cannot_be_written_is_refused_before_the_work() -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        check_picture(Path("/proc/layers.svg"))
