"""GS1 element strings and Digital Link URIs: application identifiers, check digits. A bad one is reported, never repaired.

Parsing by biip (GS1 General Specifications, section 3); biip checks GTIN, SSCC and GLN, the other keys with a GS1 check
digit are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["parse_gs1", "parse_link"]

#: Application identifier -> how many leading digits carry their check digit last (GS1 General Specifications, 3.2-3.9).
_CHECKED = {"253": 13, "255": 13, "402": 17, "8003": 14, "8006": 14, "8017": 18, "8018": 18, "8026": 14}

#: A path with one of the primary keys (GS1 Digital Link Standard: URI Syntax, 4.3) before its value.
_KEYS = "00|01|253|255|401|402|414|417|8003|8004|8006|8010|8013|8017|8018"
_LINK = re.compile(rf"https?://(?P<host>[^/?#]+)/(?:[^?#]*/)?(?:{_KEYS})/[^/?#]", re.IGNORECASE)


def parse_gs1(text: str) -> dict[str, Any]:
    """Element strings, fields separated by GS (0x1D) -> ``{"ais": {"01": ..., "10": ...}}``, or ``{"error": why}``.

    An unknown identifier, a bad check digit, an impossible date, or one identifier with two values is an error of the
    whole message: half a message is not what was printed.
    """
    from biip import ParseError
    from biip.gs1_messages import GS1Message

    try:
        return _checked(GS1Message.parse(text).element_strings)
    except (ParseError, ValueError) as error:
        return {"error": str(error)}


def parse_link(text: str) -> dict[str, Any] | None:
    """A GS1 Digital Link URI (``https://id.gs1.org/01/09506000134352/10/A1``) as `parse_gs1`; None for any other text.

    Shops number their pages, too: at another host than GS1's own, only what is right in every digit is a Digital Link.
    """
    if not (link := _LINK.match(text)):
        return None
    from biip import ParseError
    from biip.gs1_digital_link_uris import GS1DigitalLinkURI

    try:
        found = _checked(GS1DigitalLinkURI.parse(text).element_strings)
    except (ParseError, ValueError) as error:
        found = {"error": str(error)}
    return found if "ais" in found or link["host"].lower() == "id.gs1.org" else None


def _checked(elements: Iterable[Any]) -> dict[str, Any]:
    ais: dict[str, str] = {}
    for element in elements:
        ai, value = element.ai.ai, element.value
        problem = element.gtin_error or element.sscc_error or element.gln_error or _check_digit(ai, value)
        if problem:
            return {"error": f"({ai}) {problem}"}
        if ais.setdefault(ai, value) != value:
            return {"error": f"({ai}) occurs twice, with {ais[ai]!r} and {value!r}"}
    return {"ais": ais} if ais else {"error": "the message is empty"}


def _check_digit(ai: str, value: str) -> str | None:
    digits = value[: _CHECKED.get(ai, 0)]
    if not digits:
        return None
    # Weights 3, 1, 3, ... from the right, the check digit left out (section 7.9).
    total = sum(int(digit) * (3 if i % 2 == 0 else 1) for i, digit in enumerate(reversed(digits[:-1])))
    expected = -total % 10
    return (
        None if int(digits[-1]) == expected else f"Invalid check digit for {digits!r}: Expected {expected}, got {digits[-1]}."
    )
