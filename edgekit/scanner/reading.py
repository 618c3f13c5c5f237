"""What is read on a frame: a label by a model, lines of text by a reader, codes. One `Reading` a scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple, Protocol

from edgekit.errors import BackendError, EdgekitError, InputError, UsageError
from edgekit.manifest import ImagePreprocessing, TextPreprocessing
from edgekit.preprocess import Frame
from edgekit.runtime import Prediction

from .codes import Code, CodeReader

__all__ = ["Answer", "Reading", "Region"]


class FrameModel(Protocol):
    """A `Model` for pictures, or what stands in its place (`ShadowedModel`)."""

    @property
    def bundle(self) -> Any: ...

    def __call__(self, frame: Any, /) -> Prediction: ...

    def predict_batch(self, frames: Sequence[Any], /) -> list[Prediction]: ...


class Region(NamedTuple):
    """A part of a frame, in shares of its width and height: 0, 0, 1, 1 is all of it."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def of(self, frame: Frame) -> Frame:
        """The part of (H, W[, 3]), at least one pixel; a view."""
        height, width = frame.shape[:2]
        left, top = self.corner(frame)
        part: Frame = frame[top : max(top + 1, round(self.bottom * height)), left : max(left + 1, round(self.right * width))]
        return part

    def corner(self, frame: Frame) -> tuple[int, int]:
        """x, y of the part's first pixel on the frame."""
        height, width = frame.shape[:2]
        return min(int(self.left * width), width - 1), min(int(self.top * height), height - 1)


class Answer(NamedTuple):
    """``fields`` of the event, or the reason (``unfit``, ``failed``) and the words why there are none; ``codes`` as read."""

    fields: dict[str, Any]
    latency_ms: float
    reason: str = ""
    why: str = ""
    codes: Sequence[Any] = ()


class Reading:
    """``model`` answers with a label or text, ``text`` reads a line beside a classifier, ``codes`` reads codes; on ``region``.
    ``line``: the part of the frame that ``text`` reads, where it is another one.

    ``codes`` is a `CodeReader` or any function frame -> list of `Code`. Models are open (entered); the caller closes them.
    Raises `UsageError` where there is nothing to read with, or a model takes no pictures.
    """

    def __init__(
        self,
        model: FrameModel | None = None,
        codes: CodeReader | Callable[[Any], Sequence[Any]] | None = None,
        text: FrameModel | None = None,
        region: Region | None = None,
        line: Region | None = None,
    ) -> None:
        if model is None and codes is None and text is None:
            raise UsageError("there is nothing to read with", "name a bundle, or add --codes")
        for each in (model, text):
            if each is not None and not isinstance(spec := each.bundle.manifest.preprocessing, ImagePreprocessing):
                what = "raw tensors" if spec is None else "text" if isinstance(spec, TextPreprocessing) else "series"
                raise UsageError(
                    f"{each.bundle.path} takes {what}, not frames",
                    "scan with a bundle trained on pictures, or run it with Model",
                )
        if text is not None and text.bundle.manifest.task != "text-recognition":
            raise UsageError(f"{text.bundle.path} reads no text", "name a bundle trained to read lines, for example on labels")
        self.model, self.codes, self.text, self.region, self.line = model, codes, text, region, line

    def answer(self, frame: Frame) -> Answer:
        """What one frame says. A frame that the model does not take, and one it breaks down on, give the reason."""
        start = perf_counter_ns()
        fields: dict[str, Any] = {}
        codes: Sequence[Any] = ()
        reason = why = ""
        try:
            part = frame if self.region is None else self.region.of(frame)
            if self.model is not None:
                fields.update(_predicted(self.model(part)))
            codes = self._beside(frame, part, fields)
        except InputError as error:
            reason, why = "unfit", error.message
        except BackendError as error:
            reason, why = "failed", error.message
        except MemoryError:
            reason, why = "failed", "it does not fit into memory; scale it down"
        return Answer({} if reason else fields, (perf_counter_ns() - start) / 1e6, reason, why, codes)

    def answers(self, frames: Sequence[Frame]) -> list[Answer]:
        """The same for several frames; the model runs once on all of them, or on each where one of them does not fit.

        The latency of each is that of the batch: so long its answer took.
        """
        if self.model is None or len(frames) < 2:
            return [self.answer(frame) for frame in frames]
        start = perf_counter_ns()
        parts = [frame if self.region is None else self.region.of(frame) for frame in frames]
        try:
            fields = [_predicted(each) for each in self.model.predict_batch(parts)]
            codes = [self._beside(*each) for each in zip(frames, parts, fields, strict=True)]
        except (EdgekitError, MemoryError):
            return [self.answer(frame) for frame in frames]
        took = (perf_counter_ns() - start) / 1e6
        return [Answer(own, took, codes=each) for own, each in zip(fields, codes, strict=True)]

    def _beside(self, frame: Frame, part: Frame, fields: dict[str, Any]) -> Sequence[Any]:
        """Text and codes into ``fields``; the codes as the reader gave them, but where they are on the whole frame."""
        if self.text is not None:
            read = self.text(part if self.line is None else self.line.of(frame))
            fields["text"], fields["text_score"] = read.text, round(read.score, 6)
        if self.codes is None:
            return ()
        codes = self.codes(part)
        if self.region is not None:
            corner = self.region.corner(frame)
            codes = [code.moved(*corner) if isinstance(code, Code) else code for code in codes]
        fields["codes"] = [_code_fields(code) for code in codes]
        return codes


def _code_fields(code: Any) -> dict[str, Any]:
    fields: dict[str, Any] = code.figures()
    position = getattr(code, "position", None)
    return fields if position is None else {**fields, "position": [list(corner) for corner in position]}


def _predicted(prediction: Prediction) -> dict[str, Any]:
    if not math.isfinite(prediction.score):
        raise BackendError("the model's scores are not finite", "compare the bundle: edgekit compare B")
    found: dict[str, Any] = {}
    if prediction.label is not None:
        found["label"] = prediction.label
    found["score"] = round(prediction.score, 6)
    if prediction.text is not None:
        found["text"] = prediction.text
    return found
