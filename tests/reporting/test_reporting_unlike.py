"""Bundles of unlike data on one page, and bundles with damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BundleError
from edgekit.manifest import History
from edgekit.reporting import report
from edgekit.reporting.figures import rounded
from edgekit.reporting.serve import Watched


def trained(data: str, top1: float) -> tuple[History, ...]:
    return (History("train", f"2026-01-02T03:04:0{len(data) % 10}Z", "0.1.0", {"data": data}, None, {"top1": top1}),)


def test_bundles_of_unlike_data_have_a_front_each(
    digits_bundle: Bundle, tmp_path: Path, pages: Any, remade: Any, benched: Any
) -> None:
    known = {"a": ("digits", 0.9), "b": ("digits", 0.8), "mail": ("spam", 0.99), "mail2": ("spam", 0.7), "walk": ("watch", 1.0)}
    bundles = [remade(digits_bundle, name, history=trained(*facts)) for name, facts in known.items()]
    bundles.append(remade(digits_bundle, "c", history=trained("digits", 0.95)))
    speeds = (3.0, 2.0, 1.5, 1.0, 0.5, 9.0)
    bundles = [b.extend({"bench/x.json": benched(p50)}) for b, p50 in zip(bundles, speeds, strict=True)]
    report(bundles, out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "Unlike data: digits (a, b, c); spam (mail, mail2); watch (walk). " in page.text[""]
    assert "the summary is of digits" in page.text[""]
    assert "95.00 % c" in page.text["summary"]
    assert "2 ms b" in page.text["summary"]
    chart = next(data for kind, data in page.charts if kind == "scatter")
    assert chart["groups"] == ["digits", "spam", "watch"]
    assert [[point["x"] for point in front] for front in chart["fronts"]] == [[2.0, 3.0, 9.0], [1.0, 1.5], [0.5]]
    assert {point["name"]: point["group"] for point in chart["points"]}["mail2"] == 1
    report([bundles[0], bundles[2]], out=tmp_path / "r.html")
    assert not [kind for kind, _ in pages(tmp_path / "r.html").charts if kind == "scatter"]
    report(bundles[:2], out=tmp_path / "r.html")
    assert "Unlike data" not in pages(tmp_path / "r.html").text[""]


def test_damaged_derived_files_are_named_and_hide_nothing_else(
    cli: Callable[..., Any], family: list[Bundle], tmp_path: Path, pages: Any
) -> None:
    bench, engine = "bench/onnxruntime-int8-single-stream.json", "engines/rtx-ada.engine"
    for name in (bench, engine):
        path = family[1].path / name
        path.write_bytes(path.read_bytes()[:-9])
    (family[0].path / "bench/onnxruntime-float-single-stream.json").unlink()
    answer = cli("report", *[b.path for b in family], "--out", tmp_path / "r.html")
    assert answer.code == 0, answer.err
    page = pages(tmp_path / "r.html")
    why = "(its sha256 is not the manifest's)"
    assert f"Damaged, so not shown of small: {bench} {why}; {engine} {why}" in page.text[""]
    assert "of base: bench/onnxruntime-float-single-stream.json (it is missing)" in page.text[""]
    assert "No latency was measured" in page.text["latency"]
    assert "jetson-orin-nano" in page.text["engines"]
    assert "rtx-ada small" not in page.text["engines"]


def test_a_served_bundle_with_a_damaged_result_is_shown_and_mends(family: list[Bundle]) -> None:
    path = family[1].path / "bench/onnxruntime-int8-single-stream.json"
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    watched = Watched([family[1].path])
    assert b"Damaged, so not shown of small" in watched.page()
    version = watched.version()
    path.write_bytes(good)
    assert watched.version() != version
    assert b"Damaged, so" not in watched.page()


def test_a_link_out_of_a_bundle_is_still_refused(family: list[Bundle], tmp_path: Path) -> None:
    path = family[1].path / "bench/onnxruntime-int8-single-stream.json"
    path.rename(tmp_path / "x.json")
    path.symlink_to(tmp_path / "x.json")
    with pytest.raises(BundleError, match="symbolic link"):
        report(family[1], out=tmp_path / "r.html")


def test_thousands_are_written_out(digits_bundle: Bundle, tmp_path: Path, pages: Any, benched: Any) -> None:
    bundle = digits_bundle.extend({"bench/x.json": benched(2430.0, scenario="server", rate=1e6, cold_start_ms=99_999.6)})
    report(bundle, out=tmp_path / "r.html")
    text = pages(tmp_path / "r.html").text
    assert "p50 2 430 ms" in text["latency"]  # a narrow space of no break, which split() made a common one
    assert "1 000 000 queries a second" in text["latency"]
    assert "e+0" not in text["latency"] + text["summary"] + text["bundles"]
    assert [rounded(value) for value in (0.00012, 0.1234, 99.96, 999.4, 999.7)] == [
        "0.00012",
        "0.123",
        "100",
        "999",
        "1\u202f000",
    ]


def test_what_differs_of_another_measurement_is_said(family: list[Bundle], tmp_path: Path, pages: Any, benched: Any) -> None:
    family[1].extend({"bench/onnxruntime-int8-single-stream.json": benched(0.3, graph=INT8_GRAPH, scenario="server")})
    report([bundle.path for bundle in family], out=tmp_path / "r.html")
    text = pages(tmp_path / "r.html").text["bundles"]
    assert "small was measured otherwise (another scenario), which does not compare: onnxruntime · server" in text
    assert "elsewhere" not in text


def test_curves_are_named_after_the_bundle_trained_and_the_others_listed(
    cli: Callable[..., Any], family: list[Bundle], tiny_bundle: Bundle, tmp_path: Path, pages: Any
) -> None:
    """However often the trained one was measured since."""
    for i in range(4):
        family[0] = family[0].extend({}, family[0].entry("bench", {"threads": i}, {}))
    report([*family, tiny_bundle], out=tmp_path / "r.html")
    text = pages(tmp_path / "r.html").text["training"]
    assert "train · base" in text
    assert f"No curve is in the history of {tiny_bundle.path.name.removesuffix('.edge')}:" in text
    assert ": 1 bundle, " in cli("report", tiny_bundle.path, "--out", tmp_path / "one.html").out


def test_figures_of_a_graph_that_does_not_ship_are_none_of_the_bundles(
    family: list[Bundle], tmp_path: Path, pages: Any, benched: Any
) -> None:
    base, small = family
    small = small.extend(
        {"bench/onnxruntime-float-single-stream.json": benched(0.2)}, drop=["bench/onnxruntime-int8-single-stream.json"]
    )
    figures = {"top1": 0.995, "confusion": [[9 * (i == j) for j in range(10)] for i in range(10)]}
    small.extend({}, small.entry("eval", {"data": "digits", "graph": FLOAT_GRAPH}, figures))
    report([base.path, small.path], out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    row = " ".join(page.text["bundles"].partition("small")[2].split())
    assert "97.50 % another graph" in row
    assert "0.2 ms" not in row
    assert "99.50 %" not in page.text["summary"]
    assert "90 of 90 right" not in page.text["confusion"]
    assert "0.25 ms base" in page.text["summary"]
    assert not [data for kind, data in page.charts if kind == "scatter" and "Latency" in data["x"]]
    report([small.path], out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "No latency was measured of the graphs that ship" in page.text["bundles"]
    assert "None" not in page.text["bundles"]


def test_a_slow_model_answers_more_than_none_a_second(family: list[Bundle], tmp_path: Path, pages: Any, benched: Any) -> None:
    slow = family[0].extend({"bench/onnxruntime-float-single-stream.json": benched(2500.0)})
    report([slow.path], out=tmp_path / "r.html")
    assert "per second 0.4 " in pages(tmp_path / "r.html").text["latency"]
