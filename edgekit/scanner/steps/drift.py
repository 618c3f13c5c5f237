"""Drift watch: are the frames, and the model's confidence, still what they were when the model was made?

Parts that are watched, each with a baseline of its own:

| part | what | baseline |
|---|---|---|
| ``input`` | values of the model's input, without sign | the histogram in ``calibration.json``, else the first frames' |
| ``brightness``, ``contrast`` | mean and standard deviation of a frame's pixels, 0..1 | the first frames |
| ``sharpness`` | how much steps between pixels change from one to the next, over their mean (blur: less) | the first frames |
| ``colour`` | mean of red less that of blue | the first frames |
| ``score`` | the model's score | the first frames |
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import CALIBRATION, Bundle
from edgekit.errors import EdgekitError
from edgekit.files import atomic_write
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import Preprocessor
from edgekit.progress import say
from edgekit.scanner.distribution import NOISE, Baseline, Moved, Window, learnt_scalar, learnt_shares, merged
from edgekit.scanner.events import Event, rfc3339
from edgekit.scanner.reading import FrameModel, Region
from edgekit.scanner.sources import Captured

from .answers import camera_of, require

__all__ = ["Drift", "DriftOptions", "measured"]

INPUT = "input"
_VALUES = 4096  # of an input that are looked at
_PIXEL_BINS = 32
_SOURCES = 64
_MAX_BYTES = 1 << 20  # of a baseline's file


class DriftOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every ``every_frames``-th frame is measured; the last ``window_frames`` of those are held against the baseline, four
    times a window.

    Frames that are bad from the start make a bad baseline: only ``input`` knows better, where the bundle was quantized.
    ``level_psi`` is the population stability index from which a part has drifted, ``back_psi`` from which it is back.
    ``learn_frames`` measured frames make the baseline where the bundle has none; ``baseline``: a JSON file that keeps it over
    restarts, "" for none. ``by_source``: each camera is watched alone.
    """

    every_frames: int = 10
    window_frames: int = 200
    learn_frames: int = 500
    level_psi: float = 0.25
    back_psi: float = 0.15
    baseline: str = ""
    by_source: bool = False

    def __post_init__(self) -> None:
        require(self.every_frames >= 1, f"every_frames: 1 or more, not {self.every_frames}")
        require(20 <= self.window_frames <= 100_000, f"window_frames: 20 to 100000, not {self.window_frames}")
        require(20 <= self.learn_frames <= 100_000, f"learn_frames: 20 to 100000, not {self.learn_frames}")
        require(0 < self.level_psi <= 14, f"level_psi: above 0 and up to 14, not {self.level_psi:g}")
        words = f"back_psi: above 0 and up to level_psi ({self.level_psi:g}), not {self.back_psi:g}"
        require(0 < self.back_psi <= self.level_psi, words)


class _Tensor(msgspec.Struct, frozen=True):
    """Of a calibration's tensor: counts of |x| > 0 in equal bins over [0, top)."""

    mean: float
    rms: float
    count: int
    zeros: int
    top: float
    histogram: tuple[int, ...]


class _Drawn(msgspec.Struct, frozen=True):
    ids: tuple[str, ...]


class _Calibration(msgspec.Struct, frozen=True):
    tensors: dict[str, _Tensor]
    samples: _Drawn


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of baselines: of which model, by ``source`` and part."""

    digest: str
    baselines: dict[str, dict[str, Baseline]]


class _Watch:
    """What is known of one source, or of all together."""

    def __init__(self, baselines: dict[str, Baseline], size: int) -> None:
        self.windows = {part: Window(baseline, size) for part, baseline in baselines.items()}
        self.learning: dict[str, array[float]] = {}
        self.rows: list[NDArray[np.float64]] = []
        self.drifted: set[str] = set()
        self.last: dict[str, Moved] = {}
        self.frames = self.measured = 0


class Drift:
    """``model`` is the scan's (its bundle tells the baseline and the preprocessing), ``region`` the part of a frame it sees."""

    name = "drift"

    def __init__(self, model: FrameModel, options: DriftOptions | None = None, region: Region | None = None) -> None:
        self.options = options or DriftOptions()
        self._model, self._region = model, region
        self._bundle: Bundle | None = None
        self._begin()

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if captured.frame is None or "event" in event:
            return [event]
        if self._model.bundle is not self._bundle:  # swapped: another model has another baseline
            self._begin()
        source = camera_of(captured.source) if self.options.by_source else ""
        watch = self._watch(source)
        watch.frames += 1
        if watch.frames % self.options.every_frames:
            return [event]
        part = captured.frame if self._region is None else self._region.of(captured.frame)
        x = self._preprocess(part)[0]
        watch.measured += 1
        self._add(watch, x, event.get("score"))
        made = [event]
        if watch.measured % max(1, self.options.window_frames // 4) == 0:
            made += [{**found, "source": source, "time": rfc3339(captured.time)} for found in self._judged(watch)]
        return made

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> dict[str, Any]:
        """``drifted``: the parts, behind ``source/`` where each source is watched alone; ``psi``: each part's latest."""
        named = [(f"{source}/" if source else "", watch) for source, watch in self._watches.items()]
        return {
            "drifted": [f"{source}{part}" for source, watch in named for part in sorted(watch.drifted)],
            "measured": sum(watch.measured for _, watch in named),
            "learning": any(watch.learning or watch.rows for _, watch in named),
            "psi": {f"{source}{part}": round(found.psi, 4) for source, watch in named for part, found in watch.last.items()},
        }

    def close(self) -> None:
        pass

    def _begin(self) -> None:
        self._bundle = bundle = self._model.bundle
        spec = bundle.manifest.preprocessing
        assert isinstance(spec, ImagePreprocessing)  # Reading has seen to it
        self._preprocess = Preprocessor(spec)
        self._scale = np.array(spec.std, np.float32)[:, None, None], np.array(spec.mean, np.float32)[:, None, None]
        self._watches: dict[str, _Watch] = {}
        self._given = _of_calibration(bundle)
        self._kept = self._read_kept()

    def _watch(self, source: str) -> _Watch:
        watch = self._watches.get(source)
        if watch is None:
            if len(self._watches) >= _SOURCES:
                self._watches.pop(next(iter(self._watches)))
            known = {**self._kept.get(source, {}), **self._given}
            watch = self._watches[source] = _Watch(known, self.options.window_frames)
        return watch

    def _add(self, watch: _Watch, x: NDArray[np.float32], score: Any) -> None:
        std, mean = self._scale
        pixels = x * std + mean
        values = measured(pixels)
        if isinstance(score, int | float):
            values["score"] = float(score)
        for part, value in values.items():
            if (window := watch.windows.get(part)) is not None:
                window.add(value)
            else:
                self._learn(watch, part, value)
        flat = (x if self._given else pixels).ravel()
        flat = flat[:: max(1, (len(flat) // _VALUES) | 1)]
        if (window := watch.windows.get(INPUT)) is not None:
            rms = float(np.sqrt(np.square(flat).mean()))
            window.add_shares(np.abs(flat) if self._given else flat, float(flat.mean()), rms)
            return
        edges = np.arange(1, _PIXEL_BINS) / _PIXEL_BINS
        counts = np.bincount(np.searchsorted(edges, flat, "right"), minlength=_PIXEL_BINS)
        watch.rows.append(np.array([*(counts / len(flat)), flat.mean(), np.square(flat).mean()]))
        if len(watch.rows) >= self.options.learn_frames:
            rows, watch.rows = np.stack(watch.rows), []
            figures = {"mean": round(float(rows[:, -2].mean()), 4), "rms": round(float(np.sqrt(rows[:, -1].mean())), 4)}
            self._learnt(watch, INPUT, learnt_shares(edges, rows[:, :-2], figures, self._origin()))

    def _learn(self, watch: _Watch, part: str, value: float) -> None:
        values = watch.learning.setdefault(part, array("d"))
        values.append(value)
        if len(values) >= self.options.learn_frames:
            self._learnt(watch, part, learnt_scalar(watch.learning.pop(part), self._origin()))

    def _origin(self) -> str:
        return f"the first {self.options.learn_frames} frames measured"

    def _learnt(self, watch: _Watch, part: str, baseline: Baseline) -> None:
        watch.windows[part] = Window(baseline, self.options.window_frames)
        if not self.options.baseline or watch.learning or watch.rows:
            return
        kept = {
            source: {name: window.baseline for name, window in each.windows.items() if name not in self._given}
            for source, each in self._watches.items()
        }
        assert self._bundle is not None
        try:
            atomic_write(Path(self.options.baseline), msgspec.json.encode(_Kept(self._bundle.digest, {**self._kept, **kept})))
        except OSError as error:
            say(f"the drift baseline {self.options.baseline} is not kept: {error.strerror}")

    def _read_kept(self) -> dict[str, dict[str, Baseline]]:
        path = Path(self.options.baseline)
        if not self.options.baseline or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return {}
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError):
            say(f"the drift baseline {path} cannot be read; the first frames make a new one")
            return {}
        return kept.baselines if self._bundle is not None and kept.digest == self._bundle.digest else {}

    def _judged(self, watch: _Watch) -> list[Event]:
        """Parts that crossed the level, either way: once each."""
        found: list[Event] = []
        for part, window in watch.windows.items():
            if len(window) < self.options.window_frames:
                continue
            moved = watch.last[part] = window.moved()
            level = max(self.options.level_psi, NOISE * moved.chance)
            if part not in watch.drifted and moved.psi >= level:
                watch.drifted.add(part)
                found.append(_event(part, "drifted", moved, level, window.baseline, len(window)))
            elif part in watch.drifted and moved.psi < level * self.options.back_psi / self.options.level_psi:
                watch.drifted.discard(part)
                found.append(_event(part, "back", moved, level, window.baseline, len(window)))
        return found


def measured(pixels: NDArray[np.float32]) -> dict[str, float]:
    """Figures of float32 (C, H, W), 0..1."""
    grey = pixels.mean(0)
    contrast = float(grey.std())
    found = {"brightness": float(grey.mean()), "contrast": contrast}
    if min(grey.shape) > 2:
        steps = [np.diff(grey, axis=axis) for axis in (0, 1)]
        changes = sum(float(np.abs(np.diff(each, axis=axis)).mean()) for axis, each in enumerate(steps))
        found["sharpness"] = changes / max(sum(float(np.abs(each).mean()) for each in steps), 2e-3)
    if len(pixels) == 3:
        found["colour"] = float(pixels[0].mean() - pixels[2].mean())
    return found


def _of_calibration(bundle: Bundle) -> dict[str, Baseline]:
    """The baseline of the input from the bundle's calibration; none where it has none of the input."""
    if not bundle.has(CALIBRATION):
        return {}
    try:
        found = msgspec.json.decode(bundle.read(CALIBRATION), type=_Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, EdgekitError, OSError):
        return {}
    tensor = found.tensors.get(bundle.manifest.inputs[0].name)
    bins = len(tensor.histogram) if tensor else 0
    if tensor is None or not bins or tensor.count < 1 or not tensor.top > 0:
        return {}
    counts = np.array(tensor.histogram, np.float64)
    counts[0] += tensor.zeros
    if not counts.sum() > 0 or counts.min() < 0:
        return {}
    edges = np.arange(1, bins, dtype=np.float64) * (tensor.top / bins)
    kept, shares = merged(edges, counts / counts.sum())
    samples = max(len(found.samples.ids), 1)
    values = {"mean": float(f"{tensor.mean:.4g}"), "rms": float(f"{tensor.rms:.4g}")}
    return {INPUT: Baseline(tuple(kept), tuple(shares), samples, f"calibration.json, {samples} samples", values)}


def _event(part: str, state: str, moved: Moved, level: float, baseline: Baseline, frames: int) -> Event:
    key = "rms" if part == INPUT else "mean"
    return {
        "event": "drift",
        "source": "",
        "time": "",
        "state": state,
        "part": part,
        "psi": round(moved.psi, 4),
        "ks": round(moved.ks, 4),
        "level": round(level, 4),
        "reason": f"{part}: {key} {baseline.values.get(key, 0):.4g} before, {moved.values[key]:.4g} in {frames} frames",
        "before": baseline.values,
        "now": moved.values,
        "baseline": baseline.origin,
    }
