"""Tables of a TOML file into msgspec structs, with every mistake named at once: file and line, key, what arrived, what fits."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from edgekit.errors import EdgekitError

from .sources.address import shown as without_password

__all__ = ["Key", "Problem", "Tables", "line_of", "shown", "worded"]

#: A key's place: names, and numbers in arrays of tables.
Key = tuple[str | int, ...]
_BARE = re.compile(r"^[A-Za-z0-9_\-]{1,40}\Z")
_EXAMPLE = "edgekit scan --example shows every table and key"
_LONGEST = 100  # of a value in a message
_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")


class Problem(NamedTuple):
    """What is wrong, where, and what mends it."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class Tables:
    """Reads tables into structs and collects `problems`. ``file`` and ``text``: where they come from, empty for a dict."""

    def __init__(self, file: str = "", text: str = "") -> None:
        self._file, self._text = file, text
        self.problems: list[Problem] = []
        self.sound: dict[str, Any] = {}  #: what the top could be made of, mistakes left out
        self.places: dict[str, list[int]] = {}  #: which entries of its arrays are in it

    def add(self, at: Key, message: str, hint: str = "") -> None:
        message, hint = (" ".join(words.split()) for words in (message, hint))  # words of an error may quote several lines
        self.problems.append(Problem(self._where(at), message, hint or _EXAMPLE))

    def struct(self, kind: type[Any], data: Any, at: Key = ()) -> Any:
        """A ``kind`` made of ``data``; None where that did not work, and then `problems` say why."""
        if not isinstance(data, Mapping):
            self.add(at, f"`{shown(at)}` is {worded(data)}", "a table was expected: [" + shown(at) + "]")
            return None
        before = len(self.problems)
        hints = get_type_hints(kind, include_extras=True)
        names = kind.__struct_fields__
        for key in data:
            if key not in names:
                self._unknown(at, str(key), names)
        values = {name: self._value(hints[name], data[name], (*at, name)) for name in names if name in data}
        for field in msgspec.structs.fields(kind):
            if field.required and field.name not in data:
                self.add(at, f"`{shown((*at, field.name))}` is missing")
        if not at:
            self._keep_sound(values)
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except EdgekitError as error:
            self.add(at, f"[{shown(at)}] {error.message}" if at else error.message, error.hint)
        except ValueError as error:
            self.add(at, f"[{shown(at)}] {error}")
        return None

    def _keep_sound(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, tuple):
                self.places[name] = [place for place, each in enumerate(value) if each is not None]
                self.sound[name] = tuple(each for each in value if each is not None)
            elif value is not None:
                self.sound[name] = value

    def _value(self, hint: Any, value: Any, at: Key) -> Any:
        kind, many = _tables_in(hint)
        if kind is None:
            try:
                return msgspec.convert(value, hint)
            except msgspec.ValidationError as error:
                self._wrong(hint, value, at, str(error))
                return None
        if not many:
            return self.struct(kind, value, at)
        if not isinstance(value, list | tuple):
            self.add(at, f"`{shown(at)}` is one table", f"write it as [[{shown(at)}]]; it may be repeated")
            return ()
        return tuple(self.struct(kind, each, (*at, number)) for number, each in enumerate(value))

    def _wrong(self, hint: Any, value: Any, at: Key, message: str) -> None:
        choices = _choices(hint)
        if choices and isinstance(value, str):
            self.add(
                at,
                f"`{shown(at)}` is {worded(value)}",
                _near(value, choices) or f"choose one of: {', '.join(filter(None, choices))}",
            )
        else:
            what, _, where = message.partition(" - at `$")
            place = where.rstrip("`") if "[...]" not in where else ""  # msgspec's word for a key of a table
            self.add(at, f"`{shown(at)}{place}` is {worded(value)}", what[0].lower() + what[1:].replace("`", ""))

    def _unknown(self, at: Key, key: str, names: Iterable[str]) -> None:
        hint = _near(key, names) or f"there is: {', '.join(sorted(names))}"
        self.add((*at, key), f"unknown key `{shown((*at, key))}`", hint)

    def _where(self, at: Key) -> str:
        line = line_of(self._text, at)
        return f"{self._file}:{line}" if line else self._file or "config"


def shown(at: Key) -> str:
    """``source[1].address``: entries of an array counted from 0, as in the error messages of other tools."""
    text = ""
    for part in at:
        name = part if isinstance(part, int) or _BARE.match(part) else worded(part)
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text


def worded(value: Any) -> str:
    """A value in a line of its own, short, an address without its password."""
    text = repr(value) if not isinstance(value, str) else repr(without_password(value))
    text = without_password(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def line_of(text: str, at: Key) -> int:
    """The line, from 1, on which a key or its table stands in a TOML text; 0 where it is not found."""
    names = [part for part in at if isinstance(part, str)]
    index = next((part for part in at if isinstance(part, int)), 0)
    header: list[str] = []
    seen: dict[str, int] = {}
    best = 0
    for number, line in enumerate(text.splitlines(), 1):
        if found := _HEADER.match(line):
            header = [part.strip().strip("\"'") for part in found[2].split(".")]
            if found[1] == "[[":
                seen[found[2]] = seen.get(found[2], -1) + 1
            entry = seen.get(header[0], 0)
            if names[: len(header)] == header and entry == index:
                best = number
            continue
        inside = names[: len(header)] == header and seen.get(header[0] if header else "", 0) == index
        key = re.match(r"""^\s*["']?([\w\-]+)["']?\s*[=.]""", line)
        if inside and key and len(names) > len(header) and key[1] == names[len(header)]:
            return number
    if not best and index:  # entries of an array in one line, or in lines of its own
        return line_of(text, tuple(names[:1]))
    return best


def _near(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(names), 1)
    return f"did you mean `{near[0]}`?" if near else ""


def _plain(hint: Any) -> Any:
    """Without Annotated and ``| None``."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        return _plain(inner[0]) if len(inner) == 1 else hint
    return hint


def _tables_in(hint: Any) -> tuple[type[Any] | None, bool]:
    """The struct that a value becomes, and whether there may be several."""
    hint = _plain(hint)
    many = get_origin(hint) is tuple
    kind = _plain(get_args(hint)[0]) if many and get_args(hint) else hint
    return (kind, many) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else (None, many)


def _choices(hint: Any) -> list[str]:
    hint = _plain(hint)
    return [str(each) for each in get_args(hint)] if get_origin(hint) is Literal else []
