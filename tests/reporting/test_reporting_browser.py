"""The report in a real browser: no complaint, no request, every chart drawn, in light, dark and on a phone."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.reporting import report

pytestmark = pytest.mark.slow
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
INKED = """[...document.querySelectorAll("canvas")].map((c) =>
  c.getContext("2d").getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > 0).length)"""
HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>'


@pytest.fixture
def page(digits_bundle: Bundle, tiny_bundle: Bundle, prune_figures: dict[str, Any], tmp_path: Path) -> Path:
    counts, edges = np.histogram(np.random.default_rng(0).gamma(9, 0.01, 500), bins=30)
    bench = {"backend": "onnxruntime", "scenario": "single-stream", "latency_ms": {"p50": 0.09, "p90": 0.13, "p99": 0.18}}
    bench["histogram"] = {"bins": edges.tolist(), "counts": counts.tolist(), "over": 0}
    figures = {
        "top1": 0.9,
        "confusion": np.eye(10, dtype=int).tolist(),
        "curve": [{"epoch": i, "loss": 1 / i, HOSTILE + "loss": 2 / i, "top1": 1 - 0.5 / i} for i in range(1, 9)],
    }
    prune_figures["sensitivity"][HOSTILE] = [[1.0, 0.0], [0.5, 0.2]]
    prune_figures["layers"][0]["layer"] = HOSTILE
    del prune_figures["curve"]
    pruned = digits_bundle.extend({}, digits_bundle.entry("prune", {}, prune_figures))
    entry = pruned.entry("eval", {"note": HOSTILE}, figures)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    files = {"bench/a.json": json.dumps(bench).encode(), "explanations/a.png": picture.getvalue()}
    bundle = pruned.extend(files, entry)
    out = tmp_path / "report.html"
    report([bundle, tiny_bundle], out=out)
    return out


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_it_opens_quietly_and_draws_everything(browser: Any, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("[...document.querySelectorAll('section')].map((s) => s.id)") == SECTIONS
    canvases = browser.evaluate("document.querySelectorAll('canvas').length")
    assert canvases == int(browser.evaluate("document.documentElement.dataset.drawn")) == 4
    assert all(count > 500 for count in browser.evaluate(INKED))
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # only tables scroll sideways
    assert browser.evaluate("[...document.images].map((i) => i.naturalWidth)") == [8]
    assert browser.evaluate("window.hacked === undefined")
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 128")
    assert dark == (scheme == "dark")


def test_charts_follow_the_scheme_and_print_opens_the_details(browser: Any, page: Path) -> None:
    browser.open(page)
    ink = "document.querySelector('canvas').toDataURL()"
    light = browser.evaluate(ink)
    browser.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.evaluate(f"new Promise((done) => setTimeout(() => done({ink}), 100))") != light
    count = "document.querySelectorAll('details:not([open]):not(.data)').length"
    before = browser.evaluate(count)
    assert before > 0
    script = f"addEventListener('beforeprint', () => {{ window.inked = {INKED}; window.closed = {count}; }})"
    browser.evaluate(script)  # while the browser shows it dark
    browser.call("Page.printToPDF")
    assert all(count > 500 for count in browser.evaluate("window.inked"))
    assert browser.evaluate("window.closed") == 0
    assert browser.evaluate(count) == before  # as it was for who reads on
    assert browser.complaints() == []


def test_paper_holds_all_and_its_charts_are_drawn_for_it(browser: Any, family: list[Bundle], tmp_path: Path) -> None:
    report(family, out=tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    widest = "Math.max(...[...document.querySelectorAll('canvas')].map((c) => c.width))"
    assert browser.evaluate(widest) > 340
    browser.evaluate(f"addEventListener('beforeprint', () => {{ window.widest = {widest}; }})")
    browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.7)
    assert browser.evaluate("window.widest") <= 340  # two beside each other on A4
    assert browser.evaluate(widest) > 340
    browser.call("Emulation.setDeviceMetricsOverride", width=688, height=900, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", media="print")
    right = "Math.max(...[...document.querySelectorAll('section, .card, .tag')].map((e) => e.getBoundingClientRect().right))"
    assert browser.evaluate(right) <= 686
    browser.call("Emulation.setEmulatedMedia", media="")


CONTRASTS = """(() => {
  const channels = (css) => css.match(/[\\d.]+/g).slice(0, 3).map((v) => (css.startsWith("color") ? Number(v) : v / 255));
  const light = (css) => channels(css).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
  return [...document.querySelectorAll(".matrix tbody td")].map((cell) => {
    const style = getComputedStyle(cell), [a, b] = [light(style.color), light(style.backgroundColor)];
    return Math.max(a, b) / Math.min(a, b);
  });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_counts_of_every_shade_can_be_read(browser: Any, digits_bundle: Bundle, tmp_path: Path, scheme: str) -> None:
    """WCAG AA of text: 4.5:1."""
    matrix = [[(10 * i if i == j else 100 - 10 * i if j == (i + 1) % 10 else 0) for j in range(10)] for i in range(10)]
    matrix[9] = [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    entry = digits_bundle.entry("eval", {"data": "digits"}, {"top1": 0.9, "confusion": matrix})
    report(digits_bundle.extend({}, entry), out=tmp_path / "r.html")
    browser.open(tmp_path / "r.html", scheme=scheme)
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) == 100
    assert min(contrasts) >= 4.5


def test_a_click_on_a_cell_shows_its_samples(browser: Any, digits_bundle: Bundle, tmp_path: Path) -> None:
    matrix = [[9 if i == j else int((i, j) == (3, 5)) for j in range(10)] for i in range(10)]
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    png = {"id": "a", "score": 0.9, "png": base64.b64encode(picture.getvalue()).decode()}
    others = [{"id": "b", "score": None, "text": HOSTILE}, {"id": "c", "score": 0.5, "series": [[1, 2, 0], [0, 0, 0]]}]
    cells = [{"truth": 3, "answer": 5, "samples": [png]}, {"truth": 4, "answer": 4, "samples": others}]
    file = json.dumps({"data": "digits", "cells": cells}).encode()
    entry = digits_bundle.entry("eval", {"data": "digits"}, {"top1": 0.9, "confusion": matrix})
    report(digits_bundle.extend({"eval/examples.json": file}, entry), out=tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    shown = "[...document.querySelectorAll('.samples figure')].map((f) => f.firstChild.tagName)"
    assert browser.evaluate(shown) == ["IMG"]  # the mistake, from the start
    assert browser.evaluate("document.querySelector('.samples img').naturalWidth") == 8
    browser.evaluate("document.querySelector('[data-key=\"4/4\"]').click()")
    assert browser.evaluate(shown) == ["BLOCKQUOTE", "svg"]
    assert browser.evaluate("document.querySelector('.chosen').textContent") == "4, right but least sure"
    assert browser.evaluate("document.querySelectorAll('[aria-pressed=true]').length") == 1
    assert browser.evaluate("window.hacked === undefined")
    assert browser.complaints() == []


def test_labels_at_the_edges_are_not_cut(browser: Any, digits_bundle: Bundle, remade: Any, tmp_path: Path) -> None:
    """A point at 100% and the last mark of a narrow histogram; what is drawn stays on its canvas."""
    made, other = [], remade(digits_bundle, "other")
    for bundle, p50, top1 in ((digits_bundle, 0.1, 1.0), (other, 0.1001, 0.999)):
        result: dict[str, Any] = {"backend": "onnxruntime", "scenario": "server"}
        result["latency_ms"] = {"p50": p50, "p90": 0.198, "p99": 0.1999}
        result["histogram"] = {"bins": np.linspace(0.0, 0.2, 21).tolist(), "counts": [5] * 20, "over": 0}
        made.append(bundle.extend({"bench/a.json": json.dumps(result).encode()}, bundle.entry("eval", {}, {"top1": top1})))
    report(made, out=tmp_path / "r.html")
    record = """(() => {
      const out = [], draw = CanvasRenderingContext2D.prototype.fillText;
      CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
        const chart = Chart.getChart(this.canvas), width = this.measureText(text).width;
        const left = this.textAlign === "center" ? x - width / 2 : this.textAlign === "right" ? x - width : x;
        const isOwn = /^(p[0-9]+|digits.*|other.*)$/.test(text);
        if (isOwn && (left < 0 || left + width > chart.width + 0.5 || y < 7)) out.push([text, left, y]);
        return draw.call(this, text, x, y, ...rest);
      };
      Object.values(Chart.instances).forEach((chart) => chart.draw());
      CanvasRenderingContext2D.prototype.fillText = draw;
      return out;
    })()"""
    for width in (1280, 360):
        browser.open(tmp_path / "r.html", width)
        assert browser.evaluate(record) == []


def test_no_axis_begins_below_nothing(browser: Any, digits_bundle: Bundle, remade: Any, tmp_path: Path) -> None:
    """Small sizes beside a large one, and a share of all: a margin around them would reach below 0 and above 100%."""
    made, other = [], remade(digits_bundle, "other")
    for bundle, p50, top1 in ((digits_bundle, 0.01, 1.0), (other, 1.3, 0.9)):
        result = {"backend": "onnxruntime", "scenario": "single-stream", "latency_ms": {"p50": p50}}
        made.append(bundle.extend({"bench/a.json": json.dumps(result).encode()}, bundle.entry("eval", {}, {"top1": top1})))
    report(made, out=tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    scales = browser.evaluate("(({ x, y }) => [x.min, y.max])(Chart.getChart(document.querySelector('canvas')).scales)")
    assert scales[0] >= 0
    assert scales[1] <= 100


def test_a_chart_that_cannot_be_drawn_leaves_the_others(browser: Any, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    at = text.index("<canvas")
    start = text.index('data-chart="', at) + len('data-chart="')
    page.write_text(text[:start] + "[-Infinity]" + text[text.index('"', start) :], encoding="utf-8")
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('canvas').length") == 3
    assert all(count > 500 for count in browser.evaluate(INKED))
    assert "cannot be drawn" in browser.evaluate("document.body.innerText")
    assert browser.complaints() == []


def test_a_script_from_elsewhere_does_not_run(browser: Any, page: Path) -> None:
    page.write_text(
        page.read_text(encoding="utf-8").replace("</body>", "<script>window.hacked = 1</script></body>"), encoding="utf-8"
    )
    browser.open(page)
    assert browser.evaluate("window.hacked === undefined")
    assert browser.complaints()  # the policy's refusal


@pytest.mark.parametrize("slowest", [2.0, 400.0])
def test_a_front_is_drawn(browser: Any, page: Path, digits_bundle: Bundle, slowest: float) -> None:
    setting = {"width": 0.5, "size": 28, "keep": 0.5, "precision": "int8", "size_bytes": 10, "macs": 1, "parameters": 1}
    rows = [
        {"trial": i, "accuracy": 0.5 + i / 50, "latency_ms": slowest / 4 ** (5 - i), "front": i != 2, **setting}
        for i in range(6)
    ]
    rows[0] |= {"bundle": digits_bundle.path.name, "precision": HOSTILE}
    found = {"kind": "edgekit front", "study": "few.study", "latency": HOSTILE, "trials": rows}
    file = digits_bundle.path.parent / "few.study.front.json"
    file.write_text(json.dumps(found))
    report([file], out=page)
    browser.open(page)
    assert browser.complaints() == []
    assert browser.evaluate("window.hacked === undefined")
    assert "search" in browser.evaluate("[...document.querySelectorAll('section')].map((s) => s.id)")
    assert all(count > 500 for count in browser.evaluate(INKED))
