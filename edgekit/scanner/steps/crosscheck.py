"""The text of a label against the GS1 data of its codes: what agrees, what does not. Nothing is repaired."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

from .answers import require, symbology

__all__ = ["CrossCheck", "CrossCheckOptions"]

_ELEMENT = re.compile(r"\(\s*(\d{2,4})\s*\)([^(]*)")  # (01)0950... : the human-readable interpretation
#: Words before a value -> its application identifier (GS1 General Specifications, 4.6: data titles, and what is usual).
_TITLES = {
    "00": r"SSCC",
    "01": r"GTIN|EAN",
    "10": r"BATCH(?:/LOT)?|LOT",
    "11": r"PROD(?:\.| DATE)?|MFG",
    "15": r"BEST BEFORE|BBE?|BEST BY",
    "17": r"EXP(?:IRY)?(?:\.| DATE)?|USE BY",
    "21": r"SERIAL|S/?N|SER\.",
}
_TITLED = {
    ai: re.compile(rf"\b(?:{words})\b[\s.:#]*(?:NO\.?\s*)?([A-Z0-9][A-Z0-9./\-]*)", re.IGNORECASE)
    for ai, words in _TITLES.items()
}
_DATES = frozenset({"11", "12", "13", "15", "16", "17"})
_RETAIL = frozenset(map(symbology, ("EAN-13", "EAN-8", "UPC-A")))
#: What readers of text take for each other.
_ALIKE = str.maketrans("OQIBSZG", "0018526")


class CrossCheckOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ais``: the application identifiers that are compared, as digits; empty for all."""

    ais: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for ai in self.ais:
            require(ai.isascii() and ai.isdigit() and 2 <= len(ai) <= 4, f"ais: two to four digits each, not {ai!r}")


class CrossCheck:
    """Adds what ``text`` and ``codes`` of an event say of the same application identifier.

    ``agreement``: the identifiers whose values are the same. ``conflict`` and ``doubtful``: ``[{"ai", "code", "text"}]``,
    both values as read. Doubtful: the same but for letters that are taken for each other (O and 0, I and 1, B and 8, S and 5,
    Z and 2, G and 6), for upper and lower case, or a date that can be read in two ways. What only one of the two names is
    not compared, and codes with a GS1 error are not.
    """

    name = "crosscheck"

    def __init__(self, options: CrossCheckOptions | None = None) -> None:
        self.options = options or CrossCheckOptions()
        self._counts = {"compared": 0, "agreement": 0, "doubtful": 0, "conflict": 0}

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        text, codes = event.get("text"), event.get("codes")
        if not text or not codes:
            return [event]
        said, coded = _said(str(text)), _coded(codes)
        found: dict[str, list[Any]] = {"agreement": [], "doubtful": [], "conflict": []}
        for ai in sorted(said.keys() & coded.keys()):
            if self.options.ais and ai not in self.options.ais:
                continue
            value = said[ai]
            verdicts = [(_verdict(ai, code, value), code) for code in coded[ai]]
            verdict = min((v for v, _ in verdicts), key=("agreement", "doubtful", "conflict").index)
            values = [code for v, code in verdicts if v == verdict]
            both = {"ai": ai, "code": values[0] if len(values) == 1 else values, "text": value}
            found[verdict].append(ai if verdict == "agreement" else both)
            self._counts["compared"] += 1
            self._counts[verdict] += 1
        return [{**event, **{name: each for name, each in found.items() if each}}]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> dict[str, Any]:
        return dict(self._counts)

    def close(self) -> None:
        pass

    def state(self) -> None:
        """Each event is checked by itself."""

    def resume(self, state: Any) -> None:
        pass


def _coded(codes: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Application identifier -> its values in all codes. The number of a retail code is a GTIN."""
    found: dict[str, list[str]] = {}
    for code in codes:
        ais = dict((code.get("gs1") or {}).get("ais", {}))
        if not code.get("gs1") and symbology(code["format"]) in _RETAIL:
            ais = {"01": code["text"].zfill(14)}
        for ai, value in ais.items():
            if value not in found.setdefault(ai, []):
                found[ai].append(value)
    return found


def _said(text: str) -> dict[str, str]:
    """Application identifier -> its value in a line of text: in brackets, else after a word such as LOT, else plain digits."""
    elements = {ai: value.strip() for ai, value in _ELEMENT.findall(text) if value.strip()}
    if elements:
        return elements
    titled = {ai: match.group(1).rstrip(".-/") for ai, pattern in _TITLED.items() if (match := pattern.search(text))}
    if titled:
        return titled
    digits = "".join(text.split())
    folded = digits.upper().translate(_ALIKE)
    return {"01": digits} if folded.isascii() and folded.isdigit() and len(folded) in (8, 12, 13, 14) else {}


def _verdict(ai: str, code: str, text: str) -> str:
    plain = "".join(text.split())
    if ai == "01" and len(plain) in (8, 12, 13):
        plain = plain.zfill(14)
    if code == plain:
        return "agreement"
    if ai in _DATES and not plain.isdigit():
        dates = _dates(plain)
        if code in dates:
            return "agreement" if len(dates) == 1 else "doubtful"
    return "doubtful" if _folded(code) == _folded(plain) else "conflict"


def _folded(value: str) -> str:
    return value.upper().translate(_ALIKE)


def _dates(text: str) -> set[str]:
    """YYMMDD of all ways to read a written date; day 00 where only a month is named."""
    parts = re.split(r"[./\-]", text)
    if not all(part.isascii() and part.isdigit() for part in parts):
        return set()
    ways: list[tuple[str, str, str]] = []
    if len(parts) == 3:
        a, b, c = parts
        ways = [(a, b, c)] if len(a) == 4 else [(c, b, a), (c, a, b)]
        if len(c) == 2 and len(a) == 2:
            ways.append((a, b, c))
    elif len(parts) == 2:
        a, b = parts
        ways = [(a, b, "00")] if len(a) == 4 else [(b, a, "00")]
    return {
        f"{int(year) % 100:02d}{int(month):02d}{int(day):02d}"
        for year, month, day in ways
        if len(year) in (2, 4) and 1 <= int(month) <= 12 and int(day) <= 31
    }
