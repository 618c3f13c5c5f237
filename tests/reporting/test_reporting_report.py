"""The report through its command and function: figures in their places, gaps named, hostile text harmless."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle import INT8_GRAPH, REPORT, Bundle
from edgekit.errors import OutputExists, UsageError
from edgekit.manifest import History
from edgekit.reporting import report

SECTIONS = [
    "summary",
    "bundles",
    "tradeoff",
    "training",
    "confusion",
    "latency",
    "pruning",
    "quantization",
    "engines",
    "explanations",
    "provenance",
]


def test_the_command_writes_one_file_without_network(
    cli: Callable[..., Any], family: list[Bundle], tmp_path: Path, pages: Any
) -> None:
    out = tmp_path / "r.html"
    answer = cli("report", *[b.path for b in family], "--out", out, "--json")
    assert answer.code == 0
    paths = [str(b.path) for b in family]
    assert answer.json == {"bundle": paths[0], "report": str(out), "bundles": paths, "size_bytes": out.stat().st_size}
    assert out.stat().st_size < 1_000_000
    page = pages(out)
    links = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset", "action", "data")
    ]
    assert all(value and value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"@import|url\(|sourceMappingURL", out.read_text(encoding="utf-8").split("<body>")[0])
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert "default-src 'none'" in policy
    assert "sha256-" in policy


def test_every_figure_stands_in_its_section(family: list[Bundle], tmp_path: Path, pages: Any) -> None:
    report(family, out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    assert "98.00 % base" in page.text["summary"]
    assert "0.15 ms small" in page.text["summary"]
    assert "rtx-ada" in page.text["summary"]
    assert "train → quantize" in page.text["bundles"]
    assert "97.50 %" in page.text["bundles"]
    assert "0.25 ms" in page.text["bundles"]
    assert "onnxruntime · single-stream · Cortex-A78AE, 6 cores" in page.text["bundles"]
    assert "train · base" in page.text["training"]
    assert "980 of 1000 right" in page.text["confusion"]
    assert "2.00 %" in page.text["confusion"]
    assert "2 slower runs lie right of the drawing" in page.text["latency"]
    assert "31.5 dB" in page.text["quantization"]
    assert "1.7.0.12" in page.text["engines"]
    assert "1.50 s" in page.text["engines"]
    assert "the device compiles it" in page.text["engines"]
    assert family[0].digest[:12] in page.text["provenance"]
    assert family[1].manifest.files[INT8_GRAPH] in page.text["provenance"]
    kinds = [kind for kind, _ in page.charts]
    assert kinds == ["scatter", "scatter", "curves", "curves", "histogram", "histogram", "bars", "ranges"]
    charts = dict(page.charts)
    assert charts["bars"]["names"] == ["conv2", "conv1", "conv0"]
    assert charts["bars"]["float"] == [True, False, False]
    assert charts["ranges"]["values"] == [[0.0, 6.5], [-1.0, 3.0]]
    assert charts["ranges"]["covered"] == [[-127 * 0.04, 127 * 0.04], None]
    assert charts["ranges"]["inside"] == [[0.0, 127 * 0.04], [-1.0, 3.0]]
    assert charts["ranges"]["clipped"] == [21.8, 0.0]  # 6.5 - 5.08 of 6.5
    first = page.charts[0][1]
    sure = {"doubtful": False, "group": 0}
    assert first["points"] == [{"name": "base", "x": 0.25, "y": 98.0, **sure}, {"name": "small", "x": 0.15, "y": 97.5, **sure}]
    assert first["fronts"] == [[{"x": 0.15, "y": 97.5}, {"x": 0.25, "y": 98.0}]]


def test_the_figures_of_charts_stand_in_tables(family: list[Bundle], tmp_path: Path, pages: Any) -> None:
    report(family, out=tmp_path / "r.html")
    text = {section: " ".join(words.split()) for section, words in pages(tmp_path / "r.html").text.items()}
    assert "Epoch loss 1 2 2 1" in text["training"]
    assert "Layer SNR with only this layer in int8 (dB) conv2 38 left in float conv1 39" in text["quantization"]
    assert "Tensor Seen from to int8 covers from to Clipped (%) r1 0 6.5 -5.08 5.08 21.8 r2 -1 3 – – 0" in text["quantization"]
    assert "From (ms) To (ms) Runs (%)" in text["latency"]


def test_the_covered_range_is_that_of_the_quantizer_in_the_graph(
    tiny_bundle: Bundle, tmp_path: Path, pages: Any, remade: Any
) -> None:
    """Where an input is shifted and scaled channel by channel, the tensor's own scale is not in the graph."""
    seen = {"minimum": 0.0, "maximum": 8.0, "scale": 1.0}
    calibrated = {
        "tensors": {
            "plain": {**seen, "minimum": -1.0},
            "shifted": seen,
            "shared": {**seen, "minimum": -0.5},
            "bad": {**seen, "maximum": 7.0},
        },
        "groups": {"plain": "plain", "shifted": "shifted", "shared": "shared", "other": "shared", "bad": "bad"},
        "quantizers": {
            "shifted": {"scale": 0.02, "shift": [2.0, 3.0], "factor": [1.0, 0.5]},  # -0.54..4.54 and -2.08..8.08
            "shared": {"scale": 0.02},
            "other": {"scale": 0.02, "shift": [2.46]},  # -0.08..5
            "bad": {"scale": 0.02, "factor": [0.0, 1.0]},
        },
    }
    bundle = remade(tiny_bundle, "quantized", int8=True, calibration=calibrated)
    report(bundle, out=tmp_path / "r.html")
    drawn = dict(pages(tmp_path / "r.html").charts)["ranges"]
    assert drawn["names"] == ["plain", "shared", "shifted", "bad"]
    assert drawn["covered"] == [[-127, 127], [-2.54, pytest.approx(5.0)], [pytest.approx(-2.08), pytest.approx(8.08)], None]
    assert drawn["channels"] == [1, 1, 2, 1]
    assert drawn["clipped"] == [0.0, 35.3, 0.0, 0.0]  # 8 - 5 of 8.5


def test_what_was_not_measured_is_said_in_its_place(tiny_bundle: Bundle, tmp_path: Path, pages: Any) -> None:
    report(tiny_bundle, out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert not page.charts
    cures = {
        "summary": "edgekit eval B --data SPEC",
        "tradeoff": "edgekit bench B",
        "training": "edgekit train",
        "confusion": "edgekit eval",
        "latency": "edgekit bench B",
        "pruning": "edgekit prune",
        "quantization": "edgekit quantize",
        "engines": "edgekit build",
        "explanations": "edgekit explain",
    }
    assert {section for section, cure in cures.items() if cure in page.text[section]} == set(cures)


def test_a_childs_accuracy_is_never_its_parents(family: list[Bundle], tmp_path: Path, pages: Any, remade: Any) -> None:
    history = [*family[1].manifest.history]
    history[-1] = msgspec.structs.replace(history[-1], figures={"snr_db": 30.0})
    child = remade(family[1], "unjudged", history=tuple(history))
    report(child, out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "98.00" not in page.text["bundles"]
    assert "not measured" in page.text["summary"]
    assert "No confusion matrix" in page.text["confusion"]


def test_accuracy_on_other_data_does_not_replace_the_one_that_compares(
    digits_bundle: Bundle, tmp_path: Path, pages: Any, remade: Any
) -> None:
    made = History("train", "2026-01-02T03:04:05Z", "0.1.0", {"data": "digits"}, None, {"top1": 0.98})
    base = remade(digits_bundle, "base", history=(made,))
    base = base.extend({}, base.entry("eval", {"data": "digits"}, {"top1": 0.9712}))
    base = base.extend({}, base.entry("eval", {"data": "folder:odd"}, {"top1": 0.5}))
    report(base, out=tmp_path / "r.html")
    assert "97.12" in pages(tmp_path / "r.html").text["bundles"]
    other = remade(base, "other", history=(msgspec.structs.replace(made, figures={}), base.manifest.history[-1]))
    report(other, out=tmp_path / "other.html")
    assert "50.00" in pages(tmp_path / "other.html").text["bundles"]


def test_a_readers_character_errors_stand_beside_its_lines(
    digits_bundle: Bundle, tmp_path: Path, pages: Any, remade: Any
) -> None:
    made = History("train", "2026-01-02T03:04:05Z", "0.1.0", {"data": "labels"}, None, {"top1": 0.9, "cer": 0.0123})
    report(remade(digits_bundle, "reader", history=(made,)), out=tmp_path / "r.html")
    assert "CER 1.23" in pages(tmp_path / "r.html").text["bundles"]


def test_latencies_of_different_devices_are_not_compared(
    family: list[Bundle], tmp_path: Path, pages: Any, benched: Any
) -> None:
    other = family[1].extend({"bench/onnxruntime-int8-single-stream.json": benched(0.01, cpu="other")})
    report([family[0], other], out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "Needs at least two bundles with accuracy and a latency" in page.text["tradeoff"]
    assert [kind for kind, _ in page.charts].count("histogram") == 2


@pytest.mark.parametrize(
    "other",
    [{"threads": 8}, {"batch": 4}, {"streams": 2}, {"rate": 10}, {"version": "2"}, {"device": {"cpu": "A", "governor": "x"}}],
    ids=str,
)
def test_latencies_of_other_conditions_are_not_compared(
    family: list[Bundle], tmp_path: Path, pages: Any, benched: Any, other: dict[str, Any]
) -> None:
    same = {"threads": 1, "batch": 1, "streams": 1, "rate": 5, "version": "1", "device": {"cpu": "A", "governor": "y"}}
    for bundle, changed in zip(family, ({}, other), strict=True):
        file = next(name for name in bundle.manifest.files if name.startswith("bench/"))
        bundle.extend({file: benched(0.2, **{"graph": bundle.graph, **same, **changed})})
    report([bundle.path for bundle in family], out=tmp_path / "r.html")
    text = pages(tmp_path / "r.html").text
    assert "a latency of equal conditions" in text["tradeoff"]
    what = "other conditions"  # the device is the same: its governor differs
    assert f"was measured otherwise ({what})" in text["bundles"]


def test_times_of_offline_batches_are_no_latency(family: list[Bundle], tmp_path: Path, pages: Any, benched: Any) -> None:
    for bundle in family:
        file = next(name for name in bundle.manifest.files if name.startswith("bench/"))
        bundle.extend({file: benched(60.0, scenario="offline", batch=64)})
    report([bundle.path for bundle in family], out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "a latency of equal conditions" in page.text["tradeoff"]
    assert "60" not in page.text["summary"] + page.text["bundles"]
    assert "batch 64" in page.text["latency"]


def test_a_doubtful_latency_is_a_hollow_point(family: list[Bundle], tmp_path: Path, pages: Any, benched: Any) -> None:
    file = benched(0.2, trustworthy=False, reasons=["throttled"])
    family[0].extend({"bench/onnxruntime-float-single-stream.json": file})
    report([bundle.path for bundle in family], out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert [point["doubtful"] for point in page.charts[0][1]["points"]] == [True, False]
    assert "not to be trusted, see Latency : base" in page.text["tradeoff"]


def test_a_stalled_run_is_drawn_from_its_samples(family: list[Bundle], tmp_path: Path, pages: Any, benched: Any) -> None:
    samples = [0.2 + 0.001 * i for i in range(100)] + [50.0]
    stalled = {"histogram": {"bins": [0.2, 25.0, 50.0], "counts": [100, 1], "over": 0}, "samples_ms": samples}
    file = benched(0.25, latency_ms={"p50": 0.25, "p90": 0.29, "p99": 0.3}, **stalled)
    report(family[0].extend({"bench/onnxruntime-float-single-stream.json": file}), out=tmp_path / "r.html")
    chart = next(data for kind, data in pages(tmp_path / "r.html").charts if kind == "histogram")
    assert "1 or more slower runs lie right of the drawing" in pages(tmp_path / "r.html").text["latency"]
    assert len(chart["shares"]) == 40
    assert sum(chart["shares"]) == pytest.approx(100)
    assert (chart["edges"][0], chart["edges"][-1]) == (0.2, pytest.approx(0.299))


def test_doubtful_latencies_say_why(family: list[Bundle], tmp_path: Path, pages: Any, benched: Any) -> None:
    doubtful = benched(0.25, trustworthy=False, reasons=["the warm-up did not settle"])
    report(family[0].extend({"bench/onnxruntime-float-single-stream.json": doubtful}), out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "Not trustworthy: the warm-up did not settle" in page.text["latency"]
    assert "base is unsteady: the warm-up did not settle" in page.text["bundles"]
    assert "base · unsteady" in page.text["summary"]


def test_many_classes_are_listed_not_drawn(digits_bundle: Bundle, tmp_path: Path, pages: Any, remade: Any) -> None:
    labels = tuple(f"class {i}" for i in range(40))
    matrix = (np.eye(40, dtype=int) * 5).tolist()
    matrix[3][7] = 4
    entry = digits_bundle.entry("eval", {}, {"top1": 0.98, "confusion": matrix})
    report(remade(digits_bundle, "many", labels=labels, history=(entry,)), out=tmp_path / "r.html")
    text = pages(tmp_path / "r.html").text["confusion"]
    assert "40 classes are too many" in text
    assert "class 3 class 7 4" in text


def test_equal_names_are_numbered(family: list[Bundle], tmp_path: Path, pages: Any) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / family[0].path.name
    shutil.copytree(family[0].path, twin)
    report([family[0], twin], out=tmp_path / "r.html")
    assert "base (1)" in pages(tmp_path / "r.html").text["bundles"]


def test_an_earlier_report_is_replaced_and_a_foreign_file_is_not(family: list[Bundle], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    report(family[0], out=out)
    first = out.read_bytes()
    report(family, out=out)
    assert out.read_bytes() != first
    foreign = tmp_path / "thesis.html"
    foreign.write_text("<p>years of work</p>")
    with pytest.raises(OutputExists):
        report(family, out=foreign)
    assert foreign.read_text() == "<p>years of work</p>"
    with pytest.raises(UsageError, match="is a folder"):
        report(family, out=tmp_path)


def test_a_report_inside_its_bundle_is_a_file_of_the_bundle(family: list[Bundle]) -> None:
    report(family[0], out=family[0].path / REPORT)
    assert REPORT in Bundle.open(family[0].path).manifest.files
    with pytest.raises(UsageError, match="inside a bundle"):
        report(family[0], out=family[0].path / "notes.html")
