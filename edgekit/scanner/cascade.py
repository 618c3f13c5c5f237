"""Better pictures of codes that were not read: cut out, inverted, turned upright, sharpened, deblurred.

`attempts` names them in the order that pays; each is made only when asked for, and says beforehand how large it will be,
so that a reader with a time limit can pass over what would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .estimates import Motion, bars, blur_sigma, crossings, motion, noise_sigma, orientation
from .regions import Box, regions
from .restore import Affine, Bars, Blurred, Grey, enlarged, enlarged_size, scaling, sharpened, turned, upright_map

__all__ = ["Attempt", "attempts"]

MIN_SIDE = 16  # pixels; no code is smaller
_CROSSINGS = 8  # from dark to light or back along a line; the smallest codes have ten or eleven, 9 under a strong blur
_SMALLEST_TURN = 3.0  # degrees; zxing-cpp reads smaller ones by itself
_LARGEST_REGION = 600_000  # pixels; larger ones are made smaller first
_ENLARGED = 300_000  # pixels of an upright picture
_SIGMAS = (0.5, 0.8, 1.1, 1.4, 1.8, 2.2, 2.7, 3.3)  # pixels, guesses across bars
#: Smears across bars as (sigma, length) in pixels; the sigma is the camera's own.
SMEARS = ((0.5, 7.0), (0.5, 5.0), (0.5, 9.0), (0.5, 6.0), (0.5, 4.0), (0.5, 8.0), (0.5, 3.0), (0.5, 10.0), (0.5, 11.0))
ROUNDS = 20  # of constrained restoration


class Attempt(NamedTuple):
    """``make`` gives the picture, uint8 (H, W), of about ``pixels``; ``kind``: any, linear or matrix codes.

    ``upright``: bars and cells lie along the axes and bars stand, so that no other direction needs a search. ``guess``: its
    parameters are one of many tried, so that a read of it alone proves little. ``place`` leads back to the frame.
    """

    stage: str
    pixels: int
    make: Callable[[], Grey]
    kind: str = "any"
    upright: bool = False
    guess: bool = False
    place: Affine = Affine()


def attempts(grey: Grey) -> Iterator[Attempt]:
    """uint8 (H, W) -> what to try after the plain picture."""
    if min(grey.shape) < MIN_SIDE or int(grey.max()) - int(grey.min()) < 8:
        return
    whole = Region(grey, Box(0, 0, grey.shape[1], grey.shape[0]))
    busy = [Region(grey, box) for box in regions(grey)]
    found = [region for region in busy if region.plausible]
    if not found and (busy or not whole.plausible):
        return
    for region in found:
        yield from region.first()
    yield Attempt("inverted", grey.size, lambda: 255 - grey)
    for region in found:
        yield from region.second()
    for region in found:
        yield from region.third()
    if not found or found[0].share < 0.7:
        for stage in (whole.first, whole.second, whole.third):
            yield from stage()


class Region:
    """A part of the frame with what is known of it; estimates are made when first needed."""

    def __init__(self, grey: Grey, box: Box) -> None:
        part = box.of(grey)
        self.share = part.size / grey.size
        self.place = Affine(c=box.left, f=box.top)
        if part.size > _LARGEST_REGION:
            large = part
            part = enlarged(large, math.sqrt(_LARGEST_REGION / large.size))  # smaller, here
            self.place = scaling(large.shape, part.shape[::-1]).then(self.place)
        self.grey = np.ascontiguousarray(part)
        self.fits = min(part.shape) >= MIN_SIDE

    @cached_property
    def plausible(self) -> bool:
        """Whether a code can be here: one that can be read shows its bars or cells, however faintly."""
        return self.fits and crossings(self.grey) >= _CROSSINGS

    @cached_property
    def angle(self) -> float:
        angle = orientation(self.grey)
        return angle if abs(angle) >= _SMALLEST_TURN else 0.0

    @cached_property
    def bars(self) -> BarsSeen | None:
        return bars_seen(self.grey, self.place)

    @cached_property
    def blurred(self) -> Blurred:
        return Blurred(self.grey)

    @cached_property
    def noise(self) -> float:
        return noise_sigma(self.grey)

    @cached_property
    def sigma(self) -> float:
        return blur_sigma(self.grey)

    @cached_property
    def _size(self) -> tuple[float, int]:
        """The upright picture's scale and pixels: a long strip, turned, has mostly corners."""
        (height, width), radians = self.grey.shape, math.radians(self.angle)
        c, s = abs(math.cos(radians)), abs(math.sin(radians))
        box = (width * c + height * s) * (width * s + height * c)
        scale = min(2.0, math.sqrt(_ENLARGED / self.grey.size), math.sqrt(3 * _ENLARGED / box))
        return scale, round(box * scale * scale)

    @property
    def _pixels(self) -> int:
        return self._size[1]

    def _upright(self, grey: Grey) -> Grey:
        scale, _ = self._size
        return turned(grey, self.angle, scale) if self.angle else enlarged(grey, scale)

    @cached_property
    def _upright_place(self) -> Affine:
        scale, _ = self._size
        shape = self.grey.shape
        back = upright_map(shape, self.angle, scale)[1] if self.angle else scaling(shape, enlarged_size(shape, scale))
        return back.then(self.place)

    def _try(self, stage: str, make: Callable[[], Grey], guess: bool = False) -> Attempt:
        return Attempt(stage, self._pixels, make, guess=guess, place=self._upright_place)

    def first(self) -> Iterator[Attempt]:
        """What is cheap or pays most: bars with the estimated blur, the part upright and enlarged."""
        if not self.fits:
            return
        if self.bars is not None and self.bars.coherence > 0.25:
            yield from self.bars.attempts(self.bars.likely, 1e-3)
        yield Attempt("inverted part", self.grey.size, lambda: 255 - self.grey, place=self.place)
        base = cached(lambda: self._upright(self.grey))
        yield self._try("turned" if self.angle else "enlarged", base)
        if self.bars is not None and self.bars.coherence > 0.25:
            yield from self.bars.attempts(SMEARS, 1e-2)
        elif self.sigma >= 1.0:
            yield self._gauss(1.0)
        yield self._try("sharpened", lambda: sharpened(base()))

    def second(self) -> Iterator[Attempt]:
        """The best guesses of blur and motion."""
        if not self.fits:
            return
        if self.bars is not None and self.bars.coherence <= 0.25:
            yield from self.bars.attempts(SMEARS, 1e-2)
        smears = motion(self.grey)
        for smear in smears[:1]:
            yield self._smear(smear)
        yield self._gauss(1.0)
        if self.bars is not None:
            yield from self.bars.attempts(SMEARS, 1e-3)
            yield from self.bars.attempts(self.bars.likely, 1e-4)
            yield from self.bars.attempts(self.bars.unlikely, 1e-3)
        yield self._try("turned inverted", lambda: 255 - self._upright(self.grey))

    def third(self) -> Iterator[Attempt]:
        """Neighbours of the guesses; what takes long."""
        if not self.fits:
            return
        yield self._gauss(0.75)
        smears = motion(self.grey)
        for smear in smears[:1]:
            for change in (-1.0, 1.0):
                yield self._smear(smear._replace(length=smear.length + change))
        for smear in smears[1:]:
            yield self._smear(smear)
        yield self._gauss(1.3)
        if self.bars is not None:
            yield from self.bars.attempts((*self.bars.likely, *self.bars.unlikely), 1e-2)
            yield from self.bars.attempts((*SMEARS, *self.bars.unlikely), 1e-4)
        for smear in smears[:1]:
            line = self.blurred.line(smear.length, smear.degrees)
            yield self._restored("smear constrained", lambda t=line: self.blurred.constrained(t, ROUNDS))  # type: ignore[misc]
        bell = self.blurred.gaussian(max(0.5, self.sigma))
        yield self._restored("gauss constrained", lambda: self.blurred.constrained(bell, ROUNDS))

    def _gauss(self, factor: float) -> Attempt:
        ratio = 1e-5 if self.noise < 0.4 else 1e-4 if self.noise < 2 else 1e-3
        sigma = max(0.5, self.sigma * factor)
        return self._restored("gauss", lambda: self.blurred.wiener(self.blurred.gaussian(sigma), ratio))

    def _smear(self, smear: Motion) -> Attempt:
        length = max(2.0, smear.length)
        ratio = 1e-3 if self.noise < 2 else 3e-3
        return self._restored("smear", lambda: self.blurred.wiener(self.blurred.line(length, smear.degrees), ratio))

    def _restored(self, name: str, restore: Callable[[], Grey]) -> Attempt:
        return self._try(name, lambda: self._upright(restore()), guess=True)


class BarsSeen:
    """Bars found in a region: their profile, how blurred they look, and guesses from it."""

    def __init__(self, part: Grey, coherence: float, place: Affine) -> None:
        self.coherence = coherence
        self._profile = Bars(part)
        self._place = self._profile.place.then(place)
        self._pixels = self._profile.rows * 3 * part.shape[1] * 4
        seen = blur_sigma(part)
        order = sorted(_SIGMAS, key=lambda sigma: abs(sigma - seen))
        self.likely = tuple((sigma, 0.0) for sigma in order[:3])
        self.unlikely = tuple((sigma, 0.0) for sigma in order[3:])

    def attempts(self, guesses: Sequence[tuple[float, float]], ratio: float) -> Iterator[Attempt]:
        """One guess, dark bars and light, costs a tenth of a picture's."""
        for sigma, length in guesses:
            for light in (False, True):

                def make(s: float = sigma, n: float = length, inverted: bool = light) -> Grey:
                    picture = self._profile.restored(s, n, ratio)
                    return 255 - picture if inverted else picture

                name = "smear across" if length else "gauss across"
                yield Attempt(name, self._pixels, make, "linear", upright=True, guess=True, place=self._place)


def bars_seen(grey: Grey, place: Affine) -> BarsSeen | None:
    """``place``: from ``grey`` to the frame."""
    direction, coherence = bars(grey)
    upright = turned(grey, direction, 1.0, int(np.median(grey[::4, ::4])))
    box = _barred(upright)
    part = box.of(upright)
    if min(part.shape) < 3 or part.shape[1] < 40:
        return None
    _, back = upright_map(grey.shape, direction, 1.0)
    return BarsSeen(part, coherence, Affine(c=box.left, f=box.top).then(back).then(place))


def cached(make: Callable[[], Grey]) -> Callable[[], Grey]:
    made: list[Grey] = []

    def once() -> Grey:
        if not made:
            made.append(make())
        return made[0]

    return once


def _barred(upright: Grey) -> Box:
    """The part with the bars: the rows, then the columns, where slopes across are dense; with a quiet zone."""
    slope = np.abs(np.diff(upright.astype(np.float32), axis=1))
    rows = _smooth(slope.mean(axis=1), 5)
    top, bottom = _run(rows, 0.5)
    columns = np.flatnonzero((smooth := _smooth(slope[top:bottom].mean(axis=0), 9)) > 0.15 * smooth.max())
    margin = 14
    return Box(max(0, int(columns[0]) - margin), top, min(upright.shape[1], int(columns[-1]) + 1 + margin), bottom)


def _smooth(a: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    return np.convolve(a, np.full(n, 1 / n), "same").astype(np.float32)


def _run(a: NDArray[np.float32], share: float) -> tuple[int, int]:
    """First and one past the last index around the maximum that stays above ``share`` of it."""
    low = np.flatnonzero(a < share * a.max())
    peak = int(a.argmax())
    before, after = low[low < peak], low[low > peak]
    return (int(before[-1]) + 1 if len(before) else 0), (int(after[0]) if len(after) else len(a))
