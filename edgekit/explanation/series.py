"""Sensor series: windows of time are hidden by each channel's median; the heat lies behind the curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.data.csv_file import is_number, read_series
from edgekit.errors import DataError
from edgekit.files import npz_arrays, npz_problem, printable
from edgekit.runtime import Model

from .modality import Modality, View
from .occlusion import attribute
from .question import Attribution, Float, Mask, Question

__all__ = ["Series", "SeriesQuestion"]

WINDOW = 1 / 10  # of the time: a window that hides one movement, not the series
STEPS = 3  # windows overlap so that each time step is judged by about STEPS of them
PARTS = 20
MAX_CHANNELS = 32  # asked about one by one
MAX_BYTES = 64 << 20
RESERVED = frozenset({"series", "id", "time", "label", "group", "split"})  # columns that are no channels


class Recording(NamedTuple):
    """``values`` (T, C); ``names`` of the channels, none where the file does not say."""

    values: NDArray[Any]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeriesQuestion(Question):
    """``x`` float32 (1, T, C + 1), the last channel 1 where there is a sample; masks and heat are (t,), t <= T of them.

    ``by_channel``: masks and heat are (t, C), and a window hides one channel. ``given``: steps of the sample, more than the
    model takes where it is cut.
    """

    by_channel: bool = False
    given: int = 0
    names: tuple[str, ...] = ()
    _fill: Float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The median is a sensor at rest, or the middle of what swings; zero may be neither.
        object.__setattr__(self, "_fill", np.median(self.x[0, : self.steps, :-1], axis=0).astype(np.float32))

    @property
    def steps(self) -> int:
        return max(1, int((self.x[0, :, -1] > 0).sum()))

    @property
    def size(self) -> tuple[int, ...]:
        return (self.steps, self.x.shape[2] - 1) if self.by_channel else (self.steps,)

    def covered(self, masks: Mask) -> NDArray[Any]:
        batch = np.repeat(self.x, len(masks), 0)
        hidden = masks if self.by_channel else masks[:, :, None]  # (N, t, C or 1)
        seen = batch[:, : self.steps, :-1]
        batch[:, : self.steps, :-1] = np.where(hidden, self._fill, seen)
        return batch

    def windows(self) -> Iterator[Mask]:
        window = max(1, round(self.steps * WINDOW))
        step = max(1, window // STEPS)
        columns: list[Any] = list(range(self.size[1])) if self.by_channel else [...]
        for column in columns:
            for start in range(step - window, self.steps, step):
                mask = np.zeros(self.size, bool)
                rows = slice(max(0, start), start + window)
                mask[rows, column] = True
                yield mask

    def parts(self) -> NDArray[np.int64]:
        count = min(PARTS, self.steps)
        parts: NDArray[np.int64] = np.arange(self.steps, dtype=np.int64) * count // self.steps
        return parts[:, None] + count * np.arange(self.size[1]) if self.by_channel else parts


class Series(Modality):
    """See `Modality`. A sample is a `Recording`."""

    noun = "series"
    plural = "series"
    task = "series-classification"
    suffixes = frozenset({".csv", ".npy", ".npz"})
    advice = "give .csv with a column a channel, or .npy or .npz of (time, channels)"
    methods = ("lime", "occlusion")

    def __init__(self, model: Model) -> None:
        self._model = model

    def read(self, path: Path) -> list[tuple[str, Recording]]:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{printable(path)} is over {MAX_BYTES >> 20} MiB", "give the stretch that the model sees")
        if path.suffix.lower() != ".csv":
            return [(name, Recording(array)) for name, array in _read_arrays(path)]
        found = read_series(os.fspath(path))
        names = _channel_names(path, found[0][1].shape[1])
        return [(name, Recording(array, names)) for name, array in found]

    def question(self, sample: Recording, target: int, model: Model | None = None) -> SeriesQuestion:
        model = model or self._model
        return SeriesQuestion(model, model.preprocess(sample.values), target, given=len(sample.values), names=sample.names)

    def detail(self, question: Question, attribution: Attribution) -> dict[str, Any]:
        """``time_steps`` (t,); ``unread``: how many lie beyond the model's length; ``channels``, each with its heat (t,), found
        by occlusion for every method; ``channel_names`` where the file names them."""
        assert isinstance(question, SeriesQuestion)
        unread = max(0, question.given - question.steps)
        found: dict[str, Any] = {"time_steps": attribution.heat.tolist(), "unread": unread}
        if 1 < question.x.shape[2] - 1 <= MAX_CHANNELS:
            found["channels"] = attribute(replace(question, by_channel=True)).heat.T.tolist()
        if question.names:
            found["channel_names"] = list(question.names)
        return found

    def picture(self, sample: Recording, views: Sequence[View], caption: str) -> bytes:
        from . import series_picture

        steps = len(views[0].heat)
        array = np.asarray(sample.values, np.float32).reshape(len(sample.values), -1)[:steps]
        cut = f"the model reads {steps} of {len(sample.values)} steps · " if len(sample.values) > steps else ""
        return series_picture.curves(array, views, cut + caption, sample.names)


def _channel_names(path: Path, channels: int) -> tuple[str, ...]:
    """As the first row of a file that `read_series` took gives them; none where it holds numbers, or is an odd one."""
    first = path.read_text("utf-8-sig").lstrip("\r\n").splitlines()[0]
    cells = [printable(cell.strip()) for cell in next(csv.reader([first], delimiter=max(",;\t", key=first.count)))]
    names = tuple(cell for cell in cells if cell.lower() not in RESERVED)
    return () if len(names) != channels or all(map(is_number, names)) else names


def _read_arrays(path: Path) -> list[tuple[str, NDArray[Any]]]:
    try:
        with path.open("rb") as stream:  # numpy would leave a file that is no zip open
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                return [("", file)]
            with file:
                arrays = npz_arrays(file)
                return [("" if len(arrays) == 1 else name, array) for name, array in arrays.items()]
    except Exception as error:  # noqa: BLE001  zipfile, zlib and numpy's header reader raise anything on hostile bytes
        reason = npz_problem(path, error) if path.suffix.lower() == ".npz" else "it is no .npy of numbers"
        raise DataError(f"{printable(path)} cannot be read: {reason}", "write it with numpy.save(path, array)") from None
