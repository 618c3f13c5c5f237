"""The panel of a pruned bundle: layers before and after, MACs beside a latency, curves, reasons; old and odd entries too."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.manifest import History
from edgekit.pruned import kl_ticks, pruning_of
from edgekit.reporting import report
from edgekit.reporting.figures import curve

HOSTILE = '<img src=x onerror="window.hacked=1"></script>'
GAIN = "4.00x fewer MACs, measured 1.60x faster on Cortex-A78AE, onnxruntime 1.32.0, one thread."


def pruned(bundle: Bundle, figures: dict[str, Any]) -> Bundle:
    return bundle.extend({}, bundle.entry("prune", {"keep": 0.5}, figures))


def panel(bundles: Bundle | list[Bundle], tmp_path: Path) -> str:
    """The section's markup."""
    report(bundles, out=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    found = re.search(r'<section id="pruning">.*?</section>', page, re.DOTALL)
    assert found
    return found[0]


def words(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def chart(markup: str) -> dict[str, Any]:
    found = re.search(r'data-kind="lines" data-chart="([^"]*)"', markup)
    assert found
    data: dict[str, Any] = json.loads(html.unescape(found[1]))
    return data


def test_layers_stand_before_and_after(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    markup = panel(pruned(digits_bundle, prune_figures), tmp_path)
    text = words(markup)
    assert "stem convolution 1 in, 32 → 16 out 25 000 → 12 500 20.0 12.5" in text.replace("\u202f", " ")
    assert "blocks.0.conv convolution skipped 900 000 → 0 40.0 0.0" in text.replace("\u202f", " ")
    assert "hatched: in a skipped block" in text
    assert "64 → 48 key, 64 → 32 value" in text
    assert "64 → 32 in, 10 out" in text
    # Bars: channels that it makes, over the widest layer's 64.
    bars = re.findall(r'<td class="bar"><span style="--v:([\d.]+)"></span><span class="left" style="--v:([\d.]+)">', markup)
    assert bars == [("0.5000", "0.2500"), ("0.5000", "0.0000"), ("1.0000", "0.5000"), ("0.1562", "0.1562")]


def test_macs_stand_beside_the_measured_latency_and_the_prediction(
    digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path
) -> None:
    text = words(panel(pruned(digits_bundle, prune_figures), tmp_path))
    assert GAIN in text
    assert "before 0.16 ms measured 0.1 ms predicted by the table 0.11 ms" in text
    assert "one thread. 2:4 weights in 3 layers: 50.00 % of their weights are zero" in text
    assert "points of top-1 lost 1.00" in text
    assert "roofline" not in text
    named = {
        "target": "jetson-orin-nano",
        "precision": "fp16",
        "prediction": True,
        "before_ms": 0.08,
        "ms": 0.05,
        "speedup": 1.6,
    }
    slower = pruned(digits_bundle, {**prune_figures, "speedup": 0.8, "latency_predicted_ms": None, "on": named})
    text = words(panel(slower, tmp_path))
    assert "0.08 → 0.05 ms predicted on jetson-orin-nano, fp16: a roofline, not a measurement." in text
    assert "4.00x fewer MACs, measured 1.25x slower on" in text
    assert "predicted by the table –" in text


def test_macs_are_not_claimed_without_a_latency(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    del prune_figures["speedup"]
    text = words(panel(pruned(digits_bundle, prune_figures), tmp_path))
    assert "fewer MACs" not in text
    assert "No latency was measured" in text


def test_curves_order_and_reasons(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    prune_figures["sensitivity"] |= {f"tail.{i}": [[1.0, 0.0], [0.5, 0.001]] for i in range(8)}
    markup = panel(pruned(digits_bundle, prune_figures), tmp_path)
    lines = chart(markup)["lines"]
    assert lines[0] == {"name": "stem", "points": [[100.0, 0.0], [75.0, 0.1], [50.0, 0.4]], "named": True}
    assert lines[1]["name"] == "blocks.1.value"
    assert [line["named"] for line in lines] == [True] * 6 + [False] * 4
    text = words(markup)
    assert "most sensitive with half of its channels: stem . The 4 grey lines are less sensitive" in text
    assert "1 stem 32 → 16 channels 0.080 2 blocks.0 block skipped 0.200 3 blocks.1 4 → 3 heads 0.250" in text
    assert "classifier : it is the model's output norm : head.* is frozen" in text


def test_an_old_entry_of_cuts_alone_is_drawn(digits_bundle: Bundle, tmp_path: Path) -> None:
    old = {"speedup": 1.9, "macs_share": 0.5, "cuts": [{"layer": "stem.0", "before": 48, "after": 32, "kl": 0.1}], "drop": 0.2}
    text = words(panel(pruned(digits_bundle, old), tmp_path))
    assert "2.00x fewer MACs, measured 1.90x faster on ONNX Runtime, one thread" in text
    assert "1 stem.0 48 → 32 channels 0.100" in text
    assert "This entry holds no layers" in text
    assert "No sensitivity was recorded" in text


def test_a_pruning_is_shown_once_and_under_its_own_bundle(
    digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path
) -> None:
    plain = words(panel(digits_bundle, tmp_path))
    assert "None of these bundles is pruned. edgekit prune B --out B2 --speedup 2" in plain
    small = pruned(digits_bundle, prune_figures)
    child = tmp_path / "child.edge"
    with Bundle.create(child) as draft:
        for file in small.manifest.files:
            draft.write(file, small.file(file).read_bytes())
        draft.manifest = small.manifest
    later = Bundle.open(child)
    later = later.extend({}, later.entry("eval", {}, {"top1": 0.94}))
    text = words(panel([later, small], tmp_path))
    assert text.count("fewer MACs") == 1
    assert "Pruning digits 4.00x" in text


def test_rounds_of_fine_tuning_follow_each_other(prune_figures: dict[str, Any]) -> None:
    prune_figures["curve"] = [{"epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 1, 2, 3)]
    drawn = curve(History("prune", "", "", {}, None, prune_figures))
    assert drawn is not None
    assert drawn.epochs == (1, 2, 3, 4, 5)


def test_hostile_names_stay_text(digits_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> None:
    prune_figures["layers"][0] |= {"layer": HOSTILE, "kind": HOSTILE}
    prune_figures |= {"kept": {HOSTILE: HOSTILE}, "sensitivity": {HOSTILE: [[1, 0], [0.5, 1]]}, "device": HOSTILE}
    prune_figures["cuts"][0] |= {"layer": HOSTILE, "kind": HOSTILE}
    markup = panel(pruned(digits_bundle, prune_figures), tmp_path)
    assert "<img" not in markup
    assert words(markup).count(HOSTILE) >= 6


@pytest.mark.slow
def test_what_prune_writes_is_what_the_panel_reads(trained_bundle: Bundle, tmp_path: Path) -> None:
    from edgekit.pruning import prune

    small = prune(trained_bundle, out=tmp_path / "small.edge", keep=0.75, epochs=1)
    run = pruning_of(small.manifest.history[-1])
    assert run is not None
    assert run.layers
    assert run.steps
    assert run.sensitivity
    assert any(layer.before != layer.after for layer in run.layers)
    markup = panel(small, tmp_path)
    assert "x fewer MACs, measured" in words(markup)
    assert all(layer.name in markup for layer in run.layers)
    assert {line["name"] for line in chart(markup)["lines"]} == set(dict(run.sensitivity))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["layer", "kind", "before", "after", "kl"]), x),
        max_leaves=8,
    )
)
def test_figures_of_any_shape_are_read_or_ignored(value: Any) -> None:
    names = ("layers", "cuts", "kept", "sensitivity", "device", "macs_share", "sparse_layers", "on")
    run = pruning_of(History("prune", "", "", {}, None, {**dict.fromkeys(names, value), "speedup": 2}))
    assert run is not None
    assert run.gain
    assert all(len(layer.after) in (0, len(layer.before)) and layer.channels() is not None for layer in run.layers)


@given(st.floats(0, 1e6))
def test_ticks_hold_all_and_do_not_touch(most: float) -> None:
    ticks = kl_ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most
    roots = [tick**0.5 / ticks[-1] ** 0.5 for tick in ticks]
    assert all(b - a > 0.1 for a, b in itertools.pairwise(roots))
    assert len(ticks) >= 4


def test_other_stages_are_no_pruning() -> None:
    assert pruning_of(History("train", "", "", {}, None, {"speedup": 2.0})) is None
    assert pruning_of(History("prune", "", "", {}, None, {"speedup": "fast"})) is None
