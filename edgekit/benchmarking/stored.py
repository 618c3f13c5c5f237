"""What is read back of a result of `bench`: by its gate, and by a folder of results."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import msgspec

__all__ = ["Stored", "Yardstick", "differences", "same_device", "version_differences"]

#: Parts of a device that must agree before two latencies may be compared.
_DEVICE = ("cpu", "cores", "architecture", "governor", "gpu", "driver", "jetson")
_SET_UP = ("model", "backend", "threads", "batch", "streams", "rate")
FEWEST = 16  # stretches or samples, of which an interval can be made


class Yardstick(msgspec.Struct, frozen=True):
    """See `yardstick`. ``relative``: each stretch's median latency over the yardstick's before and after it; ``processes``:
    the medians of short runs in processes of their own."""

    name: str
    ms: float
    relative: list[float]
    processes: list[float] = []

    def __post_init__(self) -> None:
        if any(not value > 0 for value in (*self.relative, *self.processes)):
            raise ValueError("its yardstick's relative values must be positive")

    @property
    def enough(self) -> bool:
        return len(self.relative) >= FEWEST

    @property
    def runs(self) -> list[float]:
        """A figure for each process: this run's own and the others'."""
        return [median(self.relative), *self.processes] if self.processes else []


class Stored(msgspec.Struct, frozen=True):
    """The part of a result file that others need; other keys are ignored. ``passed`` is its gate's answer, None without."""

    model: str
    graph: str
    backend: str
    scenario: str
    threads: int
    batch: int
    latency_ms: dict[str, float]
    samples_ms: list[float]
    device: dict[str, Any]
    trustworthy: bool
    time: str = ""
    digest: str = ""
    streams: int | None = None
    rate: float | None = None
    passed: bool | None = None
    yardstick: Yardstick | None = None

    @property
    def comparable(self) -> bool:
        """Whether it holds what a comparison needs: 16 samples, all positive; of no variance there is no interval."""
        return (
            len(self.samples_ms) >= FEWEST
            and len(set(self.samples_ms)) > 1
            and min(self.samples_ms) > 0
            and self.latency_ms.get("p50", 0) > 0
        )

    @property
    def unit(self) -> str:
        """What its `pace` is counted in."""
        return self.yardstick.name if self.yardstick and self.yardstick.enough else "ms"

    @property
    def pace(self) -> float:
        """What to rank runs of one set-up by: the median relative to the yardstick, else p50 in ms."""
        return median(self.yardstick.relative) if self.yardstick and self.yardstick.enough else self.latency_ms["p50"]

    @property
    def series(self) -> str:
        """What may stand on one line: the same model and set-up, on the same machine."""
        machine = _mapping(self.device, "jetson").get("model") or self.device.get("cpu") or "unknown CPU"
        how = f", {self.streams} streams" if self.streams else f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.model} {self.graph}, {self.backend}, {self.threads} thread(s), {self.scenario}{how}, {machine}"


def differences(earlier: Stored, now: Mapping[str, Any]) -> list[str]:
    """What differs beside the graph, in words: ``cpu: A, now B``. What ``now`` does not hold yet is not compared."""
    pairs = [(key, earlier.device.get(key), now["device"].get(key)) for key in _DEVICE]
    pairs += [(key, getattr(earlier, key), now[key]) for key in _SET_UP if key in now]
    return _words(pairs) + version_differences(earlier, now)


def version_differences(earlier: Stored, now: Mapping[str, Any]) -> list[str]:
    """Libraries of another version; edgekit's own is what a gate is there to judge."""
    old, new = (_mapping(device, "versions") for device in (earlier.device, now["device"]))
    return _words([(key, old.get(key), new.get(key)) for key in sorted({*old, *new} - {"edgekit"})])


def same_device(earlier: Stored, now: Mapping[str, Any]) -> bool:
    """Whether a yardstick takes as long on both: one device, one NumPy."""
    versions = [_mapping(device, "versions").get("numpy") for device in (earlier.device, now["device"])]
    return versions[0] == versions[1] and all(earlier.device.get(key) == now["device"].get(key) for key in _DEVICE)


def _mapping(device: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """That part of a device, empty where the file has something else there."""
    found = device.get(key)
    return found if isinstance(found, Mapping) else {}


def _words(pairs: list[tuple[str, Any, Any]]) -> list[str]:
    return [f"{key}: {was}, now {here}" for key, was, here in pairs if was != here]
