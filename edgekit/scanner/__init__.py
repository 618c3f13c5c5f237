"""What runs on the device all day: frames in, events out, nothing lost and nothing invented.

A `Pipeline` takes frames from a source (`sources/`, one file a kind), reads them with a `Model`, a `CodeReader` or both,
and hands one event a frame to its sinks (`sinks/`, one file a kind). `Scanner` opens all of it as a config says, `scan`
by names.

Importing this room loads nothing of it: each name is loaded on first use, so that the processes of cameras and pictures start
without what only the scan needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.lazy import on_first_use

if TYPE_CHECKING:
    from .codes import Code, CodeReader
    from .config import ScanConfig, read_config
    from .events import SCHEMA
    from .outbox import Outbox, OutboxOptions
    from .pipeline import Pipeline, Summary
    from .reading import Reading, Region
    from .scanner import Scanner
    from .schema import event_schema
    from .service import scan
    from .sinks import SINKS, Sink, open_sink
    from .sources import SOURCES, Captured, Notice, open_source, open_sources
    from .sources.cameras import Cameras
    from .sources.frames import frames_of
    from .sources.options import CameraOptions
    from .steps import Step
    from .stop import Stop, stop_on_signals

_HOMES = {
    "SCHEMA": ".events",
    "SINKS": ".sinks",
    "SOURCES": ".sources",
    "CameraOptions": ".sources.options",
    "Cameras": ".sources.cameras",
    "Captured": ".sources",
    "Code": ".codes",
    "CodeReader": ".codes",
    "Notice": ".sources",
    "Outbox": ".outbox",
    "OutboxOptions": ".outbox",
    "Pipeline": ".pipeline",
    "Reading": ".reading",
    "Region": ".reading",
    "ScanConfig": ".config",
    "Scanner": ".scanner",
    "Sink": ".sinks",
    "Step": ".steps",
    "Stop": ".stop",
    "Summary": ".pipeline",
    "event_schema": ".schema",
    "frames_of": ".sources.frames",
    "open_sink": ".sinks",
    "open_source": ".sources",
    "open_sources": ".sources",
    "read_config": ".config",
    "scan": ".service",
    "stop_on_signals": ".stop",
}

__all__ = [
    "SCHEMA",
    "SINKS",
    "SOURCES",
    "CameraOptions",
    "Cameras",
    "Captured",
    "Code",
    "CodeReader",
    "Notice",
    "Outbox",
    "OutboxOptions",
    "Pipeline",
    "Reading",
    "Region",
    "ScanConfig",
    "Scanner",
    "Sink",
    "Step",
    "Stop",
    "Summary",
    "event_schema",
    "frames_of",
    "open_sink",
    "open_source",
    "open_sources",
    "read_config",
    "scan",
    "stop_on_signals",
]

__getattr__, __dir__ = on_first_use(__name__, _HOMES)
