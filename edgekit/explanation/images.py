"""Images: squares and superpixels are hidden by the image's median colour; the map lies over the frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import IMAGE_SUFFIXES, Frame, make_preprocessor, read_image
from edgekit.runtime import Model

from .modality import Modality, View
from .question import Attribution, Mask, Question
from .superpixels import superpixels

__all__ = ["ImageQuestion", "Images"]

PATCH = 1 / 5  # of the shorter side: a patch that hides a part, not the object
STEPS = 3  # patches overlap so that each pixel is judged by about STEPS squared of them


@dataclass(frozen=True)
class ImageQuestion(Question):
    """``x`` float32 (1, C, H, W), or uint8 where the graph takes bytes; masks and heat are (H, W)."""

    _fill: NDArray[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The median colour is the paper of a drawing and a dull tone of a photo: hiding with it removes and adds little.
        object.__setattr__(self, "_fill", np.median(self.x, axis=(2, 3), keepdims=True).astype(self.x.dtype))

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    def covered(self, masks: Mask) -> NDArray[Any]:
        return np.where(masks[:, None], self._fill, self.x)

    def windows(self) -> Iterator[Mask]:
        height, width = self.size
        patch = max(2, round(min(height, width) * PATCH))
        step = max(1, patch // STEPS)
        # Patches begin before the edge and end behind it: border pixels are judged by as many as inner ones.
        for top in range(step - patch, height, step):
            for left in range(step - patch, width, step):
                mask = np.zeros((height, width), bool)
                mask[max(0, top) : top + patch, max(0, left) : left + patch] = True
                yield mask

    def parts(self) -> NDArray[np.int64]:
        return superpixels(self.x[0].astype(np.float32))


class Images(Modality):
    """See `Modality`. A sample is a uint8 frame."""

    noun = "image"
    plural = "images"
    task = "image-classification"
    suffixes = IMAGE_SUFFIXES
    advice = "give PNG or JPEG files"
    methods = ("activations", "gradcam", "lime", "occlusion", "rollout")

    def __init__(self, model: Model) -> None:
        self._model = model

    def read(self, path: Path) -> list[tuple[str, Frame]]:
        return [("", read_image(path))]

    def question(self, sample: Frame, target: int, model: Model | None = None) -> ImageQuestion:
        model = model or self._model
        spec = model.bundle.manifest.preprocessing
        # Maps are of the graph's float input. An engine that takes frames is asked by `run_samples`, which makes bytes of it.
        read = make_preprocessor(spec) if spec and model.runner.frames else model.preprocess
        return ImageQuestion(model, read(sample), target)

    def detail(self, question: Question, attribution: Attribution) -> dict[str, Any]:
        return {}

    def picture(self, sample: Frame, views: Sequence[View], caption: str) -> bytes:
        from . import picture

        spec = self._model.bundle.manifest.preprocessing
        assert isinstance(spec, ImagePreprocessing)
        return picture.overlay(sample, views, spec, caption)
