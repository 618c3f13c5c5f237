"""From what a device sees to a model's input. Training and the device share these functions, so they see the same tensor.

One kind of input a file: `image` (uint8 frames), `text` (str), `series` (float32 of time and channels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from edgekit.errors import BundleError
from edgekit.manifest import ImagePreprocessing, Preprocessing, SeriesPreprocessing

from .image import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Frame,
    Preprocessor,
    canonical_frame,
    decode_image,
    denormalised,
    normalisation,
    open_image,
    read_image,
)
from .series import SeriesPreprocessor
from .text import TextPreprocessor

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Frame",
    "Preprocess",
    "Preprocessor",
    "SeriesPreprocessor",
    "TextPreprocessor",
    "canonical_frame",
    "decode_image",
    "denormalised",
    "make_preprocessor",
    "normalisation",
    "open_image",
    "read_image",
]

#: One sample (a frame, a str, a series) -> the model's input, the batch axis in front.
Preprocess = Callable[[Any], NDArray[Any]]


def make_preprocessor(spec: Preprocessing, tokenizer: bytes | None = None) -> Preprocess:
    """What turns one sample into the model's input. ``tokenizer``: the ``tokenizer.json`` that text needs.

    Raises `BundleError` for text without a tokenizer, `MissingExtra` without the tokenizers library.
    """
    if isinstance(spec, ImagePreprocessing):
        return Preprocessor(spec)
    if isinstance(spec, SeriesPreprocessing):
        return SeriesPreprocessor(spec)
    if tokenizer is None:
        raise BundleError("this text model has no tokenizer.json", "restore the bundle, or make it again")
    return TextPreprocessor(spec, tokenizer)
