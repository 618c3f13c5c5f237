"""Bad pictures of codes: the cascade reads what the plain reader cannot, and nothing that is not there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import zxingcpp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import UsageError
from edgekit.scanner import Code, CodeReader
from edgekit.scanner.cascade import Attempt, attempts
from edgekit.scanner.estimates import bars, blur_sigma, motion, orientation
from edgekit.scanner.gs1 import parse_gs1
from edgekit.scanner.regions import regions
from edgekit.scanner.restore import MAX_PIXELS

Grey = np.ndarray[Any, Any]


def _code(text: str, kind: str) -> Grey:
    code = zxingcpp.create_barcode(text, getattr(zxingcpp.BarcodeFormat, kind))
    return np.pad(np.asarray(code.to_image(scale=3)), 40, constant_values=255)


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
@pytest.mark.parametrize("degrees", [-40, -31, -12, 7, 10, 20, 44])
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
    for degrees in (8, 14, 23, 32, 41):
        frame = turned(picture, degrees)
        plain = {code.text for code in CodeReader(0)(frame)}
        assert {code.text for code in CodeReader(300)(frame)} <= plain | {"314028688834"}


@pytest.mark.parametrize("shape", [(480, 640), (1500, 2000), (15, 4000), (17, 20_000), (20_000, 40)])
def test_attempts_are_bounded_and_say_how_large_they_are(shape: tuple[int, int]) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    frame = (((x + 2 * y) // 9 % 2) * 200).astype(np.uint8)
    for _, attempt in zip(range(25), attempts(frame), strict=False):
        picture = attempt.make()
        assert picture.dtype == np.uint8
        assert picture.size <= max(frame.size, 1.01 * MAX_PIXELS)
        assert picture.size <= 2.5 * attempt.pixels


def smeared(picture: Grey, length: int, vertical: bool) -> Grey:
    a = picture.T if vertical else picture
    a = np.mean([np.roll(a, shift, axis=1) for shift in range(length)], axis=0)
    return np.rint(a.T if vertical else a).astype(np.uint8)


@pytest.mark.parametrize("length", [5, 7, 9])
@pytest.mark.parametrize("vertical", [False, True])
def test_motion_over_a_texture_is_found(length: int, vertical: bool) -> None:
    """Without a grid of its own. A code's modules give minima too: over codes the estimate is right about one time in three."""
    texture = np.random.default_rng(length).integers(0, 256, (200, 240)).astype(np.uint8)
    found = motion(smeared(texture, length, vertical))[0]
    assert abs(found.length - length) <= 1.0
    assert abs((found.degrees - 90 * vertical + 90) % 180 - 90) <= 15


@pytest.mark.parametrize("degrees", [-80, -31, 0, 8, 12, 20, 60])
def test_bars_tell_their_direction(kit: Any, degrees: float) -> None:
    found, excess = bars(turned(kit.code_picture("ABC-1234567", "Code128"), degrees))
    assert abs((found - degrees + 90) % 180 - 90) < 1.0
    assert excess > 0.5
    assert bars(kit.code_picture("ABC-1234567", "QRCode"))[1] < 0.25


def test_a_region_holds_the_code(kit: Any) -> None:
    code = kit.code_picture("ABC-1234567", "Code128")[30:-30, 30:-30]
    frame = np.full((600, 900), 140, np.uint8)
    frame[300 : 300 + len(code), 200 : 200 + code.shape[1]] = code
    box = regions(frame)[0]
    assert box.left <= 210
    assert box.top <= 310
    assert box.right >= 190 + code.shape[1]
    assert box.bottom >= 290 + len(code)


def test_a_budget_passes_over_what_would_not_fit(kit: Any) -> None:
    reader = CodeReader(1e9)
    assert reader(turned(kit.code_picture("ABC1234567", "Code128"), 31))
    assert reader.stage not in ("", "plain")
    reader.budget_ms = 0
    assert reader(turned(kit.code_picture("ABC1234567", "Code128"), 31)) == []
    assert reader.stage == ""


def test_only_named_formats_are_read(kit: Any) -> None:
    frame = kit.code_picture("ABC1234567", "Code128")
    assert CodeReader(1e9, ["QR Code"])(frame) == []
    assert CodeReader(1e9, ["EAN-13", "aztec"])(turned(frame, 31)) == []
    for picture in (frame, turned(frame, 31)):
        assert [code.text for code in CodeReader(1e9, ["code128", "EAN-13"])(picture)] == ["ABC1234567"]


def test_an_unknown_format_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match="Cod128") as caught:
        CodeReader(formats=["Cod128"])
    assert "Code 128" in str(caught.value.hint)
    for names in ([], [""]):
        with pytest.raises(UsageError):
            CodeReader(formats=names)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(["Code128", "QRCode", "DataMatrix"]), st.integers(0, 45), st.floats(0, 2.5), st.booleans())
def test_never_fewer_codes_than_the_plain_reader(kind: str, degrees: int, sigma: float, light: bool) -> None:
    picture = _code("ABC1234567", kind)
    two = np.concatenate([np.pad(picture, ((0, 40), (0, 0)), constant_values=255)] * 2, axis=0)
    frame = turned(two, degrees)
    frame = blurred(frame, sigma) if sigma > 0.3 else frame
    frame = 255 - frame if light else frame
    plain = CodeReader(0)(frame)
    found = CodeReader(200)(frame)
    assert {code.text for code in found} <= {"ABC1234567"}
    assert len(found) >= len(plain)


@pytest.mark.parametrize("seed", range(4))
def test_textures_give_no_codes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:200, :260]
    u = x * math.cos(seed) + y * math.sin(seed)
    bars_drawn = np.searchsorted(np.cumsum(rng.integers(2, 9, 200)) - 300, u) % 2 * 180 + 30
    cells = np.kron(rng.integers(0, 2, (50, 65)), np.ones((4, 4))) * 180 + 30
    for texture in (bars_drawn, cells):
        assert CodeReader(500)(texture.astype(np.uint8)) == []


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(["noise", "flat", "step"]))
def test_no_picture_breaks_it_and_none_without_a_code_gives_one(height: int, width: int, seed: int, kind: str) -> None:
    frame = np.full((height, width), seed % 256, np.uint8)
    if kind == "noise":
        frame = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    elif kind == "step":
        frame[:, width // 2 :] = 255 - frame[:, width // 2 :]
    assert CodeReader(1e9)(frame) == []


def test_an_enhanced_databar_is_believed_only_with_sound_gs1_data(kit: Any) -> None:
    """Rows of an unreadable stacked code join to others: a wrong read seen on a small photograph."""
    reader = CodeReader(1e9)
    code = Code("01106435615207736273108", "DataBar Expanded Stacked", parse_gs1("01106435615207736273108"))
    reader._read = lambda picture, *rest, **options: [code] if rest[1:] else []  # type: ignore[method-assign]
    assert reader(turned(kit.code_picture("ABC1234567", "Code128"), 31)) == []


@pytest.mark.parametrize(
    ("reads", "believed"),
    [
        (["2818832473941", "0810131413941", "0810131413941", "2818832473941"], None),  # a half-size EAN-13 once gave the second
        (["2818832473941", "2818832473941"], "2818832473941"),
        (["2818832473941", "0810131413941", "2818832473941", "2818832473941"], "2818832473941"),
    ],
)
def test_what_enhanced_pictures_read_otherwise_in_one_place_is_not_believed(
    kit: Any, monkeypatch: pytest.MonkeyPatch, reads: list[str], believed: str | None
) -> None:
    pictures = [kit.code_picture(text, "EAN13") for text in reads]
    tries = [Attempt("enlarged", picture.size, lambda picture=picture: picture, "linear", upright=True) for picture in pictures]
    monkeypatch.setattr("edgekit.scanner.codes.attempts", lambda grey: tries)
    found = CodeReader(60_000)(np.full_like(pictures[0], 128))
    assert [code.text for code in found] == ([believed] if believed else [])
