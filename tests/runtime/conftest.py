"""Bundles with preprocessing around the tiny graph, and one whose weights were touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.manifest import ImagePreprocessing

Rewrite = Callable[..., Bundle]


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """``rewrite(bundle, name, graph=bytes, **manifest)``: a copy with another graph or other manifest fields."""

    def write(bundle: Bundle, name: str, graph: bytes | None = None, **changes: Any) -> Bundle:
        with Bundle.create(tmp_path / name) as draft:
            draft.write(FLOAT_GRAPH, graph or bundle.file(FLOAT_GRAPH).read_bytes())
            draft.write(GOLDEN, bundle.file(GOLDEN).read_bytes())
            draft.manifest = msgspec.structs.replace(bundle.manifest, files={}, **changes)
        return Bundle.open(tmp_path / name)

    return write


@pytest.fixture
def photo_bundle(tiny_bundle: Bundle, rewrite: Rewrite) -> Callable[[str], Bundle]:
    """``photo_bundle(fit)``: 32x32 RGB in, ten labels out."""

    def make(fit: Any) -> Bundle:
        spec = ImagePreprocessing(32, 32, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), fit=fit)
        labels = tuple("abcdefghij")
        return rewrite(tiny_bundle, f"{fit}.edge", task="image-classification", preprocessing=spec, labels=labels)

    return make
