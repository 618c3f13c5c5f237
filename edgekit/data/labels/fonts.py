"""The fonts of the synthetic labels: cut to the alphabet, shipped in ``fonts/``, and split so that test fonts are unseen."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import MissingExtra

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

__all__ = ["FOLDER", "FONTS", "TEST_FONTS", "TRAIN_FONTS", "cap_height", "font_bytes", "load_font"]

FOLDER = Path(__file__).with_name("fonts")

#: Sans, condensed, serif, slab, monospaced, typewriter and terminal fonts: what label printers and shipping programs use.
TRAIN_FONTS = (
    "arimo-400",
    "arimo-700",
    "barlow-condensed-600",
    "courier-prime-400",
    "fira-sans-500",
    "ibm-plex-mono-500",
    "inconsolata-600",
    "jetbrains-mono-400",
    "lato-900",
    "open-sans-600",
    "oswald-500",
    "overpass-mono-400",
    "roboto-400",
    "roboto-700",
    "roboto-condensed-700",
    "roboto-slab-500",
    "saira-semi-condensed-500",
    "share-tech-mono-400",
    "tinos-400",
    "vt323-400",
)
#: Held out, one of each style: sans, typewriter-like, condensed, serif, cockpit monospace. No family is in both lists.
TEST_FONTS = ("archivo-narrow-600", "b612-mono-700", "cousine-400", "inter-500", "noto-serif-500")
FONTS = TRAIN_FONTS + TEST_FONTS

_REFERENCE = 100


@lru_cache(maxsize=1024)
def load_font(name: str, size: int) -> FreeTypeFont:
    """The font ``name`` at ``size`` pixels an em. Raises `MissingExtra` without Pillow."""
    try:
        from PIL import ImageFont
    except ImportError:
        raise MissingExtra("train", "PIL") from None
    # BASIC: the fonts carry no kerning, and no shaping library changes the picture from machine to machine.
    return ImageFont.truetype(FOLDER / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache
def cap_height(name: str) -> float:
    """Height of a capital, as a share of the em: fonts of one size differ by a third in it."""
    return -float(load_font(name, _REFERENCE).getbbox("H", anchor="ls")[1]) / _REFERENCE


def font_bytes() -> list[bytes]:
    """Every font file, in the order of `FONTS`: a part of the data set's digest."""
    return [(FOLDER / f"{name}.ttf").read_bytes() for name in FONTS]
