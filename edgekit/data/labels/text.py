"""What stands on a parcel label, invented: numbers with right check digits, addresses, dates, weights. All of it synthetic."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from .words import invent, words

__all__ = ["ALPHABET", "KINDS", "MAX_LENGTH", "check_s10", "check_ups", "check_weighted", "generate", "seeded"]

#: What a line may hold; the CTC blank is not among it.
ALPHABET = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase + " .,-/#():&'+")
MAX_LENGTH = 32
_MIN_LENGTH = 3
#: Codes leave out I and O, as carriers do: they read as 1 and 0.
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_S10_WEIGHTS = (8, 6, 4, 2, 3, 5, 9, 7)


def seeded(key: str) -> random.Random:
    """A generator of its own for each sample: Python seeds it with sha512 of ``key``, the same on every machine."""
    return random.Random(key)  # noqa: S311  nothing is kept secret with it


def check_weighted(digits: str) -> int:
    """The check digit of SSCC, GTIN and USPS numbers: weights 3, 1, 3, ... from the right (GS1 General Specifications 7.9)."""
    return -sum(int(d) * (3 if i % 2 == 0 else 1) for i, d in enumerate(reversed(digits))) % 10


def check_s10(serial: str) -> int:
    """The check digit of eight digits in a postal item number (UPU S10)."""
    rest = 11 - sum(int(d) * w for d, w in zip(serial, _S10_WEIGHTS, strict=True)) % 11
    return {10: 0, 11: 5}.get(rest, rest)


def check_ups(body: str) -> int:
    """The check digit of the 15 characters behind ``1Z``: letters count by their code less 63, even places twice."""
    values = [int(c) if c.isdigit() else (ord(c) - 63) % 10 for c in body]
    return -(sum(values[0::2]) + 2 * sum(values[1::2])) % 10


def _digits(rng: random.Random, count: int) -> str:
    return f"{rng.randrange(10**count):0{count}d}"


def _code(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(_CODE_LETTERS if rng.random() < 0.5 else string.digits) for _ in range(count))


def _grouped(text: str, sizes: tuple[int, ...]) -> str:
    """``text`` in groups of ``sizes``, the last size repeated."""
    out, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[min(turn, len(sizes) - 1)]
        out.append(text[at : at + size])
        at, turn = at + size, turn + 1
    return " ".join(out)


def ups(rng: random.Random) -> str:
    body = _code(rng, 6) + rng.choice(("01", "02", "03", "12", "13", "15", "68")) + _digits(rng, 7)
    number = f"1Z{body}{check_ups(body)}"
    return number if rng.random() < 0.4 else _grouped(number, (2, 3, 3, 2, 4))


def sscc(rng: random.Random) -> str:
    body = _digits(rng, 17)
    number = f"{body}{check_weighted(body)}"
    return f"(00){number}" if rng.random() < 0.5 else f"(00) {_grouped(number, (1, 7, 9, 1))}"


def usps(rng: random.Random) -> str:
    body = rng.choice(("9400", "9205", "9303", "9270", "9405")) + _digits(rng, 17)
    return _grouped(f"{body}{check_weighted(body)}", (4,))


def s10(rng: random.Random) -> str:
    serial, letters = _digits(rng, 8), rng.choice("RCELUV") + rng.choice(_CODE_LETTERS)
    country = rng.choice(("DE", "GB", "FR", "US", "NL", "PL", "IT", "CN", "JP", "SE", "AT", "CH"))
    number = f"{serial}{check_s10(serial)}"
    return f"{letters} {_grouped(number, (3,))} {country}" if rng.random() < 0.4 else f"{letters}{number}{country}"


def carrier(rng: random.Random) -> str:
    """Tracking numbers of no published check: DHL, FedEx, DPD, Amazon."""
    shape = rng.randrange(5)
    if shape == 0:
        return f"JJD{_digits(rng, rng.choice((16, 18)))}"
    if shape == 1:
        return _grouped(f"JJD{_digits(rng, 15)}", (3, 5, 5))
    if shape == 2:
        return f"TBA{_digits(rng, 12)}"
    number = _digits(rng, 12 if shape == 3 else 14)
    return _grouped(number, (4,)) if rng.random() < 0.6 else number


def date(rng: random.Random) -> str:
    year, month, day = rng.randint(2022, 2031), rng.randint(1, 12), rng.randint(1, 28)
    name = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")[month - 1]
    day_text = rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}.{month:02d}.{year}",
            f"{month:02d}/{day:02d}/{year}",
            f"{day:02d} {name} {year}",
            f"{day:02d}{name}{year % 100}",
            f"{name.capitalize()} {day}, {year}",
        )
    )
    prefix = rng.choice(("", "", "", "DATE: ", "SHIP DATE: ", "Date ", "EXP ", "DELIVER BY: ", "Printed "))
    clock = f" {rng.randrange(24):02d}:{rng.randrange(60):02d}" if rng.random() < 0.25 else ""
    return prefix + day_text + clock


def weight(rng: random.Random) -> str:
    kilograms = rng.choice((rng.uniform(0.1, 3), rng.uniform(1, 32), rng.uniform(30, 1500)))
    unit = rng.choice((" kg", " KG", "kg", " LBS", " LB", " lb"))
    sides = [rng.randint(5, 120) for _ in range(3)]
    return rng.choice(
        (
            f"{kilograms:,.2f}{unit}",
            f"{kilograms:,.1f}{unit}",
            f"WEIGHT: {kilograms:,.1f}{unit}",
            f"{rng.choice(('Gross', 'Net', 'GROSS WT', 'NET WT', 'Gewicht', 'WT'))}: {kilograms:,.2f}{unit}",
            f"{sides[0]} x {sides[1]} x {sides[2]} cm",
            f"DIM: {sides[0]}x{sides[1]}x{sides[2]} CM",
            f"{rng.choice(('PKG', 'Parcel', 'PIECE', 'BOX'))} {rng.randint(1, 9)}/{rng.randint(9, 20)}",
            f"{rng.randint(1, 9)} OF {rng.randint(9, 30)}  {kilograms:.1f}{unit}".replace("  ", " "),
            f"QTY: {rng.randint(1, 9999)} {rng.choice(('PCS', 'EA', 'pcs', 'CTN'))}",
        )
    )


def city(rng: random.Random) -> str:
    """Postcode and city, in the order of one of eight countries."""
    here, _, state = rng.choice(words("american cities")).rpartition(", ")
    plain = invent(rng) if rng.random() < 0.35 else rng.choice(words("cities"))
    letters = "".join(rng.choice(_CODE_LETTERS) for _ in range(6))
    line = rng.choice(
        (
            f"{_digits(rng, 5)} {plain}",
            f"DE-{_digits(rng, 5)} {plain}",
            f"{here}, {state} {_digits(rng, 5)}",
            f"{here} {state} {_digits(rng, 5)}-{_digits(rng, 4)}",
            f"{plain} {letters[:2]}{rng.randint(1, 29)} {rng.randint(1, 9)}{letters[2:4]}",
            f"{_digits(rng, 4)} {letters[:2]} {plain}",
            f"{_digits(rng, 2)}-{_digits(rng, 3)} {plain}",
            f"{plain} {state} {letters[0]}{rng.randint(1, 9)}{letters[1]} {rng.randint(1, 9)}{letters[2]}{rng.randint(1, 9)}",
        )
    )
    return _cased(rng, line)


def name(rng: random.Random) -> str:
    first = rng.choice(words("first names"))
    last = invent(rng) if rng.random() < 0.35 else rng.choice(words("last names"))
    other = rng.choice(words("last names"))
    line = rng.choice(
        (
            f"{first} {last}",
            f"{first} {last}",
            f"{rng.choice(('Mr', 'Mrs', 'Ms', 'Dr.', 'Herr', 'Frau'))} {first[0]}. {last}",
            f"{first} {rng.choice(string.ascii_uppercase)}. {last}",
            f"{last} & {other} {rng.choice(words('forms'))}",
            f"{last} {rng.choice(words('trades'))} {rng.choice(words('forms'))}",
            f"{rng.choice(('Attn:', 'c/o', 'TO:', 'FROM:', 'z.Hd.', 'Ship to:'))} {first} {last}",
            f"{first} O'{last}",
            f"{last}-{other}, {first}",
        )
    )
    return _cased(rng, line)


def street(rng: random.Random) -> str:
    plain = invent(rng) if rng.random() < 0.3 else rng.choice(words("american streets"))
    number = rng.randint(1, 9999 if rng.random() < 0.3 else 299)
    line = rng.choice(
        (
            f"{number} {plain} {rng.choice(words('ways'))}",
            f"{number} {rng.choice('NSEW')} {plain} {rng.choice(words('ways'))}",
            f"{plain}{rng.choice(('strasse', 'weg', 'allee', 'platz'))} {number}",
            f"{plain} {rng.choice(('Str.', 'Ring', 'Damm', 'Allee'))} {number}{rng.choice(('', '', 'a', 'b', 'c'))}",
            f"{number} rue de {plain}",
            f"Via {plain}, {number}",
            f"ul. {plain} {number}/{rng.randint(1, 60)}",
            f"{rng.choice(('APT', 'Suite', 'Unit', 'STE', 'Floor', 'Dock', 'Gate'))} {rng.randint(1, 999)}",
            f"{number} {plain} {rng.choice(words('ways'))} #{rng.randint(1, 99)}",
            f"PO Box {rng.randint(10, 99999)}",
        )
    )
    return _cased(rng, line)


def phone(rng: random.Random) -> str:
    number = rng.choice(
        (
            f"+49 {rng.randint(30, 999)} {_digits(rng, rng.randint(6, 8))}",
            f"({rng.randint(201, 989)}) {rng.randint(200, 999)}-{_digits(rng, 4)}",
            f"+1 {rng.randint(201, 989)}-{rng.randint(200, 999)}-{_digits(rng, 4)}",
            f"+44 {rng.randint(20, 99)} {_digits(rng, 4)} {_digits(rng, 4)}",
            f"0{rng.randint(30, 999)}/{_digits(rng, 7)}",
            f"{rng.randint(201, 989)}.{rng.randint(200, 999)}.{_digits(rng, 4)}",
        )
    )
    return rng.choice(("", "", "Tel. ", "TEL: ", "Phone: ", "Fax: ", "PH: ")) + number


def order(rng: random.Random) -> str:
    number = _digits(rng, rng.randint(4, 9))
    return rng.choice(
        (
            f"ORDER #{number}",
            f"Order #{number}-{_digits(rng, 2)}",
            f"PO# {number}",
            f"REF: {_code(rng, 2)}-{number}",
            f"INV {rng.randint(2022, 2031)}/{_digits(rng, 5)}",
            f"Lot: {_code(rng, rng.randint(6, 9))}",
            f"SKU: {_code(rng, 3)}-{_code(rng, 4)}-{_digits(rng, 2)}",
            f"SN: {_code(rng, rng.randint(8, 12))}",
            f"Batch {_code(rng, 6)}",
            f"P/N {_digits(rng, 4)}-{_digits(rng, 3)}+{_code(rng, 1)}",
            f"Ref.No. {number} & {_digits(rng, 4)}",
            f"RMA {_code(rng, 4)} {_digits(rng, 5)}",
        )
    )


def routing(rng: random.Random) -> str:
    hub = "".join(rng.choice(_CODE_LETTERS) for _ in range(3))
    return rng.choice(
        (
            f"{hub[:2]}-{_digits(rng, 5)}-{_digits(rng, 2)}",
            f"{hub}-{_digits(rng, 4)}",
            f"{hub} {rng.randint(1, 99)}-{rng.randint(1, 99)}",
            f"(420) {_digits(rng, 5)}",
            f"{hub[0]}{rng.randint(1, 9)}-{hub[1]}{_digits(rng, 2)}-{_digits(rng, 2)}",
            f"{hub[:2]} {_digits(rng, 3)} {rng.randint(1, 9)}-{_digits(rng, 2)}",
            f"HUB: {hub}/{_digits(rng, 3)}",
            f"(01){_digits(rng, 14)}",
            f"(10){_code(rng, 8)}(17){_digits(rng, 6)}",
            f"ROUTE {_digits(rng, 3)} STOP {rng.randint(1, 180)}",
            f"ZONE {rng.choice(_CODE_LETTERS)}{rng.randint(1, 40)} / BAY {rng.randint(1, 99)}",
        )
    )


def service(rng: random.Random) -> str:
    line = rng.choice(words("services"))
    return rng.choice((line, line, f"{line} {rng.randint(1, 99)}", f"{line} - {rng.choice(words('services'))}"))


#: kind -> (generator, weight)
KINDS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "ups": (ups, 10),
    "sscc": (sscc, 8),
    "usps": (usps, 8),
    "s10": (s10, 8),
    "carrier": (carrier, 8),
    "date": (date, 8),
    "weight": (weight, 9),
    "city": (city, 12),
    "name": (name, 12),
    "street": (street, 12),
    "phone": (phone, 7),
    "order": (order, 10),
    "routing": (routing, 8),
    "service": (service, 4),
}
_NAMES = tuple(KINDS)
_WEIGHTS = tuple(weight for _, weight in KINDS.values())


def generate(rng: random.Random, kind: str = "") -> str:
    """One line of ``kind`` (any, by weight, where empty), `MAX_LENGTH` characters at most."""
    make = KINDS[kind or rng.choices(_NAMES, _WEIGHTS)[0]][0]
    while True:
        line = make(rng)
        if _MIN_LENGTH <= len(line) <= MAX_LENGTH:
            return line


def _cased(rng: random.Random, line: str) -> str:
    return line.upper() if rng.random() < 0.45 else line
