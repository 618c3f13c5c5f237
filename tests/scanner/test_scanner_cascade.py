"""Bad pictures of codes: the cascade reads what the plain reader cannot, and nothing that is not there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.scanner import CodeReader
from edgekit.scanner.cascade import MAX_PIXELS, blur_sigma, enhanced, orientation

Grey = np.ndarray[Any, Any]


def turned(picture: Grey, degrees: float) -> Grey:
    image = Image.fromarray(picture).rotate(-degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=255)
    return np.asarray(image)


def blurred(picture: Grey, sigma: float) -> Grey:
    """A true Gaussian, in the frequency domain, with mirrored borders."""
    pad = 40
    padded = np.pad(picture.astype(float), pad, mode="reflect")
    fy, fx = np.fft.fftfreq(padded.shape[0])[:, None], np.fft.rfftfreq(padded.shape[1])[None, :]
    transfer = np.exp(-2 * (math.pi * sigma) ** 2 * (fx**2 + fy**2))
    return np.clip(np.rint(np.fft.irfft2(np.fft.rfft2(padded) * transfer, padded.shape)), 0, 255)[pad:-pad, pad:-pad].astype(
        np.uint8
    )


@pytest.mark.parametrize("kind", ["Code128", "DataMatrix"])
@pytest.mark.parametrize("degrees", [-40, -31, -12, 7, 20, 44])
def test_orientation_finds_the_turn(kit: Any, kind: str, degrees: float) -> None:
    found = orientation(turned(kit.code_picture("ABC-1234567", kind), degrees))
    assert abs((found - degrees + 45) % 90 - 45) < 2.0


def test_an_upright_code_is_not_turned(kit: Any) -> None:
    assert abs(orientation(kit.code_picture("ABC-1234567", "Code128"))) < 2.0


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
def test_blur_is_estimated_within_a_fifth_of_the_true_one(kit: Any, sigma: float) -> None:
    picture = np.kron(kit.code_picture("ABC-1234567", "QRCode"), np.ones((4, 4), np.uint8))  # modules wide beside sigma
    assert blur_sigma(blurred(picture, sigma)) == pytest.approx(sigma, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "degrade"),
    [
        ("Code128", lambda p: 255 - p),
        ("Code128", lambda p: turned(p, 31)),
        ("Code39", lambda p: turned(p, -20)),
        ("Code128", lambda p: blurred(p, 2.2)),
        ("Code128", lambda p: turned(blurred(p, 1.8), 25)),
    ],
)
def test_what_the_plain_reader_misses_is_read(kit: Any, kind: str, degrade: Any) -> None:
    frame = degrade(kit.code_picture("ABC1234567", kind))
    assert [code.text for code in CodeReader(1e9)(frame)] == ["ABC1234567"]


def test_the_cascade_adds_no_short_itf_reads(kit: Any) -> None:
    picture = kit.code_picture("314028688834", "ITF")
    for degrees in range(8, 45, 3):
        frame = turned(picture, degrees)
        plain = {code.text for code in CodeReader(0)(frame)}
        assert {code.text for code in CodeReader(1e9)(frame)} <= plain | {"314028688834"}


@pytest.mark.parametrize("shape", [(480, 640), (2000, 3000), (15, 4000), (17, 90_000)])
def test_enhanced_pictures_are_bounded(shape: tuple[int, int]) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    frame = (((x + 2 * y) // 9 % 2) * 200).astype(np.uint8)
    for picture in enhanced(frame):
        assert picture.dtype == np.uint8
        assert picture.size <= 1.01 * MAX_PIXELS


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(["noise", "flat", "step"]))
def test_no_picture_breaks_it_and_none_without_a_code_gives_one(height: int, width: int, seed: int, kind: str) -> None:
    frame = np.full((height, width), seed % 256, np.uint8)
    if kind == "noise":
        frame = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    elif kind == "step":
        frame[:, width // 2 :] = 255 - frame[:, width // 2 :]
    assert CodeReader(1e9)(frame) == []
