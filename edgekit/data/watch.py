"""``watch``: shoulder exercises felt by a smartwatch, the data set of the PyPI package seglearn, five of ten people held out.

140 recordings of 10 people, 7 exercises, both arms: 50 Hz of acceleration (ax, ay, az) and rotation (wx, wy, wz). Burns et
al., "Shoulder physiotherapy exercise recognition: machine learning the inertial signals from a smartwatch",
https://arxiv.org/abs/1802.01489; BSD-3-Clause. The file is not part of edgekit: seglearn brings it, or its path is given.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, MissingExtra
from edgekit.files import printable

from .dataset import Dataset, Split, digest_of, normalised

__all__ = ["HELD_OUT", "LENGTH", "STEP", "load"]

LENGTH = 100  # samples a window: 2 s
STEP = 50
#: Whoever has these numbers is never trained on: the last five, settled before anything was measured.
HELD_OUT = frozenset({6, 7, 8, 9, 10})
CHANNELS = 6
MAX_BYTES = 256 << 20
_HINT = "watch:PATH wants seglearn/data/watch_dataset.npy of seglearn 1.2.5"
#: Steps of a pickle (pickletools.opcodes) that build numbers, texts, lists, dicts and arrays.
_STEPS = frozenset(
    """PROTO STOP FRAME MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE
    SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES EMPTY_LIST EMPTY_TUPLE EMPTY_DICT APPEND APPENDS TUPLE TUPLE1 TUPLE2
    TUPLE3 SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET""".split()  # noqa: SIM905
)
_PLACES = frozenset(("BINPUT", "LONG_BINPUT"))
_MOST_STEPS = 1 << 20
_HEADER = b"\x93NUMPY"


def load(path: str = "") -> Dataset:
    """Samples are windows, float32 (100, 6), every 50 samples of each recording, in train and test alike; their groups are
    people. Top-1 is a share of windows. What a recording has left behind its last whole window is not used.

    ``path``: the file; "" for the one that the installed package seglearn brings, which is not imported. The file is a
    pickle, but nothing in it is run: see `_Reader`. Raises `MissingExtra` without seglearn, `DataError` for another file.
    """
    file = Path(path) if path else _installed()
    recordings = _recordings(file)
    labels = recordings.names
    spans = [(i, start) for i, x in enumerate(recordings.x) for start in range(0, len(x) - LENGTH + 1, STEP)]
    people = recordings.people

    def read(index: int) -> NDArray[np.float32]:
        i, start = spans[index]
        return recordings.x[i][start : start + LENGTH]

    every = Split(
        ids=tuple(f"watch/{i:03d}/{start:04d}" for i, start in spans),
        targets=np.array([recordings.targets[i] for i, _ in spans], np.int64),
        read=read,
        groups=tuple(people[i] for i, _ in spans),
    )
    train: list[int] = []
    test: list[int] = []
    for index, (i, _) in enumerate(spans):
        (test if people[i] in HELD_OUT else train).append(index)
    if not train or not test:
        raise DataError(f"{printable(file)} holds the people {sorted(set(people))}, wanted are 1 to 10", _HINT)
    return Dataset(
        spec=f"watch:{path}" if path else "watch",
        labels=labels,
        digest=digest_of([*labels, *map(str, people), *map(str, recordings.targets), *(x.tobytes() for x in recordings.x)]),
        train=every.take(train),
        test=every.take(test),
        all=every,
        preprocessing=normalised([x for x, person in zip(recordings.x, people, strict=True) if person not in HELD_OUT], LENGTH),
        augmentation="series",
        task="series-classification",
    )


def _installed() -> Path:
    """The file in the installed package. Looked up, not imported: seglearn does not load beside every scikit-learn."""
    spec = importlib.util.find_spec("seglearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "data" / "watch_dataset.npy"
        if file.is_file():
            return file
    raise MissingExtra("watch", "seglearn")


class _Recordings(NamedTuple):
    x: list[NDArray[np.float32]]
    targets: list[int]
    people: list[int]
    names: tuple[str, ...]


def _recordings(file: Path) -> _Recordings:
    data = _unpickled(file)
    try:
        names = tuple(data["y_labels"])
        x = [np.ascontiguousarray(series, np.float32) for series in data["X"] if isinstance(series, np.ndarray)]
        targets = [int(target) for target in data["y"]]
        people = [int(person) for person in data["subject"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{printable(file)} holds other data: {type(error).__name__} {error}", _HINT) from None
    fits = (
        all(isinstance(name, str) for name in names)
        and 0 < len(x) == len(targets) == len(people)
        and all(series.ndim == 2 and series.shape[1] == CHANNELS and bool(np.isfinite(series).all()) for series in x)
        and 2 <= len(set(names)) == len(names)
        and set(targets) == set(range(len(names)))
    )
    if not fits:
        raise DataError(f"{printable(file)}: its recordings, exercises and people do not fit each other", _HINT)
    return _Recordings(x, targets, people, names)


def _unpickled(file: Path) -> dict[Any, Any]:
    """The dict in the file, arrays and all. Raises `DataError` for all that is none."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{printable(file)} is larger than {MAX_BYTES >> 20} MiB", _HINT)
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(file)} cannot be read: {error.strerror}", _HINT) from None
    if data[:6] != _HEADER or len(data) < 10:
        raise DataError(f"{printable(file)} is no .npy file", _HINT)
    size = int.from_bytes(data[8:10], "little")  # format 1.0, as numpy writes all short headers
    try:
        _check_form(data[10 + size :])
        found = _Reader(io.BytesIO(data[10 + size :])).load()
        found = found.array().item() if isinstance(found, _Array) else None
        if isinstance(found, dict):
            return {key: _plain(value) for key, value in found.items()}
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  the unpickler raises anything on hostile bytes
        raise DataError(f"{printable(file)} cannot be read: {type(error).__name__} {error}", _HINT) from None
    raise DataError(f"{printable(file)} holds no dict", _HINT)


def _check_form(data: bytes) -> None:
    """Raise `DataError` for a pickle that holds more than such a data set needs, before one is read: a number may be kept in
    place 2^32 of an unpickler's list, which then takes all memory."""
    count = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        far = opcode.name in _PLACES and (argument is None or argument >= _MOST_STEPS)
        if count > _MOST_STEPS or opcode.name not in _STEPS or far:
            raise DataError(f"the file does what reads no data ({opcode.name}): it is not the data set", _HINT)


def _plain(value: object) -> object:
    """Arrays in place of their stand-ins, also in a list."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.array() if isinstance(value, _Array) else value


class _Reader(pickle.Unpickler):
    """Unpickles numbers, str, tuples, lists, dicts and numpy arrays, and nothing else.

    A pickle calls what it names. This one finds only the stand-ins below, whatever names it uses: not even numpy's own
    constructors, whose ``__setstate__`` trusts its arguments with raw memory. They are made anew each time and have no
    attributes, so nothing that a pickle writes to one is ever seen again.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
            ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): _MakeDtype(),
            ("_codecs", "encode"): _Encode(),
        }
        if (module, name) not in known:
            raise DataError(f"the file asks to run {module[:60]}.{name[:60]}: it is not the data set", _HINT)
        return known[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        raise DataError("the file points outside itself: it is not the data set", _HINT)


class _Reconstruct:
    """Stands in for numpy's function that makes an empty array, filled by its state."""

    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> _Array:
        return _Array()


class _MakeDtype:
    """Stands in for the constructor of numpy.dtype."""

    __slots__ = ()

    def __call__(self, code: object, align: object = False, copy: object = True) -> _Dtype:
        return _Dtype(code)


class _Encode:
    """Stands in for codecs.encode, by which protocol 2 writes bytes."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise DataError(f"the file holds bytes as {encoding!r}: it is not the data set", _HINT)
        return text.encode("latin1")


class _Dtype:
    """Stands in for numpy.dtype: the few plain types that a data set needs."""

    __slots__ = ("dtype",)

    def __init__(self, code: object) -> None:
        if code not in ("f4", "f8", "i4", "i8", "O8"):
            raise DataError(f"the file holds an array of {str(code)[:40]}: it is not the data set", _HINT)
        self.dtype = np.dtype(str(code) if code != "O8" else "O")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|") or any(part is not None for part in state[2:5]):
            raise DataError("the file holds an array of another byte order or of records: it is not the data set", _HINT)


class _Array:
    """Stands in for numpy.ndarray: keeps what the pickle says, and makes an array of it only by numpy's checked ways."""

    __slots__ = ("content", "dtype", "fortran", "shape")

    def __init__(self) -> None:
        self.content: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, self.fortran, self.content = state
        if not isinstance(dtype, _Dtype):
            raise DataError("the file holds an array of no type: it is not the data set", _HINT)
        self.dtype = dtype.dtype

    def array(self) -> NDArray[Any]:
        """Raises `ValueError`, `TypeError` or `AttributeError` where the parts do not make an array."""
        if self.dtype == object:
            out = np.empty(len(self.content), object)
            for i, value in enumerate(self.content):
                out[i] = value
            return out.reshape(self.shape)
        return np.frombuffer(self.content, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")
