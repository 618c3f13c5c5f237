"""Memory that was freed goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["give_back", "returned"]

_M_MMAP_THRESHOLD = -3  # mallopt(3)
_LARGE = 1 << 20


@contextlib.contextmanager
def returned() -> Iterator[None]:
    """Inside, arrays above 1 MiB have pages of their own, which are gone when they are freed; glibc would keep ever more.

    The threshold stays (mallopt(3) knows no way back to glibc's own tuning); training sets it anew.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        give_back()


def give_back() -> None:
    """Hand back the holes that freed memory leaves between what is in use (malloc_trim(3)). Milliseconds."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
