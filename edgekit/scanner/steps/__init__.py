"""Steps: what happens between a frame's answer and the sinks. One file a kind; `Pipeline` runs them in order."""

from __future__ import annotations

from typing import Any, Protocol

from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

__all__ = ["Resuming", "Step"]


class Step(Protocol):
    """Used from the scanning thread only. Events that a step makes of its own need no id: the pipeline numbers them.

    Time is `Captured.monotonic` for all that counts milliseconds: the wall clock may jump by a day.
    """

    name: str

    def wants(self, captured: Captured) -> str:
        """Before the frame is read: "" to have it read, else the reason why it is dropped (counted under that word)."""
        ...

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        """What goes on to the next step: ``[event]``, changed or not; none where it is held back; or more than one.

        Called for every event on its way, those without an answer (``"event": "damaged"``) too.
        """
        ...

    def due(self, monotonic: float, wall: float) -> list[Event]:
        """Events whose time has come without a frame. Called after each frame, and at least four times a second."""
        ...

    def status(self) -> dict[str, Any]:
        """Figures for the summary and the metrics."""
        ...

    def close(self) -> None:
        """The scan ends; before, `due` is asked with an infinite ``monotonic``: once, and once more when all is flushed."""
        ...


class Resuming(Protocol):
    """What a step has, beside, that a recorded incident is replayed with exactly (`Incidents`)."""

    def state(self) -> Any:
        """What it knows between two rounds, in JSON types, bytes and uint8 frames. Quick: called every few seconds."""
        ...

    def resume(self, state: Any) -> None:
        """Go on from there: JSON types, frames as arrays. May raise anything where it is no such state."""
        ...
