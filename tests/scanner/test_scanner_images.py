"""Pictures as files: cut off, too large, odd, gone, forbidden, still being written. A frame or one drop with cause and cure."""

from __future__ import annotations

import errno
import io
import itertools
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.errors import DataError, EdgekitError, UsageError
from edgekit.scanner import CameraOptions, Captured, Notice, Stop, open_source
from edgekit.scanner.config import config_of
from edgekit.scanner.sources import files, stills

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "interlaced.png": ("PNG", {"interlace": 1}),
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_decoder() -> Iterator[None]:
    """For all sources of these tests; each would start its own."""
    with stills.decoding():
        yield


def one(path: Path, **options: Any) -> Captured:
    (captured,) = (item for item in open_source(str(path), **options) if isinstance(item, Captured))
    return captured


@pytest.fixture(scope="module")
def photograph() -> Any:
    """uint8 (48, 64, 3): a slope under noise, so that every part of a file matters."""
    slope = np.add.outer(np.arange(48), np.arange(64))[:, :, None] * 2.0
    noise = np.random.default_rng(0).normal(0, 20, (48, 64, 3))
    return np.clip(slope + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_cut_off_anywhere_gives_its_frame_or_one_drop(tmp_path: Path, photograph: Any, kind: str) -> None:
    written, (name, options) = io.BytesIO(), KINDS[kind]
    picture = Image.fromarray(photograph)
    (picture.quantize(64) if name == "GIF" else picture).save(written, name, **options)
    data, path = written.getvalue(), tmp_path / f"cut.{kind}"
    path.write_bytes(data)
    whole = one(path).frame
    assert whole is not None
    for share in range(100):
        path.write_bytes(data[: len(data) * share // 100])
        captured = one(path)
        assert captured.frame is None, f"{share}% of a {kind} is a frame"
        assert captured.error.startswith(f"{path.name} cannot be decoded as an image: ")
        assert captured.error.endswith("; remove or replace the file")
        assert "\n" not in captured.error
    for missing in (1, 2):  # the end mark of a JPEG, say: nothing of the picture is missing then
        path.write_bytes(data[:-missing])
        captured = one(path)
        assert captured.frame is None or np.array_equal(captured.frame, whole)


def test_a_folder_of_cut_pictures_is_read_on(tmp_path: Path, photograph: Any) -> None:
    written = io.BytesIO()
    Image.fromarray(photograph).save(written, "JPEG")
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(written.getvalue()[: None if i % 2 else 400])
    found = list(open_source(str(tmp_path)))
    assert [item.frame is not None for item in found if isinstance(item, Captured)] == [False, True] * 3
    assert [item.seq for item in found if isinstance(item, Captured)] == list(range(6))


# Bombs


def png(width: int, height: int) -> bytes:
    """White or black in one bit a pixel, as small as it gets: 1,030 to 1, but for the checksum at its end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9, zlib.DEFLATED, -15), 1 + (width + 7) // 8
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = b"\x78\xda" + piece * (row * height // (1 << 20) + 1)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    small = {}
    for name in ("JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, name, **({"lossless": True} if name == "WEBP" else {}))
        small[name] = bytearray(out.getvalue())
    at = small["JPEG"].index(b"\xff\xc0") + 5
    small["JPEG"][at : at + 4] = struct.pack(">HH", 65500, 65500)
    small["GIF"][6:10] = struct.pack("<HH", 65535, 65535)
    small["BMP"][18:26] = struct.pack("<ii", 30000, 30000)
    for tag in (256, 257):  # width and height, short or long
        at = small["TIFF"].index(struct.pack("<H", tag), struct.unpack("<I", small["TIFF"][4:8])[0])
        small["TIFF"][at + 2 : at + 12] = struct.pack("<HII", 4, 1, 40000)
    canvas, corner = (12000 - 1).to_bytes(3, "little") * 2, (16 - 1).to_bytes(3, "little") * 2
    frame = bytes(6) + corner + bytes(4) + bytes(small["WEBP"][12:])
    parts = [(b"VP8X", bytes([2, 0, 0, 0]) + canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in parts)
    small["WEBP"] = bytearray(b"RIFF" + struct.pack("<I", len(body)) + body)
    found = {f"bomb.{name.lower()}": bytes(data) for name, data in small.items()}
    found["bomb.tif"] = found.pop("bomb.tiff")
    return found | {"bomb.png": png(20000, 19775), "near.png": png(8000, 8001), "bomb.ppm": b"P6 50000 50000 255\n" + bytes(99)}


_MEASURE = """
import resource, sys
from edgekit.scanner import open_source
list(open_source(sys.argv[1]))  # what reading needs once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for captured in open_source(sys.argv[2]):
    print(captured.frame is None, captured.error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    folder, warm = tmp_path / "bombs", tmp_path / "warm.png"
    folder.mkdir()
    Image.new("L", (8, 8)).save(warm)
    found = bombs()
    assert len(found["bomb.png"]) < 60_000
    for name, data in found.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-W", "error", "-c", _MEASURE, str(warm), str(folder)]
    *lines, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(found)
    for name, line in zip(sorted(found), lines, strict=True):
        assert line.startswith(f"True {name}"), line
        assert line.endswith("; scale it down"), line
        assert "64000000 pixels" in line, line
    assert int(grown) < 64, "MB"


def test_the_limit_is_the_source_s_own(tmp_path: Path) -> None:
    Image.new("L", (100, 50)).save(tmp_path / "large.png")
    refused = one(tmp_path / "large.png", options=CameraOptions(max_pixels=4999))
    assert refused.error == "large.png: 100 x 50 exceeds 4999 pixels; scale it down"
    assert one(tmp_path / "large.png", options=CameraOptions(max_pixels=5000)).frame is not None


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 30)])
def test_sizes_at_the_edge(tmp_path: Path, size: tuple[int, int]) -> None:
    for mode, shape in (("L", ()), ("RGB", (3,)), ("1", ()), ("RGBA", (3,))):
        Image.new(mode, size).save(tmp_path / "edge.png")
        frame = one(tmp_path / "edge.png").frame
        assert frame is not None
        assert frame.shape == (*size[::-1], *shape)


def test_what_is_no_picture_under_a_picture_s_name_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")  # Pillow would run gs
    assert (
        one(path).error == "page.png cannot be decoded as an image: it is of no kind that is read; remove or replace the file"
    )


# Paths


def test_names_in_any_script_and_deep_folders(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(6):
        deep = deep / ("ü" * 100)
    deep.mkdir(parents=True)
    Image.new("L", (3, 2)).save(deep / "фото 写真 📷.PNG")
    tmp_path.chmod(0o555)
    try:
        captured = one(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert captured.frame is not None
    assert captured.source.endswith("фото 写真 📷.PNG")


def test_a_name_that_is_too_long_is_a_wrong_name() -> None:
    for spec in ("a" * 5000, "/" + "a/" * 3000, "x" * 300 + ".png", "\0.png"):
        with pytest.raises(DataError) as refused:
            open_source(spec)
        assert len(refused.value.message) < 300
    pipeline = "gst:" + "videotestsrc ! queue ! " * 20 + "identity"  # no slash in it, longer than a file's name may be
    assert config_of({"source": [{"address": pipeline}], "codes": {}}).source[0].address == pipeline


@pytest.mark.parametrize(
    ("spec", "cause", "cure"),
    [
        ("foo://x", "there is no source foo:", "give an image, a video file"),
        ("camera:x", "camera:x names no camera", "write camera:0"),
        ("v4l2:", "v4l2: names no device", "write v4l2:/dev/video0"),
        ("rtsp://", "rtsp:// names no host", "write rtsp://HOST"),
        ("udp://", "udp:// names no port", "write udp://HOST:PORT"),
        ("tcp://127.0.0.1:99999", "tcp://127.0.0.1:99999 is no address: Port out of range", "write tcp://HOST:PORT"),
        ("http://[::1", "http://[::1 is no address", "write http://HOST:PORT"),
        ("pattern:0x0@1", "pattern:0x0@1 is no test picture", "write pattern:WIDTHxHEIGHT@FPS"),
        ("/nonexistent/x.png", "there is no file or folder at /nonexistent/x.png", "check --source"),
        ("/nonexistent/x.mp4", "there is no video file at /nonexistent/x.mp4", "check --source"),
        ("/dev/null", "/dev/null is no regular file", "give an image file or a folder"),
    ],
)
def test_a_wrong_address_is_refused_at_once_with_cause_and_cure(spec: str, cause: str, cure: str) -> None:
    with pytest.raises((UsageError, DataError)) as refused:
        open_source(spec)
    assert refused.value.message.startswith(cause)
    assert refused.value.hint.startswith(cure)


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[None]:
    """Without root's rights, which reach everything."""
    Image.new("L", (2, 2)).save(tmp_path / "warm.png")
    one(tmp_path / "warm.png")  # loads what is loaded late
    (tmp_path / "warm.png").unlink()
    opened = [each for each in (tmp_path, *tmp_path.parents) if each.stat().st_uid == os.geteuid() and len(each.parts) > 2]
    modes = [each.stat().st_mode for each in opened]
    for each, mode in zip(opened, modes, strict=True):
        each.chmod(mode | 0o055)
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    yield
    if own == 0:
        os.seteuid(own)
    for each, mode in zip(opened, modes, strict=True):
        each.chmod(mode)


def test_what_may_not_be_read_says_so(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "shut"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (3, 2)).save(tmp_path / name)
    (tmp_path / "a.png").chmod(0)
    folder.chmod(0)
    request.getfixturevalue("nobody")
    try:
        shut = one(tmp_path / "a.png")
        assert shut.error == "a.png cannot be read: Permission denied; give this user the right to read it"
        assert one(tmp_path / "b.png").frame is not None
        with pytest.raises(EdgekitError) as refused:
            open_source(str(tmp_path))
        assert refused.value.message == f"{folder} cannot be listed: Permission denied"
        with pytest.raises(EdgekitError, match="Permission denied"):
            open_source(str(folder / "x.png"))
    finally:
        os.seteuid(os.getuid())
        folder.chmod(0o755)


def test_a_file_that_goes_between_listing_and_reading_is_one_drop(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (3, 2)).save(tmp_path / name)
    frames = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    first, second = (item for item in frames if isinstance(item, Captured))
    assert first.error == "a.png is gone; nothing may remove files while they are read"
    assert second.frame is not None


def test_a_file_that_is_being_written_is_read_once_it_stands_still(tmp_path: Path, photograph: Any) -> None:
    written = io.BytesIO()
    Image.fromarray(photograph).save(written, "JPEG")
    data, stop, path = written.getvalue(), Stop(), tmp_path / "growing.jpg"
    items = open_source(str(tmp_path), watch=True, stop=stop)
    for share in range(5):
        path.write_bytes(data[: len(data) * share // 4])
        assert next(items) is None
    captured = next(items)
    assert isinstance(captured, Captured)
    assert captured.frame is not None
    assert next(items) is None
    stop.set()
    assert list(items) == []


def test_a_folder_that_goes_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    (inbox := tmp_path / "inbox").mkdir()
    for name in ("a", "b"):
        (inbox / name).mkdir()
        Image.new("L", (3, 2)).save(inbox / name / "1.png")
    stop = Stop()
    items = open_source(str(inbox), watch=True, stop=stop)

    def until_frames(count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            item = next(items)
            if item is not None:
                state = f" {item.details['state']}" if isinstance(item, Notice) else ""
                found.append(f"{Path(item.source).relative_to(tmp_path)}{state}")
        return found

    assert until_frames(2) == ["inbox/a/1.png", "inbox/b/1.png"]
    inbox.rename(tmp_path / "gone")
    assert until_frames(1) == ["inbox down"]
    assert next(items) is None  # the scan goes round
    (tmp_path / "gone").rename(inbox)
    assert until_frames(1) == ["inbox up"]
    Image.new("L", (3, 2)).save(inbox / "a" / "2.png")
    assert until_frames(1) == ["inbox/a/2.png"]  # and none a second time
    stop.set()


def test_a_folder_that_may_not_be_listed_keeps_nobody_from_the_others(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (3, 2)).save(tmp_path / name / "1.png")
    (tmp_path / "a").chmod(0)
    request.getfixturevalue("nobody")
    try:
        items = [item for item in itertools.islice(open_source(str(tmp_path), watch=True, stop=Stop()), 4) if item]
        told, read = items
        assert isinstance(told, Notice)
        assert told.details == {"state": "down", "reason": "it cannot be listed: Permission denied"}
        assert read.source == str(tmp_path / "b" / "1.png")
    finally:
        os.seteuid(os.getuid())
        (tmp_path / "a").chmod(0o755)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """A label, black on nothing: below what is transparent most programs leave black."""
    alpha = Image.new("L", (4, 2))
    alpha.paste(255, (0, 0, 2, 2))
    label = Image.new("LA" if mode == "LA" else "RGBA", (4, 2))
    label.putalpha(alpha)
    (label.quantize() if mode == "P" else label).save(tmp_path / "a.png")
    frame = one(tmp_path / "a.png").frame
    assert frame is not None
    assert frame.shape == ((2, 4) if mode == "LA" else (2, 4, 3))
    assert frame[:, :2].max() == 0
    assert frame[:, 2:].min() == 255


def test_what_is_remembered_of_a_watched_folder_is_bounded_where_a_part_of_it_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a folder that goes while its parent is walked is no camera that is down."""
    stamps, shut = files._stamps, OSError(errno.EACCES, "Permission denied", str(tmp_path / "lost+found"))
    gone = OSError(errno.ENOENT, "No such file or directory", str(tmp_path / "gone"))

    def walked(folder: Path, unlisted: Any) -> Any:
        unlisted(shut), unlisted(gone)
        return stamps(folder, unlisted)

    monkeypatch.setattr(files, "_stamps", walked)
    stop = Stop()
    items = open_source(str(tmp_path), watch=True, stop=stop)
    told = []
    for number in range(3):
        Image.new("L", (3, 2)).save(tmp_path / f"{number}.png")
        while not isinstance(item := next(items), Captured):
            told += [item] if item else []
        (tmp_path / f"{number}.png").unlink()
    for _ in range(3):
        assert next(items) is None
    assert [each.source for each in told] == [str(tmp_path / "lost+found")]
    assert items.gi_yieldfrom.gi_frame.f_locals["done"] == {}  # type: ignore[attr-defined]
    stop.set()


def test_a_grey_level_may_be_the_transparent_one(tmp_path: Path) -> None:
    Image.new("L", (4, 2), 0).save(tmp_path / "a.png", transparency=0)
    frame = one(tmp_path / "a.png").frame
    assert frame is not None
    assert (frame.shape, frame.min()) == ((2, 4), 255)
