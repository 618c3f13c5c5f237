"""A sample to explain."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgekit.data import load


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    frame = load("digits").test.read(420)
    Image.fromarray(frame).save(tmp_path / "four.png")
    return tmp_path / "four.png"
