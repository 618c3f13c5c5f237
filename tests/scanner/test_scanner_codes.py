"""Codes and GS1 data, on pictures that zxing-cpp itself draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import InputError, UsageError
from edgekit.scanner import CodeReader
from edgekit.scanner.gs1 import parse_gs1

ELEMENTS = "(01)09501101530003(17)301231(10)AB-123"


def check_digit(digits: str) -> int:
    return -sum(int(d) * (3 if i % 2 == 0 else 1) for i, d in enumerate(reversed(digits))) % 10


@pytest.mark.parametrize(
    ("text", "kind", "options", "read", "name", "gs1"),
    [
        ("ABC-123", "Code128", {}, "ABC-123", "Code 128", None),
        ("größer ✓", "QRCode", {}, "größer ✓", "QR Code", None),
        ("9501101530003", "EAN13", {}, "9501101530003", "EAN-13", None),
        (
            ELEMENTS,
            "DataMatrix",
            {"gs1": True},
            "01095011015300031730123110AB-123",
            "Data Matrix",
            {"ais": {"01": "09501101530003", "17": "301231", "10": "AB-123"}},
        ),
        ("(00)006141411234567890", "Code128", {"gs1": True}, "00006141411234567890", "Code 128", "sscc"),
        ("(10)AB(21)C9", "DataMatrix", {"gs1": True}, "10AB\x1d21C9", "Data Matrix", {"ais": {"10": "AB", "21": "C9"}}),
    ],
)
def test_codes_are_read(kit: Any, text: str, kind: str, options: dict[str, Any], read: str, name: str, gs1: Any) -> None:
    grey = kit.code_picture(text, kind, **options)
    colour = np.stack([grey, grey, np.full_like(grey, 200)], axis=2)  # (H, W, 3)
    if gs1 == "sscc":
        gs1 = {"ais": {"00": "006141411234567890"}}
    for frame in (grey, colour, 255 - grey, np.rot90(grey), np.ascontiguousarray(grey[:, ::-1])[:, ::-1]):
        assert [(c.text, c.format, c.gs1) for c in CodeReader(1e9)(frame)] == [(read, name, gs1)]


def test_two_codes_on_one_frame(kit: Any) -> None:
    left, right = kit.code_picture("LEFT", "QRCode"), kit.code_picture("RIGHT", "QRCode")
    height = max(len(left), len(right))
    frame = np.concatenate([np.pad(p, ((0, height - len(p)), (0, 0)), constant_values=255) for p in (left, right)], axis=1)
    assert {code.text for code in CodeReader()(frame)} == {"LEFT", "RIGHT"}


def test_a_bad_check_digit_is_reported_and_not_repaired(kit: Any) -> None:
    (code,) = CodeReader()(kit.code_picture("(00)006141411234567891", "Code128", gs1=True))
    assert code.text == "00006141411234567891"
    assert set(code.gs1 or {}) == {"error"}
    assert "check digit" in (code.gs1 or {})["error"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("0109501101530004", "check digit"),
        ("00006141411234567891", "check digit"),
        ("4149501101530004", "check digit"),
        ("8017950110153000000000", "check digit"),
        ("25395011015300041", "check digit"),
        ("17301399", "17"),
        ("0599", "Application Identifier"),
        ("ABC", "Application Identifier"),
        ("10A\x1d10B", "twice"),
        ("", "empty"),
    ],
)
def test_bad_gs1_messages_are_errors(text: str, word: str) -> None:
    result = parse_gs1(text)
    assert set(result) == {"error"}
    assert word in result["error"]


@given(st.sampled_from([("00", 17), ("01", 13), ("410", 12), ("402", 16), ("253", 12), ("8017", 17), ("8018", 17)]), st.data())
def test_exactly_the_right_check_digit_passes(key: tuple[str, int], data: st.DataObject) -> None:
    ai, length = key
    digits = data.draw(st.text("0123456789", min_size=length, max_size=length))
    given_digit = data.draw(st.integers(0, 9))
    result = parse_gs1(f"{ai}{digits}{given_digit}")
    if given_digit == check_digit(digits):
        assert result == {"ais": {ai: f"{digits}{given_digit}"}}
    else:
        assert set(result) == {"error"}


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    result = parse_gs1(text)
    assert set(result) in ({"ais"}, {"error"})


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 500), (500, 1), (3, 3, 4), (40, 40)])
def test_pictures_without_codes_give_none(shape: tuple[int, ...]) -> None:
    reader = CodeReader(1e9)
    assert reader(np.zeros(shape, np.uint8)) == []
    assert reader(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)) == []


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(InputError):
        CodeReader()(np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError):
        CodeReader(-1)


def test_no_budget_reads_the_plain_picture_only(kit: Any) -> None:
    reader = CodeReader(0)
    calls = []
    read = reader._read
    reader._read = lambda picture, *rest: calls.append(picture.shape) or read(picture, *rest)  # type: ignore[method-assign,func-returns-value]
    assert reader(np.zeros((50, 60), np.uint8)) == []
    assert calls == [(50, 60)]
    assert [code.text for code in reader(kit.code_picture("ABC", "QRCode"))] == ["ABC"]
