"""`Preview`: the newest frame of each camera with what was read on it, as a JPEG for whoever looks.

The scanning thread hands a frame over only while somebody looks; drawing and compressing happen in the asking thread.
"""

from __future__ import annotations

import functools
import io
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekit.errors import MissingExtra
from edgekit.preprocess import Frame

from .reading import Answer, Region
from .sources import Captured

__all__ = ["Preview"]

#: A frame is kept while the last look is no longer ago than this.
LOOKING_S = 2.0
#: The pictures are made no more often than this, their longer side between these.
PERIOD_S = 0.1
MOST_PIXELS = 1280
LEAST_PIXELS = 480
#: Cameras kept at once.
MOST_SOURCES = 16
QUALITY = 80
#: Characters of a code that are shown.
LONGEST_CODE = 40
_CODE, _BAD, _TEXT, _REGION, _BAND = (0, 214, 143), (255, 107, 94), (255, 255, 255), (255, 190, 60), (16, 20, 24)


class Shot(NamedTuple):
    """One frame and its answer. ``number`` counts all shots, so that a viewer knows what is new; ``step``: each so manyth
    pixel of the frame, which was ``size`` (width, height), was kept; ``name``: of its camera or file."""

    number: int
    frame: Frame
    step: int
    size: tuple[int, int]
    answer: Answer | None
    name: str


class Preview:
    """``region``: where was read. Raises `MissingExtra` without Pillow."""

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
        if source not in self._shots and len(self._shots) >= MOST_SOURCES and not self._make_room(now):
            return
        self._taken[source] = now
        self._number += 1
        # A copy, for the application may write on; of a large frame no more than twice as fine as it is shown.
        height, width = frame.shape[:2]
        step = max(1, max(height, width) // (2 * MOST_PIXELS))
        shot = Shot(self._number, np.array(frame[::step, ::step]), step, (width, height), answer, captured.source)
        self._shots[source] = shot

    def forget(self, source: str) -> None:
        """A camera was removed."""
        for each in (self._shots, self._pictures, self._taken):
            each.pop(source, None)

    def _make_room(self, now: float) -> bool:
        """The picture of the camera that was silent for longest goes, if it was for long enough."""
        silent = min(self._shots, key=lambda source: self._taken[source])
        if now - self._taken[silent] < LOOKING_S:
            return False
        self.forget(silent)
        return True

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


@functools.cache
def _font(size: int) -> Any:
    """Of the system where it has one that knows more than ASCII, Pillow's own else."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _drawn(shot: Shot, region: Region | None) -> bytes:
    from PIL import Image, ImageDraw

    width, height = shot.size
    longer = max(width, height)
    # A small frame in whole steps, so that its pixels are seen as they are.
    scale = MOST_PIXELS / longer if longer > MOST_PIXELS else float(max(1, math.ceil(LEAST_PIXELS / longer)))
    image = Image.fromarray(shot.frame).convert("RGB")
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
    draw = ImageDraw.Draw(image)
    line = max(3, round(min(size) / 140))
    font = _font(min(40, max(13, round(max(size) / 32))))
    if region is not None:
        corners = (region.left * width, region.top * height, region.right * width, region.bottom * height)
        left, top, right, bottom = (each * scale for each in corners)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=_REGION, width=line)
    for code in shot.answer.codes if shot.answer else ():
        _box(draw, font, code, scale, line, size)
    _tag(draw, font, _name(shot.name), (0, 0), size)
    _tag(draw, font, _headline(shot), (0, size[1]), size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)  # words stay sharp
    return buffer.getvalue()


def _box(draw: Any, font: Any, code: Any, scale: float, line: int, size: tuple[int, int]) -> None:
    """Around a code, with its text; red where its GS1 data is wrong. On dark pictures and on light ones: light in dark."""
    corners = [(x * scale, y * scale) for x, y in code.position or ()]
    if not corners:
        return
    colour = _BAD if "error" in (code.gs1 or {}) else _CODE
    draw.line([*corners, corners[0], corners[1]], fill=_BAND, width=line + 4, joint="curve")
    draw.line([*corners, corners[0], corners[1]], fill=colour, width=line, joint="curve")
    words = code.text if len(code.text) <= LONGEST_CODE else f"{code.text[: LONGEST_CODE - 1]}…"
    top, bottom, room = min(y for _, y in corners), max(y for _, y in corners), 4 * font.size
    # Above it; where that is the place of the camera's name, below it.
    at = min(x for x, _ in corners), top - line if top >= room else bottom + room / 2
    _tag(draw, font, f"{words}  {code.format}", at, size, colour)


def _name(source: str) -> str:
    """Of a file without its folder; a camera may be named as it likes."""
    return source.rpartition("/")[2] if Path(source).suffix and "://" not in source else source


def _headline(shot: Shot) -> str:
    if shot.answer is None:
        return "not read"
    if shot.answer.reason:
        return f"{shot.answer.reason}: {shot.answer.why}"
    fields = shot.answer.fields
    parts = [f"{fields['label']}  {fields['score']:.0%}"] if "label" in fields else []
    parts += [f"“{fields['text']}”"] if fields.get("text") else []
    codes: Sequence[Any] = fields.get("codes", ())
    parts += [f"{len(codes)} code{'' if len(codes) == 1 else 's'}"] if "codes" in fields else []
    if codes and not any(code.position for code in shot.answer.codes):
        parts += [", ".join(f"{code['text']} ({code['format']})" for code in codes)]
    return "   ".join([*parts, f"{shot.answer.latency_ms:.1f} ms"])


def _tag(
    draw: Any, font: Any, text: str, at: tuple[float, float], size: tuple[int, int], colour: tuple[int, int, int] = _TEXT
) -> None:
    """Light words on a dark band, wholly inside of the picture, above ``at``; cut where they are longer than it is wide."""
    text = "".join(c if c.isprintable() else " " for c in text)[:200]
    pad = 4
    while text and draw.textlength(text, font=font) > size[0] - 2 * pad:
        text = text[: max(len(text) * 9 // 10 - 1, 0)] + "…" if len(text) > 2 else ""
    if not text:
        return
    _, y0, _, y1 = draw.textbbox((0, 0), "Ágj|", font=font)  # all tags alike in height
    wide, high = draw.textlength(text, font=font) + 2 * pad, y1 - y0 + 2 * pad
    x = max(0, min(at[0], size[0] - wide))
    y = max(0, min(at[1] - high, size[1] - high))
    draw.rectangle((x, y, x + wide, y + high), fill=_BAND)
    draw.text((x + pad, y + pad - y0), text, font=font, fill=colour)
