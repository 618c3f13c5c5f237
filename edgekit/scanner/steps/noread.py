"""Why nothing was read on a frame: what is measured on the picture, and what zxing-cpp says of codes that it gave up.

The busiest part of the picture is taken for the code: cells whose grey levels vary more than noise does. The causes are
asked in the order of `CAUSES`, the first that holds is the answer: a dark frame has no sharp edges either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.preprocess import Frame, canonical_frame
from edgekit.scanner.codes import _grey
from edgekit.scanner.estimates import blur_sigma, noise_sigma

from .answers import require, symbology, valid

__all__ = ["CAUSES", "Cause", "NoReadOptions", "cause"]

CAUSES = ("bad check digit", "too dark", "low contrast", "glare", "nothing there", "cut off", "too small", "blur", "unclear")
#: Symbologies with a check digit. In the others, zxing-cpp's checksum error is one of error correction.
_CHECKED = frozenset(
    map(symbology, ("EAN-13", "EAN-8", "UPC-A", "UPC-E", "ISBN", "ITF-14", "Code 128", "Code 93", "Code 39", "Code 32"))
) | {"pharmazentralnummer", "databar", "databarexpanded", "databarlimited", "databaromni", "databarstacked", "telepen"}
_CELL = 16  # pixels a side
_MOST_CELLS = 128  # a side of the picture: cells are larger on larger frames
_CROP = 512  # pixels a side that edges and modules are measured on
_SATURATED = 250
_OUTLINE = 0.35  # of its box is busy: the outline of an empty label
_ALL_OVER = 0.9  # of an edge is busy: the grain of cardboard
_BLUR_MODULES = 0.1  # of a module as it is measured: a blur that joins bars makes modules look wide
_RUN = 1.8  # modules a bar or space is wide in the mean: 1.6 in EAN, 1.8 in Code 128, 2 in QR codes

Grey = NDArray[np.uint8]


class NoReadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits between causes, in grey levels of 255, pixels, or shares.

    ``dark_level``: too dark where 99.5% of the picture are below. ``contrast_level``: between the dark and the light of a
    code; zxing-cpp's binarizer wants 24. ``glare_share`` of a code's cells are white all over. ``cut_share`` of the cells
    along an edge of the picture are the code's. ``least_edges`` cross a line over a code. ``module_px``: of the narrowest bar,
    as it is measured: bars that fall between pixels look wider than they are.
    ``blur_px``: the sigma of the Gaussian that blurs a sharp edge so.
    """

    dark_level: float = 40.0
    contrast_level: float = 24.0
    glare_share: float = 0.04
    cut_share: float = 0.15
    least_edges: float = 4.0
    module_px: float = 2.6
    blur_px: float = 1.3

    def __post_init__(self) -> None:
        for name in ("dark_level", "contrast_level"):
            require(0 <= getattr(self, name) <= 255, f"{name}: 0 to 255 grey levels, not {getattr(self, name):g}")
        for name in ("glare_share", "cut_share"):
            require(0 <= getattr(self, name) <= 1, f"{name}: 0 to 1, not {getattr(self, name):g}")
        for name in ("least_edges", "module_px", "blur_px"):
            require(0 <= getattr(self, name) <= 100, f"{name}: 0 to 100, not {getattr(self, name):g}")


class Cause(NamedTuple):
    """``cause`` is one of `CAUSES`; ``figure`` what decided, ``{"name", "value", "limit"}``, or nothing."""

    cause: str
    figure: dict[str, Any]


def cause(frame: Frame, event: Mapping[str, Any] | None = None, options: NoReadOptions | None = None) -> Cause:
    """Why the frame, (H, W[, 3]) uint8, gave no read; ``event`` says which codes were read and are not valid.

    Raises `InputError` for what is no frame.
    """
    options = options or NoReadOptions()
    grey = _grey(canonical_frame(frame))
    if wrong := _bad_check(grey, event or {}):
        return Cause("bad check digit", wrong)
    brightest = float(np.percentile(grey[::2, ::2], 99.5))
    if brightest < options.dark_level:
        return _because("too dark", "brightest_level", brightest, options.dark_level, 1)
    found = _Busiest(grey)
    if not found.cells or found.fill < _OUTLINE:
        return Cause("nothing there", {})
    if found.contrast < options.contrast_level:
        return _because("low contrast", "contrast_level", found.contrast, options.contrast_level, 1)
    if (glare := found.saturated_share()) > options.glare_share:
        return _because("glare", "saturated_share", glare, options.glare_share, 3)
    edge = found.edge_share()
    if edge > _ALL_OVER or found.edges < options.least_edges:
        return _because("nothing there", "edges", found.edges, options.least_edges, 1)
    sigma = blur_sigma(found.crop)
    if edge > options.cut_share and sigma <= 2 * options.blur_px:  # a strong blur spreads a whole code over the edge
        return _because("cut off", "edge_share", edge, options.cut_share, 3)
    if found.module_px < options.module_px:
        return _because("too small", "module_px", found.module_px, options.module_px, 2)
    if sigma > options.blur_px and sigma > _BLUR_MODULES * found.module_px:
        return _because("blur", "blur_px", sigma, options.blur_px, 2)
    return Cause("unclear", {})


class _Busiest:
    """The connected cells with the most in them; their ``crop`` of at most `_CROP` pixels a side."""

    def __init__(self, grey: Grey) -> None:
        self._noise = noise_sigma(grey[:1024, :1024]) if min(grey.shape) > 2 else 0.0
        size = max(_CELL, -(-max(grey.shape) // _MOST_CELLS))
        rows, columns = grey.shape[0] // size, grey.shape[1] // size
        self.cells = 0
        if not rows or not columns:
            return
        grid = grey[: rows * size, : columns * size].reshape(rows, size, columns, size)
        values = grid.astype(np.float32)
        energy = values.var(axis=(1, 3)) - np.float32(self._noise**2)  # (rows, columns)
        busy = energy > max(1.5, 0.5 * self._noise**2, 0.15 * float(energy.max()))
        self._white = (grid >= _SATURATED).mean(axis=(1, 3)) > 0.95
        self._busy, self._own = busy, _connected(busy, np.where(busy, energy, 0))
        self.cells = int(self._own.sum())
        if self.cells < 2:
            self.cells = 0
            return
        top, bottom, left, right = _box(self._own)
        self.fill = self.cells / ((bottom - top) * (right - left))
        whole = grey[top * size : bottom * size, left * size : right * size]
        y, x = max(0, (whole.shape[0] - _CROP) // 2), max(0, (whole.shape[1] - _CROP) // 2)
        self.crop = whole[y : y + _CROP, x : x + _CROP]
        low, high = np.percentile(self.crop, [5, 95])
        self.contrast = max(0.0, float(high - low) - 3 * self._noise)
        self.edges, self.module_px = _edges(self.crop, float(low), float(high))

    def saturated_share(self) -> float:
        """Of the cells around all that is busy: white all over. The paper between the bars is not: bars are in its cells."""
        top, bottom, left, right = _box(self._busy)
        return float(self._white[top:bottom, left:right].mean())

    def edge_share(self) -> float:
        """Of the edge of the picture on which most of the busy cells lie."""
        own = self._own
        return float(max(own[0].mean(), own[-1].mean(), own[:, 0].mean(), own[:, -1].mean()))


def _connected(mask: NDArray[np.bool_], energy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The cells of ``mask`` that touch each other around the place with most energy."""
    near = _around(energy, np.add)
    grown = np.zeros_like(mask)
    if not mask.any():
        return grown
    grown.flat[int(np.argmax(np.where(mask, near, -1)))] = True
    while True:
        larger = _around(grown, np.logical_or) & mask
        if (larger == grown).all():
            return grown
        grown = larger


def _around(cells: NDArray[Any], join: Any) -> NDArray[Any]:
    """Each cell joined with its eight neighbours."""
    a = np.pad(cells, 1)
    a = join(join(a[:-2], a[1:-1]), a[2:])
    joined: NDArray[Any] = join(join(a[:, :-2], a[:, 1:-1]), a[:, 2:])
    return joined


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _edges(crop: Grey, low: float, high: float) -> tuple[float, float]:
    """How often dark and light change along a line across the bars, and how many pixels a module has by that.

    Lines run along the axis on which grey levels change faster; the quarter with most changes counts. Between a tenth of
    the contrast above and below the middle the last state goes on, so that noise is no edge.
    """
    a = crop.astype(np.float32)
    if np.abs(np.diff(a, axis=1)).mean() < np.abs(np.diff(a, axis=0)).mean():
        a = a.T
    middle, margin = (low + high) / 2, (high - low) / 10
    state = np.where(a > middle + margin, 1, np.where(a < middle - margin, -1, 0))
    last = np.maximum.accumulate(np.where(state != 0, np.arange(a.shape[1]), 0), axis=1)
    state = np.take_along_axis(state, last, axis=1)
    changes = state[:, 1:] != state[:, :-1]
    counts = changes.sum(axis=1)
    lines = counts >= max(2, np.percentile(counts, 75))
    if not lines.any():
        return float(counts.max(initial=0)), float(a.shape[1])
    changes, counts = changes[lines], counts[lines]
    first = changes.argmax(axis=1)
    span = changes.shape[1] - 1 - changes[:, ::-1].argmax(axis=1) - first
    return float(np.median(counts)), float(np.median(span / (counts - 1))) / _RUN


def _bad_check(grey: Grey, event: Mapping[str, Any]) -> dict[str, Any]:
    """The code whose check digit is wrong: one that was read, or one that zxing-cpp gave up for it."""
    for code in event.get("codes", ()):
        if not valid(code) and "check digit" in str(code["gs1"]["error"]):
            return {"name": "code", "value": f"{code['format']} {code['text']}", "limit": code["gs1"]["error"]}
    try:
        import zxingcpp
    except ImportError:  # no codes were sought
        return {}
    for code in zxingcpp.read_barcodes(grey, text_mode=zxingcpp.TextMode.Plain, return_errors=True):
        wrong = not code.valid and code.error is not None and code.error.type == zxingcpp.ErrorType.Checksum
        if wrong and symbology(str(code.format)) in _CHECKED:
            return {"name": "code", "value": f"{code.format} {code.text}", "limit": "its check digit is wrong"}
    return {}


def _because(what: str, name: str, value: float, limit: float, digits: int) -> Cause:
    return Cause(what, {"name": name, "value": round(value, digits), "limit": limit})
