"""What a result and a verbose build hold beside latencies, in its place on the page; and what is missing of it, said there."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.reporting import report

HOSTILE = "<img src=x onerror=alert(1)>"
RESULT: dict[str, Any] = {
    "backend": "onnxruntime",
    "scenario": "multi-stream",
    "graph": "model.onnx",
    "latency_ms": {"p50": 0.5, "p90": 0.6, "p95": 0.65, "p99": 0.7, "p999": 0.81, "min": 0.4, "max": 0.9},
    "key": "p99",
    "streams": 4,
    "jitter_ms": 0.0123,
    "cold_start_ms": 45.6,
    "process_start_ms": 1012.4,
    "energy": {
        "whole": "VDD_IN",
        "watts": {"VDD_IN": 5.0, "VDD_CPU": 2.0},
        "mj_per_inference": {"VDD_IN": 2.5, "VDD_CPU": 1.0},
    },
    "temperatures": {"before": {"gpu": 51.0, "cpu": 50.0}, "after": {"gpu": 58.0, "cpu": 52.0}},
    "memory": {"rss_mb": 74.4, "model_mb": 12.1},
}


def layers(count: int) -> list[dict[str, Any]]:
    return [{"layer": f"conv{i}", "op": "Conv", "us": float(i + 1), "share": 0.01, "output": "1x8x4x4"} for i in range(count)]


def section(bundle: Bundle, files: dict[str, Any], name: str, out: Path) -> str:
    """The text of one section of the page of a bundle with these files."""
    bundle = bundle.extend({file: json.dumps(data).encode() for file, data in files.items()})
    report(bundle, out=out)
    page = out.read_text(encoding="utf-8")
    assert HOSTILE not in page
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found is not None
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", found[1])).split())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.html"


def test_what_was_measured_stands_with_its_latency(digits_bundle: Bundle, out: Path) -> None:
    text = section(digits_bundle, {"bench/a.json": RESULT}, "latency", out)
    for words in ("p95 0.65 ms", "p99.9 0.81 ms", "jitter 0.0123 ms", "process start 1 012 ms", "4 streams"):
        assert words in text
    assert "energy 2.5 mJ an inference (VDD_IN)" in text  # rails that the whole one feeds are not added up
    assert "heat 51 → 58 °C (gpu)" in text
    assert "memory 74 MB, 12.1 by the model" in text
    assert re.search(r'class="key"[^>]*><dt>p99</dt>', out.read_text(encoding="utf-8"))


def test_sensors_that_are_not_there_are_said(digits_bundle: Bundle, out: Path) -> None:
    blind = {**RESULT, "energy": None, "temperatures": {"before": {}, "after": {}}}
    text = section(digits_bundle, {"bench/a.json": blind}, "latency", out)
    assert "energy no power rail to read" in text
    assert "heat no sensor to read" in text


def test_each_layer_has_its_time_and_the_rest_one_row(digits_bundle: Bundle, out: Path) -> None:
    profile = {"layers": [*layers(20), {"layer": HOSTILE, "op": HOSTILE, "us": 99.0, "share": 0.5}, {"us": "x"}, 3]}
    text = section(digits_bundle, {"bench/a.json": {**RESULT, "profile": {**profile, "run_us": 300.0}}}, "latency", out)
    assert "21 layers, 0.3 ms a run while each is timed" in text
    assert f"{HOSTILE} {HOSTILE} 99.0 50.0 % conv19 Conv 20.0" in text
    assert "5 others 15.0" in text
    assert "--layers" not in text


def test_layers_that_nobody_timed_name_the_command(digits_bundle: Bundle, tiny_bundle: Bundle, out: Path) -> None:
    assert "No layers were timed. edgekit bench B --layers" in section(digits_bundle, {"bench/a.json": RESULT}, "latency", out)
    timed = digits_bundle.extend({"bench/a.json": json.dumps({**RESULT, "profile": {"layers": layers(3)}}).encode()})
    report([timed, tiny_bundle], out=out)
    assert f"No layers were timed of {tiny_bundle.path.name.removesuffix('.edge')}." in out.read_text(encoding="utf-8")


def test_results_without_a_picture_say_why(digits_bundle: Bundle, out: Path) -> None:
    broken = {**RESULT, "latency_ms": {"p50": float("nan")}}
    still = {**RESULT, "latency_ms": {**RESULT["latency_ms"], "min": 0.5, "max": 0.5}}
    still["histogram"] = {"bins": [0.0, 0.5, 1.0], "counts": [0, 9], "over": 0}
    text = section(digits_bundle, {"bench/nan.json": broken, "bench/still.json": still}, "latency", out)
    assert "bench/nan.json holds no latency that is a number. edgekit bench B" in text
    assert "Every run took the same time" in text


def test_an_engines_layers_stand_with_their_precision(digits_bundle: Bundle, out: Path) -> None:
    rows = [{"name": f"c{i}", "type": "CONSTANT", "precision": "float", "outputs": [[4]]} for i in range(9)]
    rows += [{"name": HOSTILE, "type": "CONVOLUTION", "precision": "float", "outputs": [[-1, 8, 4, 4]]}]
    rows += [{"name": "q", "type": "QUANTIZE", "precision": "int8", "outputs": [[1]]}]
    files: dict[str, Any] = {"engines/rtx-ada.json": {"target": "rtx-ada"}, "engines/rtx-ada.engine": 1}
    assert "build B --target rtx-ada --verbose" in section(digits_bundle, files, "engines", out)
    bundle = Bundle.open(digits_bundle.path)
    text = section(bundle, {"engines/rtx-ada.layers.json": {"source": "network", "layers": rows}}, "engines", out)
    assert "11 layers of the network, before fusion" in text
    assert "1 float, 1 int8" in text
    assert f"{HOSTILE} CONVOLUTION float ?x8x4x4" in text
    inspected = {"Name": "k", "LayerType": "gemm", "Outputs": [{"Dimensions": [1, 8], "Format/Datatype": "Int8"}]}
    bundle = Bundle.open(digits_bundle.path)
    text = section(bundle, {"engines/rtx-ada.layers.json": {"source": "engine", "layers": [inspected, 3]}}, "engines", out)
    assert "1 layers of the engine, after fusion" in text
    assert "k gemm Int8 1x8" in text


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def test_samples_stand_behind_the_cells_of_their_own_matrix(digits_bundle: Bundle, out: Path) -> None:
    matrix = [[9 if i == j else int((i, j) == (3, 5)) for j in range(10)] for i in range(10)]
    judged = digits_bundle.extend({}, digits_bundle.entry("eval", {"data": "digits"}, {"top1": 0.9, "confusion": matrix}))
    odd = [{"id": HOSTILE, "score": 0.5, "text": HOSTILE}, {"png": "javascript:1"}, {"png": PNG + HOSTILE}, {"series": [3]}, 7]
    cells = [{"truth": 3, "answer": 5, "samples": odd}, {"truth": 10, "answer": 0, "samples": odd}, {"truth": "0"}, 3]
    text = section(judged, {"eval/examples.json": {"data": "digits", "cells": cells}}, "confusion", out)
    assert "A framed cell shows samples" in text
    page = out.read_text(encoding="utf-8")
    assert page.count("<button") == 1
    raw = re.search(r'data-examples="([^"]*)"', page)
    assert raw is not None
    assert json.loads(html.unescape(raw[1])) == {"3/5": [odd[0]]}
    other = {"data": "folder:odd", "cells": cells}
    text = section(Bundle.open(judged.path), {"eval/examples.json": other}, "confusion", out)
    assert "No samples were kept beside this matrix. edgekit eval B --data SPEC" in text
    assert "<button" not in out.read_text(encoding="utf-8")


def test_bundles_that_a_chart_lacks_are_named_with_the_reason(digits_bundle: Bundle, tiny_bundle: Bundle, out: Path) -> None:
    matrix = [[int(i == j) for j in range(10)] for i in range(10)]
    figures = {"top1": 0.9, "confusion": matrix}
    names = ("here", "there", "elsewhere", "unjudged")
    bundles = []
    for name in names:
        path = digits_bundle.path.with_name(f"{name}.edge")
        shutil.copytree(tiny_bundle.path if name == "unjudged" else digits_bundle.path, path)
        bundle = Bundle.open(path)
        cpu = "another" if name == "elsewhere" else "the same"
        file = {"bench/a.json": json.dumps({**RESULT, "device": {"cpu": cpu, "cores": 2}}).encode()}
        entry = bundle.entry("eval", {"data": "digits"}, {} if name == "unjudged" else figures)
        bundles.append(bundle.extend(file, entry))
    report(bundles, out=out)
    page = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", out.read_text(encoding="utf-8"))).split())
    assert "elsewhere , its latency was measured under other conditions edgekit bench B" in page
    assert "unjudged , no accuracy was measured on these weights edgekit eval B --data SPEC" in page
    assert "No confusion matrix was measured on the weights of unjudged." in page
    way = "onnxruntime · multi-stream · another, 2 cores"
    assert f"elsewhere was measured otherwise (another device), which does not compare: {way}" in page
