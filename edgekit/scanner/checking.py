"""`check_config`: a scan's config held against this machine, without scanning: its bundles, parts, folders and addresses."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import DataError, EdgekitError, MissingExtra
from edgekit.files import check_new
from edgekit.runtime import Model

from .batching import refuse_fixed_batch
from .codes import CodeReader
from .config import ModelOptions, ScanConfig, parse_config
from .consistency import idle
from .database import check_database
from .outbox import default_outbox
from .reading import Reading
from .sinks import open_sink
from .sinks.jsonl import place_of
from .sinks.sqlite import VERSION
from .sources import open_source
from .sources.address import kind_of, parsed_url
from .sources.cameras import Cameras
from .sources.gstreamer import GST_LAUNCH
from .sources.opencv import device_of
from .sources.tls import ANY, SCHEMES, check_certificate
from .sources.trouble import Trouble
from .steps.triggers import Trigger
from .tables import Key, Problem, Tables
from .trigger_inputs import open_trigger_input

__all__ = ["Checked", "check_config"]

ANSWER_S = 2.0
_PORTS = {"mqtt": 1883, "mqtts": 8883, "http": 80, "https": 443, "opc.tcp": 4840, "rtsp": 554, "rtsps": 322}


class Checked(NamedTuple):
    """``problems``: the scan would not start. ``warnings``: it starts, and waits or goes without."""

    problems: list[Problem]
    warnings: list[Problem]


class _Sound(Exception):
    """All of a sink's address was understood; its outbox is not opened."""


def check_config(path: str | os.PathLike[str]) -> Checked:
    """Every mistake in a TOML file, and all that this machine lacks of what its sound tables name. Nothing is written.

    Bundles are verified and loaded, extras and folders looked for, and each host is asked once whether it answers.
    """
    config, problems, places, wrong = parse_config(path)
    if config is None:
        return Checked(problems, [])
    found = _Check(config, path, places, wrong).done()
    lines = {problem.where for problem in problems}
    return Checked([*problems, *(each for each in found.problems if each.where not in lines)], found.warnings)


class _Check:
    """``places``: which entries of the file's arrays the config's are. ``wrong``: the tables that it lacks for a mistake in
    them, against which nothing can be held."""

    def __init__(
        self, config: ScanConfig, path: str | os.PathLike[str], places: Mapping[str, Sequence[int]], wrong: Set[str]
    ) -> None:
        text = Path(path).read_text(encoding="utf-8")
        self.config, self.places, self.broken = config, places, wrong
        self.wrong, self.doubtful = (Tables(os.fspath(path), text) for _ in range(2))

    def done(self) -> Checked:
        self._readers()
        self._sources()
        self._sinks()
        self._folders()
        self._ports()
        for finding in idle(self.config, self.broken):
            self.doubtful.add(self._placed(finding.at), finding.message, finding.hint)
        return Checked(self.wrong.problems, self.doubtful.problems)

    def _try(self, at: Key, look: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """What ``look`` gives; None, and a problem at ``at``, where it raises."""
        try:
            return look(*args, **named)
        except EdgekitError as error:
            self.wrong.add(at, error.message, error.hint)
        except OSError as error:
            self.wrong.add(at, f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return None

    def _placed(self, at: Key) -> Key:
        """The place in the file of what stands at ``at`` in the config."""
        places = self.places.get(str(at[0]))
        return (at[0], places[number], *at[2:]) if places and len(at) > 1 and isinstance(number := at[1], int) else at

    def _readers(self) -> None:
        config = self.config
        before = len(self.wrong.problems)
        with contextlib.ExitStack() as stack:
            model, text = (
                self._try((table, "bundle"), _opened, options, stack) if options else None
                for table, options in (("model", config.model), ("text", config.text))
            )
            at: Key = ("codes", "formats") if config.codes and config.codes.formats else ("codes",)
            codes = self._try(at, CodeReader, formats=config.codes.formats or None) if config.codes else None
            if len(self.wrong.problems) == before and self.broken.isdisjoint(("model", "text", "codes")):
                self._try(("text" if config.text else "model", "bundle"), Reading, model, codes, text)

    def _sources(self) -> None:
        sources, several = self.config.source, Cameras([])
        for number, source in enumerate(sources):
            at = self._placed(("source", number, "address"))
            if len(sources) == 1 and (not source.name or not kind_of(source.address)):
                self._try(at, open_source, source.address, watch=source.watch, options=source.camera())
            else:
                self._try(at, several.add, source.address, source.name, source.camera())
            self._present(at, source.address)
            if source.certificate not in ("", ANY) and kind_of(source.address) in SCHEMES:
                try:
                    check_certificate(source.certificate)
                except Trouble as trouble:
                    self.wrong.add(
                        self._placed(("source", number, "certificate")), trouble.reason, "it gives no pictures without"
                    )

    def _present(self, at: Key, address: str) -> None:
        kind = kind_of(address)
        if kind in ("camera", "v4l2") and not os.path.exists(device_of(address)):
            self.doubtful.add(at, f"there is no {device_of(address)} now", "plug the camera in; the scan waits for it")
        elif kind == "gst" and shutil.which(GST_LAUNCH) is None:
            self.wrong.add(at, f"{GST_LAUNCH} is not installed", "apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good")
        elif kind in _PORTS or kind == "tcp":
            self._answers(at, address, "the scan waits for the camera")

    def _sinks(self) -> None:
        forwards = False
        for number, sink in enumerate(self.config.sink):
            at, kind = self._placed(("sink", number, "address")), sink.address.partition(":")[0].lower()
            if sink in self.config.sink[:number]:
                self.wrong.add(at, "the same sink is named above", "name each sink once")
            if kind in ("jsonl", "sqlite") and sink.address.partition(":")[2].strip("/"):
                self._try(at, _file_sink, kind, sink.address)
                continue
            with contextlib.suppress(_Sound):
                self._try(at, open_sink, sink.address, _no_outbox)
                continue  # it is no sink
            forwards = True
            self._answers(at, sink.address, "events wait for it in the outbox")
        if forwards:
            path = Path(self.config.outbox.path or default_outbox())
            if not path.is_file():
                self._try(("outbox", "path"), check_new, path)

    def _folders(self) -> None:
        for table in ("ring", "incidents", "harvest"):
            if options := getattr(self.config, table):
                self._try((table, "folder"), check_new, Path(options.folder) / "frame")
                self._try((table, "folder"), refuse_inside_bundle, Path(options.folder) / "frame")
        for table, what in (("ring", self.config.ring), ("server", self.config.server and self.config.server.preview)):
            if what and importlib.util.find_spec("PIL") is None:
                self._try((table,), _missing_pillow)
        for table, key in (("drift", "baseline"), ("shadow", "report"), ("shadow", "kept")):
            path = getattr(getattr(self.config, table), key, "")
            if path:
                self._try((table, key), check_new, Path(path))

    def _ports(self) -> None:
        """Ports that this scan listens on; one that is in use may be so by the scan itself."""
        trigger = self.config.trigger
        if trigger:
            self._try(("trigger",), Trigger, trigger, cameras=[source.name for source in self.config.source if source.name])
        for address in trigger.inputs if trigger else ():
            at = ("trigger", "inputs")
            try:
                open_trigger_input(address, lambda source, reference: False).close()
            except DataError as error:
                self.doubtful.add(at, error.message, error.hint)
            except EdgekitError as error:
                self.wrong.add(at, error.message, error.hint)
            else:
                if address.startswith("mqtt"):
                    self._answers(at, address, "no trigger comes until it does")
        if self.config.server:
            host, port = self.config.server.place()
            try:
                socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            except OSError as error:
                self.doubtful.add(("server", "address"), f"{host}:{port}: {error.strerror}", "perhaps a scan that runs")

    def _answers(self, at: Key, address: str, meanwhile: str) -> None:
        try:
            url, host, port = parsed_url(address)
        except ValueError:  # whoever opens it has said so
            return
        port = port or _PORTS.get(url.scheme)
        if url.scheme == "serial" and not os.path.exists(url.path):
            self.doubtful.add(at, f"there is no {url.path} now", f"plug it in; {meanwhile}")
        if not host or not port:  # a serial line
            return
        try:
            socket.create_connection((host, port), ANSWER_S).close()
        except OSError as error:
            self.doubtful.add(at, f"{host}:{port} does not answer now ({error.strerror or error})", meanwhile)


def _opened(options: ModelOptions, stack: contextlib.ExitStack) -> Model:
    model = Model.open(options.bundle, options.backend, precision=options.precision, threads=options.threads)
    stack.enter_context(model)
    refuse_fixed_batch(model)
    return model


def _file_sink(kind: str, address: str) -> None:
    path = Path(address.partition(":")[2]) if kind == "sqlite" else place_of(address)[0]
    if path is None:
        return
    if not path.exists():
        check_new(path)
    elif kind == "sqlite":
        check_database(path, VERSION)
    elif not os.access(path, os.W_OK):
        raise PermissionError(13, os.strerror(13), str(path))


def _missing_pillow() -> NoReturn:
    raise MissingExtra("scan", "PIL")


def _no_outbox() -> NoReturn:
    raise _Sound
