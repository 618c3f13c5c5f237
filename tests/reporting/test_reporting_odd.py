"""Hostile, malformed and damaged bundles: harmless, absent, or refused; never the end of a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import FLOAT_GRAPH, MANIFEST, Bundle
from edgekit.errors import BundleError, DataError, UsageError
from edgekit.manifest import History
from edgekit.reporting import report
from edgekit.reporting.figures import confusion, curve, number, own_entries, pareto

HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>&amp;\'"'


def test_hostile_names_stay_text(digits_bundle: Bundle, tmp_path: Path, pages: Any, benched: Any, remade: Any) -> None:
    matrix = np.full((10, 10), 1).tolist()
    figures = {
        "top1": 0.5,
        "confusion": matrix,
        "note": HOSTILE,
        "curve": [{"epoch": i, f"loss{HOSTILE}": 1.0} for i in (1, 2)],
    }
    entry = History(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, figures)
    labels = tuple(f"{i}{HOSTILE}" for i in range(10))
    bundle = remade(digits_bundle, "hostile", labels=labels, history=(entry,))
    bundle = bundle.extend({"bench/x.json": benched(1.0, backend=HOSTILE, trustworthy=False, reasons=[HOSTILE])})
    report(bundle, out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}, {}]
    assert not [tag for tag, attrs in page.tags if tag == "img" or any(key.startswith("on") for key in attrs)]
    assert HOSTILE in page.text["provenance"]
    assert len(page.charts) == 2


def test_malformed_derived_files_count_as_absent(digits_bundle: Bundle, tmp_path: Path, pages: Any) -> None:
    broken = {
        "bench/a.json": b"not json",
        "bench/b.json": b'{"latency_ms": {"p50": "fast"}, "histogram": {"bins": [3, 1], "counts": ["x"]}}',
        "bench/c.json": b'{"latency_ms": {"p50": 0.5}, "histogram": {"bins": [0, 1, 2], "counts": [1]}, "device": "cpu"}',
        "bench/d.json": b'[{"latency_ms": NaN}]',
        "engines/t.json": b"[]",
        "engines/t.engine": b"",
    }
    figures = {"top1": float("nan"), "confusion": [[1, 2], [3]], "curve": "none"}
    bundle = digits_bundle.extend(broken, digits_bundle.entry("eval", {}, figures))
    report(bundle, out=tmp_path / "r.html")
    page = pages(tmp_path / "r.html")
    assert "No histogram was stored" in page.text["latency"]
    assert "0.5 ms" in page.text["latency"]
    assert "No confusion matrix" in page.text["confusion"]


BENCH = {"scenario": "single-stream", "backend": "onnxruntime", "latency_ms": {"p50": 0.5, "p90": 0.6, "p99": 0.7}}


@pytest.mark.parametrize(
    "odd",
    [
        json.dumps({**BENCH, "backend": "\ud800", "reasons": ["\udfff"], "trustworthy": False}),
        json.dumps({**BENCH, "energy": {"mj_per_inference": {"\ud800": 10**400}}})[:-1] + ', "cv": ' + "9" * 400 + "}",
        json.dumps({**BENCH, "histogram": {"bins": [0, 1, 2], "counts": [1e308, 1e308]}, "samples_ms": [0, 5e-324, 1e-323]}),
        json.dumps(BENCH)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=["half a surrogate", "400 digits", "sums that overflow", "nested too deep"],
)
def test_one_odd_file_does_not_end_the_page(odd: str, digits_bundle: Bundle, tmp_path: Path, pages: Any) -> None:
    files = dict.fromkeys(("bench/a.json", "engines/t.json", "engines/t.layers.json", "eval/examples.json"), odd.encode())
    bundle = digits_bundle.extend({"bench/b.json": json.dumps(BENCH).encode(), "engines/t.engine": b"", **files})
    report(bundle, out=tmp_path / "r.html")
    assert "0.5 ms" in pages(tmp_path / "r.html").text["latency"]
    for name in ("explanation.json", "x.front.json"):
        (tmp_path / name).write_text(odd)
        named = {"explanations": tmp_path} if name == "explanation.json" else {}
        with pytest.raises(DataError, match="holds no"):
            report(bundle if named else tmp_path / name, out=tmp_path / "r.html", **named)


def test_a_grid_without_ends_is_not_drawn(tiny_bundle: Bundle, tmp_path: Path, pages: Any, remade: Any) -> None:
    seen = {"minimum": 0.0, "maximum": 8.0}
    scales = {"huge": {"scale": 1e308}, "split": {"scale": 1e29, "factor": [1e-300]}, "far": {"scale": 0.1, "shift": [10**400]}}
    calibrated = {"tensors": dict.fromkeys(scales, seen), "quantizers": scales}
    report(remade(tiny_bundle, "odd", int8=True, calibration=calibrated), out=tmp_path / "r.html")
    assert "Infinity" not in (tmp_path / "r.html").read_text(encoding="utf-8").split("<script>")[0]
    assert dict(pages(tmp_path / "r.html").charts)["ranges"]["covered"][:2] == [None, None]


def test_missing_and_damaged_bundles_are_refused(cli: Callable[..., Any], family: list[Bundle], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert cli("report", tmp_path / "none.edge", "--out", out).code == 1
    assert cli("report", "--out", out).code == 2
    graph = family[0].path / FLOAT_GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    outcome = cli("report", family[0].path, "--out", out)
    assert outcome.code == 1
    assert "damaged" in outcome.err
    assert not out.exists()
    (family[1].path / MANIFEST).write_text("{}")
    with pytest.raises(BundleError):
        report(family[1], out=out)
    with pytest.raises(UsageError):
        report([], out=out)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["epoch", "loss", "top1", "x"]), x),
    )
)
def test_figures_of_any_shape_are_read_or_ignored(value: Any) -> None:
    entry = History("train", "", "", {}, None, {"curve": value, "confusion": value, "top1": value})
    found = curve(entry)
    assert found is None or len(found.epochs) >= 2
    matrix = confusion([entry], 0)
    assert matrix is None or all(len(row) == len(matrix) for row in matrix)
    assert number(entry.figures, "top1") is None or isinstance(value, float)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_pareto_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto(points)
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert set(front) == set(points) - beaten


def test_own_entries_start_at_the_last_maker() -> None:
    stages = ["train", "eval", "prune", "eval", "bench"]
    history = [History(stage, "", "") for stage in stages]
    assert [entry.stage for entry in own_entries(history)] == ["prune", "eval", "bench"]
