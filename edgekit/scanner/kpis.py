"""Key figures of a scan, as the trade counts them: read rate, codes a frame, misreads that were noticed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from .reading import Answer
from .sources import Captured
from .steps.answers import camera_of, good, valid
from .steps.triggers import TriggerOptions

__all__ = ["Tally", "kpi_line"]

_GOOD_SCORE = TriggerOptions().good_score
#: Cameras that are told of one by one, and latencies of each over which percentiles are taken.
MOST_CAMERAS = 64
LATENCIES = 1024
FORGET_S = 3600.0


class _Camera:
    def __init__(self) -> None:
        self.frames = self.good = 0
        self.seen = 0.0
        self.latencies = array("d")

    def figures(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.latencies, [50, 99]).round(3).tolist()
        return {"inferred": self.frames, "good": self.good, "latency_ms": {"p50": p50, "p99": p99}}


class Tally:
    """Counts what was read, frame by frame, and makes the key figures of it and of the steps' figures."""

    def __init__(self) -> None:
        self._frames = self._good = self._codes = self._invalid = 0
        self._coded = False
        self._cameras: dict[str, _Camera] = {}

    def see(self, captured: Captured, answer: Answer | None) -> None:
        """Each captured frame, as `Pipeline` tells them."""
        if answer is None or answer.reason:
            return
        self._frames += 1
        codes = answer.fields.get("codes")
        if codes is not None:
            self._coded = True
            self._codes += len(codes)
            self._invalid += sum(not valid(code) for code in codes)
        well = good(answer.fields, _GOOD_SCORE)
        self._good += well
        name = camera_of(captured.source)
        camera = self._cameras.get(name)
        if camera is None:
            if len(self._cameras) >= MOST_CAMERAS and not self._forget(captured.monotonic):
                return
            camera = self._cameras[name] = _Camera()
        if len(camera.latencies) < LATENCIES:
            camera.latencies.append(answer.latency_ms)
        else:
            camera.latencies[camera.frames % LATENCIES] = answer.latency_ms
        camera.frames += 1
        camera.good += well
        camera.seen = captured.monotonic

    def _forget(self, now: float) -> bool:
        """The row of whom nothing came for longest goes, if that is long ago: a folder a day has its day."""
        name = min(self._cameras, key=lambda name: self._cameras[name].seen)
        gone = now - self._cameras[name].seen > FORGET_S
        if gone:
            del self._cameras[name]
        return gone

    def cameras(self) -> list[dict[str, Any]]:
        """A row a camera, stream or folder of pictures: ``source``, ``inferred``, ``good``, ``latency_ms`` p50 and p99 over the
        last 1,024 frames."""
        return [{"source": name, **camera.figures()} for name, camera in self._cameras.items()]

    def figures(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """``read_rate``: triggers with a valid code (or a label, a text, of enough score) of all ``triggers``; without
        [trigger] each frame that was read is one. ``codes_a_frame``, None where no codes are sought. ``misreads``: those that
        were noticed, by how: GS1 data with a ``gs1`` error, a ``conflict`` with the text, an ``unconfirmed`` read without
        enough votes; a key where somebody looks. None where there is nothing to tell a rate by.
        """
        by_name = {str(step["step"]): step for step in steps}
        triggers, reads = self._frames, self._good
        if trigger := by_name.get("trigger"):
            triggers, reads = trigger["triggers"], trigger["good"]
        misreads: dict[str, int] = {"gs1": self._invalid} if self._coded else {}
        for key, step, figure in (("conflict", "crosscheck", "conflict"), ("unconfirmed", "votes", "outvoted")):
            if step in by_name:
                misreads[key] = by_name[step][figure]
        return {
            "triggers": triggers,
            "good": reads,
            "read_rate": round(reads / triggers, 4) if triggers else None,
            "codes_a_frame": round(self._codes / self._frames, 4) if self._coded else None,
            "misreads": misreads,
        }


def kpi_line(kpis: Mapping[str, Any]) -> str:
    """In words, "" where nothing was read."""
    if not kpis or kpis["read_rate"] is None:
        return ""
    if kpis["codes_a_frame"] == 0 and not kpis["good"]:  # pictures without codes, or a reader that saw none: both are this
        return f"no codes (0 of {kpis['triggers']})"
    text = f"read rate {kpis['read_rate']:.1%} ({kpis['good']} of {kpis['triggers']})"
    if kpis["codes_a_frame"] is not None:
        text += f", {kpis['codes_a_frame']:.3g} codes a frame"
    found = [f"{count} {_WORDS[how]}" for how, count in kpis["misreads"].items() if count]
    return text + (f", misreads: {', '.join(found)}" if found else "")


_WORDS = {"gs1": "with a GS1 error", "conflict": "in conflict with the text", "unconfirmed": "without enough votes"}
