"""Checkpoints: what a stopped run needs to go on, and the key that says which run it is."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from edgekit.data import Tensors
from edgekit.files import atomic_write
from edgekit.progress import say

__all__ = ["load_checkpoint", "run_key", "save_checkpoint"]


def run_key(module: nn.Module, data: Tensors, config: dict[str, Any], objective: object) -> str:
    """What a checkpoint belongs to: the same settings, samples, objective and starting weights."""
    about = [
        config,
        data.x.shape,
        type(objective).__name__,
        getattr(objective, "teacher_digest", ""),
    ]
    weights = getattr(getattr(objective, "inner", objective), "weights", None)
    if weights is not None:  # of the classes
        about.append(weights.tolist())
    digest = hashlib.sha256(msgspec.json.encode(about))
    digest.update("\0".join(data.ids).encode(errors="replace"))
    if isinstance(data.x, np.ndarray):
        digest.update(np.ascontiguousarray(data.x).data)
    digest.update(np.ascontiguousarray(data.y).data)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path | None, state: dict[str, Any]) -> None:
    if path is None:
        return
    buffer = io.BytesIO()  # not the file: on a full disk torch.save raises no OSError
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: Path | None, key: str) -> dict[str, Any] | None:
    """The state in ``path``, if it is there, whole, and belongs to the run called ``key``; says why not otherwise."""
    if path is None or not path.is_file():
        return None
    state = _read(path)
    if state is None:
        say(f"{path} cannot be read; starting again")
        return None
    if state["key"] != key:
        kept = path.with_name(f"{path.name}.old")
        before = _read(kept)
        if before is None or len(state["curve"]) >= len(before["curve"]):  # it may be hours of work
            path.replace(kept)
        say(f"{path} belongs to other settings or data; starting again, the longest of such runs is kept as {kept.name}")
        return None
    return state


def _read(path: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote; None where there is nothing of the kind: a damaged checkpoint costs time, not the run."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001  torch's reader raises many types on damaged bytes
        return None
    return state if isinstance(state, dict) and {"key", "curve"} <= state.keys() else None
