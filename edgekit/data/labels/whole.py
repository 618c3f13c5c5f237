"""Synthetic whole labels: carrier, addresses, a real barcode and at most one handling mark, lying on a box or a belt."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra

from . import degrade, text
from .conditions import Condition
from .fonts import cap_height, load_font
from .pictograms import draw_mark

try:
    from PIL import Image, ImageDraw
except ImportError:
    raise MissingExtra("train", "PIL") from None

__all__ = ["SIDE", "Code", "code_of", "render_label"]

#: A frame is this many pixels wide and high.
SIDE = 320
CLEAN_SHARE = 0.4
_BLACK = (16, 16, 16)
_DAMAGE = (
    *(degrade.blur, degrade.motion, degrade.low_resolution, degrade.jpeg),
    *(degrade.glare, degrade.uneven, degrade.low_light, degrade.low_contrast),
)
_UNIT = 16.0  # to the damage a label is as coarse as letters of this height, since its marks are


class Code(NamedTuple):
    """What the label's barcode says; ``format`` as zxing-cpp names it."""

    format: Literal["Code128", "QRCode", "DataMatrix"]
    text: str


def code_of(key: str) -> Code:
    """The code on the label ``key``."""
    rng = text.seeded(f"{key}/code")
    if rng.random() < 0.5:
        return Code("Code128", f"{rng.randrange(10**12):012d}")  # as much as fits at two pixels a bar
    content = rng.choice((text.ups, text.s10))(rng).replace(" ", "")
    return Code("QRCode" if rng.random() < 0.5 else "DataMatrix", content)


def render_label(name: str, key: str, fonts: tuple[str, ...], condition: Condition) -> NDArray[np.uint8]:
    """A label of class ``name`` as uint8 (320, 320, 3) RGB, the same for the same ``key`` in every thread.

    On ``clean`` labels zxing-cpp reads the code (`code_of`). Raises `MissingExtra` without zxing-cpp.
    """
    rng = text.seeded(key)
    clean = condition == "clean" or (condition == "mixed" and rng.random() < CLEAN_SHARE)
    label = _label(name, code_of(key), rng, fonts)
    ground = _ground(rng)
    x, y = rng.randint(2, SIDE - label.width - 2), rng.randint(2, SIDE - label.height - 2)
    if clean:
        ground.paste(label, (x, y))
        return np.asarray(ground)
    strength = rng.uniform(0.1 if condition == "mixed" else 0.3, 1)
    layer = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    layer.paste(label, (x, y))
    layer = degrade.perspective(
        layer, rng, 14 * strength, 20 * strength, shear=0.12 * strength, zoom=1 / rng.uniform(0.78, 0.98)
    )
    ground.paste(layer, (0, 0), layer)
    picture = np.asarray(ground, np.float32)
    for damage in rng.sample(_DAMAGE, rng.choice((0, 1, 1, 2))):
        picture = damage(picture, rng, _UNIT, strength)
    return degrade.to_frame(picture)


def _label(name: str, code: Code, rng: random.Random, fonts: tuple[str, ...]) -> Image.Image:
    """White, 264 to 306 pixels wide and high; rows for carrier, mark and addresses, code and small print."""
    width, height = rng.randint(264, 306), rng.randint(264, 306)
    label = Image.new("RGB", (width, height), rng.choice(((255, 255, 255), (250, 249, 244), (246, 248, 250))))
    draw = ImageDraw.Draw(label)
    font = rng.choice(fonts)
    bars = _code_image(code)
    rows = [("carrier", rng.randint(26, 38)), ("body", 0), ("code", max(bars.height, 84 if code.format != "Code128" else 0))]
    if rng.random() < 0.3:
        rows[1:] = [rows[2], rows[1]]
    if rng.random() < 0.4:
        rows.append(("print", 14))
    gap = rng.randint(5, 8)
    free = height - sum(size for _, size in rows) - gap * (len(rows) + 1)
    y = gap
    for kind, size in rows:
        size = size or free
        box = (8, y, width - 8, y + size)
        if kind == "carrier":
            _carrier(draw, box, font, rng)
        elif kind == "body":
            _body(label, draw, box, name, font, rng)
        elif kind == "code":
            _code_row(label, draw, box, bars, code, font, rng)
        else:
            _write(draw, (box[0], y), text.generate(rng), font, 8, box[2] - box[0])
        y += size + gap
        if rng.random() < 0.7 and kind != "print" and y < height - gap:
            draw.line((6, y - gap // 2, width - 6, y - gap // 2), fill=_BLACK, width=rng.randint(1, 2))
    if rng.random() < 0.6:
        draw.rectangle((1, 1, width - 2, height - 2), outline=_BLACK, width=rng.randint(1, 2))
    return label


def _write(draw: ImageDraw.ImageDraw, at: tuple[float, float], line: str, font: str, capital: int, room: float) -> None:
    """``line`` with capitals of ``capital`` pixels, its top left at ``at``, smaller or cut where it would not fit."""
    size = _fitting(line, font, round(capital / cap_height(font)), room)
    face = load_font(font, size)
    while line and face.getlength(line) > room:
        line = line[:-1]
    draw.text(at, line, fill=_BLACK, font=face, anchor="lt")


def _fitting(line: str, font: str, size: int, room: float) -> int:
    """``size``, or as much less, down to 6, as lets ``line`` fit into ``room`` pixels."""
    used = load_font(font, size).getlength(line)
    return size if used <= room else max(6, int(size * room / used))


def _carrier(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], font: str, rng: random.Random) -> None:
    """A made-up carrier's block, a service and a letter: what a handling mark must not be taken for."""
    left, top, right, bottom = box
    colour = rng.choice((_BLACK, (70, 40, 20), (210, 160, 0), (40, 60, 130), (150, 20, 30), (90, 90, 90)))
    split = left + rng.randint(70, 130)
    draw.rectangle((left, top, split, bottom), fill=colour)
    logo = rng.choice(("NORDPOST", "KURIER 24", "AXON", "PAKEX", "SWIFTBOX", "TRANSLINE", "QPS", "MERIDIO"))
    size = _fitting(logo, font, int((bottom - top) * 0.6), split - left - 10)
    draw.text((left + 5, (top + bottom) / 2), logo, fill=(255, 255, 255), font=load_font(font, size), anchor="lm")
    _write(draw, (split + 6, top + 2), rng.choice(("EXPRESS", "STANDARD", "ECONOMY", "PRIORITY")), font, 10, right - split - 44)
    _write(draw, (split + 6, top + 17), text.generate(rng, "date"), font, 7, right - split - 44)
    if rng.random() < 0.5:
        draw.rectangle((right - 30, top, right, bottom), outline=_BLACK, width=2)
        draw.text((right - 15, (top + bottom) / 2), rng.choice("AEPXS48"), fill=_BLACK, font=load_font(font, 22), anchor="mm")


def _body(
    label: Image.Image,
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    name: str,
    font: str,
    rng: random.Random,
) -> None:
    """Sender and receiver, beside the mark where there is one."""
    left, top, right, bottom = box
    if name != "plain":
        side = min(rng.randint(78, 104), bottom - top)
        down = top + rng.randint(0, bottom - top - side)
        at_left = rng.random() < 0.5
        label.paste(draw_mark(name, side, rng), (left if at_left else right - side, down))
        left, right = (left + side + 8, right) if at_left else (left, right - side - 8)
    step = rng.randint(14, 17)
    blocks = [["name", "street", "city"], ["name", "street", "city", "phone"]]
    y = top + 2
    for title, kinds in zip(("FROM:", "TO:"), blocks, strict=True):
        if y + step * 3 > bottom:
            break
        _write(draw, (left, y), title, font, 6, right - left)
        y += 11
        for kind in kinds:
            if y + 10 <= bottom:
                _write(draw, (left, y), text.generate(rng, kind), font, 8 if title == "FROM:" else 9, right - left)
                y += step
        y += 4


def _code_image(code: Code) -> Image.Image:
    """The code in black on white with its quiet zone, each module a whole number of pixels."""
    try:
        import zxingcpp
    except ImportError:
        raise MissingExtra("scan", "zxingcpp") from None
    made = zxingcpp.create_barcode(code.text, getattr(zxingcpp.BarcodeFormat, code.format))
    modules = np.array(zxingcpp.write_barcode_to_image(made, scale=1, add_quiet_zones=False))
    if code.format == "Code128":
        modules = np.repeat(np.repeat(modules[:1], 56, 0), 2, 1)
        return Image.fromarray(np.pad(modules, ((0, 0), (20, 20)), constant_values=255))
    scale = max(3, 84 // max(modules.shape))  # Data Matrix may be a flat rectangle
    modules = np.repeat(np.repeat(modules, scale, 0), scale, 1)
    return Image.fromarray(np.pad(modules, 4 * scale if code.format == "QRCode" else 2 * scale, constant_values=255))


def _code_row(
    label: Image.Image,
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    bars: Image.Image,
    code: Code,
    font: str,
    rng: random.Random,
) -> None:
    left, top, right, _ = box
    if code.format == "Code128":
        label.paste(bars, ((left + right - bars.width) // 2, top))
        return
    at_left = rng.random() < 0.5
    label.paste(bars, (left if at_left else right - bars.width, top))
    start = left + bars.width + 6 if at_left else left
    y = top + 4
    for line in (code.text, text.generate(rng, "weight"), text.generate(rng, "order"), text.generate(rng, "routing")):
        _write(draw, (start, y), line, font, 9, right - left - bars.width - 8)
        y += 20


def _ground(rng: random.Random) -> Image.Image:
    """Cardboard with flutes, a dark belt with seams, or a bare table."""
    kind = rng.randrange(3)
    rough = degrade.noise_of(rng).standard_normal((SIDE, SIDE), np.float32)
    field = degrade.smooth_field(rng, SIDE, SIDE, rng.randint(2, 7)) * np.float32(10)
    if kind == 0:
        colour = (rng.randint(160, 195), rng.randint(120, 150), rng.randint(80, 110))
        field += np.sin(np.arange(SIDE, dtype=np.float32) * np.float32(rng.uniform(0.5, 1.2))) * np.float32(4)
        field += rough * np.float32(4)
    elif kind == 1:
        grey = rng.randint(28, 75)
        colour = (grey, grey, grey + rng.randint(0, 8))
        field += rough * np.float32(5)
        field[:: rng.randint(24, 60)] += np.float32(25)
    else:
        grey = rng.randint(110, 190)
        colour = (grey, grey + rng.randint(-6, 6), grey + rng.randint(-12, 6))
        field += rough * np.float32(2)
    return Image.fromarray(degrade.to_frame(np.array(colour, np.float32) + field[:, :, None]))
