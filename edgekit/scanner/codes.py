"""1-D and 2-D codes by zxing-cpp, GS1 data by biip."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra, UsageError
from edgekit.preprocess import Frame, canonical_frame

from .cascade import enhanced
from .gs1 import parse_gs1

__all__ = ["Code", "CodeReader"]

BUDGET_MS = 100.0
#: What an enhanced picture may give: not ITF, Telepen or DX film edge. A part of an ITF code is a valid ITF code, and a
#: damaged picture gives such short wrong reads.
ENHANCED = (
    "Code128,Code93,Code39,Codabar,EANUPC,DataBar,QRCode,MicroQRCode,RMQRCode,DataMatrix,Aztec,PDF417,MicroPDF417,MaxiCode"
)


class Code(NamedTuple):
    """One code. ``text`` is the plain content (GS1 fields end with 0x1D); ``gs1`` as `parse_gs1`, None where not GS1."""

    text: str
    format: str
    gs1: dict[str, Any] | None

    def figures(self) -> dict[str, Any]:
        data: dict[str, Any] = {"text": self.text, "format": self.format}
        return data if self.gs1 is None else {**data, "gs1": self.gs1}


class CodeReader:
    """Reads every code on a frame.

    The plain picture is read first, always. Only where that finds nothing, stages that cost more follow (see
    `_stages`) until one finds something or ``budget_ms`` has passed; a stage is not started after that. 0 reads the
    plain picture only. Raises `MissingExtra` without zxing-cpp or biip.
    """

    def __init__(self, budget_ms: float = BUDGET_MS) -> None:
        if not budget_ms >= 0:
            raise UsageError(f"the code budget is {budget_ms:g} ms", "give 0 (plain reading only) or more milliseconds")
        try:
            import zxingcpp
        except ImportError:
            raise MissingExtra("scan", "zxingcpp") from None
        try:
            import biip  # noqa: F401
        except ImportError:
            raise MissingExtra("scan", "biip") from None
        self.budget_ms = budget_ms
        self._zxing = zxingcpp
        self._all = zxingcpp.BarcodeFormats([])  # any
        self._enhanced = zxingcpp.barcode_formats_from_str(ENHANCED)

    def __call__(self, frame: Frame) -> list[Code]:
        """uint8 (H, W), (H, W, 3) RGB -> the codes on it, in the reader's order. Raises `InputError` for what is no frame."""
        start = perf_counter()
        grey = _grey(canonical_frame(frame))
        for picture, formats in self._stages(grey):
            if codes := self._read(picture, formats):
                return codes
            if (perf_counter() - start) * 1e3 >= self.budget_ms:
                break
        return []

    def _stages(self, grey: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint8], Any]]:
        """Pictures, with the formats that are believed on them; each is made when it is asked for."""
        yield grey, self._all
        # zxing-cpp tries inversion itself, but with the same thresholds: light codes on dark ground mostly stay unread.
        yield 255 - grey, self._all
        for picture in enhanced(grey):
            yield picture, self._enhanced

    def _read(self, grey: NDArray[np.uint8], formats: Any) -> list[Code]:
        zxing = self._zxing
        found = zxing.read_barcodes(grey, formats=formats, text_mode=zxing.TextMode.Plain)
        return [self._code(code) for code in found if code.valid]

    def _code(self, code: Any) -> Code:
        is_gs1 = code.content_type == self._zxing.ContentType.GS1
        return Code(code.text, str(code.format), parse_gs1(code.text) if is_gs1 else None)


def _grey(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W[, 3]) -> contiguous uint8 (H, W), ITU-R BT.601 luma in 8-bit fixed point."""
    if frame.ndim == 2:
        return np.ascontiguousarray(frame)
    luma = frame[:, :, 0] * np.uint16(77)
    luma += frame[:, :, 1] * np.uint16(150)
    luma += frame[:, :, 2] * np.uint16(29)
    luma >>= 8
    return luma.astype(np.uint8)
