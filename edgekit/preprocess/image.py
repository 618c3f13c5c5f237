"""uint8 frame -> model input. Training and the device share this one function, so they see the same tensor.

Pure numpy: an antialiased bilinear (triangle) resize as in Pillow's ``Image.BILINEAR``, written as two small banded
matrix products that are built once for each frame size.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, InputError
from edgekit.files import printable
from edgekit.manifest import ImagePreprocessing

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Frame",
    "Preprocessor",
    "canonical_frame",
    "denormalised",
    "normalisation",
    "read_image",
]

Frame = NDArray[Any]
Float = NDArray[np.float32]
MAX_PIXELS = 64_000_000
#: What training and the scanner take for an image in a folder.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
#: Of all that Pillow opens, whatever a file is called: others start programs (EPS), or nobody meant them.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L
_BAND = 8  # output rows per matrix product: each touches only the input rows under its triangle
_ONE_BAND = 4096  # a resize matrix of up to this many entries is faster as one dense product
# OpenBLAS, which numpy's wheels bring, splits products above these sizes over threads. At frame sizes that saves
# nothing, and on a busy machine the threads wait for each other: 1.3 ms became 15 ms for a 640x480 frame. So products
# are kept below (interface/gemm.c and gemv.c: 65536 and 2304, each times GEMM_MULTITHREAD_THRESHOLD = 4).
_GEMM = 1 << 18  # m * n * k
_GEMV = 9216 // 3  # rows of three
_CACHED_SIZES = 8


def canonical_frame(frame: Frame) -> NDArray[np.uint8]:
    """Any usual frame -> uint8 (H, W) or (H, W, 3).

    Takes uint8 or uint16 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). 16 bits keep their upper byte;
    alpha is dropped. Raises `InputError` for all else.
    """
    if not isinstance(frame, np.ndarray) or frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] not in (1, 3, 4)):
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise InputError(
            f"a frame is uint8 of shape (H, W, 3), not {got}", "pass an RGB array, for example numpy.asarray(image)"
        )
    if frame.dtype == np.uint16:
        frame = (frame >> 8).astype(np.uint8)
    elif frame.dtype != np.uint8:
        raise InputError(
            f"a frame is uint8 (or uint16), not {frame.dtype}", "scale to 0..255 and convert: frame.astype('uint8')"
        )
    if frame.size == 0:
        raise InputError(f"the frame is empty: shape {frame.shape}", "check the source")
    if frame.ndim == 3:
        return frame[:, :, 0] if frame.shape[2] == 1 else frame[:, :, :3]
    return frame


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file with Pillow into uint8 (H, W) or (H, W, 3), turned upright by its EXIF orientation, on white
    where it is transparent.

    Raises `DataError` where the file is no image, is truncated, or has more than ``max_pixels`` (checked before decoding).
    """
    with open_image(path) as file:
        return decode_image(file, printable(Path(path).name), max_pixels)


def open_image(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, for reading. Raises `DataError`."""
    name = printable(Path(path).name)
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a pipe would be waited for
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except IsADirectoryError:
        pass
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    raise DataError(f"{name} is no regular file", "give an image file")


def decode_image(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """As `read_image`, of an open file; ``name`` is what errors call it."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about bombs; max_pixels refuses them
            with Image.open(file, formats=_FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    raise DataError(f"{name}: {opened.width} x {opened.height} exceeds {max_pixels} pixels", "scale it down")
                image = ImageOps.exif_transpose(opened)
                if image.mode in ("I", "F"):
                    # Pillow reads 16-bit PGM (and, in older versions, PNG) as I; elsewhere the range is anybody's guess.
                    if image.mode == "F" or opened.format not in ("PNG", "PPM"):
                        raise DataError(f"{name} has 32-bit pixels, whose range is not known", "convert it to 8 or 16 bits")
                    array = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
                elif image.mode in ("I;16", "I;16B", "I;16L") or (image.mode == "L" and not image.has_transparency_data):
                    array = np.asarray(image)
                    array = array.astype(np.uint16) if array.dtype.itemsize == 2 else array
                else:
                    array = np.asarray(_opaque(image))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{name} exceeds {max_pixels} pixels by far", "scale it down") from None
    except Exception as error:  # noqa: BLE001  decoders raise anything on hostile bytes
        raise _unreadable(name, error) from None
    return canonical_frame(array)


def _opaque(image: Any) -> Any:
    """Mode L or RGB; what is transparent shows white, as on a page: most files have black there, and so are labels."""
    from PIL import Image

    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    layer = image if image.mode == "LA" else image.convert("RGBA")
    page = Image.new(mode, image.size, "white")
    page.paste(layer.convert(mode), mask=layer.getchannel("A"))
    return page


def _unreadable(name: str, error: Exception) -> DataError:
    """What is wrong with a file, and its cure: with the file system, or with the bytes in it."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name} is gone", "nothing may remove files while they are read")
    if isinstance(error, OSError) and error.errno is not None:
        cure = "give this user the right to read it" if isinstance(error, PermissionError) else "check the disk"
        return DataError(f"{name} cannot be read: {error.strerror}", cure)
    kind = type(error).__name__
    words = "it is of no kind that is read" if kind == "UnidentifiedImageError" else str(error).split("\n")[0][:200]
    return DataError(f"{name} cannot be decoded as an image: {words or kind}", "remove or replace the file")


def _triangle(size_in: int, size_out: int, start: float, stop: float) -> list[tuple[slice, slice, Float]]:
    """Resize weights along one axis, from [start, stop) of the input to ``size_out``, as bands of a matrix.

    Returns (output rows, input rows, weights (rows out, rows in)) triples.
    """
    scale = (stop - start) / size_out
    radius = max(scale, 1.0)
    centre = start + (np.arange(size_out) + 0.5) * scale
    first = np.clip(np.floor(centre - radius + 0.5), 0, size_in - 1).astype(int)
    last = np.clip(np.floor(centre + radius + 0.5), first + 1, size_in).astype(int)
    bands = []
    height = size_out if size_in * size_out <= _ONE_BAND else _BAND
    for begin in range(0, size_out, height):
        rows = slice(begin, min(begin + height, size_out))
        low, high = int(first[rows].min()), int(last[rows].max())
        position = np.arange(low, high)
        weight = np.maximum(0.0, 1.0 - np.abs((position[None, :] + 0.5 - centre[rows, None]) / radius))
        weight[(position[None, :] < first[rows, None]) | (position[None, :] >= last[rows, None])] = 0.0
        weight /= weight.sum(1, keepdims=True)
        bands.append((rows, slice(low, high), np.ascontiguousarray(weight, np.float32)))
    return bands


def normalisation(spec: ImagePreprocessing) -> tuple[Float, Float]:
    """(scale, shift), float32 (C,): ``pixel * scale + shift`` of a pixel in 0..255 is ``(pixel / 255 - mean) / std``."""
    scale = [1.0 / (255.0 * s) for s in spec.std]
    shift = [-m / s for m, s in zip(spec.mean, spec.std, strict=True)]
    return np.array(scale, np.float32), np.array(shift, np.float32)


def denormalised(spec: ImagePreprocessing, x: NDArray[Any]) -> NDArray[np.uint8]:
    """float (N, C, H, W), as the model takes it -> uint8 (N, H, W, C), the pixels that it was made from, rounded to 8 bits."""
    pixels = (x.transpose(0, 2, 3, 1) * np.array(spec.std) + np.array(spec.mean)) * 255
    frames: NDArray[np.uint8] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return frames


class Preprocessor:
    """Call with a frame, get float32 (1, C, H, W). It keeps the weights of recent frame sizes; threads may share it."""

    def __init__(self, spec: ImagePreprocessing) -> None:
        self.spec = spec
        self._scale, self._shift = normalisation(spec)
        self._plans: OrderedDict[tuple[int, int], _Plan] = OrderedDict()

    def __call__(self, frame: Frame) -> Float:
        """uint8 frame, any size -> float32 (1, C, H, W). Raises `InputError` for what is no frame."""
        spec = self.spec
        sized = self._sized(frame)
        out = np.empty((1, spec.channels, spec.height, spec.width), np.float32)
        for channel in range(spec.channels):  # one plane at a time: no transposed copy of the frame
            plane = sized if sized.ndim == 2 else sized[:, :, channel]
            np.multiply(plane, self._scale[channel], out=out[0, channel], dtype=np.float32)
            out[0, channel] += self._shift[channel]
        return out

    def resized(self, frame: Frame) -> NDArray[np.uint8]:
        """uint8 frame, any size -> uint8 (1, H, W, C) at the model's size, for an engine that normalises by itself.

        What lies between two values of a pixel is rounded, which the call's float32 keeps. Raises as the call does.
        """
        sized = self._sized(frame)
        if sized.dtype != np.uint8:
            sized = np.rint(sized, out=sized).astype(np.uint8)  # means of bytes: there is nothing to clip
        pixels = sized[:, :, None] if sized.ndim == 2 else sized  # grey stands for each of three channels
        return np.ascontiguousarray(np.broadcast_to(pixels, (1, *pixels.shape[:2], self.spec.channels)))

    def pixels(self, frame: Frame) -> NDArray[np.uint8]:
        """`resized` as uint8 (1, C, H, W), for a graph that takes bytes in the order of its own layers."""
        return np.ascontiguousarray(self.resized(frame).transpose(0, 3, 1, 2))

    def _sized(self, frame: Frame) -> NDArray[Any]:
        """A frame at the model's size and number of channels, 0..255: (H, W) or (H, W, 3)."""
        frame = canonical_frame(frame)
        plan = self._plan(frame.shape[0], frame.shape[1])
        if plan is not None:
            return plan(_luma(frame) if self.spec.channels == 1 else frame)
        return _luma(frame) if self.spec.channels == 1 else frame

    def _plan(self, height: int, width: int) -> _Plan | None:
        key = (height, width)
        if key == (self.spec.height, self.spec.width):
            return None
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(height, width, self.spec)
            if len(self._plans) > _CACHED_SIZES:
                self._plans.popitem(last=False)
        return plan


def _luma(frame: NDArray[np.uint8]) -> NDArray[Any]:
    """(H, W, 3) -> float32 (H, W); grey frames pass through."""
    if frame.ndim == 2:
        return frame
    flat = frame.reshape(-1, 3)
    grey = np.empty(len(flat), np.float32)
    for start in range(0, len(flat), _GEMV - 1):
        block = slice(start, start + _GEMV - 1)
        np.matmul(flat[block].astype(np.float32), _LUMA, out=grey[block])
    return grey.reshape(frame.shape[:2])


class _Plan:
    """How one frame size becomes the model's size."""

    def __init__(self, height: int, width: int, spec: ImagePreprocessing) -> None:
        self.out_height, self.out_width = spec.height, spec.width
        top, left, bottom, right = 0.0, 0.0, float(height), float(width)
        box_height, box_width = spec.height, spec.width
        if spec.fit == "crop":
            scale = min(height / spec.height, width / spec.width)
            top, left = (height - spec.height * scale) / 2, (width - spec.width * scale) / 2
            bottom, right = height - top, width - left
        elif spec.fit == "letterbox":
            scale = max(height / spec.height, width / spec.width)
            box_height, box_width = max(1, round(height / scale)), max(1, round(width / scale))
        elif spec.fit == "line":
            box_width = max(1, min(spec.width, round(width * spec.height / height)))
        self.box = (box_height, box_width)
        centred = ((spec.height - box_height) // 2, (spec.width - box_width) // 2)
        self.offset = (0, 0) if spec.fit == "line" else centred
        self.rows = _triangle(height, box_height, top, bottom)
        self.columns = _triangle(width, box_width, left, right)

    def __call__(self, frame: NDArray[Any]) -> Float:
        """uint8 or float32 (H, W[, 3]) -> float32 (out_height, out_width[, 3]) in 0..255."""
        tail = frame.shape[2:]
        box_height, box_width = self.box
        flat = frame.reshape(frame.shape[0], -1)
        tall = np.empty((box_height, flat.shape[1]), np.float32)
        for out_rows, in_rows, weight in self.rows:
            source, target = flat[in_rows].astype(np.float32, copy=False), tall[out_rows]
            step = max(1, _GEMM // weight.size)
            for start in range(0, flat.shape[1], step):
                np.matmul(weight, source[:, start : start + step], out=target[:, start : start + step])
        tall = tall.reshape(box_height, frame.shape[1], *tail)
        small = np.empty((box_height, box_width, *tail), np.float32)
        for out_columns, in_columns, weight in self.columns:
            if tail:  # one small product a row
                small[:, out_columns] = weight @ tall[:, in_columns]
                continue
            step = max(1, _GEMM // weight.size)
            for start in range(0, box_height, step):
                small[start : start + step, out_columns] = tall[start : start + step, in_columns] @ weight.T
        if (box_height, box_width) == (self.out_height, self.out_width):
            return small
        padded = np.zeros((self.out_height, self.out_width, *tail), np.float32)
        padded[self.offset[0] : self.offset[0] + box_height, self.offset[1] : self.offset[1] + box_width] = small
        return padded
