"""`ScanConfig`: one TOML file that says all of a scan. `read_config` reads it; `checking` looks at everything it names."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from edgekit.errors import UsageError

from .codes import BUDGET_MS, LIVE_BUDGET_MS
from .consistency import mistakes
from .logs import LogOptions
from .outbox_options import OutboxOptions
from .reading import Region
from .sources.options import CameraOptions
from .steps.crosscheck import CrossCheckOptions
from .steps.drift import DriftOptions
from .steps.duplicates import DuplicateOptions
from .steps.harvest import HarvestOptions
from .steps.incident import IncidentOptions
from .steps.ring import RingOptions
from .steps.selftest import SelfTestOptions
from .steps.shadow import ShadowOptions
from .steps.triggers import TriggerOptions
from .steps.votes import VoteOptions
from .tables import Problem, Tables, worded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CodeOptions",
    "ModelOptions",
    "RegionOptions",
    "ScanConfig",
    "ServerOptions",
    "SinkOptions",
    "SourceOptions",
    "TextOptions",
    "config_of",
    "parse_config",
    "read_config",
]

MAX_BYTES = 1 << 20
Threads = Annotated[int, msgspec.Meta(ge=0, le=1024)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bundle that answers with a label, or reads a line of text. ``threads``: CPU cores, 0 for all."""

    bundle: str
    backend: str = "auto"
    precision: Literal["auto", "float", "int8"] = "auto"
    threads: Threads = 1


class CodeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``budget_ms``: so long after the plain reading of a frame no further attempt is started, 0 reads plainly only; where it
    is not set 300 for files and 100 where a source is live. ``formats``: those that are read, as `CodeReader` takes them; none
    named: all."""

    budget_ms: Annotated[float, msgspec.Meta(ge=0, le=600_000)] | None = None
    formats: tuple[str, ...] = ()

    def budget(self, live: bool) -> float:
        return self.budget_ms if self.budget_ms is not None else LIVE_BUDGET_MS if live else BUDGET_MS


class RegionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of each frame that is read, in shares of its width and height."""

    left: Share = 0.0
    top: Share = 0.0
    right: Share = 1.0
    bottom: Share = 1.0

    def __post_init__(self) -> None:
        if not (self.left < self.right and self.top < self.bottom):
            raise UsageError("the region is empty", "left is below right and top below bottom, each in 0..1")

    def region(self) -> Region:
        return Region(self.left, self.top, self.right, self.bottom)


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A text reader beside the model. ``beam``: readings weighed at each step, 1 is greedy. ``left``, ``top``, ``right``,
    ``bottom``: the part of the frame that has its line, in shares; where none is set, [region]'s."""

    bundle: str
    backend: str = "auto"
    precision: Literal["auto", "float", "int8"] = "auto"
    threads: Threads = 1
    beam: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    left: Share | None = None
    top: Share | None = None
    right: Share | None = None
    bottom: Share | None = None

    def __post_init__(self) -> None:
        self.line()

    def line(self) -> Region | None:
        """Raises `UsageError` where it is empty."""
        sides = {name: side for name in ("left", "top", "right", "bottom") if (side := getattr(self, name)) is not None}
        return RegionOptions(**sides).region() if sides else None


class SourceOptions(CameraOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where frames come from. ``name`` stands for a camera in events; ``watch`` waits for new files in a folder."""

    address: Annotated[str, msgspec.Meta(min_length=1)]
    name: str = ""
    watch: bool = False

    def camera(self) -> CameraOptions:
        return CameraOptions(**{name: getattr(self, name) for name in CameraOptions.__struct_fields__})


class SinkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    address: Annotated[str, msgspec.Meta(min_length=1)]


class OutboxFile(OutboxOptions, frozen=True, forbid_unknown_fields=True):
    """``path``: empty for $STATE_DIRECTORY or the user's state folder. The limits are each sink's (`OutboxOptions`)."""

    path: str = ""

    def limits(self) -> OutboxOptions:
        return OutboxOptions(**{name: getattr(self, name) for name in OutboxOptions.__struct_fields__})


class ServerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metrics, health and the preview over HTTP, read-only. ``hosts``: names it may be asked by, beside its own address."""

    address: str = "127.0.0.1:9110"
    preview: bool = True
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.place()

    def place(self) -> tuple[str, int]:
        """Host and port. Raises `UsageError` for what is no address."""
        host, _, port = self.address.rpartition(":")
        host = host.strip("[]")
        try:
            host.encode("idna")
        except UnicodeError:
            host = ""
        if not host or not port.isdigit() or int(port) > 65535:
            raise UsageError(f"the address {self.address!r}", "write HOST:PORT, for example 127.0.0.1:9110")
        return host, int(port)


#: Tables that watch a model.
_WATCHING = ("shadow", "drift", "selftest")


class ScanConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of a scan. A table that is not there is off; `source` is all that must be, and something to read with.

    Relative paths start from the file's folder; they are absolute once it is read.
    """

    model: ModelOptions | None = None
    text: TextOptions | None = None
    codes: CodeOptions | None = None
    region: RegionOptions | None = None
    source: tuple[SourceOptions, ...] = ()
    trigger: TriggerOptions | None = None
    votes: VoteOptions | None = None
    crosscheck: CrossCheckOptions | None = None
    duplicates: DuplicateOptions | None = None
    ring: RingOptions | None = None
    drift: DriftOptions | None = None
    selftest: SelfTestOptions | None = None
    shadow: ShadowOptions | None = None
    incidents: IncidentOptions | None = None
    harvest: HarvestOptions | None = None
    sink: tuple[SinkOptions, ...] = ()
    outbox: OutboxFile = OutboxFile()
    server: ServerOptions | None = None
    log: LogOptions = LogOptions()

    def __post_init__(self) -> None:
        for name in _WATCHING:
            if getattr(self, name) is not None and self.model is None:
                raise UsageError(f"[{name}] wants a model", "add [model] with a bundle, or leave it out")


#: Keys that hold a path, which is relative to the config's file.
_PATHS = (
    ("model", "bundle"),
    ("text", "bundle"),
    ("outbox", "path"),
    ("ring", "folder"),
    ("incidents", "folder"),
    ("harvest", "folder"),
    ("drift", "baseline"),
    ("shadow", "candidate"),
    ("shadow", "report"),
    ("shadow", "kept"),
)
#: Sinks whose address is a path.
_FILE_SINKS = ("jsonl", "sqlite")


def read_config(path: str | os.PathLike[str]) -> ScanConfig:
    """Read and check a TOML file. Raises `UsageError` that names the first mistake and says how many more there are."""
    config, problems, *_ = parse_config(path)
    if problems or config is None:
        first, *more = problems
        also = f" (and {len(more)} more: edgekit scan --check {os.fspath(path)})" if more else ""
        raise UsageError(f"{first.where}: {first.message}{also}", first.hint)
    return config


def config_of(config: ScanConfig | Mapping[str, Any] | str | os.PathLike[str], *, sourced: bool = True) -> ScanConfig:
    """A config as it is, of tables in a dict (paths relative to the working folder; not ``sourced``: they need name no source),
    or of a file."""
    if isinstance(config, ScanConfig):
        return config
    if isinstance(config, str | os.PathLike):
        return read_config(config)
    found, problems, *_ = _parsed(Tables(), config, Path(), sourced)
    if problems or found is None:
        raise UsageError(problems[0].message, problems[0].hint)
    return found


class Parsed(NamedTuple):
    """A ``config`` and every mistake; with ``problems`` it is of the sound tables only, or None. ``places``: which entries of
    the file's arrays of tables its own are. ``wrong``: the tables that it lacks for a mistake in them, or in their name."""

    config: ScanConfig | None
    problems: list[Problem]
    places: Mapping[str, Sequence[int]] = {}
    wrong: frozenset[str] = frozenset()


def parse_config(path: str | os.PathLike[str]) -> Parsed:
    """The config in a TOML file, and what is wrong in it."""
    file = Path(path)
    name = os.fspath(path)
    try:
        if not file.is_file() and not file.is_dir() and file.exists():
            return Parsed(None, [Problem(name, "it is a pipe, a socket or a device", "name a TOML file that can be read")])
        with file.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            return Parsed(None, [Problem(name, f"it is larger than {MAX_BYTES >> 20} MiB", "a config is a few tables of text")])
        text = raw.decode()
        data = tomllib.loads(text)
    except FileNotFoundError:
        return Parsed(None, [Problem(name, "there is no such file", "docs/scan.md has an example to start from")])
    except OSError as error:
        return Parsed(None, [Problem(name, error.strerror or str(error), "name a TOML file that can be read")])
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return Parsed(None, [Problem(f"{name}:{line}", "this is no UTF-8 text", "save the file as UTF-8")])
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return Parsed(None, [Problem(name, f"this is no TOML: {error}", "strings need quotes, tables [brackets]")])
    return _parsed(Tables(name, text), data, file.parent)


def _parsed(tables: Tables, data: Mapping[str, Any], base: Path, sourced: bool = True) -> Parsed:
    config: ScanConfig = tables.struct(ScanConfig, data) or _sound(tables.sound)
    wrong = frozenset(data) - tables.sound.keys()
    if not wrong <= set(ScanConfig.__struct_fields__):  # whatever it was meant to be
        wrong = frozenset(ScanConfig.__struct_fields__)
    if sourced and "source" not in data:
        tables.add((), "there is no [[source]]", 'write [[source]] and address = "camera:0", a folder or another source')
    if not {"model", "text", "codes"} & set(data):
        tables.add((), "there is nothing to read with", "add [model] with a bundle, [text] or [codes]")
    sources = data.get("source")
    listed = sources if isinstance(sources, list | tuple) else ()
    names = [source.get("name") if isinstance(source, Mapping) else "" for source in listed]
    for number, name in enumerate(names):
        if name and name in names[:number]:
            tables.add(("source", number, "name"), f"two sources are named {worded(name)}", "give each its own name")
    for finding in mistakes(config):
        tables.add(*finding)
    return Parsed(_absolute(config, base), tables.problems, tables.places, wrong)


def _sound(tables: Mapping[str, Any]) -> ScanConfig:
    """A config of the tables in which no mistake is, without those that watch a model where there is none."""
    return ScanConfig(**{name: each for name, each in tables.items() if "model" in tables or name not in _WATCHING})


def _absolute(config: ScanConfig, base: Path) -> ScanConfig:
    """With all paths absolute."""
    changes: dict[str, Any] = {}
    for table, key in _PATHS:
        options = changes.get(table, getattr(config, table))
        if options is not None and getattr(options, key):
            changes[table] = msgspec.structs.replace(options, **{key: str((base / getattr(options, key)).absolute())})
    changes["source"] = tuple(_source_from(source, base) for source in config.source)
    changes["sink"] = tuple(_sink_from(sink, base) for sink in config.sink)
    return msgspec.structs.replace(config, **changes)


def _source_from(source: SourceOptions, base: Path) -> SourceOptions:
    from .sources.address import kind_of
    from .sources.tls import ANY

    if source.certificate not in ("", ANY):
        source = msgspec.structs.replace(source, certificate=str((base / source.certificate).absolute()))
    path = base / source.address
    if kind_of(source.address) not in ("", "video") and not os.path.exists(path):
        return source
    return msgspec.structs.replace(source, address=str(path.absolute()))


def _sink_from(sink: SinkOptions, base: Path) -> SinkOptions:
    kind, _, rest = sink.address.partition(":")
    if kind.lower() not in _FILE_SINKS or rest in ("", "-"):
        return sink
    return msgspec.structs.replace(sink, address=f"{kind}:{(base / rest).absolute()}")
