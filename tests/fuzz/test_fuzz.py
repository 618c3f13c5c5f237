"""Every fuzz target on its corpus and on a few hundred mutations; `python -m tests.fuzz` goes on where this ends."""

from __future__ import annotations

import io
import os
import pickle
import random
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgekit import files
from edgekit.data import npz
from edgekit.data.watch import _recordings
from edgekit.errors import BundleError, DataError, EdgekitError
from edgekit.preprocess.text import TextPreprocessor
from edgekit.runtime.golden import parse_golden
from edgekit.runtime.onnx_wire import survey

from . import harness, targets
from .mutate import mutated

SECONDS = 0.35  # of mutations, for each target: the runner has time for more
assert targets  # it fills `TARGETS`


@pytest.mark.parametrize("name", harness.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_a_target_takes_its_corpus_and_mutations(name: str) -> None:
    one, rng, end = harness.TARGETS[name], random.Random(0), time.monotonic() + SECONDS
    corpus = harness.corpus_of(name)
    for data in corpus[:1] if one.programs else corpus:
        found = harness.run_one(one, data)
        assert found is None, f"{found}\n{found.trace}"
    for _ in range(0 if one.programs else 200):
        data = mutated(one.kind, rng, rng.choice(corpus), corpus, one.words)
        found = harness.run_one(one, data)
        assert found is None, f"{data!r}\n{found}\n{found.trace}"
        if time.monotonic() > end:
            break


def test_the_watch_sees_what_no_target_may_do(tmp_path: Path) -> None:
    """Else the targets could not fail."""
    acts = {
        "open": lambda: (tmp_path / "out").write_bytes(b"x"),
        "os.mkdir": lambda: (tmp_path / "folder").mkdir(),
        "os.symlink": lambda: (tmp_path / "link").symlink_to("x"),
        "subprocess.Popen": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "took longer": lambda: time.sleep(5),
        "KeyError": lambda: {}["a"],
        "without cause": lambda: (_ for _ in ()).throw(EdgekitError("what", "")),
        "pickle.find_class": lambda: pickle.loads(pickle.dumps(np.zeros(1))),  # noqa: S301  its own
    }
    for what, act in acts.items():
        one = harness.Target("act", lambda _, act=act: act(), list, "bytes", seconds=0.2)
        found = harness.run_one(one, b"")
        assert found is not None, what
        assert what.removeprefix("subprocess.Popen") in found.what, found


def test_a_bomb_of_an_npz_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "UNPACKED_BYTES", 1 << 20)  # a gigabyte of zeros takes long to pack
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 10, 128, 128)})
        member.write(header.getvalue())
        member.write(bytes(16 << 20))
    with pytest.raises(DataError, match="unpack to"):
        npz.load(str(path))
    with pytest.raises(BundleError, match="unpack to"):
        parse_golden(path.read_bytes())


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"words")
        archive.writestr("labels", b"words")
    with pytest.raises(DataError, match="is no array"):
        npz.load(str(path))
    with pytest.raises(BundleError, match="is no array"):
        parse_golden(path.read_bytes())


def test_a_text_that_is_none_is_refused(tmp_path: Path) -> None:
    path, names = tmp_path / "a.npz", np.array([0x61, 0x7FFFFFFF], "<u4").view("<U1")
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2), classes=names)
    with pytest.raises(DataError, match="texts that are none"):
        npz.load(str(path))


def test_a_number_without_an_end_costs_no_time() -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match="no protobuf"):
        survey(b"location" + b"\xff" * (4 << 20))
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    "steps",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # kept in place 2^31 of the list of kept things: 16 GiB
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02P1\n.",
        b"]" + b"2(lp0\n" * 40 + b".",
    ],
)
def test_a_pickle_that_does_more_than_hold_data_is_refused(tmp_path: Path, steps: bytes) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = tmp_path / "w.npy"
    path.write_bytes(header.getvalue() + steps)
    with pytest.raises(DataError):
        _recordings(path)


def test_a_tokenizer_without_a_token_for_a_text_says_so() -> None:
    from edgekit.manifest import TextPreprocessing

    data = next(each for each in harness.TARGETS["tokenizer"].seeds() if b"Unigram" in each)
    with pytest.raises(BundleError, match="cannot take this text"):
        TextPreprocessor(TextPreprocessing(16), data)("Ω")


def test_an_error_is_one_line_whatever_it_names() -> None:
    error = EdgekitError("a\nb\x1b[31m\u2028\u202e", "c\rd")
    assert error.message == "a b\\x1b[31m\\u2028\\u202e"
    assert error.hint == "c d"
