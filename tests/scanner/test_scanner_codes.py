"""Codes and GS1 data, on pictures that zxing-cpp itself draws."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import zxingcpp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from edgekit.errors import InputError, UsageError
from edgekit.scanner import Code, CodeReader, event_schema
from edgekit.scanner.assembly import assemble
from edgekit.scanner.config import config_of
from edgekit.scanner.gs1 import parse_gs1, parse_link
from edgekit.scanner.reading import Reading, Region
from edgekit.scanner.stop import Stop

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


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["01", "00", "17", "3103", "253", "10", "\x1d", "(", ")", "]C1"]) | st.text("0123456789Aé\x1d")
    ).map("".join)
)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    assert set(parse_gs1(text)) in ({"ais"}, {"error"})
    for link in (text, f"https://id.gs1.org/{text}", f"http://x/01/{text}", f"https://[{text}"):
        found = parse_link(link)
        assert found is None or set(found) in ({"ais"}, {"error"})


@pytest.mark.parametrize(
    ("text", "ais"),
    [
        ("\x1d0109501101530003", {"01": "09501101530003"}),  # FNC1 that nothing needs
        ("0109501101530003\x1d10AB\x1d\x1d21C", {"01": "09501101530003", "10": "AB", "21": "C"}),
        ("17300200", {"17": "300200"}),  # day 00: the month's last
        ("3103001750", {"3103": "001750"}),
        ("253950110153000399", {"253": "950110153000399"}),
        ("91A,b", {"91": "A,b"}),  # a company's own
        ("10ABCDEFGHIJKLMNOPQRSTUV", None),  # no FNC1 after 20 characters
        ("17301400", None),
        ("17300230", None),
        ("7003301231", None),
        ("21\u00e9", None),
        ("(01)09501101530003", None),
        ("0109501101530003\x1d5", None),
    ],
)
def test_messages(text: str, ais: dict[str, str] | None) -> None:
    found = parse_gs1(text)
    assert found == {"ais": ais} if ais else set(found) == {"error"}


def test_a_digital_link_is_gs1_data(kit: Any) -> None:
    link = "https://id.gs1.org/01/09506000134352/10/A%2F1?17=251231&x=1"
    (code,) = CodeReader()(kit.code_picture(link, "QRCode"))
    assert (code.text, code.gs1) == (link, {"ais": {"01": "09506000134352", "10": "A/1", "17": "251231"}})
    assert parse_link("HTTP://shop.example/a/01/9506000134352") == {"ais": {"01": "09506000134352"}}
    assert "check digit" in (parse_link("https://id.gs1.org/01/09506000134353") or {})["error"]
    for other in (
        "https://shop.example/2024/01/20240131123456",
        "https://shop.example/01/",
        "x",
        "https://[/01/1",
        "http://a/b",
    ):
        assert parse_link(other) is None


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


def placed(kind: str, degrees: float, scale: float, inverted: bool = False) -> tuple[Any, list[tuple[float, float]]]:
    """A code turned about (480, 330) of a (700, 900) frame, and its true corners, clockwise from its own top left."""
    code = zxingcpp.create_barcode("ABC1234567", getattr(zxingcpp.BarcodeFormat, kind))
    modules = np.asarray(code.to_image(scale=1, add_quiet_zones=False))
    printed = np.kron(np.pad(modules, 8, constant_values=255), np.ones((8, 8), np.uint8))
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, (height, width), by = 480, 330, printed.shape, 8 / scale
    back = (c * by, s * by, width / 2 - by * (c * x + s * y), -s * by, c * by, height / 2 + by * (s * x - c * y))
    warp = {"size": (900, 700), "method": Image.Transform.AFFINE, "data": back, "resample": Image.Resampling.BICUBIC}
    frame = Image.new("L", (900, 700), 130)
    frame.paste(Image.fromarray(printed).transform(**warp), mask=Image.new("L", (width, height), 255).transform(**warp))
    half_h, half_w = np.array(modules.shape) * scale / 2
    corners = [(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)]
    picture = np.asarray(frame)
    return 255 - picture if inverted else picture, [(x + u * c - v * s, y + u * s + v * c) for u, v in corners]


def away(code: Code, corners: list[tuple[float, float]]) -> float:
    assert code.position is not None
    return float(np.abs(np.array(code.position) - np.array(corners)).max())


@pytest.mark.parametrize("kind", ["QRCode", "DataMatrix", "Code128"])
@pytest.mark.parametrize(("degrees", "scale"), [(0, 3.0), (31, 3.0), (180, 2.0), (-90, 2.0), (12, 3.0), (-168, 2.0)])
def test_a_code_says_where_it_is(kind: str, degrees: float, scale: float) -> None:
    frame, corners = placed(kind, degrees, scale)
    (code,) = CodeReader(1e9)(frame)
    assert away(code, corners) < 5


def test_a_position_leads_back_from_what_was_made_of_the_frame() -> None:
    """Cut out, turned, enlarged, deblurred: the corners are those on the frame."""
    stages = set()
    for kind, degrees, scale, sigma in [
        ("Code128", 31, 3, 0),
        ("Code128", 31, 3, 1.8),
        ("QRCode", 31, 3, 1.8),
    ]:
        frame, corners = placed(kind, degrees, scale)
        reader = CodeReader(1e9)
        (code,) = reader(np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(sigma))))
        stages.add(reader.stage)
        assert away(code, corners) < 10, (kind, reader.stage)
    assert len(stages) >= 2
    assert not stages & {"plain", ""}


@pytest.mark.parametrize("kind", ["Aztec", "QRCode"])
def test_corners_run_clockwise_in_a_mirror(kind: str) -> None:
    frame, corners = placed(kind, 0, 3.0)
    frame = np.ascontiguousarray(frame[:, ::-1])
    (code,) = CodeReader()(frame)
    ring = np.array(code.position)
    (ax, ay), (bx, by) = ring[1] - ring[0], ring[2] - ring[1]
    assert ax * by > ay * bx  # y points down
    for x, y in corners:
        assert np.abs(ring - (899 - x, y)).max(axis=1).min() < 4


def test_a_position_counts_from_the_frame_where_a_region_is_read() -> None:
    frame, corners = placed("QRCode", 0, 3.0)
    answer = Reading(codes=CodeReader(), region=Region(0.31, 0.27, 0.9, 0.8)).answer(frame)
    assert away(answer.codes[0], corners) < 4
    (found,) = answer.fields["codes"]
    assert found == {"text": "ABC1234567", "format": "QR Code", "position": [list(at) for at in answer.codes[0].position]}
    both = Reading(codes=CodeReader(), region=Region(0.31, 0.27, 0.9, 0.8)).answers([frame, frame])
    assert [each.fields["codes"] for each in both] == [[found], [found]]
    assert answer.codes[0].figures() == {"text": "ABC1234567", "format": "QR Code"}
    event = {"schema": 1, "id": "a", "time": "2026-01-31T12:00:00.000Z", "codes": [found]}
    event |= {"source": "dock", "seq": 0, "latency_ms": 1.0}
    jsonschema.validate(event, event_schema())


def damaged_itf(random: np.random.Generator) -> tuple[str, Any]:
    """Fourteen digits with one to three stripes through the bars, as wide as a quiet zone at most."""
    text = "".join(map(str, random.integers(0, 10, 14)))
    code = zxingcpp.create_barcode(text, zxingcpp.BarcodeFormat.ITF)
    bars = np.tile(np.repeat(np.asarray(code.to_image(scale=1, add_quiet_zones=False))[0], 3), (60, 1))
    for _ in range(int(random.integers(1, 4))):
        x, wide = int(random.integers(0, bars.shape[1] - 10)), int(random.integers(3, 30))
        bars[:, x : x + wide] = random.choice([0, 255, 255])
    noisy = np.pad(bars, ((30, 30), (40, 40)), constant_values=255) + random.normal(0, 8, (120, bars.shape[1] + 80))
    return text, np.clip(noisy, 0, 255).astype(np.uint8)


def test_a_part_of_an_itf_code_is_not_read_as_one() -> None:
    """It is the same wrong text on every frame, so that votes would believe it; zxing-cpp alone reads some here."""
    random = np.random.default_rng(5)
    reader, plain, right = CodeReader(0), 0, 0
    for _ in range(250):
        text, picture = damaged_itf(random)
        plain += any(code.text != text for code in zxingcpp.read_barcodes(picture, formats=zxingcpp.BarcodeFormat.ITF))
        found = [code.text for code in reader(picture)]
        assert found in ([], [text])
        right += bool(found)
    assert plain >= 2
    assert right >= 3


@pytest.mark.parametrize("degrees", [0, 90, 20])
def test_whole_itf_codes_beside_print_are_read(degrees: int) -> None:
    code = zxingcpp.create_barcode("31402868883412", zxingcpp.BarcodeFormat.ITF)
    bars = np.asarray(code.to_image(scale=3, add_quiet_zones=False))
    label = Image.fromarray(np.pad(bars, ((40, 40), (36, 160)), constant_values=255))
    draw = ImageDraw.Draw(label)
    for line in range(6):
        draw.text((bars.shape[1] + 76, 44 + 20 * line), "LOT 4711", fill=0, font_size=18)
    draw.rectangle((4, 4, label.width - 5, label.height - 5), outline=0, width=4)
    picture = np.asarray(label.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=255))
    assert [each.text for each in CodeReader(0)(picture)] == ["31402868883412"]


def test_files_have_more_time_than_cameras(tmp_path: Path) -> None:
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    budgets = {}
    for address in ("pattern:32x32@0,1", str(tmp_path)):
        with contextlib.ExitStack() as stack:
            config = config_of({"codes": {}, "source": [{"address": address}]})
            parts = assemble(config, stack, Stop())
            assert parts.reading is not None
            assert isinstance(parts.reading.codes, CodeReader)
            budgets[address] = parts.reading.codes.budget_ms
    assert list(budgets.values()) == [100, 300]
