"""What pruning is to reach: a share of the work, a size, or a latency that is measured."""

from __future__ import annotations

from typing import Literal, NamedTuple

from edgekit.errors import UsageError

__all__ = ["Target", "target_of"]

_HALF = 0.5


class Target(NamedTuple):
    """``kind`` macs or speedup: a share of the original's to reach (speedup 2: 0.5); size: bytes; latency: milliseconds.
    ``asked``: the option where it is not the kind's."""

    kind: Literal["macs", "size", "speedup", "latency"]
    value: float
    asked: str = ""

    def share(self, original_ms: float) -> Target:
        """A latency as a share of what the original takes."""
        return Target("speedup", min(self.value / original_ms, 1.0), str(self))

    def limit(self, whole: float) -> float:
        """What the pruned model may cost, where the original costs ``whole``."""
        return self.value * whole if self.kind in ("macs", "speedup") else self.value

    def __str__(self) -> str:
        return (
            self.asked
            or {
                "macs": f"--keep {self.value:g}",
                "size": f"--size {self.value:g}",
                "speedup": f"--speedup {1 / self.value:g}",
                "latency": f"--latency-ms {self.value:g}",
            }[self.kind]
        )


def target_of(
    keep: float | None, size: float | None, speedup: float | None, latency_ms: float | None, *, whole: bool = False
) -> Target | None:
    """The one that is stated; none: half of the MACs, or None where ``whole`` says that nothing need be cut.

    Raises `UsageError` for two, or for what cannot be.
    """
    given = {"--keep": keep, "--size": size, "--speedup": speedup, "--latency-ms": latency_ms}
    stated = [name for name, value in given.items() if value is not None]
    if len(stated) > 1:
        raise UsageError(f"{' and '.join(stated)} arrived together", "give one of them")
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UsageError(f"{name} {value!r} is no number", "give a number")
    if keep is not None:
        if not 0 < keep <= 1:
            raise UsageError(f"--keep {keep:g} is not a share", "give the share of the MACs to keep, for example 0.5")
        return Target("macs", keep)
    if speedup is not None:
        if not 1 < speedup <= 100:
            raise UsageError(f"--speedup {speedup:g} is out of reach", "give how many times faster, for example 2")
        return Target("speedup", 1 / speedup)
    for kind, name, value in (("size", "--size", size), ("latency", "--latency-ms", latency_ms)):
        if value is not None:
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} {value:g} is out of reach", "give a positive number")
            return Target(kind, float(value))  # type: ignore[arg-type]
    return None if whole else Target("macs", _HALF)
