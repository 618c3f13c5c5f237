"""Why nothing was read, asked of pictures made to be unreadable in one way each."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import zxingcpp

from edgekit.scanner.steps.noread import CAUSES, cause

Picture = np.ndarray[Any, Any]
HEIGHT, WIDTH = 240, 320
KINDS = {"Code128": 2.0, "ITF": 2.4, "EAN13": 2.4, "QRCode": 5.0, "DataMatrix": 7.0}  # pixels a module
_LEFT = ["0001101", "0011001", "0010011", "0111101", "0100011", "0110001", "0101111", "0111011", "0110111", "0001011"]
_PARITY = ["LLLLLL", "LLGLGG", "LLGGLG", "LLGGGL", "LGLLGG", "LGGLLG", "LGGGLL", "LGLGLG", "LGLGGL", "LGGLGL"]


def ean13(text: str) -> Picture:
    """The modules of an EAN-13 with whatever check digit, 1 for dark, (40, 95)."""
    right = ["".join("10"[int(bit)] for bit in bits) for bits in _LEFT]
    left = [_LEFT[int(d)] if p == "L" else right[int(d)][::-1] for d, p in zip(text[1:7], _PARITY[int(text[0])], strict=True)]
    bits = "101" + "".join(left) + "01010" + "".join(right[int(d)] for d in text[7:]) + "101"
    return np.repeat(np.array([[int(bit) for bit in bits]], np.uint8), 40, axis=0)


def modules(kind: str, random: np.random.Generator, wrong: int = 0) -> Picture:
    digits = "".join(map(str, random.integers(0, 10, 12)))
    if kind == "EAN13":
        check = -sum(int(d) * (3 if i % 2 == 0 else 1) for i, d in enumerate(reversed(digits)))
        return ean13(f"{digits}{(check + wrong) % 10}")
    text = {"Code128": f"AB{digits[:8]}", "QRCode": f"https://e.x/{digits}"}.get(kind, digits)
    code = zxingcpp.create_barcode(text, getattr(zxingcpp.BarcodeFormat, kind))
    return (np.asarray(code.to_image(scale=1, add_quiet_zones=False)) < 128).astype(np.uint8)


def blurred(picture: Picture, sigma: float) -> Picture:
    pad = int(4 * sigma) + 4
    padded = np.pad(picture, pad, mode="edge")
    fy, fx = np.fft.fftfreq(padded.shape[0])[:, None], np.fft.rfftfreq(padded.shape[1])[None, :]
    transfer = np.exp(-2 * (math.pi * sigma) ** 2 * (fx**2 + fy**2))
    return np.fft.irfft2(np.fft.rfft2(padded) * transfer, padded.shape)[pad:-pad, pad:-pad]


def labelled(code: Picture, pixels: float, random: np.random.Generator, cut: float = 0.0) -> tuple[Picture, float, float]:
    """A grey place with a label on it, at four times the size and averaged; the code's centre."""
    height, width = code.shape[0] * pixels, code.shape[1] * pixels
    top = random.uniform(16, max(17, HEIGHT - height - 16))
    left = -cut * width if cut else random.uniform(24, max(25, WIDTH - width - 24))
    y = np.floor(((np.arange(4 * HEIGHT) + 0.5) / 4 - top) / pixels).astype(int)
    x = np.floor(((np.arange(4 * WIDTH) + 0.5) / 4 - left) / pixels).astype(int)
    rows, columns = code.shape
    large = np.full((4 * HEIGHT, 4 * WIDTH), random.uniform(80, 110), np.float32)
    paper, ink = random.uniform(160, 215), random.uniform(20, 60)
    large[np.ix_((y >= -2) & (y < rows + 2), (x >= -8) & (x < columns + 8))] = paper
    on_y, on_x = (y >= 0) & (y < rows), (x >= 0) & (x < columns)
    large[np.ix_(on_y, on_x)] = np.where(code[y[on_y]][:, x[on_x]], ink, paper)
    return large.reshape(HEIGHT, 4, WIDTH, 4).mean(axis=(1, 3)), top + height / 2, left + width / 2


def unreadable(why: str, kind: str, random: np.random.Generator) -> Picture:
    pixels = KINDS[kind] if why != "too small" else random.uniform(0.4, 0.6)
    code = modules(kind, random) if why != "bad check digit" else modules("EAN13", random, wrong=int(random.integers(1, 10)))
    if why == "bad check digit":
        pixels = KINDS["EAN13"]
    picture, y, x = labelled(code, pixels, random, cut=random.uniform(0.3, 0.6) if why == "cut off" else 0.0)
    if why == "nothing there":
        picture = np.full((HEIGHT, WIDTH), random.uniform(60, 200)) + np.arange(WIDTH) * random.uniform(-0.1, 0.1)
    elif why == "blur":
        picture = blurred(picture, pixels * random.uniform(1.2, 1.8))
    elif why == "too dark":
        picture = picture * random.uniform(0.01, 0.05)
    elif why == "low contrast":
        picture = 120 + (picture - picture.mean()) * random.uniform(4, 7) / np.ptp(picture)
    elif why == "glare":
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        picture = picture + 500 * np.exp(-(((rows - y) / 35) ** 2) - ((columns - x) / 45) ** 2)
    noisy = blurred(picture, 0.5) + random.normal(0, 1.5, picture.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("why", [each for each in CAUSES if each != "unclear"])
def test_the_cause_is_found_on_most_pictures(why: str) -> None:
    found: Counter[str] = Counter()
    for seed in range(10):
        picture = unreadable(why, list(KINDS)[seed % 5], np.random.default_rng(seed))
        if not any(code.valid for code in zxingcpp.read_barcodes(picture)):
            found[cause(picture).cause] += 1
    print(why, dict(found))  # noqa: T201  the confusion, with -s
    assert sum(found.values()) >= 6  # the rest can still be read
    # What is too small may leave too little to say so; a cause that is not the right one is worse.
    assert found[why] >= (0.6 if why == "too small" else 0.9) * sum(found.values())
    assert found[why] + found["unclear"] >= 0.9 * sum(found.values())


def test_a_whole_sharp_code_with_scratches_is_given_no_cause() -> None:
    for seed, kind in enumerate(("QRCode", "DataMatrix")):
        random = np.random.default_rng(seed)
        picture, y, x = labelled(modules(kind, random), KINDS[kind], random)
        for shift in (-24, -8, 8, 24):
            picture[int(y) + shift - 3 : int(y) + shift + 3, int(x) - 70 : int(x) + 70] = 120
            picture[int(y) - 60 : int(y) + 60, int(x) + shift - 3 : int(x) + shift + 3] = 120
        sharp = np.clip(np.rint(blurred(picture, 0.5) + random.normal(0, 1.5, picture.shape)), 0, 255).astype(np.uint8)
        assert not zxingcpp.read_barcodes(sharp)
        assert cause(sharp).cause == "unclear", kind


def test_a_bad_check_digit_of_what_was_read_is_named() -> None:
    codes = [{"text": "00006141411234567891", "format": "Code 128", "gs1": {"error": "Invalid SSCC check digit"}}]
    why = cause(np.zeros((50, 50), np.uint8), {"codes": codes})
    assert (why.cause, why.figure["value"]) == ("bad check digit", "Code 128 00006141411234567891")


@pytest.mark.parametrize("shape", [(1, 1), (2, 500), (15, 15, 3), (40, 40), (3000, 20)])
def test_any_frame_has_a_cause(shape: tuple[int, ...]) -> None:
    for picture in (np.zeros(shape, np.uint8), np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)):
        assert cause(picture).cause in CAUSES
