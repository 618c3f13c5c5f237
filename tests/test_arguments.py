"""Arguments of kinds that no verb takes: one line that names them, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import Bundle
from edgekit.benchmarking import bench_pair, compare
from edgekit.errors import EdgekitError

NO_PATHS = [None, 3, ["a", "b"], "", "a\0b", b"bytes", object()]
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "bench": lambda good, bad: edgekit.bench(bad, seconds=0.1),
    "bench against": lambda good, bad: edgekit.bench(good, seconds=0.1, against=bad or [], save=False),
    "bench history": lambda good, bad: edgekit.bench(good, seconds=0.1, history=bad or [], save=False),
    "bench plot": lambda good, bad: edgekit.bench(good, seconds=0.1, plot=bad or [], save=False),
    "bench_pair": lambda good, bad: bench_pair(good, bad, seconds=0.1),
    "compare": lambda good, bad: compare(bad),
    "compare other": lambda good, bad: compare(good, other=bad or []),
    "compare data": lambda good, bad: compare(good, data=bad or []),
    "compare plot": lambda good, bad: compare(good, plot=bad or []),
    "explain": lambda good, bad: edgekit.explain(bad, [good], out="out"),
    "explain out": lambda good, bad: edgekit.explain(good, [good], out=bad),
    "explain images": lambda good, bad: edgekit.explain(good, bad, out="out"),
    "report": lambda good, bad: edgekit.report([bad], out="report.html"),
    "report out": lambda good, bad: edgekit.report([good], out=bad),
    "report explanations": lambda good, bad: edgekit.report([good], out="report.html", explanations=bad or object()),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_path_is_refused_before_any_work(
    digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    for bad in NO_PATHS:
        with pytest.raises(EdgekitError) as caught:
            CALLS[call](digits_bundle.path, bad)
        assert "\n" not in str(caught.value), bad
        assert not list(here.iterdir()), bad


@pytest.mark.parametrize("backend", [[1], {}, None, 3])
def test_a_backend_is_a_name(digits_bundle: Bundle, backend: Any) -> None:
    with pytest.raises(EdgekitError, match="backend"):
        edgekit.bench(digits_bundle.path, backend=backend, seconds=0.1, save=False)


@pytest.mark.parametrize("samples", [True, "1000", 99.5, None])
def test_samples_are_a_whole_number(digits_bundle: Bundle, tmp_path: Path, samples: Any) -> None:
    with pytest.raises(EdgekitError, match="samples"):
        edgekit.explain(digits_bundle, [tmp_path], out=tmp_path / "out", samples=samples)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/report.html", "/dev/null"])
def test_where_no_report_can_be_written_is_told(digits_bundle: Bundle, out: str) -> None:
    with pytest.raises(EdgekitError, match=out):
        edgekit.report([digits_bundle.path], out=out)
