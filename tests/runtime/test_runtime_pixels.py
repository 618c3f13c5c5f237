"""Training and the device see the same tensor: the proof, pixel for pixel, through the public functions alone.

Image files of every kind are written, read as a data set by training (`edgekit.data`), and read one by one as the
scanner reads them (`read_image` and `open_source`, then `Model`). The tensors must be equal bit for bit, and the right ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.data import load
from edgekit.preprocess import read_image
from edgekit.runtime import Model
from edgekit.scanner import open_source

Array = np.ndarray[Any, Any]
SIZES = [(31, 17), (33, 97), (1, 1), (5, 211), (32, 32), (64, 48)]  # (height, width)


def on_white(image: Array) -> Array:
    """uint8 (H, W, C) whose last channel is alpha -> uint8 (H, W, C - 1), as a page shows it; rounded."""
    values, alpha = image[:, :, :-1].astype(int), image[:, :, -1:].astype(int)
    return ((values * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def picture(kind: str, height: int, width: int) -> tuple[Image.Image, Array]:
    """An image of a kind, and the uint8 frame that it must be read as."""
    rng = np.random.default_rng(height * 1000 + width)
    if kind == "grey":
        frame = rng.integers(0, 256, (height, width), np.uint8)
        return Image.fromarray(frame), frame
    if kind == "16-bit":
        deep = rng.integers(0, 65536, (height, width), np.uint16)
        return Image.fromarray(deep), (deep // 256).astype(np.uint8)
    if kind == "bilevel":
        bits = rng.integers(0, 2, (height, width)).astype(bool)
        return Image.fromarray(bits), bits.astype(np.uint8) * 255
    if kind == "grey with alpha":
        pair = rng.integers(0, 256, (height, width, 2), np.uint8)
        return Image.fromarray(pair), on_white(pair)[:, :, 0]
    if kind == "RGBA":
        four = rng.integers(0, 256, (height, width, 4), np.uint8)
        return Image.fromarray(four), on_white(four)
    frame = rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "palette":
        few = Image.fromarray(frame).quantize(16)
        return few, np.asarray(few.convert("RGB"))
    return Image.fromarray(frame), frame


KINDS = ["grey", "RGB", "RGBA", "16-bit", "palette", "bilevel", "grey with alpha"]


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_device_see_the_same_tensor(
    kind: str, fit: str, tmp_path: Path, photo_bundle: Callable[[str], Bundle], digits_bundle: Bundle
) -> None:
    frames = {}
    for i, (height, width) in enumerate(SIZES):
        path = tmp_path / "data" / ("a" if i % 2 else "b") / f"{height}x{width}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, frames[str(path.relative_to(tmp_path / "data"))] = picture(kind, height, width)
        image.save(path)
    every = load(f"folder:{tmp_path / 'data'}").all
    for bundle in (photo_bundle(fit), digits_bundle):  # three channels, one channel
        spec = bundle.manifest.preprocessing
        assert spec is not None
        trained_on = every.tensors(spec)  # what training sees
        assert set(trained_on.ids) == set(frames)
        with Model.open(bundle.path) as model:
            for name, tensor in zip(trained_on.ids, trained_on.x, strict=True):
                frame = read_image(tmp_path / "data" / name)  # what the scanner reads
                assert frame.dtype == np.uint8
                assert np.array_equal(frame, frames[name])
                seen = model.preprocess(frame)
                assert seen.dtype == tensor.dtype == np.float32
                assert seen.shape == (1, spec.channels, spec.height, spec.width)
                assert seen[0].tobytes() == tensor.tobytes()
                logits = model.run({"x": tensor[None]})["y"][0]
                scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                np.testing.assert_allclose(model(frame).scores, scores, rtol=1e-5)


def test_a_scanned_folder_gives_the_frames_that_training_saw(tmp_path: Path, photo_bundle: Callable[[str], Bundle]) -> None:
    for i, kind in enumerate(KINDS):
        height, width = SIZES[i % len(SIZES)]
        path = tmp_path / "data" / ("a" if i % 2 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(kind, height, width)[0].save(path)
    bundle = photo_bundle("crop")
    spec = bundle.manifest.preprocessing
    assert spec is not None
    tensors = load(f"folder:{tmp_path / 'data'}").all.tensors(spec)
    expected = dict(zip(tensors.ids, tensors.x, strict=True))
    with Model.open(bundle.path) as model:
        for label in ("a", "b"):
            for captured in open_source(str(tmp_path / "data" / label)):
                assert captured.frame is not None
                seen = model.preprocess(captured.frame)
                assert seen[0].tobytes() == expected.pop(f"{label}/{Path(captured.source).name}").tobytes()
    assert not expected


def test_a_wide_frame_is_the_same_frame(photo_bundle: Callable[[str], Bundle]) -> None:
    """Grey as (H, W), (H, W, 1) and three equal channels; RGBA and RGB; 8 bits and the same widened to 16."""
    grey = np.random.default_rng(0).integers(0, 256, (19, 45), np.uint8)
    rgb = np.random.default_rng(1).integers(0, 256, (19, 45, 3), np.uint8)
    with Model.open(photo_bundle("crop").path) as model:
        tensor = model.preprocess(grey)
        assert np.array_equal(tensor, model.preprocess(grey[:, :, None]))
        np.testing.assert_allclose(tensor, model.preprocess(np.repeat(grey[:, :, None], 3, 2)), atol=1e-5)
        colour = model.preprocess(rgb)
        alpha = np.full((19, 45, 1), 7, np.uint8)
        assert np.array_equal(colour, model.preprocess(np.concatenate([rgb, alpha], 2)))
        assert np.array_equal(colour, model.preprocess(rgb.astype(np.uint16) * 257))


def test_exif_orientation_is_applied_before_training_and_before_scanning(tmp_path: Path) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    turned = Image.fromarray(np.rot90(upright).copy())  # 90 degrees against the clock; tag 6 says: turn it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), upright)
