"""Digits as a camera gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import GOLDEN, Bundle
from edgekit.runtime.golden import load_golden, save_golden
from edgekit.scanner import Captured


def frames(digits: list[Any], count: int, begin: int = 0) -> Iterator[Captured]:
    for seq in range(begin, begin + count):
        yield Captured(digits[seq % len(digits)], "cam", seq, 1e9 + seq / 10, "", 100 + seq / 10)


def renamed(bundle: Bundle, path: Path, labels: tuple[str, ...] | None = None, wrong: bool = False, **manifest: Any) -> Path:
    """The same model, another digest. ``wrong``: its golden outputs are others."""
    with Bundle.create(path) as draft:
        for name in bundle.manifest.files:
            draft.write(name, bundle.read(name))
        inputs, outputs = load_golden(bundle)
        draft.write(GOLDEN, save_golden({"x": inputs["x"][:4]}, {"y": outputs["y"][:4] + wrong}))
        draft.manifest = msgspec.structs.replace(bundle.manifest, labels=labels or bundle.manifest.labels, **manifest)
    return path
