"""Why nothing was read on a frame: what is measured on the picture, and what zxing-cpp says of codes that it gave up.

The busiest part of the picture is taken for the code: cells whose grey levels vary more than noise does. The causes are
asked in turn, the first that holds is the answer: a dark frame has no sharp edges either. Where none holds, the answer is
``unclear``: a wrong cause sends somebody to turn the wrong screw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.preprocess import Frame, canonical_frame
from edgekit.scanner.codes import grey_of
from edgekit.scanner.estimates import blur_sigma, noise_sigma

from .answers import symbology, valid

__all__ = ["CAUSES", "Cause", "cause"]

CAUSES = ("bad check digit", "too dark", "low contrast", "glare", "nothing there", "cut off", "too small", "blur", "unclear")
#: Symbologies with a check digit. In the others, zxing-cpp's checksum error is one of error correction.
_CHECKED = frozenset(
    map(symbology, ("EAN-13", "EAN-8", "UPC-A", "UPC-E", "ISBN", "ITF-14", "Code 128", "Code 93", "Code 39", "Code 32"))
) | {"pharmazentralnummer", "databar", "databarexpanded", "databarlimited", "databaromni", "databarstacked", "telepen"}
_CELL = 16  # pixels a side
_MOST_CELLS = 128  # a side of the picture: cells are larger on larger frames
_CROP = 512  # pixels a side that edges and modules are measured on
_SATURATED = 250
_MOST_PARTS = 4  # that are looked at
_OUTLINE = 0.35  # of its box is busy: the outline of an empty label
_DENSE = 0.9  # of its box is busy: no outline
_FEW = 5.0  # edges; bars and cells have more unless they are blurred, cut off or tiny
_WIDE = 5.0  # pixels: bars so wide would be read
_SPECK = 48  # pixels a side: a code of this size has hardly two pixels a module
_WIDEST_BLUR = 8.0  # pixels
_ALL_OVER = 0.9  # of an edge is busy: the grain of cardboard
_BLUR_MODULES = 0.1  # of a module as it is measured: a blur that joins bars makes modules look wide
_DARK_LEVEL = 40.0  # too dark where 99.5% of the picture are below
_CONTRAST_LEVEL = 24.0  # between the dark and the light of a code: what zxing-cpp's binarizer wants
_GLARE_SHARE = 0.025  # of a code's cells are white all over
_CUT_SHARE = 0.15  # of the cells along an edge of the picture are the code's
_LEAST_EDGES = 4.0  # cross a line over a code
_MODULE_PX = 2.6  # of the narrowest bar, as it is measured: bars that fall between pixels look wider than they are
_BLUR_PX = 1.3  # the sigma of the Gaussian that blurs a sharp edge so
_RUN = 1.8  # modules a bar or space is wide in the mean: 1.6 in EAN, 1.8 in Code 128, 2 in QR codes

Grey = NDArray[np.uint8]


class Cause(NamedTuple):
    """``cause`` is one of `CAUSES`; ``figure`` what decided, ``{"name", "value", "limit"}``, or nothing."""

    cause: str
    figure: dict[str, Any]


def cause(frame: Frame, event: Mapping[str, Any] | None = None) -> Cause:
    """Why the frame, (H, W[, 3]) uint8, gave no read; ``event`` says which codes were read and are not valid.

    Raises `InputError` for what is no frame.
    """
    grey = grey_of(canonical_frame(frame))
    if wrong := _bad_check(grey, event or {}):
        return Cause("bad check digit", wrong)
    brightest = float(np.percentile(grey[::2, ::2], 99.5))
    if brightest < _DARK_LEVEL:
        return _because("too dark", "brightest_level", brightest, _DARK_LEVEL, 1)
    found = _busiest(grey)
    if found is None:
        return Cause("nothing there", {})
    if found.contrast < _CONTRAST_LEVEL:
        return _because("low contrast", "contrast_level", found.contrast, _CONTRAST_LEVEL, 1)
    if (glare := found.saturated_share) > _GLARE_SHARE:
        return _because("glare", "saturated_share", glare, _GLARE_SHARE, 3)
    return _of_edges(found)


def _of_edges(found: _Part) -> Cause:
    """A blur first: it spreads a code to the picture's edge and leaves of its bars a few wide ones. No camera's is as wide as
    the waves of an empty wall."""
    sigma = blur_sigma(found.crop)
    if _BLUR_PX < sigma < _WIDEST_BLUR and (found.edges < _FEW or sigma > _BLUR_MODULES * found.module_px):
        return _because("blur", "blur_px", sigma, _BLUR_PX, 2)
    small = max(found.crop.shape) <= _SPECK and found.fill >= _DENSE
    if found.edges < _LEAST_EDGES or (found.edges < _FEW and (found.fill < _OUTLINE or found.module_px > _WIDE)):
        what = "unclear" if small else "nothing there"  # a tiny code may have lost its inside
        return _because(what, "edges", found.edges, _LEAST_EDGES, 1)
    if found.edge_share > _ALL_OVER:
        return _because("nothing there", "edge_share", found.edge_share, _ALL_OVER, 3)
    if found.edge_share > _CUT_SHARE:
        return _because("cut off", "edge_share", found.edge_share, _CUT_SHARE, 3)
    if found.module_px < _MODULE_PX or (small and found.module_px < 2 * _MODULE_PX):
        return _because("too small", "module_px", found.module_px, _MODULE_PX, 2)
    return Cause("unclear", {})


class _Part(NamedTuple):
    """Connected cells with much in them; their ``crop`` of at most `_CROP` pixels a side.

    ``fill``: of their box is theirs. ``edge_share``: of an edge of the picture. ``saturated_share``: of the cells around all
    that is busy, white all over; the paper between bars is not: bars are in its cells.
    """

    crop: Grey
    fill: float
    contrast: float
    edges: float
    module_px: float
    edge_share: float
    saturated_share: float


def _busiest(grey: Grey) -> _Part | None:
    """The part with the most in it that bars or cells can be in, else that with the most; None where all is plain."""
    noise = noise_sigma(grey[:1024, :1024]) if min(grey.shape) > 2 else 0.0
    size = max(_CELL, -(-max(grey.shape) // _MOST_CELLS))
    rows, columns = grey.shape[0] // size, grey.shape[1] // size
    if not rows or not columns:
        return None
    grid = grey[: rows * size, : columns * size].reshape(rows, size, columns, size)
    energy = grid.astype(np.float32).var(axis=(1, 3)) - np.float32(noise**2)  # (rows, columns)
    busy = energy > max(1.5, 0.5 * noise**2, 0.15 * float(energy.max()))
    if not busy.any():
        return None
    top, bottom, left, right = _box(busy)
    white = float(((grid >= _SATURATED).mean(axis=(1, 3)) > 0.95)[top:bottom, left:right].mean())
    first: _Part | None = None
    for _ in range(_MOST_PARTS):
        own = _connected(busy, np.where(busy, energy, 0))
        if own.sum() < 2:
            break
        part = _part(grey, own, size, noise, white)
        if part.edges >= _FEW:
            return part
        first, busy = first or part, busy & ~own
    return first


def _part(grey: Grey, own: NDArray[np.bool_], size: int, noise: float, white: float) -> _Part:
    top, bottom, left, right = _box(own)
    whole = grey[top * size : bottom * size, left * size : right * size]
    y, x = max(0, (whole.shape[0] - _CROP) // 2), max(0, (whole.shape[1] - _CROP) // 2)
    crop = whole[y : y + _CROP, x : x + _CROP]
    low, high = (float(level) for level in np.percentile(crop, [5, 95]))
    fill = float(own.sum()) / ((bottom - top) * (right - left))
    at_edge = float(max(own[0].mean(), own[-1].mean(), own[:, 0].mean(), own[:, -1].mean()))
    return _Part(crop, fill, max(0.0, high - low - 3 * noise), *_edges(crop, low, high), at_edge, white)


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
