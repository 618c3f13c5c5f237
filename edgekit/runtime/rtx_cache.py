"""TensorRT-RTX's runtime cache: the kernels that it compiled for this GPU, kept on disk so that the next start is quick.

TensorRT checks a cache against its own version, the GPU and the driver; a cache holds machine code, so it is read only from
a file that no other user can write.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from edgekit.errors import BackendError
from edgekit.files import atomic_write
from edgekit.trust import check_private

from .cuda import Device
from .engines import Choice

__all__ = ["restore", "store"]


def _path(choice: Choice, device: Device) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    record = choice.record
    return Path(base) / "edgekit" / "rtx" / f"{record.engine_sha256[:16]}-sm{device.sm}.cache"


def restore(engine: Any, choice: Choice, device: Device) -> tuple[Any, Any]:
    """(runtime configuration, runtime cache) for the contexts of an engine; (None, None) where TensorRT has no such cache."""
    if not hasattr(engine, "create_runtime_config"):
        return None, None
    config = engine.create_runtime_config()
    if not hasattr(config, "create_runtime_cache"):
        return None, None
    cache = config.create_runtime_cache()
    path = _path(choice, device)
    with contextlib.suppress(OSError, BackendError):  # without it the kernels are compiled anew, and stored over it
        check_private(path)
        cache.deserialize(path.read_bytes())
    config.set_runtime_cache(cache)
    return config, cache


def store(cache: Any, choice: Choice, device: Device) -> None:
    """Keep what was compiled, where it is new. A disk that takes no more costs the next start some time, nothing else."""
    if cache is None:
        return
    blob = cache.serialize()
    data = b"" if blob is None else bytes(blob)
    path = _path(choice, device)
    with contextlib.suppress(OSError):
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
            if (mode := folder.stat().st_mode) & 0o022:  # umask 002: `restore` never reads what a group could have written
                folder.chmod(mode & 0o7755)
        if data and (not path.is_file() or path.read_bytes() != data):
            atomic_write(path, data)
