"""Pictures of data: what a data set holds (`report`), and what augmentation makes of it (`contact`). Drawn by Pillow."""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.errors import OutputExists, UsageError

__all__ = ["new_picture"]


def new_picture(out: str | os.PathLike[str]) -> Path:
    """``out`` as a path for a new PNG. Raises `OutputExists`, `UsageError` for a name that says it is something else."""
    path = Path(out)
    if os.path.lexists(path):
        error = OutputExists(path)
        error.hint = "choose another file, or remove it first"
        raise error
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not named as what is written there, a PNG", f"write {path.with_suffix('.png')}")
    return path
