"""Charts as SVG files: where they may be written, and what may be written into them."""

from __future__ import annotations

from pathlib import Path
from xml.sax import saxutils

from .bundle import refuse_inside_bundle
from .errors import OutputExists, UsageError
from .files import check_new

__all__ = ["checked_path", "escape"]


def checked_path(path: Path, mark: str) -> Path:
    """``path``, fit to be written: a new file, or one that holds ``mark`` near its beginning, and so is such a chart.

    Raises `UsageError` where it is no .svg or cannot be written, `OutputExists` for any other file.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError(f"the chart is drawn as SVG, not as {path.suffix or 'a file without ending'!r}", "name it FILE.svg")
    refuse_inside_bundle(path)
    check_new(path)
    if path.exists() and mark.encode() not in path.read_bytes()[:200]:
        raise OutputExists(path)
    return path


def escape(text: str) -> str:
    """For XML, which cannot hold control characters at all; names of foreign graphs may."""
    return saxutils.escape("".join(c if c.isprintable() else "\ufffd" for c in text))
