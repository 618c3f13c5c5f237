"""Bundles that several files compare."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit
from edgekit.bundle import Bundle


@pytest.fixture
def int8(tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> Bundle:
    """x -> conv1 - relu1 - conv2 - add (of relu1) - pool - flatten - gemm, all three layers int8."""
    return edgekit.quantize(tiny_bundle, out=tmp_path / "int8.edge", calib=calibration_folder, share=1.0, method="mse")
