"""`Preview`: the newest frame of each camera with what was read on it, as a JPEG for whoever looks.

The scanning thread hands a frame over only while somebody looks; drawing and compressing happen in the asking thread.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from edgekit.errors import MissingExtra
from edgekit.preprocess import Frame

from .reading import Answer, Region
from .sources import Captured

__all__ = ["Preview"]

#: A frame is kept while the last look is no longer ago than this.
LOOKING_S = 2.0
#: The pictures are made no more often than this, and no larger.
PERIOD_S = 0.1
MOST_PIXELS = 1280
#: Cameras kept at once.
MOST_SOURCES = 16
QUALITY = 80
_CODE, _TEXT, _REGION, _BAND = (0, 214, 143), (255, 255, 255), (255, 190, 60), (16, 20, 24)


class Shot(NamedTuple):
    """One frame and its answer. ``number`` counts all shots, so that a viewer knows what is new."""

    number: int
    frame: Frame
    answer: Answer | None
    time: float


class Preview:
    """``region``: where codes were sought. Raises `MissingExtra` without Pillow."""

    def __init__(self, region: Region | None = None) -> None:
        try:
            import PIL  # noqa: F401  said at the start, not to the first viewer
        except ImportError:
            raise MissingExtra("scan", "PIL") from None
        self._region = region
        self._shots: dict[str, Shot] = {}
        self._pictures: dict[str, tuple[int, bytes]] = {}
        self._lock = threading.Lock()
        self._looked = -LOOKING_S
        self._taken: dict[str, float] = {}
        self._number = 0
        #: Whether frames carry a camera's name; files have a name each, and share one place.
        self.by_source = False

    def show(self, captured: Captured, answer: Answer | None) -> None:
        """Called by the scanning thread with each frame; a frame that was not read stays without marks."""
        now = time.monotonic()
        if now - self._looked > LOOKING_S:
            if self._shots:  # nobody looks any more: give the memory back
                self._shots.clear()
                self._pictures.clear()
            return
        frame = captured.frame
        if frame is None or not (frame.ndim == 2 or frame.shape[2:] == (3,)):
            return
        source = captured.source if self.by_source else ""
        if now - self._taken.get(source, -1.0) < PERIOD_S:
            return
        if source not in self._shots and len(self._shots) >= MOST_SOURCES:
            return
        self._taken[source] = now
        self._number += 1
        # A copy: cameras write the next frame where this one lies.
        self._shots[source] = Shot(self._number, np.array(frame), answer, captured.time)

    def sources(self) -> list[str]:
        """Who has a picture; asking counts as looking."""
        self._looked = time.monotonic()
        return sorted(self._shots)

    def jpeg(self, source: str = "", after: int = 0) -> tuple[int, bytes] | None:
        """The newest picture of a source (of all, where none is named) and its number; None where there is none newer than
        ``after``."""
        self._looked = time.monotonic()
        shot = self._shots.get(source) or (None if source else max(self._shots.copy().values(), default=None))
        if shot is None or shot.number <= after:
            return None
        with self._lock:  # ten viewers, one picture
            made = self._pictures.get(source)
            if made is None or made[0] != shot.number:
                made = (shot.number, _drawn(shot, self._region))
                self._pictures[source] = made
            return made


def _drawn(shot: Shot, region: Region | None) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    height, width = shot.frame.shape[:2]
    scale = min(1.0, MOST_PIXELS / max(width, height))
    image = Image.fromarray(shot.frame).convert("RGB")
    if scale < 1:
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 200))
    size = max(12, round(image.height / 28))
    font = ImageFont.load_default(size)
    if region is not None:
        left, top = region.corner(shot.frame)
        corner = (region.right * width * scale - 1, region.bottom * height * scale - 1)
        draw.rectangle((left * scale, top * scale, *corner), outline=_REGION)
    fields = shot.answer.fields if shot.answer else {}
    for code in shot.answer.codes if shot.answer else ():
        corners = [(x * scale, y * scale) for x, y in getattr(code, "position", None) or ()]
        if corners:
            draw.line([*corners, corners[0]], fill=_CODE, width=line, joint="curve")
            _tag(draw, font, f"{code.text}  {code.format}", min(corners, key=lambda at: (at[1], at[0])), image.size)
    _tag(draw, font, _headline(fields, shot), (0, 0), image.size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _headline(fields: dict[str, Any], shot: Shot) -> str:
    if shot.answer is None:
        return ""
    if shot.answer.reason:
        return f"{shot.answer.reason}: {shot.answer.why}"
    parts = [f"{fields['label']}  {fields['score']:.0%}"] if "label" in fields else []
    parts += [f"“{fields['text']}”"] if fields.get("text") else []
    codes: Sequence[Any] = fields.get("codes", ())
    parts += [f"{len(codes)} code{'' if len(codes) == 1 else 's'}"] if "codes" in fields else []
    return "   ".join([*parts, f"{shot.answer.latency_ms:.1f} ms"])


def _tag(draw: Any, font: Any, text: str, at: tuple[float, float], size: tuple[int, int]) -> None:
    """Light words on a dark band, wholly inside of the picture, above ``at``."""
    text = "".join(c if c.isprintable() else " " for c in text)[:80]
    if not text:
        return
    x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
    pad = 4
    wide, high = x1 - x0 + 2 * pad, y1 - y0 + 2 * pad
    x = max(0, min(at[0], size[0] - wide))
    y = max(0, min(at[1] - high, size[1] - high))
    draw.rectangle((x, y, x + wide, y + high), fill=_BAND)
    draw.text((x + pad - x0, y + pad - y0), text, font=font, fill=_TEXT)
