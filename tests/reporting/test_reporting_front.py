"""A study stands for the bundles on its front; its trials are drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.bundle import Bundle
from edgekit.reporting import report

HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>&amp;\'"'


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


def test_a_study_stands_for_the_bundles_on_its_front(
    cli: Callable[..., Any], family: list[Bundle], tmp_path: Path, pages: Any
) -> None:
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
    page = pages(tmp_path / "r.html")
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
