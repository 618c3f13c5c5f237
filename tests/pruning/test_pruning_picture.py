"""The picture of a pruning: valid SVG, layers before and after, curves named, nothing where nothing was pruned."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.errors import OutputExists, UsageError
from edgekit.pruning.picture import check_picture, draw_pruning

SVG = "{http://www.w3.org/2000/svg}"


def drawn(bundle: Bundle, figures: dict[str, Any], path: Path) -> ET.Element:
    draw_pruning(bundle.extend({}, bundle.entry("prune", {}, figures)), path)
    return ET.fromstring(path.read_bytes())  # noqa: S314 - drawn here


def texts(root: ET.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def bars(root: ET.Element, kind: str) -> list[float]:
    return [float(r.get("width", "0")) for r in root.iter(f"{SVG}rect") if r.get("class") == f"bar {kind}"]


def test_layers_and_curves_are_drawn(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    root = drawn(digits_bundle, prune_figures, tmp_path / "p.svg")
    words = texts(root)
    gain = "4.00x fewer MACs, measured 1.60x faster on Cortex-A78AE, onnxruntime 1.32.0, one thread"
    assert gain in words
    assert "0.16 ms before, 0.1 ms after; predicted by the table of layers: 0.11 ms" in words
    assert {"stem", "1 in, 32 → 16 out", "25k → 12.5k", "20.0 → 12.5"} <= set(words)
    assert {"blocks.0.conv", "skipped", "in a skipped block", "blocks.1 attention", "64 → 48 key, 64 → 32 value"} <= set(words)
    whole, left, skipped = bars(root, "before"), bars(root, "after"), bars(root, "skipped")
    assert [after / before for before, after in zip(whole, left, strict=True)] == pytest.approx([0.5, 0.5, 1.0], abs=0.01)
    assert skipped == pytest.approx([whole[1] / 2], abs=0.1)  # 32 channels of the widest layer's 64
    lines = [*root.iter(f"{SVG}polyline")]
    assert {line.findtext(f"{SVG}title") for line in lines} == {"stem", "blocks.1.value"}
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
        assert points == sorted(points)  # ever fewer channels, to the right
        assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert words.index("stem") < len(words) - 1 - words[::-1].index("stem")  # its bar, and its curve


def test_many_layers_and_groups_leave_the_lesser_out(
    digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path
) -> None:
    row = prune_figures["layers"][0]
    prune_figures["layers"] = [{**row, "layer": f"layer.{i}", "macs_before": 1000 * (i + 1)} for i in range(60)]
    prune_figures["layers"].append({**row, "layer": "norm", "kind": "normalisation", "before": [32], "after": [16]})
    prune_figures["sensitivity"] = {f"group.{i}": [[1, 0], [0.5, i / 10]] for i in range(9)}
    root = drawn(digits_bundle, prune_figures, tmp_path / "p.svg")
    words = texts(root)
    assert "the other 12 of 60 layers have fewer MACs" in words
    assert [word for word in words if word.startswith("layer.")] == [f"layer.{i}" for i in range(12, 60)]
    assert {word for word in words if word.startswith("group.")} == {f"group.{i}" for i in range(3, 9)}
    assert "grey: 3 less sensitive groups" in words
    height = float(root.get("height", "0"))
    assert all(float(text.get("y") or 0) < height for text in root.iter(f"{SVG}text"))


def test_an_old_entry_has_its_gain_and_a_bundle_without_none(digits_bundle: Bundle, tmp_path: Path) -> None:
    draw_pruning(digits_bundle, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    old = {"speedup": 1.9, "macs_share": 0.5, "cuts": [{"layer": "stem.0", "before": 48, "after": 32, "kl": 0.1}]}
    words = texts(drawn(digits_bundle, old, tmp_path / "old.svg"))
    assert words == ["digits: before and after pruning", "2.00x fewer MACs, measured 1.90x faster on ONNX Runtime, one thread"]


def test_hostile_and_long_names_stay_text(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    name = '<script>&"\x00' + "x" * 200 + ".tail"
    prune_figures["layers"][0] |= {"layer": name, "kind": name}
    prune_figures |= {"sensitivity": {name: [[1, 0], [0.5, 0.0]]}, "device": name}
    root = drawn(digits_bundle, prune_figures, tmp_path / "p.svg")
    assert not list(root.iter(f"{SVG}script"))
    assert all(len(text) <= 122 for text in texts(root))


def test_only_its_own_pictures_are_replaced(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    path = check_picture(tmp_path / "p.svg")
    drawn(digits_bundle, prune_figures, path)
    assert check_picture(path) == path
    (tmp_path / "mine.svg").write_text("<svg/>")
    with pytest.raises(OutputExists):
        check_picture(tmp_path / "mine.svg")
    with pytest.raises(UsageError, match="SVG"):
        check_picture(tmp_path / "p.png")
