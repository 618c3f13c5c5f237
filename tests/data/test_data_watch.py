"""The watch data set: windows, people kept apart, and a pickle that is read without running anything in it."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.data import Dataset
from edgekit.data.watch import HELD_OUT, load
from edgekit.errors import DataError, MissingExtra
from edgekit.manifest import SeriesPreprocessing

NAMES = ["PEN", "ABD", "FEL"]


def recordings(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Like seglearn's: 10 people, 3 exercises, 150 to 260 samples each, float64 as numpy stores transposed data."""
    r = np.random.default_rng(seed)
    pairs = [(person, kind) for person in range(1, 11) for kind in range(3)]
    data = {
        "X": [np.asfortranarray(r.normal(kind, 2, (150 + 10 * person + kind, 6))) for person, kind in pairs],
        "y": np.array([kind for _, kind in pairs]),
        "subject": np.array([person for person, _ in pairs]),
        "side": np.zeros(len(pairs)),
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": NAMES,
    }
    return {**data, **changes}


def write(path: Path, content: object, protocol: int = 2) -> Path:
    """``content`` in a .npy file as numpy lays one out."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    pickled = content if isinstance(content, bytes) else pickle.dumps(np.array(content, dtype=object), protocol)
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_windows_hold_what_the_recordings_hold(tmp_path: Path, protocol: int) -> None:
    data = recordings()
    dataset = load(str(write(tmp_path / "watch.npy", data, protocol)))
    assert len(dataset.all) == sum(1 + (len(x) - 100) // 50 for x in data["X"])
    for i in (0, 1, len(dataset.all) - 1):
        _, recording, start = dataset.all.ids[i].split("/")
        window = dataset.all.read(i)
        assert window.dtype == np.float32
        assert np.array_equal(window, data["X"][int(recording)][int(start) : int(start) + 100].astype(np.float32))
        assert dataset.all.targets[i] == data["y"][int(recording)]
        assert dataset.all.groups[i] == data["subject"][int(recording)]
    assert dataset.labels == tuple(NAMES)


def test_numpys_own_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "watch.npy"
    np.save(path, np.array(recordings(), dtype=object), allow_pickle=True)
    assert load(str(path)).digest == load(str(write(tmp_path / "other.npy", recordings()))).digest


def check_split(dataset: Dataset) -> None:
    """Nobody is on both sides, and the figures of normalisation are those of the training people."""
    assert set(dataset.test.groups) == HELD_OUT
    assert set(dataset.train.groups) == {1, 2, 3, 4, 5}
    assert len(dataset.train) + len(dataset.test) == len(dataset.all)
    assert set(dataset.train.targets) == set(dataset.test.targets) == set(range(len(dataset.labels)))
    assert (dataset.task, dataset.augmentation) == ("series-classification", "series")
    spec = dataset.preprocessing
    assert isinstance(spec, SeriesPreprocessing)
    assert (spec.length, spec.channels) == (100, 6)
    x = dataset.train.take(range(0, len(dataset.train), 5))
    mean = np.mean([x.read(i).mean(0) for i in range(len(x))], 0)
    assert np.allclose(mean, spec.mean, atol=0.2 * np.array(spec.std))


def test_people_never_straddle_the_split(tmp_path: Path) -> None:
    dataset = load(str(write(tmp_path / "watch.npy", recordings())))
    check_split(dataset)
    assert dataset.spec == f"watch:{tmp_path / 'watch.npy'}"


def test_normalisation_does_not_look_at_held_out_people(tmp_path: Path) -> None:
    data = recordings()
    wild = [x * 1000 if person in HELD_OUT else x for x, person in zip(data["X"], data["subject"], strict=True)]
    one, two = (load(str(write(tmp_path / f"{i}.npy", d))) for i, d in enumerate((data, {**data, "X": wild})))
    assert one.preprocessing == two.preprocessing
    assert one.digest != two.digest


def test_without_seglearn_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        load("")
    assert (caught.value.extra, caught.value.module) == ("watch", "seglearn")


def test_the_real_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of different days compare only if this never changes; and seglearn itself is not imported."""
    try:
        dataset = load("")
    except MissingExtra:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("seglearn is not installed: pip install 'edgekit[watch]'")
    check_split(dataset)
    assert "seglearn" not in sys.modules
    assert dataset.labels == ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
    assert (len(dataset.train), len(dataset.test), len(dataset.all)) == (2191, 2486, 4677)
    assert dataset.digest == "71bc2e61abe2fe8fb6dfb5de069bf610b24a31185b4d0bdd497ec9e3133cbdb2"


# hostile and broken files


class Call:
    """Pickles as a call of ``what`` with ``arguments``."""

    def __init__(self, what: Callable[..., Any], *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.what, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("what", [os.mkdir, exec, eval, getattr, np.load, np.zeros], ids=lambda what: what.__name__)
def test_a_pickle_that_calls_something_is_refused_and_runs_nothing(
    tmp_path: Path, what: Callable[..., Any], protocol: int
) -> None:
    mark = tmp_path / "mark"
    argument = str(mark) if what is os.mkdir else f"__import__('os').mkdir({str(mark)!r})"
    for content in (Call(what, argument), recordings(X=[Call(what, argument)])):
        path = write(tmp_path / "bad.npy", pickle.dumps(content, protocol))
        with pytest.raises(DataError, match=r"asks to run|reads no data"):
            load(str(path))
    assert not mark.exists()


def test_the_stand_ins_cannot_be_turned_against_the_reader(tmp_path: Path) -> None:
    """A dtype whose state says that raw bytes are objects would crash numpy; a written method would change the next load."""
    record = np.dtype([("a", object)])
    evil = b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\ntN I8\nI1\nI0\ntb."
    fields = evil.replace(b"V8", b"O8")
    codec = b"c_codecs\nencode\n(Vx\nVhex\ntR."
    write_method = b"c_codecs\nencode\n(N}S'__code__'\nI1\nstb."
    write_defaults = b"cnumpy.core.multiarray\n_reconstruct\n(N}S'__defaults__'\n(I1\nI2\ntstb."
    write_dict = b"cnumpy.core.multiarray\n_reconstruct\n}S'seen'\nI1\nsb."
    persistent = b"Psomewhere\n."
    for content in (
        evil,
        fields,
        codec,
        write_method,
        write_defaults,
        write_dict,
        persistent,
        pickle.dumps(np.zeros(3, record), 2),
    ):
        with pytest.raises(DataError):
            load(str(write(tmp_path / "bad.npy", content)))
    load(str(write(tmp_path / "good.npy", recordings())))


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        recordings(y_labels=["PEN"]),
        recordings(y_labels=["PEN", "PEN", "FEL"]),
        recordings(X=[np.zeros((200, 5))] * 30),
        recordings(X=[np.full((200, 6), np.nan)] * 30),
        recordings(X=[np.zeros((20, 6))] * 30),
        recordings(X=3),
        recordings(subject=np.ones(30, np.int64)),
        recordings(subject=np.ones(3, np.int64)),
        recordings(y=np.array(["a"] * 30)),
    ],
    ids=range(11),
)
def test_other_data_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(DataError) as caught:
        load(str(write(tmp_path / "bad.npy", content)))
    assert "watch_dataset.npy" in caught.value.hint


def test_what_is_no_npy_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    with pytest.raises(DataError):
        load(str(path))
    with pytest.raises(DataError):
        load(str(tmp_path))
    np.save(path, np.zeros(3))
    with pytest.raises(DataError):
        load(str(path))


WHOLE = pickle.dumps(np.array(recordings(), dtype=object), 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_data_errors_only(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "watch.npy"
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 800))] = data.draw(st.integers(0, 255))
    write(path, bytes(content[: data.draw(st.sampled_from([len(content), 5000, 300, 100]))]))
    with contextlib.suppress(DataError):
        load(str(path))
