"""What runs on the device all day: frames in, events out, nothing lost and nothing invented.

A `Pipeline` takes frames from a source (`sources/`, one file a kind), reads them with a `Model`, a `CodeReader` or both,
and hands one event a frame to its sinks (`sinks/`, one file a kind). `Scanner` opens all of it as a config says, `scan`
by names.

Importing this room loads no decoder, code reader or network library; each is loaded by the file that needs it.
"""

from .codes import Code, CodeReader
from .config import ScanConfig, read_config
from .event_schema import event_schema
from .events import SCHEMA
from .outbox import Outbox, OutboxOptions
from .pipeline import Pipeline, Summary
from .reading import Reading, Region
from .scanner import Scanner
from .service import scan
from .sinks import SINKS, Sink, open_sink
from .sources import SOURCES, Captured, Notice, open_source, open_sources
from .sources.cameras import Cameras
from .sources.frames import frames_of
from .sources.options import CameraOptions
from .steps import Step
from .stop import Stop, stop_on_signals

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
