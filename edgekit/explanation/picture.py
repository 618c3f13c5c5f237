"""Pictures of explanations: the image beside its maps, or a sheet of feature maps, with a caption."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import Frame

from .modality import View
from .question import Float

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    raise MissingExtra("explain", "PIL") from None

__all__ = ["AGAINST", "FOR", "GAP", "INK", "PAPER", "onto_frame", "overlay", "page", "printed", "sheet"]

SIDE = 320  # pixels of the longer side of each panel
GAP, STRIP = 8, 26
FOR, AGAINST = (230, 110, 0), (0, 114, 200)  # orange and blue: apart for every kind of colour vision
PAPER, INK = (255, 255, 255), (30, 38, 48)
MAPS = 64


def onto_frame(heat: Float, spec: ImagePreprocessing, frame: tuple[int, int], shown: tuple[int, int]) -> Float:
    """(H, W) over the model's input -> ``shown`` (h, w) over the frame; NaN where the model did not look (crop)."""
    height, width = frame
    if spec.fit == "letterbox":
        scale = max(height / spec.height, width / spec.width)
        box_height, box_width = max(1, round(height / scale)), max(1, round(width / scale))
        top, left = (spec.height - box_height) // 2, (spec.width - box_width) // 2
        heat = heat[top : top + box_height, left : left + box_width]
    if spec.fit != "crop":
        return _resize(heat, shown)
    scale = min(height / spec.height, width / spec.width)
    inner = (max(1, round(spec.height * scale * shown[0] / height)), max(1, round(spec.width * scale * shown[1] / width)))
    top, left = (shown[0] - inner[0]) // 2, (shown[1] - inner[1]) // 2
    full = np.full(shown, np.nan, np.float32)
    full[top : top + inner[0], left : left + inner[1]] = _resize(heat, inner)
    return full


def _resize(values: Float, size: tuple[int, int]) -> Float:
    resized = Image.fromarray(values.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)


def _panel(frame: Frame) -> NDArray[np.uint8]:
    """uint8 (H, W) or (H, W, 3) -> uint8 (h, w, 3), the longer side `SIDE`; small images keep their pixels visible."""
    rgb = np.repeat(frame[:, :, None], 3, 2) if frame.ndim == 2 else frame
    scale = SIDE / max(rgb.shape[:2])
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    way = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(rgb).resize(size, way), np.uint8)


def overlay(frame: Frame, views: Sequence[View], spec: ImagePreprocessing, caption: str) -> bytes:
    """PNG bytes: the frame, and the frame in grey under each map, (H, W) over the model's input; all in one scale."""
    left = _panel(frame)
    placed = [onto_frame(view.heat, spec, frame.shape[:2], left.shape[:2]) for view in views]
    largest = max(float(np.quantile(np.abs(heat[np.isfinite(heat)]), 0.995)) for heat in placed) or 1.0
    return page([left, *(_laid(left, heat / largest) for heat in placed)], caption, ["", *(view.title for view in views)])


def _laid(left: NDArray[np.uint8], heat: Float) -> NDArray[np.uint8]:
    """``heat`` (h, w) of -1..1, NaN where the model did not look, over the panel (h, w, 3) in grey."""
    seen = np.isfinite(heat)
    strength = np.clip(np.nan_to_num(heat), -1, 1)
    grey = left.astype(np.float32).mean(2, keepdims=True).repeat(3, 2)
    grey = np.where(seen[:, :, None], 60 + grey * 0.55, 235)  # neither black nor white, so that both colours show on it
    colour = np.where(strength[:, :, None] > 0, FOR, AGAINST)
    alpha = np.abs(strength)[:, :, None] * 0.85
    return np.asarray((grey * (1 - alpha) + colour * alpha).round(), np.uint8)


def sheet(frame: Frame, maps: Float, caption: str) -> bytes:
    """PNG bytes: the frame, and the first `MAPS` of ``maps`` (C, h, w) in one common grey scale."""
    maps = maps[:MAPS]
    low, high = float(maps.min()), float(maps.max())
    tiles = np.round(255 * (maps - low) / ((high - low) or 1.0)).astype(np.uint8)
    columns = int(np.ceil(np.sqrt(len(tiles))))
    side = SIDE // columns
    canvas = np.full((-(-len(tiles) // columns) * side, columns * side), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * side, i % columns * side
        shown = Image.fromarray(tile).resize((max(1, side - 2),) * 2, Image.Resampling.NEAREST)
        canvas[y : y + shown.height, x : x + shown.width] = np.asarray(shown)
    return page([_panel(frame), np.repeat(canvas[:, :, None], 3, 2)], caption)


def printed(text: str) -> str:
    """Control characters as spaces; letters that the font lacks become its box."""
    return "".join(c if c.isprintable() else " " for c in text)


def page(panels: Sequence[NDArray[np.uint8]], caption: str, titles: Sequence[str] = ()) -> bytes:
    """PNG bytes: panels (h, w, 3) side by side, each under its title where there is one, over a caption of one line."""
    width = GAP + sum(panel.shape[1] + GAP for panel in panels)
    top = GAP + (STRIP - GAP if any(titles) else 0)
    height = top + GAP + max(panel.shape[0] for panel in panels) + STRIP
    paper = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(14)
    x = GAP
    for i, panel in enumerate(panels):
        paper.paste(Image.fromarray(panel), (x, top))
        if i < len(titles):
            pen.text((x, GAP // 2), titles[i], INK, font)
        x += panel.shape[1] + GAP
    text = printed(caption)
    while text and pen.textlength(text, font) > width - 2 * GAP:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    pen.text((GAP, height - STRIP), text, INK, font)
    buffer = io.BytesIO()
    paper.save(buffer, "PNG")  # optimized it would be 3% smaller, in five times the time
    return buffer.getvalue()
