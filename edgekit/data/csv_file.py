"""``csv:PATH``: texts, one a row, or series in long form, one time step a row; which of them, the header says.

Texts: the columns ``text`` and ``label``. Series: ``series`` (or ``id``), ``label``, and numeric channels, which are all
columns but these and ``time`` (a number to sort by), ``group`` (a person, a machine) and ``split``. Both may have ``split``
(``train``, ``val`` or ``test``); without it a fifth is held out. UTF-8; separated by commas, semicolons or tabs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.files import printable, read_file
from edgekit.manifest import Preprocessing, Task, TextPreprocessing

from .dataset import Dataset, Split, digest_of, normalised, one_group_out, stratified

__all__ = ["MAX_STEPS", "TEST_SHARE", "is_number", "load", "read_series"]

TEST_SHARE = 0.2
TOKENS = 128
#: Longer series are cut: a model over more steps than this wants a lower sampling rate.
MAX_STEPS = 4096
MAX_CHANNELS = 1024
_LARGEST = float(np.finfo(np.float32).max)
_FIELD_LIMIT = (1 << 31) - 1
_FIELD_LIMIT_LOCK = threading.Lock()  # the limit is the csv module's, not a reader's
_SPLITS = {"train": False, "val": True, "test": True}
_RESERVED = frozenset({"series", "id", "time", "label", "group", "split"})
_UNLABELLED = "series need a row a time step and a column a channel, named in the first row"
_SHAPES = "texts need the columns text,label; series need series,label and numeric channels"


class _Row(NamedTuple):
    line: int
    cells: list[str]


class _Table(NamedTuple):
    name: str
    columns: dict[str, int]
    rows: list[_Row]

    def cell(self, row: _Row, column: str) -> str:
        return row.cells[self.columns[column]]

    def filled(self, row: _Row, column: str) -> str:
        """The cell without spaces around it. Raises `DataError` where nothing is in it."""
        value = self.cell(row, column).strip()
        if not value:
            raise self.error(row.line, f"the {column} is empty", "fill it in, or remove the row")
        return value

    def held_out(self, row: _Row) -> bool:
        value = self.cell(row, "split").strip().lower()
        if value not in _SPLITS:
            raise self.error(row.line, f"the split is {value[:40]!r}", "write train, val or test")
        return _SPLITS[value]

    def error(self, line: int, message: str, hint: str) -> DataError:
        return DataError(f"{self.name}, line {line}: {message}", hint)


class _Samples(NamedTuple):
    """What both shapes come to. ``held_out`` is empty where the file does not say; ``people`` where it names no groups."""

    ids: list[str]
    labels: list[str]
    lines: list[int]
    contents: list[str]  # equal samples have equal digests
    people: list[str]
    held_out: list[bool]


def load(path: str) -> Dataset:
    """Texts are str; series are float32 (T, channels), T as long as each is.

    Equal texts (but for case and spaces), equal series and one ``group`` never straddle the split: where a ``split`` column
    puts equal samples on both sides, they leave train. Raises `DataError`, which names the line, for all that is no such file.
    """
    table = _read(path)
    if "text" in table.columns:
        texts, samples = _texts(table)
        return _dataset(path, table, samples, texts)
    series, samples = _series(table)
    return _dataset(path, table, samples, series)


def read_series(path: str) -> list[tuple[str, NDArray[np.float32]]]:
    """(name, float32 (T, channels)) of each series in a file, as `load` reads them but without labels, to ask a model about.

    A file of one series needs no column that names it, and one of numbers alone no header; the name is empty then. Raises
    `DataError`, which names the line, for all that is no such file.
    """
    table = _read(path, labelled=False)
    key = next((name for name in ("series", "id") if name in table.columns), None)
    channels = _channels(table)
    found = [(name, _values(table, rows, channels)) for name, rows in _members(table, key).items()]
    return found if len(found) > 1 else [("", found[0][1])]


def _dataset(path: str, table: _Table, samples: _Samples, values: Sequence[str] | Sequence[NDArray[np.float32]]) -> Dataset:
    labels = tuple(sorted(set(samples.labels)))
    if len(labels) < 2:
        raise DataError(
            f"{table.name}, line {table.rows[-1].line}: every label up to here is {labels[0][:40]!r}",
            "two or more classes are needed to tell them apart",
        )
    index = {label: i for i, label in enumerate(labels)}
    targets = np.array([index[label] for label in samples.labels], np.int64)
    every = Split(
        tuple(f"{table.name}/{name}" for name in samples.ids),
        targets,
        values.__getitem__,
        tuple(samples.people or samples.contents),
        tuple(samples.contents) if samples.people else (),
    )
    inside, outside = _sides(table, samples, targets)
    held_out = {samples.contents[i] for i in outside}
    inside = [i for i in inside if samples.contents[i] not in held_out]  # else they would be learnt by heart
    _check_sides(table, samples, inside, outside)
    preprocessing: Preprocessing = TextPreprocessing(TOKENS)
    task: Task = "text-classification"
    arrays = [value for value in values if not isinstance(value, str)]
    if arrays:
        length = min(MAX_STEPS, -(-max(map(len, arrays)) // 8) * 8)
        preprocessing, task = normalised([arrays[i] for i in inside], length), "series-classification"
    return Dataset(
        spec=f"csv:{path}",
        labels=labels,
        digest=digest_of([*labels, *samples.ids, targets.tobytes(), *samples.contents, *map(str, outside)]),
        train=every.take(inside),
        test=every.take(outside),
        all=every.take(outside) if samples.held_out else every,
        preprocessing=preprocessing,
        augmentation="series" if arrays else "text",
        task=task,
    )


def _sides(table: _Table, samples: _Samples, targets: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Indices of (train, held out), as the file says or, where it does not, by class and group."""
    if samples.held_out:
        if samples.people:
            _check_groups(table, samples)
        sides = samples.held_out
        return [i for i, out in enumerate(sides) if not out], [i for i, out in enumerate(sides) if out]
    groups = samples.people or samples.contents
    inside, outside = stratified(targets, groups, TEST_SHARE)
    if samples.people and not outside:
        return one_group_out(groups, targets)
    return inside, outside


def _check_groups(table: _Table, samples: _Samples) -> None:
    side: dict[str, bool] = {}
    for group, out, line in zip(samples.people, samples.held_out, samples.lines, strict=True):
        if side.setdefault(group, out) != out:
            raise table.error(line, f"the group {group[:40]!r} is in train and held out", "give all of it one split")


def _check_sides(table: _Table, samples: _Samples, inside: list[int], outside: list[int]) -> None:
    last = table.rows[-1].line
    if not outside:
        if samples.held_out:
            raise table.error(last, "up to here nothing is held out to test on", "mark rows test")
        message = f"up to here nothing can be held out: {len(set(samples.contents))} of {len(samples.ids)} samples differ"
        raise table.error(last, message, "give each class three different samples or more, and two groups or more")
    if not inside:
        raise table.error(last, "up to here nothing is left to train on", "mark rows train that are not test rows too")
    known = {samples.labels[i] for i in inside}
    for i in outside:
        if samples.labels[i] not in known:
            message = f"the class {samples.labels[i][:40]!r} is held out, but not in train"
            raise table.error(samples.lines[i], message, "add other samples of this class to train, or leave it out")


def _texts(table: _Table) -> tuple[list[str], _Samples]:
    texts: list[str] = []
    samples = _Samples([], [], [], [], [], [])
    for row in table.rows:
        table.filled(row, "text")
        text = table.cell(row, "text")
        texts.append(text)
        samples.ids.append(str(row.line))
        samples.labels.append(table.filled(row, "label"))
        samples.lines.append(row.line)
        samples.contents.append(_digest(" ".join(text.casefold().split()).encode()))
        if "group" in table.columns:
            samples.people.append(table.filled(row, "group"))
        if "split" in table.columns:
            samples.held_out.append(table.held_out(row))
    return texts, samples


def _series(table: _Table) -> tuple[list[NDArray[np.float32]], _Samples]:
    key = "series" if "series" in table.columns else "id"
    channels = _channels(table)
    series: list[NDArray[np.float32]] = []
    samples = _Samples([], [], [], [], [], [])
    for name, rows in _members(table, key).items():
        values = _values(table, rows, channels)
        series.append(values)
        samples.ids.append(name)
        samples.labels.append(_constant(table, rows, "label"))
        samples.lines.append(rows[0].line)
        samples.contents.append(_digest(values.tobytes()))
        if "group" in table.columns:
            samples.people.append(_constant(table, rows, "group"))
        if "split" in table.columns:
            _constant(table, rows, "split")
            samples.held_out.append(table.held_out(rows[0]))
    return series, samples


def _channels(table: _Table) -> list[str]:
    channels = [name for name in table.columns if name not in _RESERVED]
    if not 0 < len(channels) <= MAX_CHANNELS:
        message = f"{len(channels)} channels beside series, label and the like, 1 to {MAX_CHANNELS} are possible"
        raise table.error(1, message, "give each measured quantity a column of numbers")
    return channels


def _members(table: _Table, key: str | None) -> dict[str, list[_Row]]:
    """The rows of each series, in order of time where it is told; of the one series where no column names it."""
    members: dict[str, list[_Row]] = {}
    for row in table.rows:
        members.setdefault("" if key is None else table.filled(row, key), []).append(row)
    if "time" in table.columns:
        for rows in members.values():
            rows.sort(key=lambda row: _number(table, row, "time"))
    return members


def _values(table: _Table, rows: list[_Row], channels: list[str]) -> NDArray[np.float32]:
    return np.array([[_number(table, row, channel) for channel in channels] for row in rows], np.float32)


def _constant(table: _Table, rows: list[_Row], column: str) -> str:
    """What all rows of a series have in ``column``."""
    value = table.filled(rows[0], column)
    for row in rows:
        if (other := table.filled(row, column)) != value:
            message = f"the {column} is {other[:40]!r}, but {value[:40]!r} in line {rows[0].line}"
            raise table.error(row.line, message, f"one series has one {column}: give it another id, or mend the cell")
    return value


def _number(table: _Table, row: _Row, column: str) -> float:
    cell = table.cell(row, column)
    try:
        value = float(cell) if "_" not in cell else float("nan")  # Python's 1_000 is no number in a file
    except ValueError:
        value = float("nan")
    if not abs(value) <= _LARGEST:
        message = f"{column} is {cell[:40]!r}, not a finite number"
        raise table.error(row.line, message, "write numbers with a decimal point and no unit; drop or fill missing values")
    return value


def _read(path: str, *, labelled: bool = True) -> _Table:
    name = printable(Path(path).name)
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", error)
        raise DataError(f"{printable(path)} cannot be read: {reason}", "csv:PATH wants a file; mind the path") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}, line {line}: not UTF-8", "save it as UTF-8 (in a spreadsheet: CSV UTF-8)") from None
    if not text.strip():
        raise DataError(f"{name}, line 1: the file is empty", _SHAPES if labelled else _UNLABELLED)
    rows = _rows(name, text, _delimiter(text))
    header = next(rows, _Row(1, []))
    if labelled or not _is_bare(name, header):
        columns = _columns(name, header.cells, header.line, labelled)
    else:
        columns, rows = {f"channel {i}": i for i in range(len(header.cells))}, itertools.chain([header], rows)
    table = _Table(name, columns, [])
    for row in rows:
        if len(row.cells) != len(columns):
            message = f"{len(row.cells)} cells, but the header has {len(columns)}"
            raise table.error(row.line, message, 'put "..." around cells that hold the separator or a line break')
        table.rows.append(row)
    if not table.rows:
        raise table.error(1, "a header and nothing below it", "add rows")
    return table


def _delimiter(text: str) -> str:
    """Of comma, semicolon and tab the one that makes a header of the first line; else the one that is there most often."""
    first = text.lstrip("\r\n").splitlines()[0]
    for delimiter in ",;\t":
        names = {cell.strip().strip('"').strip().lower() for cell in first.split(delimiter)}
        if "label" in names and names & {"text", "series", "id"}:
            return delimiter
    return max(",;\t", key=first.count)


def _rows(name: str, text: str, delimiter: str) -> Iterator[_Row]:
    """Rows with the line that each begins in, blank lines left out. Raises `DataError` where the quoting is broken."""
    with _FIELD_LIMIT_LOCK:
        before = csv.field_size_limit(_FIELD_LIMIT)
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            found = []
            line = 1
            try:
                for cells in reader:
                    if cells:
                        found.append(_Row(line, cells))
                    line = reader.line_num + 1
            except csv.Error as error:
                message = f"{name}, line {line}: the row that begins here is broken: {error}"
                raise DataError(message, 'put "..." around cells with quotes in them, and double those: ""') from None
        finally:
            csv.field_size_limit(before)
    return iter(found)


def _is_bare(name: str, first: _Row) -> bool:
    """Whether numbers begin in the first row. Raises `DataError` where it counts the columns, as pandas names those without
    a name: it may be a header or a time step."""
    if len(first.cells) > 1 and [cell.strip() for cell in first.cells] == [str(i) for i in range(len(first.cells))]:
        message = f"{name}, line {first.line}: {','.join(first.cells)[:40]!r} may be a header or the first time step"
        raise DataError(message, "name the channels in the first row (pandas: columns=), or write 0.0 for 0")
    return all(map(is_number, first.cells))


def is_number(cell: str) -> bool:
    """Whether a cell holds a number, also a NaN or an infinity."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _columns(name: str, cells: list[str], line: int, labelled: bool = True) -> dict[str, int]:
    """Lowercase column name -> its place."""
    names = [cell.strip().lower() for cell in cells]
    columns = {column: i for i, column in enumerate(names)}
    shown = ", ".join(names)[:80]
    if labelled and ("label" not in columns or not columns.keys() & {"text", "series", "id"}):
        raise DataError(f"{name}, line {line}: the header is {shown!r}", _SHAPES)
    if len(columns) != len(names):
        raise DataError(f"{name}, line {line}: two columns of the header {shown!r} have one name", "rename or remove one")
    return columns


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
