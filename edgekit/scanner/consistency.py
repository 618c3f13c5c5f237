"""What one table of a config says and another does not bear out, and names that no type knows: of events, of symbologies."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .sources.address import kind_of
from .sources.tls import SCHEMES
from .steps.answers import CHECKED, symbology
from .steps.selftest import ZONES, hottest
from .tables import Key

if TYPE_CHECKING:
    from .config import ScanConfig

__all__ = ["EVENTS", "Finding", "idle", "mistakes"]

#: What a file of an incident, or a harvest, may be asked for.
EVENTS = ("no_read", "failed", "unfit", "damaged", "drift", "selftest", "model", "camera", "gap", *CHECKED)


class Finding(NamedTuple):
    at: Key
    message: str
    hint: str


def mistakes(config: ScanConfig) -> Iterator[Finding]:
    """With these the scan would not do what the file says."""
    for table in ("incidents", "harvest"):
        options = getattr(config, table)
        yield from _names((table, "on"), options.on if options else (), EVENTS, "event")
    known = _symbologies()
    if known:
        yield from _names(("votes", "formats"), config.votes.formats if config.votes else (), known, "symbology")
        yield from _names(
            ("duplicates", "per_format"), config.duplicates.per_format if config.duplicates else (), known, "symbology"
        )


def idle(config: ScanConfig, wrong: Container[str] = ()) -> Iterator[Finding]:
    """What is there and does nothing. ``wrong``: tables that are not in the config, but were meant to be."""

    def missing(*tables: str) -> bool:
        return all(getattr(config, table) is None and table not in wrong for table in tables)

    for table in ("votes", "duplicates", "crosscheck"):
        if getattr(config, table) is not None and missing("codes"):
            yield Finding((table,), f"[{table}] does nothing: no codes are read", "add [codes]")
    if config.crosscheck is not None and missing("text", "model"):
        yield Finding(("crosscheck",), "[crosscheck] does nothing: no text is read", "add [text] with a reader of lines")
    if config.shadow is not None and not config.shadow.candidate:
        yield Finding(("shadow",), "[shadow] does nothing: no candidate is named", 'write candidate = "next.edge"')
    for number, source in enumerate(config.source):
        if source.certificate and kind_of(source.address) not in SCHEMES:
            message = "certificate does nothing: it is of https:// and rtsps://"
            yield Finding(("source", number, "certificate"), message, "leave it out, or mend the address")
    trigger = config.trigger
    if trigger is not None and trigger.mode in ("single", "burst", "external") and not trigger.inputs:
        hint = 'write inputs = ["tcp://:7007"], or call Scanner.fire in an application'
        yield Finding(("trigger",), f"mode {trigger.mode} waits for triggers, and no inputs are named", hint)
    zones = config.selftest.zones if config.selftest is not None else ZONES
    if zones != ZONES and hottest(zones) is None:  # many machines have none where they are by default
        message = f"no temperature can be read in {zones}: it is never tested for heat"
        yield Finding(("selftest", "zones"), message, "name a folder with thermal_zone*/temp in it")


def _names(at: Key, given: Iterable[str], known: Iterable[str], what: str) -> Iterator[Finding]:
    plain = {symbology(name): name for name in known}
    for name in given:
        if symbology(name) not in plain or (what == "event" and name not in plain.values()):
            near = difflib.get_close_matches(symbology(name), plain, 1)
            hint = f"did you mean `{plain[near[0]]}`?" if near else f"there is: {', '.join(plain.values())}"
            yield Finding(at, f"there is no {what} {name[:60]!r}", hint)


def _symbologies() -> list[str]:
    """As events name them; none where nothing is installed that reads codes."""
    try:
        import zxingcpp as zxing
    except ImportError:
        return []
    return [str(each) for each in zxing.barcode_formats_list(zxing.barcode_formats_from_str("AllReadable"))]
