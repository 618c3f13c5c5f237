"""Black or white on a cell of the confusion matrix: whichever reads better on its shade, in the light and the dark scheme."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["inks"]

Colour = tuple[float, ...]


def inks(css: str) -> Callable[[bool, float], str]:
    """(right, share of the row) -> classes ``lw`` or ``lb`` and ``dw`` or ``db``: light or dark scheme, white or black ink.

    The colours are the style sheet's, each stated twice, for the light scheme first. Black or white always reaches 4.5:1.
    """
    schemes = zip("ld", *(_stated(css, name) for name in ("right", "wrong", "wash")), strict=True)
    known = [(scheme, {True: right, False: wrong}, wash) for scheme, right, wrong, wash in schemes]

    def choose(right: bool, share: float) -> str:
        part = min(1.0, share if right else 4 * share)  # as the style sheet mixes them
        shades = [(scheme, _mixed(colour[right], wash, part)) for scheme, colour, wash in known]
        return " ".join(scheme + ("w" if 1.05 / (_luminance(shade) + 0.05) > 4.5826 else "b") for scheme, shade in shades)

    return choose


def _stated(css: str, name: str) -> list[Colour]:
    found = re.findall(rf"--{name}: #([0-9a-f]{{6}});", css)
    return [tuple(int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)) for text in found]


def _mixed(colour: Colour, other: Colour, part: float) -> Colour:
    return tuple(part * a + (1 - part) * b for a, b in zip(colour, other, strict=True))


def _luminance(colour: Colour) -> float:
    """Relative luminance of WCAG 2."""
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
