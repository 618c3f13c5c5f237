"""1-D and 2-D codes by zxing-cpp, GS1 data by biip."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra, UsageError
from edgekit.preprocess import Frame, canonical_frame

from .cascade import Attempt, attempts
from .extent import goes_on, whole_height
from .gs1 import parse_gs1, parse_link
from .restore import Affine

__all__ = ["Code", "CodeReader"]

BUDGET_MS = 300.0
LIVE_BUDGET_MS = 100.0  # where the next frame does not wait
_BESIDE = 30  # modules beside an ITF code in which its bars would go on; its quiet zone has ten
RATE = 5e-5  # ms a pixel, until a stage has been measured
#: What an enhanced picture may give: not ITF, Telepen or DX film edge. A part of an ITF code is a valid ITF code, and a
#: damaged picture gives such short wrong reads.
LINEAR = "Code128,Code93,Code39,Codabar,EANUPC,DataBar"
MATRIX = "QRCode,MicroQRCode,RMQRCode,DataMatrix,Aztec,PDF417,MicroPDF417,MaxiCode"
KINDS = {"any": f"{LINEAR},{MATRIX}", "linear": LINEAR, "matrix": MATRIX}
#: Names of formats with one check digit or none: an enhanced picture must give the same twice.
WEAK = frozenset({"EAN-13", "UPC-A", "EAN-8", "UPC-E", "Codabar", "Micro QR Code", "rMQR Code"})
#: The same, whose rows also join to codes that nobody printed; what they carry must be GS1 data without an error.
STACKED = frozenset({"DataBar Expanded", "DataBar Expanded Stacked", "DataBar Stacked", "DataBar Stacked Omni"})
#: Formats with error correction: one read is proof, however the picture was made.
STRONG = frozenset({"QR Code", "Data Matrix", "Aztec", "PDF417", "MaxiCode"})


Corners = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


class Code(NamedTuple):
    """One code. ``text`` is the plain content (GS1 fields end with 0x1D); ``gs1`` as `parse_gs1` or `parse_link`, or None.

    ``position``: its corners (x, y) in pixels of the frame, clockwise on the frame, first the code's own top left: of a code
    that stands on its head that is below and on the right. None where it is not known.
    """

    text: str
    format: str
    gs1: dict[str, Any] | None
    position: Corners | None = None

    def moved(self, x: int, y: int) -> Code:
        """The code as seen from a frame on which the picture it was read on begins at (x, y)."""
        if self.position is None:
            return self
        a, b, c, d = ((left + x, top + y) for left, top in self.position)
        return self._replace(position=(a, b, c, d))

    def figures(self) -> dict[str, Any]:
        data: dict[str, Any] = {"text": self.text, "format": self.format}
        return data if self.gs1 is None else {**data, "gs1": self.gs1}


_HERE = Affine()


class CodeReader:
    """Reads every code on a frame.

    The plain picture is read first, always. Only where that finds nothing, better pictures follow (`attempts`) until one
    gives a code or ``budget_ms`` more have passed; one that is not expected to end in time is passed over. So the budget
    bounds what a bad frame costs beside a good one of its size. 0 reads the plain picture only. ``formats``: symbologies as
    zxing-cpp names them, None for all; fewer cost less. ``stage`` is how the last frame's codes were read. Raises
    `UsageError` for an unknown format, `MissingExtra` without zxing-cpp or biip.
    """

    def __init__(self, budget_ms: float = BUDGET_MS, formats: Sequence[str] | None = None) -> None:
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
        self.budget_ms, self.formats = budget_ms, tuple(formats or ())
        self.stage = ""
        self._zxing = zxingcpp
        self._all = zxingcpp.BarcodeFormats([])  # any
        self._itf = frozenset(zxingcpp.barcode_formats_list(zxingcpp.barcode_formats_from_str("ITF,ITF14")))
        self._linear = frozenset(zxingcpp.barcode_formats_list(zxingcpp.barcode_formats_from_str("AllLinear")))
        wanted = None
        if formats is not None:
            self._all = wanted = _formats(zxingcpp, formats)
        self._kinds = {kind: _common(zxingcpp, names, wanted) for kind, names in KINDS.items()}
        self._rates: dict[str, float] = {}  # ms a pixel of each stage, measured

    def __call__(self, frame: Frame) -> list[Code]:
        """uint8 (H, W), (H, W, 3) RGB -> the codes on it, in the reader's order. Raises `InputError` for what is no frame."""
        grey = grey_of(canonical_frame(frame))
        found = self._read(grey, self._all)
        self.stage = "plain" if found else ""
        if found or self.budget_ms <= 0:
            return found
        start = perf_counter()
        votes: list[Code] = []
        for attempt in attempts(grey):
            before = perf_counter()
            left_ms = self.budget_ms - (before - start) * 1e3
            if left_ms <= 0:
                break
            rate = self._rates.get(attempt.stage, RATE)
            if rate * attempt.pixels > left_ms:
                continue
            believed = self._believed(attempt, votes)
            spent = (perf_counter() - before) * 1e3 / attempt.pixels
            self._rates[attempt.stage] = spent if attempt.stage not in self._rates else 0.8 * rate + 0.2 * spent
            if believed:
                self.stage = attempt.stage
                return believed
        return []

    def _believed(self, attempt: Attempt, votes: list[Code]) -> list[Code]:
        """What an attempt reads, if it can be believed alone or an earlier attempt read the same, and more often than others
        read something else in its place. ``votes``: what all attempts read."""
        if attempt.stage == "inverted":
            return self._read(attempt.make(), self._all, try_invert=False)
        believed = []
        formats = self._kinds[attempt.kind]
        if formats is None:
            return []
        for code in self._read(
            attempt.make(),
            formats,
            attempt.place,
            not attempt.upright,
            try_rotate=not attempt.upright,
            try_downscale=False,
            try_invert=attempt.kind != "linear",
        ):
            if code.format in STACKED and "error" in (code.gs1 or {}):
                continue
            votes.append(code)
            alike = sum((each.text, each.format) == (code.text, code.format) for each in votes)
            others = sum(each.format == code.format and each.text != code.text and _overlap(each, code) for each in votes)
            needed = 2 if code.format in WEAK | STACKED or (attempt.guess and code.format not in STRONG) else 1
            if alike >= needed + others:
                believed.append(code)
        return believed

    def _read(
        self, grey: NDArray[np.uint8], formats: Any, place: Affine = _HERE, square: bool = True, **options: bool
    ) -> list[Code]:
        zxing = self._zxing
        found = zxing.read_barcodes(grey, formats=formats, text_mode=zxing.TextMode.Plain, **options)
        return [
            self._code(code, grey if square else None, place) for code in found if code.valid and not self._part(grey, code)
        ]

    def _part(self, grey: NDArray[np.uint8], code: Any) -> bool:
        """Whether an ITF code was read of a part of one: it begins and ends with bars that digits contain."""
        if code.format not in self._itf:
            return False
        modules = 9 * len(code.text) + 9  # wide bars three modules wide
        return goes_on(grey, _corners(code.position, linear=True), _BESIDE / modules)

    def _code(self, code: Any, grey: NDArray[np.uint8] | None, place: Affine) -> Code:
        """``grey``: the picture, None where its pixels are not square."""
        gs1 = parse_gs1(code.text) if code.content_type == self._zxing.ContentType.GS1 else parse_link(code.text)
        linear = code.format in self._linear
        corners = _corners(code.position, linear)
        corners = whole_height(grey, corners) if linear and grey is not None else corners
        a, b, c, d = ((round(x), round(y)) for x, y in (place(*corner) for corner in corners))
        return Code(code.text, str(code.format), gs1, (a, b, c, d))


def _corners(seen: Any, linear: bool) -> Sequence[tuple[float, float]]:
    """A position as zxing-cpp gives it -> its corners, clockwise."""
    a, b, c, d = ((each.x, each.y) for each in (seen.top_left, seen.top_right, seen.bottom_right, seen.bottom_left))
    if (c[0] - a[0]) * (d[1] - b[1]) < (c[1] - a[1]) * (d[0] - b[0]):
        # Bars that were read from right to left have top and bottom exchanged; a matrix code was seen in a mirror.
        a, b, c, d = (d, c, b, a) if linear else (a, d, c, b)
    return a, b, c, d


def _overlap(one: Code, other: Code) -> bool:
    """Whether they lie in one place, by the boxes around them."""
    sides = [zip(*code.position, strict=True) for code in (one, other) if code.position]
    if len(sides) < 2:
        return True
    return all(min(a) <= max(b) and min(b) <= max(a) for a, b in zip(*sides, strict=True))


def _formats(zxing: Any, names: Sequence[str]) -> Any:
    """zxing-cpp's set of the named formats. Raises `UsageError` for a name that it does not know, and for none."""
    known = {str(each): each for each in zxing.barcode_formats_list(zxing.barcode_formats_from_str("AllReadable"))}
    chosen = []
    for name in names:
        try:
            chosen.append(zxing.barcode_format_from_str(name))
        except ValueError:
            near = difflib.get_close_matches(name.lower(), {each.lower(): each for each in known}, n=3, cutoff=0.4)
            offered = [each for each in known if each.lower() in near] or list(known)
            raise UsageError(f"the code format {name!r} is not known", f"formats: {', '.join(offered)}") from None
    if not chosen or any(each == zxing.BarcodeFormat.NONE for each in chosen):
        raise UsageError("no code format is named", f"formats: {', '.join(known)}; leave them out for all")
    return zxing.BarcodeFormats(chosen)


def _common(zxing: Any, names: str, wanted: Any) -> Any:
    """The formats of ``names`` that are ``wanted`` (None: all); None where there are none."""
    offered = zxing.barcode_formats_from_str(names)
    if wanted is None:
        return offered
    each = set(zxing.barcode_formats_list(offered)) & set(zxing.barcode_formats_list(wanted))
    return zxing.BarcodeFormats(sorted(each, key=str)) if each else None


def grey_of(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W[, 3]) -> contiguous uint8 (H, W), ITU-R BT.601 luma in 8-bit fixed point."""
    if frame.ndim == 2:
        return np.ascontiguousarray(frame)
    luma = frame[:, :, 0] * np.uint16(77)
    luma += frame[:, :, 1] * np.uint16(150)
    luma += frame[:, :, 2] * np.uint16(29)
    luma >>= 8
    return luma.astype(np.uint8)
