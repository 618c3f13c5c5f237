"""Pictures of explanations on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import Bundle
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
    with pytest.raises(DataError, match="holds no explanations"):
        report(family, out=tmp_path / "r.html", explanations=tmp_path)


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
