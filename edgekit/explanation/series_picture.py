"""Curves of a sensor series over time, with the heat behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra

from .modality import View
from .picture import AGAINST, FOR, GAP, INK, PAPER, page
from .question import Float

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    raise MissingExtra("explain", "PIL") from None

__all__ = ["curves"]

WIDTH = 720  # pixels of one view, 480 where two stand side by side
ROW, STRIP, AXIS, MARGIN = 72, 30, 22, 64
CHANNELS = 16  # drawn
FINE = 3  # drawn so much larger and scaled down: smooth lines
LINE = (38, 50, 64)


def curves(series: Float, views: Sequence[View], caption: str, names: Sequence[str] = ()) -> bytes:
    """PNG bytes: of ``series`` (t, C) a row a channel, its heat behind it; above, the heat of all channels at once.
    ``names``: of each channel, else they are numbered.

    Each of the two heats has one scale over all views, for they are of different sizes.
    """
    width = WIDTH if len(views) == 1 else WIDTH * 2 // 3
    apart = [np.array(view.detail.get("channels", [view.heat]), np.float32) for view in views]  # (C or 1, t)
    largest = max(float(np.abs(view.heat).max()) for view in views) or 1.0
    largest_apart = max(float(np.abs(heat).max()) for heat in apart) or 1.0
    names = names or [f"ch {channel + 1}" for channel in range(series.shape[1])]
    panels = [
        _panel(series, view.heat / largest, heat / largest_apart, width, names) for view, heat in zip(views, apart, strict=True)
    ]
    return page(panels, caption, [view.title for view in views])


def _panel(series: Float, heat: Float, apart: Float, width: int, names: Sequence[str]) -> NDArray[np.uint8]:
    """``heat`` (t,) and ``apart`` (C or 1, t) within -1..1 -> uint8 (h, width, 3)."""
    drawn = min(series.shape[1], CHANNELS)
    height = STRIP + drawn * (ROW + GAP) + AXIS
    inner = width - MARGIN
    paper = np.full((height, width, 3), PAPER, np.uint8)
    paper[: STRIP - GAP, MARGIN:] = _coloured(heat, inner, STRIP - GAP)
    for channel in range(drawn):
        top = STRIP + channel * (ROW + GAP)
        behind = apart[channel if len(apart) > 1 else 0]
        paper[top : top + ROW, MARGIN:] = _curve(series[:, channel], _coloured(behind, inner, ROW))
    image = Image.fromarray(paper)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    pen.text((0, 4), "together", INK, font)
    for channel in range(drawn):
        top = STRIP + channel * (ROW + GAP)
        low, high = float(series[:, channel].min()), float(series[:, channel].max())
        pen.text((0, top + ROW // 2 - 8), _fitted(names[channel], font), INK, font)
        pen.text((MARGIN - 4, top), f"{high:.3g}", LINE, ImageFont.load_default(10), "ra")
        pen.text((MARGIN - 4, top + ROW - 12), f"{low:.3g}", LINE, ImageFont.load_default(10), "ra")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = MARGIN + share * (inner - 1)
        pen.line((x, height - AXIS - GAP + 2, x, height - AXIS - GAP + 6), LINE)
        anchor = "la" if share == 0 else "ra" if share == 1 else "ma"
        text = f"{round(share * (len(series) - 1))}"
        pen.text((x, height - AXIS), f"step {text}" if share == 0 else text, LINE, font, anchor)
    if drawn < series.shape[1]:
        pen.text((0, height - AXIS), f"+{series.shape[1] - drawn} more", LINE, font)
    return np.asarray(image, np.uint8)


def _fitted(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a name as the margin holds."""
    cut = name
    while font.getlength(cut) > MARGIN - 6 and len(name) > 1:
        name = name[:-1]
        cut = f"{name}…"
    return cut


def _coloured(heat: Float, width: int, height: int) -> NDArray[np.uint8]:
    """(t,) -> uint8 (height, width, 3): orange above 0, blue below, nearly white at 0."""
    place = np.linspace(0, len(heat) - 1, width)
    strength = np.interp(place, np.arange(len(heat)), np.clip(heat, -1, 1))[None, :, None]
    colour = np.where(strength > 0, FOR, AGAINST)
    alpha = np.abs(strength) * 0.75
    row = np.array((248, 248, 248)) * (1 - alpha) + colour * alpha
    return np.asarray(np.repeat(row.round(), height, 0), np.uint8)


def _curve(values: Float, behind: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The curve of ``values`` (t,), from its lowest to its highest, over ``behind`` (h, w, 3)."""
    height, width = behind.shape[:2]
    large = Image.fromarray(behind).resize((width * FINE, height * FINE), Image.Resampling.NEAREST)
    low, high = float(values.min()), float(values.max())
    edge = 5 * FINE
    x = np.linspace(0, width * FINE - 1, len(values)) if len(values) > 1 else np.array([width * FINE / 2])
    share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    y = height * FINE - edge - share * (height * FINE - 2 * edge)
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    pen = ImageDraw.Draw(large)
    if len(points) > 1:
        pen.line(points, LINE, round(1.6 * FINE), "curve")
    else:
        pen.circle(points[0], 3 * FINE, LINE)
    return np.asarray(large.resize((width, height), Image.Resampling.BOX), np.uint8)
