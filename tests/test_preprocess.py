"""The one preprocessing: its properties, and Pillow as the reference for its resize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import DataError, InputError
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import MAX_PIXELS, Preprocessor, canonical_frame, read_image

Array = np.ndarray[Any, Any]
side = st.integers(1, 70)
fits = st.sampled_from(["stretch", "crop", "letterbox"])


@st.composite
def frames(draw: st.DrawFn, channels: tuple[int | None, ...] = (None, 3)) -> Array:
    """uint8 frames of any size: noise, edges and gradients, sometimes as a view that is not contiguous."""
    height, width, depth = draw(side), draw(side), draw(st.sampled_from(channels))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (height, width) if depth is None else (height, width, depth)
    kind = draw(st.sampled_from(["noise", "edges", "gradient", "flipped"]))
    if kind == "edges":
        return (rng.integers(0, 2, shape) * 255).astype(np.uint8)
    if kind == "gradient":
        ramp = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width)).astype(np.uint8)
        return ramp if depth is None else np.repeat(ramp[:, :, None], depth, 2)
    noise = rng.integers(0, 256, shape, np.uint8)
    return noise[::-1, ::-1] if kind == "flipped" else noise


@st.composite
def plain_specs(draw: st.DrawFn, channels: int | None = None) -> ImagePreprocessing:
    """mean 0 and std 1: the output is the frame in 0..1."""
    depth: Any = channels or draw(st.sampled_from([1, 3]))
    return ImagePreprocessing(draw(side), draw(side), depth, (0.0,) * depth, (1.0,) * depth, draw(fits))


@given(frames((None, 1, 3, 4)), plain_specs())
def test_shape_type_and_range(frame: Array, spec: ImagePreprocessing) -> None:
    before = frame.copy()
    tensor = Preprocessor(spec)(frame)
    assert tensor.shape == (1, spec.channels, spec.height, spec.width)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    low, high = frame.min() / 255, frame.max() / 255
    assert tensor.max() <= high + 1e-5
    assert tensor.min() >= (0 if spec.fit == "letterbox" else low) - 1e-5
    assert np.array_equal(frame, before)


@given(frames(), st.floats(0, 1), st.floats(0.05, 2))
def test_equal_size_is_the_identity_with_normalisation(frame: Array, mean: float, std: float) -> None:
    channels: Any = 1 if frame.ndim == 2 else 3
    for fit in ("stretch", "crop", "letterbox"):
        spec: Any = ImagePreprocessing(frame.shape[1], frame.shape[0], channels, (mean,) * channels, (std,) * channels, fit)
        expected = (frame.astype(np.float64) / 255 - mean) / std
        expected = expected[None] if frame.ndim == 2 else expected.transpose(2, 0, 1)
        np.testing.assert_allclose(Preprocessor(spec)(frame)[0], expected, atol=2e-6 / std)


def pillow(frame: Array, spec: ImagePreprocessing) -> Array:
    """The same with Pillow: float64 (H, W[, 3]) in 0..1."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    size = (spec.width, spec.height)
    if spec.fit == "stretch":
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR)) / 255.0
    if spec.fit == "crop":
        scale = min(image.height / spec.height, image.width / spec.width)
        left, top = (image.width - spec.width * scale) / 2, (image.height - spec.height * scale) / 2
        box = (max(left, 0.0), max(top, 0.0), min(image.width - left, image.width), min(image.height - top, image.height))
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box)) / 255.0
    scale = max(image.height / spec.height, image.width / spec.width)
    width, height = max(1, round(image.width / scale)), max(1, round(image.height / scale))
    canvas = Image.new(image.mode, size)
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(small, ((spec.width - width) // 2, (spec.height - height) // 2))
    return np.asarray(canvas) / 255.0


@settings(max_examples=200)
@given(st.data())
def test_the_resize_is_pillows_bilinear(data: st.DataObject) -> None:
    frame = data.draw(frames())
    spec = data.draw(plain_specs(1 if frame.ndim == 2 else 3))
    found = Preprocessor(spec)(frame)[0]
    expected = pillow(frame, spec)
    expected = expected[None] if frame.ndim == 2 else expected.transpose(2, 0, 1)
    # Pillow rounds to 8 bits after each of its two passes; this one keeps floats.
    assert np.abs(found - expected).max() <= 1.5 / 255


@given(side, side, plain_specs(), st.integers(0, 255))
def test_a_constant_frame_stays_constant(height: int, width: int, spec: ImagePreprocessing, value: int) -> None:
    tensor = Preprocessor(spec)(np.full((height, width, 3), value, np.uint8))[0]
    inside = tensor if spec.fit != "letterbox" else tensor[:, (spec.height - 1) // 2, (spec.width - 1) // 2]
    np.testing.assert_allclose(inside, value / 255, atol=1e-5)


@given(frames((3,)), plain_specs(3))
def test_a_mirrored_frame_gives_a_mirrored_tensor(frame: Array, spec: ImagePreprocessing) -> None:
    """No half-pixel shift: left and right, top and bottom are treated alike (letterbox may be off by its odd pixel)."""
    if spec.fit == "letterbox":
        return
    preprocess = Preprocessor(spec)
    np.testing.assert_allclose(preprocess(frame[::-1, ::-1])[0], preprocess(frame)[0][:, ::-1, ::-1], atol=1e-4)


def test_letterbox_keeps_the_aspect_and_pads_with_black() -> None:
    spec = ImagePreprocessing(20, 20, 1, mean=(0.5,), std=(0.25,), fit="letterbox")
    tensor = Preprocessor(spec)(np.full((10, 40), 255, np.uint8))[0, 0]  # 4:1, so 5 of 20 rows are picture
    black, white = -2.0, 2.0
    rows = np.flatnonzero(tensor[:, 0] > 0)
    assert rows.tolist() == [7, 8, 9, 10, 11]
    np.testing.assert_allclose(tensor[rows], white, atol=1e-5)
    np.testing.assert_allclose(np.delete(tensor, rows, 0), black, atol=1e-5)


def test_crop_cuts_the_centre() -> None:
    spec = ImagePreprocessing(10, 10, 1, mean=(0.0,), std=(1.0,), fit="crop")
    frame = np.zeros((10, 30), np.uint8)
    frame[:, 10:20] = 255
    np.testing.assert_allclose(Preprocessor(spec)(frame), 1.0, atol=1e-5)


def test_grey_is_bt601_luma() -> None:
    spec = ImagePreprocessing(1, 1, 1, mean=(0.0,), std=(1.0,))
    for channel, share in enumerate((0.299, 0.587, 0.114)):
        frame = np.zeros((1, 1, 3), np.uint8)
        frame[0, 0, channel] = 255
        assert Preprocessor(spec)(frame).item() == pytest.approx(share, abs=1e-6)


@given(st.lists(st.tuples(side, side), min_size=9, max_size=20))
def test_many_sizes_in_a_row_do_not_confuse_it(sizes: list[tuple[int, int]]) -> None:
    """More sizes than plans are kept: each is answered as by a fresh one."""
    spec = ImagePreprocessing(12, 9, 3, (0.4,) * 3, (0.2,) * 3, "crop")
    preprocess = Preprocessor(spec)
    for height, width in [*sizes, *sizes]:
        frame = np.random.default_rng(height * 71 + width).integers(0, 256, (height, width, 3), np.uint8)
        assert np.array_equal(preprocess(frame), Preprocessor(spec)(frame))


def test_answers_do_not_share_memory() -> None:
    preprocess = Preprocessor(ImagePreprocessing(4, 4, 1, (0.0,), (1.0,)))
    first = preprocess(np.zeros((4, 4), np.uint8))
    preprocess(np.full((4, 4), 255, np.uint8))
    assert not first.any()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"not uint8 \(4, 4, 5\)"),
        (np.zeros((4, 4), np.int32), "not int32"),
        (np.zeros((4, 4, 3), np.float32), "not float32"),
        (np.zeros((4, 0, 3), np.uint8), "empty"),
        (np.zeros((), np.uint8), "shape"),
        ([1, 2], "not list"),
    ],
)
def test_what_is_no_frame(frame: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        canonical_frame(frame)
    assert caught.value.hint


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name in ("empty.png", "text.jpg", "cut.png", "missing.png"):
        with pytest.raises(DataError, match=name) as caught:
            read_image(tmp_path / name)
        assert caught.value.hint
    Image.new("L", (100, 50)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png", max_pixels=5000).shape == (50, 100)
    with pytest.raises(DataError, match="exceeds 4999 pixels"):
        read_image(tmp_path / "large.png", max_pixels=4999)
    assert MAX_PIXELS >= 4000 * 6000


@pytest.mark.parametrize(
    ("name", "kind", "value", "read"),
    [("a.tif", np.uint16, 0x1234, 0x12), ("a.png", np.uint16, 0xABCD, 0xAB), ("a.pgm", np.int32, 0xABCD, 0xAB)],
)
def test_deep_greys_keep_their_upper_byte(tmp_path: Path, name: str, kind: type, value: int, read: int) -> None:
    Image.fromarray(np.full((3, 5), value, kind)).save(tmp_path / name)
    frame = read_image(tmp_path / name)
    assert (frame == read).all()
    assert frame.shape == (3, 5)


@pytest.mark.parametrize(("kind", "value"), [(np.int32, 200), (np.float32, 0.5)])
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, kind: type, value: float) -> None:
    """Taken as 16 bits, a float picture in 0..1 would be black, and nobody would be told."""
    Image.fromarray(np.full((3, 5), value, kind)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match="32-bit pixels") as caught:
        read_image(tmp_path / "deep.tif")
    assert caught.value.hint == "convert it to 8 or 16 bits"
