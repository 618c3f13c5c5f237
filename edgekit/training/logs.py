"""Curves for TensorBoard: event files written by tensorboardX, readable by ``tensorboard --logdir``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from edgekit.errors import MissingExtra

__all__ = ["Log", "no_log", "tensorboard"]

#: Called with a row of the curve: ``epoch`` and figures.
Log = Callable[[Mapping[str, float]], None]


def no_log(row: Mapping[str, float]) -> None:
    """Keep nothing."""


@contextlib.contextmanager
def tensorboard(folder: str | os.PathLike[str] | None) -> Iterator[Log]:
    """A log that writes into ``folder``; none without one. Raises `MissingExtra` without tensorboardX."""
    if folder is None:
        yield no_log
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise MissingExtra("logs", "tensorboardX") from None
    with SummaryWriter(os.fspath(folder)) as writer:

        def log(row: Mapping[str, float]) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(f"train/{name}", value, int(row["epoch"]))
            writer.flush()

        yield log
