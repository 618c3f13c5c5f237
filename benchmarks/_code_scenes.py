"""Photograph-like pictures of generated codes, and what makes them bad. Procedural: every picture follows from its seed.

A code of known content is drawn by zxing-cpp, printed (ink and paper grey, print noise, a quiet zone that may be too
small), laid on a textured background in perspective, lit unevenly, and taken by a camera (optical blur, noise, JPEG).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import zxingcpp
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "CONDITIONS",
    "FORMATS",
    "PLAIN",
    "UNREAD",
    "Scene",
    "blurred",
    "degraded",
    "motion_kernel",
    "photograph",
    "scene",
    "unread",
    "without_code",
]

Grey = NDArray[np.uint8]
Rng = np.random.Generator

DIGITS, CAPITALS = "0123456789", "ABCDEFGHJKLMNPRSTUVWXYZ"


class Scene(NamedTuple):
    picture: Grey  # uint8 (H, W)
    texts: frozenset[str]  # what a reader may say
    kind: str
    corners: NDArray[np.float64] | None = None  # (4, 2) of its paper: x, y


def _text(rng: Rng, alphabet: str, low: int, high: int | None = None) -> str:
    return "".join(rng.choice(list(alphabet), int(rng.integers(low, (high or low) + 1))))


#: Name -> (zxing-cpp's format, content, options of its encoder, one module's height to width: 0 for bars).
FORMATS: dict[str, tuple[str, Callable[[Rng], str], dict[str, Any], int]] = {
    "Code128": ("Code128", lambda r: _text(r, CAPITALS + DIGITS + "-", 6, 14), {}, 0),
    "GS1-128": ("Code128", lambda r: f"(00){_sscc(r)}", {"gs1": True}, 0),
    "EAN13": ("EAN13", lambda r: _text(r, DIGITS, 12), {}, 0),
    "EAN8": ("EAN8", lambda r: _text(r, DIGITS, 7), {}, 0),
    "UPCA": ("UPCA", lambda r: _text(r, DIGITS, 11), {}, 0),
    "UPCE": ("UPCE", lambda r: "0" + _text(r, DIGITS, 6), {}, 0),
    "Code39": ("Code39", lambda r: _text(r, CAPITALS + DIGITS, 5, 9), {}, 0),
    "Code93": ("Code93", lambda r: _text(r, CAPITALS + DIGITS, 6, 12), {}, 0),
    "Codabar": ("Codabar", lambda r: "A" + _text(r, DIGITS, 6, 10) + "B", {}, 0),
    "ITF14": ("ITF14", lambda r: _text(r, DIGITS, 13), {}, 0),
    "DataBar": ("DataBarOmni", lambda r: "0" + _text(r, DIGITS, 12), {}, 0),
    "DataBarExp": ("DataBarExp", lambda r: "(10)" + _text(r, CAPITALS + DIGITS, 6, 10), {"gs1": True}, 0),
    "QR": ("QRCode", lambda r: "HTTPS://EXAMPLE.ORG/" + _text(r, CAPITALS + DIGITS, 4, 20), {}, 1),
    "MicroQR": ("MicroQRCode", lambda r: _text(r, DIGITS, 5, 10), {}, 1),
    "DataMatrix": ("DataMatrix", lambda r: _text(r, CAPITALS + DIGITS, 8, 24), {}, 1),
    "Aztec": ("Aztec", lambda r: _text(r, CAPITALS + DIGITS, 8, 24), {}, 1),
    "PDF417": ("PDF417", lambda r: _text(r, CAPITALS + DIGITS, 12, 30), {}, 1),
}


def _sscc(rng: Rng) -> str:
    digits = _text(rng, DIGITS, 17)
    total = sum(int(d) * (3 if i % 2 == 0 else 1) for i, d in enumerate(reversed(digits)))
    return f"{digits}{-total % 10}"


def _code(rng: Rng, kind: str) -> tuple[Grey, frozenset[str]]:
    """One pixel a module, and what zxing-cpp reads on a large clean print of it."""
    name, content, options, matrix = FORMATS[kind]
    while True:
        try:
            code = zxingcpp.create_barcode(content(rng), getattr(zxingcpp.BarcodeFormat, name), **options)
            break
        except ValueError:
            continue  # a content that the symbology refuses
    large = np.pad(np.asarray(code.to_image(scale=4)), 40, constant_values=255)
    texts = {found.text for found in zxingcpp.read_barcodes(large, text_mode=zxingcpp.TextMode.Plain)}
    modules = np.asarray(code.to_image(scale=1, add_quiet_zones=False))
    if not matrix:
        height = max(12, int(modules.shape[1] * rng.uniform(0.22, 0.6)))
        modules = np.repeat(modules[len(modules) // 4][None], height, axis=0)
    return modules, frozenset(texts)


def _clouds(rng: Rng, width: int, height: int, octaves: int = 5) -> NDArray[np.float32]:
    """Noise of all scales, about -1..1, float32 (H, W)."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        size = (3 * 2**octave, 3 * 2**octave)
        grid = rng.standard_normal(size).astype(np.float32) * 0.6**octave
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return total / 1.6


def _background(rng: Rng, width: int, height: int) -> Image.Image:
    """A table, a carton, print: clouds with shapes, lines and words on them."""
    base = rng.uniform(60, 190) + rng.uniform(8, 40) * _clouds(rng, width, height)
    image = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 9))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = rng.uniform(20, width / 2), rng.uniform(10, height / 3)
        grey = int(rng.integers(20, 240))
        shape = rng.integers(0, 4)
        if shape == 0:
            draw.rectangle((x, y, x + w, y + h), fill=grey)
        elif shape == 1:
            draw.ellipse((x, y, x + w, y + h), outline=grey, width=int(rng.integers(2, 12)))
        elif shape == 2:
            draw.line((x, y, x + w, y + h), fill=grey, width=int(rng.integers(1, 8)))
        else:
            for line in range(int(rng.integers(1, 5))):
                size = int(rng.integers(14, 50))
                draw.text((x, y + line * size * 1.2), _text(rng, CAPITALS + " ", 6, 24), fill=grey, font_size=size)
    return image


def _perspective(source: NDArray[np.float64], target: NDArray[np.float64]) -> list[float]:
    """Eight coefficients for PIL that map ``target``'s corners (4, 2) to those of ``source``."""
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows), np.array(values))]


def scene(seed: int, kind: str) -> Scene:
    """A code that fills a picture of about 0.3 megapixels."""
    rng = np.random.default_rng([seed, list(FORMATS).index(kind)])
    modules, texts = _code(rng, kind)
    matrix = FORMATS[kind][3]
    module = rng.uniform(3.0, 6.0) if matrix and kind != "PDF417" else rng.uniform(1.9, 4.2)  # pixels of the final picture
    width, height = [(640, 480), (800, 600), (480, 640), (600, 600)][int(rng.integers(4))]
    module = min(module, 0.86 * width / (modules.shape[1] + 12), 0.86 * height / (modules.shape[0] + 12))
    print_ = _printed(rng, modules, 2 * module, bool(matrix))
    canvas = _background(rng, 2 * width, 2 * height)  # twice as large, halved at the end: soft edges
    _lay(rng, canvas, *print_)
    return Scene(_taken(rng, canvas.reduce(2)), texts, kind)


def photograph(seed: int, kind: str) -> Scene:
    """A code that takes 5 to 60% of the width of a picture of 0.5 to 4 megapixels, no finer than can be read when sharp."""
    rng = np.random.default_rng([seed, list(FORMATS).index(kind), 17])
    modules, texts = _code(rng, kind)
    matrix = bool(FORMATS[kind][3])
    area = 0.5e6 * 8 ** rng.uniform(0, 1)
    ratio = [4 / 3, 16 / 9, 3 / 4, 1.0][int(rng.integers(4))]
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    least = 3.0 if matrix and kind != "PDF417" else 1.9
    module = max(least, width * 0.05 * 12 ** rng.uniform(0, 1) / modules.shape[1])
    module = min(module, 0.86 * width / (modules.shape[1] + 12), 0.86 * height / (modules.shape[0] + 12))
    print_ = _printed(rng, modules, module, matrix)
    canvas = _background(rng, width, height)
    corners = _lay(rng, canvas, *print_)
    return Scene(_taken(rng, canvas), texts, kind, corners)


def _printed(rng: Rng, modules: Grey, module: float, matrix: bool) -> tuple[Image.Image, float, float]:
    """Ink on paper with a quiet zone, and its width and height where a module has ``module`` pixels."""
    dark, light = rng.uniform(15, 60), rng.uniform(190, 245)
    quiet = int(rng.integers(6, 12)) if not matrix else int(rng.integers(2, 5))
    scale = max(2, math.ceil(module))
    printed = np.kron(np.pad(modules, quiet, constant_values=255), np.ones((scale, scale), np.uint8))
    ink = np.where(printed > 127, light, dark) + rng.normal(0, rng.uniform(2, 9), printed.shape)
    paper = Image.fromarray(np.clip(ink, 0, 255).astype(np.uint8))
    return paper, module * (modules.shape[1] + 2 * quiet), module * (modules.shape[0] + 2 * quiet)


def _lay(rng: Rng, canvas: Image.Image, paper: Image.Image, w: float, h: float) -> NDArray[np.float64]:
    """Somewhere on the canvas, ``w`` by ``h`` pixels, in slight perspective. Its corners, (4, 2)."""
    width, height = canvas.size
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]]) - [w / 2, h / 2]
    turn = math.radians(rng.uniform(-4, 4) + 90 * int(rng.integers(0, 4) == 0))
    corners = corners @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    if np.ptp(corners[:, 0]) > width or np.ptp(corners[:, 1]) > height:
        corners = corners @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    corners += rng.uniform(-0.02, 0.02, (4, 2)) * min(w, h)
    slack = np.maximum(0, [width - np.ptp(corners[:, 0]), height - np.ptp(corners[:, 1])])
    corners += np.array([width, height]) / 2 + rng.uniform(-0.45, 0.45, 2) * slack
    box = np.array([[0, 0], [paper.width, 0], [paper.width, paper.height], [0, paper.height]], float)
    coefficients = _perspective(box, corners)
    laid = paper.transform(canvas.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    mask = Image.new("L", paper.size, 255).transform(canvas.size, Image.Transform.PERSPECTIVE, coefficients)
    canvas.paste(laid, mask=mask)
    return corners


def _taken(rng: Rng, canvas: Image.Image) -> Grey:
    """Uneven light, the camera's optics, noise and compression."""
    a = np.asarray(canvas).astype(np.float32)
    y, x = np.mgrid[-1 : 1 : a.shape[0] * 1j, -1 : 1 : a.shape[1] * 1j].astype(np.float32)  # type: ignore[misc]
    slope = rng.uniform(-0.22, 0.22, 2)
    a *= 0.85 + slope[0] * x + slope[1] * y + 0.04 * _clouds(rng, a.shape[1], a.shape[0], 2)
    a = blurred(a, rng.uniform(0.4, 0.75)) + rng.normal(0, rng.uniform(0.5, 2.5), a.shape)
    return jpeg(_clipped(a), int(rng.integers(82, 96)))


def without_code(seed: int) -> Scene:
    """Textures, text, stripes, checks, noise; a fifth of them blurred or turned."""
    rng = np.random.default_rng([seed, 999])
    width, height = 640, 480
    kind = seed % 5
    if kind < 2:
        picture = _taken(rng, _background(rng, 2 * width, 2 * height).reduce(2))
    else:
        y, x = np.mgrid[:height, :width]
        turn = rng.uniform(0, math.pi)
        u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        if kind == 2:  # bars of drawn widths: what most resembles a linear code
            edges = np.cumsum(rng.integers(2, 9, 400)) - 400
            a = np.searchsorted(edges, u) % 2 * 170.0 + 40
        elif kind == 3:  # cells of drawn grey: what most resembles a matrix code
            side = rng.uniform(3, 8)
            cells = rng.integers(0, 2, (1024, 1024))
            a = cells[(v / side).astype(int) % 1024, (u / side).astype(int) % 1024] * 170.0 + 40
        else:
            a = 120 + 60 * np.sin(2 * math.pi * u / rng.uniform(3, 20)) + rng.normal(0, rng.uniform(1, 25), u.shape)
        picture = _clipped(blurred(a.astype(np.float32), rng.uniform(0.4, 2.2)) + rng.normal(0, 2, a.shape))
    return Scene(picture, frozenset(), "none")


#: Why a picture of `unread` cannot be read; "damaged" stands for what no cause is named for.
UNREAD = ("bad check digit", "too dark", "low contrast", "glare", "nothing there", "cut off", "too small", "blur", "damaged")


def unread(seed: int, why: str) -> Grey:
    """A picture, 640 x 480, that is bad in one way. Now and then one can be read all the same."""
    rng = np.random.default_rng([seed, UNREAD.index(why), 31])
    width, height = 640, 480
    kind = ("Code128", "EAN13", "QR", "DataMatrix", "ITF14")[seed % 5] if why != "bad check digit" else "EAN13"
    matrix = bool(FORMATS[kind][3])
    modules, _ = _code(rng, kind) if why != "bad check digit" else (_wrong_ean13(rng), frozenset())
    module = rng.uniform(4.0, 7.0) if matrix else rng.uniform(2.2, 3.5)
    if why == "too small":
        module = rng.uniform(0.7, 1.3) if matrix else rng.uniform(0.4, 0.8)
    canvas = _background(rng, width, height)
    if why == "nothing there":
        return _taken(rng, canvas)
    corners = _lay(rng, canvas, *_printed(rng, modules, module, matrix))
    a = np.asarray(canvas)
    low, high = corners.min(axis=0), corners.max(axis=0)
    across = low + (high - low) * rng.uniform(0.35, 0.65)
    if why == "cut off":
        a = a[:, int(across[0]) :] if rng.integers(2) else a[:, : int(across[0])]
        a = a if min(a.shape) >= 120 else np.asarray(canvas)[int(across[1]) :]
    elif why == "damaged":
        draw, wide = ImageDraw.Draw(canvas), max(3, round(3 * module))
        for _ in range(4):  # scratches across it
            x, y = rng.uniform(low, high, (2, 2)).T
            draw.line((x[0], low[1], x[1], high[1]), fill=int(rng.integers(30, 220)), width=wide)
            draw.line((low[0], y[0], high[0], y[1]), fill=int(rng.integers(30, 220)), width=wide)
        a = np.asarray(canvas)
    elif why == "blur":
        a = _clipped(blurred(a, module * rng.uniform(0.9, 1.6)))
    elif why == "glare":
        y, x = np.mgrid[:height, :width]
        reach = (high - low) * rng.uniform(0.2, 0.4)
        a = _clipped(a + 600 * np.exp(-(((x - across[0]) / reach[0]) ** 2) - ((y - across[1]) / reach[1]) ** 2))
    elif why == "low contrast":
        a = _clipped(120 + (a - a.mean()) * rng.uniform(5, 12) / np.ptp(a))
    elif why == "too dark":
        a = _clipped(a * rng.uniform(0.01, 0.06))
    picture = blurred(a, rng.uniform(0.4, 0.7)) + rng.normal(0, rng.uniform(0.5, 2), a.shape)
    return _clipped(picture) if why in ("low contrast", "too dark") else jpeg(_clipped(picture), int(rng.integers(85, 96)))


def _wrong_ean13(rng: Rng) -> Grey:
    """The modules of an EAN-13 whose last digit is another: the right half of one code behind the left half of another."""
    while True:
        left, right = (_text(rng, DIGITS, 12) for _ in range(2))
        codes = [zxingcpp.create_barcode(text, zxingcpp.BarcodeFormat.EAN13) for text in (left, left[:7] + right[7:])]
        if codes[0].text[-1] != codes[1].text[-1]:
            halves = [np.asarray(code.to_image(scale=1, add_quiet_zones=False)) for code in codes]
            row = np.concatenate([halves[1][10, :-10], halves[0][10, -10:]])  # a digit of 7 modules and the guard of 3
            return np.repeat(row[None], int(rng.integers(30, 60)), axis=0)


# What makes a picture bad.


def _clipped(a: NDArray[Any]) -> Grey:
    return np.clip(np.rint(a), 0, 255).astype(np.uint8)


def _filtered(a: NDArray[Any], kernel: NDArray[np.float64]) -> NDArray[np.float32]:
    """Correlated with ``kernel`` (odd sides), borders mirrored."""
    pad = len(kernel) // 2
    padded = np.pad(a.astype(np.float64), pad, mode="reflect")
    transfer = np.fft.rfft2(kernel, padded.shape)
    return np.fft.irfft2(np.fft.rfft2(padded) * transfer, padded.shape)[2 * pad :, 2 * pad :].astype(np.float32)


def blurred(a: NDArray[Any], sigma: float) -> NDArray[np.float32]:
    x = np.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    bell = np.exp(-(x**2) / (2 * sigma**2))
    kernel = np.outer(bell, bell)
    return _filtered(a, kernel / kernel.sum())


def motion_kernel(length: float, degrees: float) -> NDArray[np.float64]:
    """A line of ``length`` pixels, drawn by many points with bilinear weights."""
    half = math.ceil(length / 2) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    for t in np.linspace(-length / 2, length / 2, 40 * half):
        x, y = half + t * math.cos(math.radians(degrees)), half + t * math.sin(math.radians(degrees))
        i, j = int(x), int(y)
        for di in (0, 1):
            for dj in (0, 1):
                kernel[j + dj, i + di] += (1 - abs(x - i - di)) * (1 - abs(y - j - dj))
    return kernel / kernel.sum()


def jpeg(picture: Grey, quality: int) -> Grey:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _resized(p: Grey, factor: float) -> Grey:
    image = Image.fromarray(p)
    size = (round(image.width * factor), round(image.height * factor))
    return np.asarray(image.resize(size, Image.Resampling.BOX if factor == 0.5 else Image.Resampling.BICUBIC))


def _rotated(p: Grey, degrees: float) -> Grey:
    image = Image.fromarray(p).rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=128)
    return np.asarray(image)


def _moved(p: Grey, length: float, degrees: float) -> Grey:
    return _clipped(_filtered(p, motion_kernel(length, degrees)))


def _noisy(p: Grey, sigma: float, rng: Rng) -> Grey:
    return _clipped(p + rng.normal(0, sigma, p.shape))


def _blur(sigma: float) -> Callable[[Grey, Rng], Grey]:
    return lambda p, rng: _clipped(blurred(p, sigma))


def _any_motion(p: Grey, rng: Rng, low: float = 5, high: float = 11) -> Grey:
    return _moved(p, rng.uniform(low, high), rng.uniform(0, 180))


#: As the issue names them, then other strengths and mixtures: a parameter cannot be known beforehand.
CONDITIONS: dict[str, Callable[[Grey, Rng], Grey]] = {
    "clean": lambda p, rng: p,
    "half size": lambda p, rng: _resized(p, 0.5),
    "blur 2": _blur(2.0),
    "rotated 31": lambda p, rng: _rotated(p, 31),
    "dark and noisy": lambda p, rng: _clipped(p * 0.35 + rng.normal(0, 4, p.shape)),
    "motion 7": lambda p, rng: _moved(p, 7, 0),
    "inverted": lambda p, rng: 255 - p,
    "blur 1": _blur(1.0),
    "blur 1.5": _blur(1.5),
    "blur 3": _blur(3.0),
    "rotated 5-45": lambda p, rng: _rotated(p, rng.uniform(5, 45) * rng.choice([-1, 1])),
    "motion 5-11": _any_motion,
    "JPEG 10-30": lambda p, rng: jpeg(p, int(rng.integers(10, 31))),
    "blur + noise": lambda p, rng: _noisy(_clipped(blurred(p, rng.uniform(1, 2.5))), rng.uniform(2, 6), rng),
    "blur + JPEG": lambda p, rng: jpeg(_clipped(blurred(p, rng.uniform(1, 2.2))), int(rng.integers(30, 80))),
    "rotated + blur": lambda p, rng: _clipped(blurred(_rotated(p, rng.uniform(5, 45)), rng.uniform(1, 2.2))),
    "motion + noise": lambda p, rng: _noisy(_any_motion(p, rng, 4, 9), rng.uniform(1, 4), rng),
    "small + blur": lambda p, rng: _clipped(blurred(_resized(p, 0.7), rng.uniform(0.8, 1.5))),
    "rotated + inverted": lambda p, rng: 255 - _rotated(p, rng.uniform(5, 45)),
    "dark + motion": lambda p, rng: _clipped(_any_motion(p, rng, 4, 8) * 0.35 + rng.normal(0, 1.5, p.shape)),
}
#: The seven of the issue.
PLAIN = tuple(CONDITIONS)[:7]


def degraded(one: Scene, condition: str, seed: int) -> Grey:
    return CONDITIONS[condition](one.picture, np.random.default_rng([seed, list(CONDITIONS).index(condition), 7]))
