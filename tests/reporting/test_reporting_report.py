"""The report through its command and function: figures in their places, gaps named, hostile text harmless."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, INT8_GRAPH, MANIFEST, REPORT, Bundle
from edgekit.errors import BundleError, DataError, OutputExists, UsageError
from edgekit.manifest import History
from edgekit.reporting import report
from edgekit.reporting.figures import confusion, curve, number, own_entries, pareto

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
CALIBRATED = {
    "tensors": {"r1": {"minimum": 0.0, "maximum": 6.5, "scale": 0.04}, "r2": {"minimum": -1.0, "maximum": 3.0}},
    "layers": [{"name": f"conv{i}", "alone_db": 40.0 - i, "int8": i != 2} for i in range(3)],
}
HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>&amp;\'"'


class Page(HTMLParser):
    """The text of each section, all start tags, and the data of each chart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.charts: list[tuple[str, dict[str, Any]]] = []
        self._section, self._skip = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._skip = tag in ("script", "style")
        if tag == "section":
            self._section = found["id"] or ""
        if tag == "canvas":
            self.charts.append((found["data-kind"] or "", json.loads(found["data-chart"] or "")))

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text[self._section] = self.text.get(self._section, "") + " ".join(data.split()) + " "


def bench_file(p50: float, device: str = "Cortex-A78AE", graph: str = FLOAT_GRAPH, **more: Any) -> bytes:
    samples = p50 * (1 + np.random.default_rng(0).gamma(2, 0.05, 400))
    counts, edges = np.histogram(samples, bins=40)
    ranks = {"p50": p50, "p90": float(np.quantile(samples, 0.9)), "p99": float(np.quantile(samples, 0.99))}
    result = {"scenario": "single-stream", "backend": "onnxruntime", "graph": graph, "latency_ms": ranks, "cv": 0.02}
    result |= {"throughput": 1000 / p50, "iterations": 400, "trustworthy": True, "reasons": []}
    result |= {
        "histogram": {"bins": edges.tolist(), "counts": counts.tolist(), "over": 2},
        "device": {"cpu": device, "cores": 6},
    }
    return json.dumps({**result, **more}).encode()


@pytest.fixture
def family(digits_bundle: Bundle) -> list[Bundle]:
    """A trained bundle and its quantized child, with every kind of figure the report knows."""
    points = [{"epoch": i + 1, "loss": 2.0 / (i + 1), "top1": 1 - 0.4 / (i + 1), "lr": 1e-3} for i in range(6)]
    matrix = (np.eye(10, dtype=int) * 98 + np.roll(np.eye(10, dtype=int) * 2, 1, 1)).tolist()
    figures = {"top1": 0.98, "parameters": 38122, "macs": 2_300_000, "curve": points, "confusion": matrix}
    trained = remake(
        digits_bundle, "base", history=(History("train", "2026-01-02T03:04:05Z", "0.1.0", {"lr": 0.003}, None, figures),)
    )
    entry = trained.entry("quantize", {"calib": "digits"}, {"top1": 0.975, "snr_db": 31.5})
    child = remake(trained, "small", history=(*trained.manifest.history, entry), int8=True)
    engines = {
        "engines/rtx-ada.engine": b"e" * 5000,
        "engines/rtx-ada.json": json.dumps(
            {"target": "rtx-ada", "tensorrt": "1.7.0.12", "precision": "int8", "seconds": 1.5}
        ).encode(),
        "engines/jetson-orin-nano.kit.zip": b"k" * 900,
    }
    trained = trained.extend({"bench/onnxruntime-float-single-stream.json": bench_file(0.25)})
    child = child.extend({"bench/onnxruntime-int8-single-stream.json": bench_file(0.15, graph=INT8_GRAPH), **engines})
    return [trained, child]


def remake(
    source: Bundle, name: str, *, int8: bool = False, calibration: dict[str, Any] = CALIBRATED, **changes: Any
) -> Bundle:
    """A copy of a bundle with another manifest; ``int8`` adds the quantized graph's files."""
    with Bundle.create(source.path.with_name(f"{name}.edge")) as draft:
        for file in source.manifest.files:
            if "/" not in file:
                draft.write(file, source.file(file).read_bytes())
        if int8:
            draft.write(INT8_GRAPH, source.file(FLOAT_GRAPH).read_bytes())
            draft.write(CALIBRATION, json.dumps(calibration).encode())
        draft.manifest = msgspec.structs.replace(source.manifest, name=name, **changes)
    return Bundle.open(source.path.with_name(f"{name}.edge"))


def write_front(study: Path, rows: list[dict[str, Any]], /, **more: Any) -> Path:
    """A study with what `edgekit search --objective accuracy,latency` leaves beside it."""
    study.write_text("{}")
    found = {"kind": "edgekit front", "study": study.name, "latency": "ONNX Runtime, one thread, a CPU", "prediction": False}
    file = study.with_name(f"{study.name}.front.json")
    file.write_text(json.dumps({**found, "notes": [], "trials": rows, **more}))
    return file


def front_row(trial: int, accuracy: float | None, latency: float, bundle: str | None = None, **more: Any) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "latency_ms": latency, "macs": 1000, "parameters": 50, "size_bytes": 4000}
    setting = {"width": 0.5, "size": 28, "keep": 0.25, "precision": "int8"}
    return {"trial": trial, **figures, **setting, "front": bundle is not None, "bundle": bundle, **more}


def test_a_study_stands_for_the_bundles_on_its_front(cli: Callable[..., Any], family: list[Bundle], tmp_path: Path) -> None:
    """Named as itself or as its JSON; a bundle that is named too stands once; paths out of the folder are not followed."""
    rows = [front_row(1, 0.9, 3.0, "base.edge"), front_row(0, 0.8, 0.2, "small.edge"), front_row(2, 0.7, 1.0)]
    rows += [front_row(3, None, 1.0), front_row(4, 0.95, 4.0, "../elsewhere.edge"), front_row(5, 0.96, 5.0, "gone.edge")]
    shutil.copytree(family[0].path, tmp_path.parent / "elsewhere.edge", dirs_exist_ok=True)
    assert family[0].path.parent == tmp_path
    file = write_front(tmp_path / "x.study", rows, notes=["int8 is slow here"])
    for named in (file, file.with_name("x.study")):
        answer = cli("report", named, family[0].path, "--out", tmp_path / "r.html", "--json")
        assert answer.code == 0, answer.err
        assert answer.json["bundles"] == [str(tmp_path / "small.edge"), str(tmp_path / "base.edge")]
    page = Page(tmp_path / "r.html")
    assert "5 trials, 1 failed" in page.text["search"]
    assert "int8 is slow here" in page.text["search"]
    assert "0: 0.5x, 28 px, keep 0.25, int8 80.00 % 0.2 ms" in page.text["search"]
    (chart,) = [data for kind, data in page.charts if kind == "front"]
    assert [(point["x"], point["y"]) for point in chart["step"]] == [(0.2, 80.0), (3.0, 90.0), (4.0, 95.0), (5.0, 96.0)]
    assert [point["name"][:2] for point in chart["others"]] == ["2:"]
    assert chart["logarithmic"] is not None


def test_a_front_without_bundles_is_one_clear_error(cli: Callable[..., Any], tmp_path: Path) -> None:
    write_front(tmp_path / "x.study", [front_row(1, 0.9, 3.0, "gone.edge")])
    done = cli("report", tmp_path / "x.study", "--out", tmp_path / "r.html")
    assert done.code == 1
    assert done.err.splitlines()[0] == "error: the bundles on the front of x.study are gone"
    (tmp_path / "y.front.json").write_text('{"kind": 3}')
    assert "holds no front" in cli("report", tmp_path / "y.front.json", "--out", tmp_path / "r.html").err


def test_a_hostile_front_is_harmless(family: list[Bundle], tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [front_row(0, 0.9, 1.0, "base.edge", width=HOSTILE, size=[1], keep=None, precision=HOSTILE)]
    odd += [front_row(1, 0.5, 2.0, "small.edge", macs=HOSTILE, parameters=[], size_bytes=None), {"trial": {}}]
    odd[1]["trial"] = HOSTILE
    write_front(tmp_path / "x.study", odd, study=HOSTILE, latency=HOSTILE, notes=[HOSTILE, 3])
    report(tmp_path / "x.study", out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "<img" not in text.split("<body>")[1].split("<footer>")[0]


def test_the_command_writes_one_file_without_network(cli: Callable[..., Any], family: list[Bundle], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    answer = cli("report", *[b.path for b in family], "--out", out, "--json")
    assert answer.code == 0
    paths = [str(b.path) for b in family]
    assert answer.json == {"bundle": paths[0], "report": str(out), "bundles": paths, "size_bytes": out.stat().st_size}
    assert out.stat().st_size < 1_000_000
    page = Page(out)
    links = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset", "action", "data")
    ]
    assert all(value and value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"@import|url\(|sourceMappingURL", out.read_text(encoding="utf-8").split("<body>")[0])
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert "default-src 'none'" in policy
    assert "sha256-" in policy


def test_every_figure_stands_in_its_section(family: list[Bundle], tmp_path: Path) -> None:
    report(family, out=tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
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
    assert first["points"] == [{"name": "base", "x": 0.25, "y": 98.0}, {"name": "small", "x": 0.15, "y": 97.5}]
    assert first["front"] == [{"x": 0.15, "y": 97.5}, {"x": 0.25, "y": 98.0}]


def test_the_covered_range_is_that_of_the_quantizer_in_the_graph(tiny_bundle: Bundle, tmp_path: Path) -> None:
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
    bundle = remake(tiny_bundle, "quantized", int8=True, calibration=calibrated)
    report(bundle, out=tmp_path / "r.html")
    drawn = dict(Page(tmp_path / "r.html").charts)["ranges"]
    assert drawn["names"] == ["plain", "shared", "shifted", "bad"]
    assert drawn["covered"] == [[-127, 127], [-2.54, pytest.approx(5.0)], [pytest.approx(-2.08), pytest.approx(8.08)], None]
    assert drawn["channels"] == [1, 1, 2, 1]
    assert drawn["clipped"] == [0.0, 35.3, 0.0, 0.0]  # 8 - 5 of 8.5


def test_what_was_not_measured_is_said_in_its_place(tiny_bundle: Bundle, tmp_path: Path) -> None:
    report(tiny_bundle, out=tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
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


def test_a_childs_accuracy_is_never_its_parents(family: list[Bundle], tmp_path: Path) -> None:
    history = [*family[1].manifest.history]
    history[-1] = msgspec.structs.replace(history[-1], figures={"snr_db": 30.0})
    child = remake(family[1], "unjudged", history=tuple(history))
    report(child, out=tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "98.00" not in page.text["bundles"]
    assert "not measured" in page.text["summary"]
    assert "No confusion matrix" in page.text["confusion"]


def test_accuracy_on_other_data_does_not_replace_the_one_that_compares(digits_bundle: Bundle, tmp_path: Path) -> None:
    made = History("train", "2026-01-02T03:04:05Z", "0.1.0", {"data": "digits"}, None, {"top1": 0.98})
    base = remake(digits_bundle, "base", history=(made,))
    base = base.extend({}, base.entry("eval", {"data": "digits"}, {"top1": 0.9712}))
    base = base.extend({}, base.entry("eval", {"data": "folder:odd"}, {"top1": 0.5}))
    report(base, out=tmp_path / "r.html")
    assert "97.12" in Page(tmp_path / "r.html").text["bundles"]
    other = remake(base, "other", history=(msgspec.structs.replace(made, figures={}), base.manifest.history[-1]))
    report(other, out=tmp_path / "other.html")
    assert "50.00" in Page(tmp_path / "other.html").text["bundles"]


def test_a_readers_character_errors_stand_beside_its_lines(digits_bundle: Bundle, tmp_path: Path) -> None:
    made = History("train", "2026-01-02T03:04:05Z", "0.1.0", {"data": "labels"}, None, {"top1": 0.9, "cer": 0.0123})
    report(remake(digits_bundle, "reader", history=(made,)), out=tmp_path / "r.html")
    assert "CER 1.23" in Page(tmp_path / "r.html").text["bundles"]


def test_latencies_of_different_devices_are_not_compared(family: list[Bundle], tmp_path: Path) -> None:
    other = family[1].extend({"bench/onnxruntime-int8-single-stream.json": bench_file(0.01, device="other")})
    report([family[0], other], out=tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "Needs at least two bundles with accuracy and latency" in page.text["tradeoff"]
    assert [kind for kind, _ in page.charts].count("histogram") == 2


def test_a_stalled_run_is_drawn_from_its_samples(family: list[Bundle], tmp_path: Path) -> None:
    samples = [0.2 + 0.001 * i for i in range(100)] + [50.0]
    stalled = {"histogram": {"bins": [0.2, 25.0, 50.0], "counts": [100, 1], "over": 0}, "samples_ms": samples}
    file = bench_file(0.25, latency_ms={"p50": 0.25, "p90": 0.29, "p99": 0.3}, **stalled)
    report(family[0].extend({"bench/onnxruntime-float-single-stream.json": file}), out=tmp_path / "r.html")
    chart = next(data for kind, data in Page(tmp_path / "r.html").charts if kind == "histogram")
    assert len(chart["shares"]) == 40
    assert sum(chart["shares"]) == pytest.approx(100)
    assert (chart["edges"][0], chart["edges"][-1]) == (0.2, pytest.approx(0.299))


def test_doubtful_latencies_say_why(family: list[Bundle], tmp_path: Path) -> None:
    doubtful = bench_file(0.25, trustworthy=False, reasons=["the warm-up did not settle"])
    report(family[0].extend({"bench/onnxruntime-float-single-stream.json": doubtful}), out=tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "Not trustworthy: the warm-up did not settle" in page.text["latency"]
    assert "unsteady" in page.text["bundles"]
    assert "base · unsteady" in page.text["summary"]


def test_hostile_names_stay_text(digits_bundle: Bundle, tmp_path: Path) -> None:
    matrix = np.full((10, 10), 1).tolist()
    figures = {
        "top1": 0.5,
        "confusion": matrix,
        "note": HOSTILE,
        "curve": [{"epoch": i, f"loss{HOSTILE}": 1.0} for i in (1, 2)],
    }
    entry = History(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, figures)
    labels = tuple(f"{i}{HOSTILE}" for i in range(10))
    bundle = remake(digits_bundle, "hostile", labels=labels, history=(entry,))
    bundle = bundle.extend({"bench/x.json": bench_file(1.0, backend=HOSTILE, trustworthy=False, reasons=[HOSTILE])})
    report(bundle, out=tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}, {}]
    assert not [tag for tag, attrs in page.tags if tag == "img" or any(key.startswith("on") for key in attrs)]
    assert HOSTILE in page.text["provenance"]
    assert len(page.charts) == 2


def test_malformed_derived_files_count_as_absent(digits_bundle: Bundle, tmp_path: Path) -> None:
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
    page = Page(tmp_path / "r.html")
    assert "No histogram was stored" in page.text["latency"]
    assert "0.5 ms" in page.text["latency"]
    assert "No confusion matrix" in page.text["confusion"]


def test_many_classes_are_listed_not_drawn(digits_bundle: Bundle, tmp_path: Path) -> None:
    labels = tuple(f"class {i}" for i in range(40))
    matrix = (np.eye(40, dtype=int) * 5).tolist()
    matrix[3][7] = 4
    entry = digits_bundle.entry("eval", {}, {"top1": 0.98, "confusion": matrix})
    report(remake(digits_bundle, "many", labels=labels, history=(entry,)), out=tmp_path / "r.html")
    text = Page(tmp_path / "r.html").text["confusion"]
    assert "40 classes are too many" in text
    assert "class 3 class 7 4" in text


def test_equal_names_are_numbered(family: list[Bundle], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / family[0].path.name
    shutil.copytree(family[0].path, twin)
    report([family[0], twin], out=tmp_path / "r.html")
    assert "base (1)" in Page(tmp_path / "r.html").text["bundles"]


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


def test_explanations_are_embedded_by_file_name_only(family: list[Bundle], tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "why"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "b.png").write_bytes(b"no picture")
    images = [{"source": HOSTILE, "label": "3", "score": 0.5, "overlay": "a.png"}]
    images += [{"source": "x", "overlay": name} for name in ("../secret.png", "b.png", "gone.png")]
    (folder / "explanation.json").write_text(json.dumps({"method": "lime", "images": images}))
    report(family, out=tmp_path / "r.html", explanations=folder)
    page = Page(tmp_path / "r.html")
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert "3 50.00 % lime" in page.text["explanations"]
    with pytest.raises(DataError, match="holds no explanations"):
        report(family, out=tmp_path / "r.html", explanations=tmp_path)


def test_many_pictures_do_not_swell_the_page(family: list[Bundle], tmp_path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (330, 330, 3), np.uint8)
    folder = tmp_path / "why"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(noise).save(folder / f"{i}.png")
    images = [{"source": f"{i}.png", "overlay": f"{i}.png"} for i in range(6)]
    (folder / "explanation.json").write_text(json.dumps({"method": "lime", "images": images}))
    size = report(family, out=tmp_path / "r.html", explanations=folder)["size_bytes"]
    page = Page(tmp_path / "r.html")
    shown = [tag for tag, _ in page.tags].count("img")
    assert 0 < shown < 6
    assert f"{6 - shown} more were left out" in page.text["explanations"]
    assert size < 2_500_000


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
