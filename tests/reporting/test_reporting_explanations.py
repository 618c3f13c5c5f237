"""Pictures of explanations on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import DataError
from edgekit.reporting import report

HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>&amp;\'"'


def test_explanations_are_embedded_by_file_name_only(family: list[Bundle], tmp_path: Path, pages: Any) -> None:
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
    page = pages(tmp_path / "r.html")
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert "3 50.00 % lime" in page.text["explanations"]
    assert "of an unnamed bundle, which is none of this page" in page.text["explanations"]
    report(family, out=tmp_path / "r.html", explanations=[folder, folder])
    assert [tag for tag, _ in pages(tmp_path / "r.html").tags].count("img") == 2
    with pytest.raises(DataError, match="holds no explanations"):
        report(family, out=tmp_path / "r.html", explanations=tmp_path)


def test_pictures_say_what_they_are_of_and_whether_to_believe_them(family: list[Bundle], tmp_path: Path, pages: Any) -> None:
    from PIL import Image

    def shown(digest: str, **figures: Any) -> str:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        checks = {"deletion_auc": 0.2, "misplaced_auc": 0.4, "insertion_auc": 0.8, "misplaced_insertion_auc": 0.5}
        record = {"method": "lime", "graph": FLOAT_GRAPH, "bundle": "/elsewhere/x.edge", "digest": digest}
        image = {"source": "four.png", "label": "4", "overlay": "a.png", **checks, **figures}
        (tmp_path / "explanation.json").write_text(json.dumps({**record, "images": [image]}))
        report(family, out=tmp_path / "r.html", explanations=tmp_path)
        text: str = pages(tmp_path / "r.html").text["explanations"]
        return text

    good = shown(family[0].digest)
    assert "base · model.onnx · lime" in good
    assert "deletion 0.20 (misplaced 0.40), insertion 0.80 (misplaced 0.50)" in good
    assert "no better than the same" not in good
    assert "none of this page" not in good
    assert "of x, which is none of this page" in shown("0" * 64)
    assert "no better than the same map misplaced, by deletion" in shown(family[0].digest, deletion_auc=0.4)
    assert "no better than the same map misplaced, by insertion" in shown(family[0].digest, insertion_auc=0.3)
    few = shown(family[0].digest, misplaced_auc=None, misplaced_insertion_auc=None, unchecked="too few")
    assert "deletion 0.20, insertion 0.80" in few
    assert "not checked: too few" in few
    assert "10/20 free dollars" in shown(family[0].digest, source="You have won 10/20 free dollars")
    assert "explains 9" in shown(family[0].digest, explained="9")
    assert "explains" not in shown(family[0].digest, explained="4")
    assert "photos" not in shown(family[0].digest, source="photos/a.png")


def test_many_pictures_do_not_swell_the_page(family: list[Bundle], tmp_path: Path, pages: Any) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (330, 330, 3), np.uint8)
    folder = tmp_path / "why"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(noise).save(folder / f"{i}.png")
    images = [{"source": f"{i}.png", "overlay": f"{i}.png"} for i in range(6)]
    (folder / "explanation.json").write_text(json.dumps({"method": "lime", "images": images}))
    size = report(family, out=tmp_path / "r.html", explanations=folder)["size_bytes"]
    page = pages(tmp_path / "r.html")
    shown = [tag for tag, _ in page.tags].count("img")
    assert 0 < shown < 6
    assert f"{6 - shown} more were left out" in page.text["explanations"]
    assert size < 2_500_000
