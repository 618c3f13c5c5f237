"""``csv:``: texts and series come back as they were written; whatever is wrong with a file is named with its line."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.data import Dataset
from edgekit.data.csv_file import load
from edgekit.errors import DataError
from edgekit.manifest import SeriesPreprocessing, TextPreprocessing

Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: str | bytes) -> str:
        path = tmp_path / "data.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return put


def texts(count: int = 10, header: str = "text,label", separator: str = ",") -> str:
    rows = [f"{'good' if i % 2 else 'bad'} thing {i}{separator}{'pos' if i % 2 else 'neg'}" for i in range(count)]
    return "\n".join([header.replace(",", separator), *rows]) + "\n"


def series(ids: int = 10, steps: int = 3, extra: Callable[[int, int], str] = lambda i, t: "", header: str = "") -> str:
    """Long form; id i has ``steps`` + i rows, the channels x = i + t and y = -t."""
    rows = [f"s{i},{'ab'[i % 2]},{i + t},{-t}{extra(i, t)}" for i in range(ids) for t in range(steps + i)]
    return "\n".join([f"series,label,x,y{header}", *rows]) + "\n"


def contents(dataset: Dataset) -> tuple[set[bytes], set[bytes]]:
    """What is in train and in test."""
    found = [{np.asarray(part.read(i)).tobytes() for i in range(len(part))} for part in (dataset.train, dataset.test)]
    return found[0], found[1]


# texts


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_texts(write: Write, separator: str, start: str) -> None:
    dataset = load(write(start + texts(separator=separator)))
    assert (dataset.labels, dataset.task, dataset.augmentation) == (("neg", "pos"), "text-classification", "text")
    assert dataset.preprocessing == TextPreprocessing(128)
    assert (len(dataset.train), len(dataset.test), len(dataset.all)) == (8, 2, 10)
    assert [dataset.all.read(i) for i in (0, 9)] == ["bad thing 0", "good thing 9"]
    assert dataset.all.ids[0] == "data.csv/2"
    assert dataset.all.targets.tolist() == [0, 1] * 5


def test_columns_come_in_any_order_and_others_are_ignored(write: Write) -> None:
    dataset = load(write("id, Label ,note,TEXT\n" + "".join(f"{i},{i % 2},x,{'ab'[i % 2]} {i}\n" for i in range(10))))
    assert dataset.labels == ("0", "1")
    assert dataset.all.read(3) == "b 3"


def test_equal_texts_never_straddle_the_split(write: Write) -> None:
    rows = "".join(f"Word  {i // 3}{' ' * (i % 3)},{'ab'[i // 3 % 2]}\n" for i in range(60))
    dataset = load(write("text,label\n" + rows.replace("Word  1", "word 1")))
    sides = [{" ".join(part.read(i).lower().split()) for i in range(len(part))} for part in (dataset.train, dataset.test)]
    assert not sides[0] & sides[1]
    assert len(dataset.test) == 12


def test_the_file_may_say_the_split_and_duplicates_leave_train(write: Write) -> None:
    rows = "one,a,train\ntwo,b,train\nTHREE,a,train\nfour,a,val\nthree,b,Test\nfive,b,train\n"
    dataset = load(write("text,label,split\n" + rows))
    assert [dataset.train.read(i) for i in range(3)] == ["one", "two", "five"]
    assert [dataset.test.read(i) for i in range(2)] == ["four", "three"]
    assert dataset.all.ids == dataset.test.ids


NO_SURROGATES = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")  # csv reads no NUL before Python 3.11
TEXTS = st.lists(st.text(NO_SURROGATES, min_size=1, max_size=40).filter(str.strip), min_size=8, max_size=20)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.sampled_from(",;\t"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from(["\n", "\r\n"]))
def test_any_text_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, written: list[str], separator: str, quoting: int, end: str
) -> None:
    stream = io.StringIO(newline="")
    out = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)
    # Before Python 3.13 the writer leaves a lone \r of the text unquoted where it does not end lines: a fault of the file.
    safe = [text if quoting == csv.QUOTE_ALL else text.replace("\r", "") or "x" for text in written]
    safe = [text if text.strip() else "x" for text in safe] + [f"so that a test is left {i}" for i in range(8)]
    out.writerows([["text", "label"], *([text, "ab"[i % 2]] for i, text in enumerate(safe))])
    path = tmp_path_factory.mktemp("texts") / "data.csv"
    path.write_bytes(stream.getvalue().encode())
    dataset = load(str(path))
    assert [dataset.all.read(i) for i in range(len(dataset.all))] == safe
    assert [dataset.labels[t] for t in dataset.all.targets] == ["ab"[i % 2] for i in range(len(safe))]


def test_a_text_longer_than_pythons_field_limit_is_read(write: Write) -> None:
    before = csv.field_size_limit()
    dataset = load(write(texts() + f"{'x' * (before + 1)},pos\n"))
    assert len(dataset.all.read(10)) == before + 1
    assert csv.field_size_limit() == before


# series


def test_series(write: Write) -> None:
    dataset = load(write(series()))
    assert (dataset.labels, dataset.task, dataset.augmentation) == (("a", "b"), "series-classification", "series")
    assert (len(dataset.train), len(dataset.test), len(dataset.all)) == (8, 2, 10)
    one = dataset.all.read(4)
    assert one.dtype == np.float32
    assert one.tolist() == [[4 + t, -t] for t in range(7)]
    assert dataset.all.ids[4] == "data.csv/s4"
    spec = dataset.preprocessing
    assert isinstance(spec, SeriesPreprocessing)
    assert (spec.length, spec.channels) == (16, 2)  # 12 steps
    steps = np.concatenate([dataset.train.read(i) for i in range(8)])
    assert np.allclose(spec.mean, steps.mean(0))
    assert np.allclose(spec.std, steps.std(0))


def test_rows_are_sorted_by_time_and_need_not_lie_together(write: Write) -> None:
    rows = [f"{i},{t},{'ab'[i % 2]},{10 * i + t}" for t in (2, -1.5, 10) for i in range(10)]
    dataset = load(write("id,time,label,x\n" + "\n".join(rows)))
    assert dataset.all.read(3).ravel().tolist() == [28.5, 32, 40]


def test_a_channel_that_stands_still_and_a_long_series(write: Write) -> None:
    rows = [f"{i},{'ab'[i % 2]},7,{t % (i + 2)}" for i in range(6) for t in range(5000 if i == 3 else 3)]
    spec = load(write("series,label,still,x\n" + "\n".join(rows))).preprocessing
    assert isinstance(spec, SeriesPreprocessing)
    assert spec.length == 4096
    assert (spec.mean[0], spec.std[0]) == (7, 1)


def test_equal_texts_of_two_people_do_not_straddle_a_validation_split(write: Write) -> None:
    rows = "".join(f"{'ab'[i % 2]},p{i // 10},text {i % 20}\n" for i in range(100))
    train = load(write("label,group,text\n" + rows)).train
    for seed in range(3):
        rest, part = train.part(0.2, seed)
        assert len(part)
        assert not set(rest.contents) & set(part.contents)
        assert not set(rest.groups) & set(part.groups)


def test_a_copy_under_another_name_is_the_same_data(write: Write, tmp_path: Path) -> None:
    path = Path(write(texts(20)))
    copy = tmp_path / "copy.csv"
    copy.write_bytes(path.read_bytes())
    assert load(str(copy)).digest == load(str(path)).digest


@pytest.mark.parametrize("people", [3, 4, 10])
def test_groups_never_straddle_the_split(write: Write, people: int) -> None:
    """Also where each group is above the share that is held out."""
    dataset = load(write(series(40, extra=lambda i, t: f",p{i // 2 % people}", header=",group")))
    assert set(dataset.train.groups) | set(dataset.test.groups) == {f"p{i}" for i in range(people)}
    assert not set(dataset.train.groups) & set(dataset.test.groups)
    assert set(dataset.train.targets) == {0, 1}
    assert 0 < len(dataset.test) < len(dataset.train)


def test_equal_series_leave_train(write: Write) -> None:
    rows = series(6, extra=lambda i, t: ",test" if i < 2 else ",train", header=",split")
    rows += "".join(f"copy,a,{t},{-t},train\n" for t in range(3))
    dataset = load(write(rows))
    train, test = contents(dataset)
    assert not train & test
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


# what is wrong with a file

TEXT_HEAD, SERIES_HEAD = texts(), series()
BROKEN = {
    "empty": ("", 1, "empty"),
    "blank": ("\n \n", 1, "empty"),
    "byte order mark only": ("\ufeff", 1, "empty"),
    "header only": ("text,label\n", 1, "nothing below"),
    "latin-1": (TEXT_HEAD.encode() + "café,pos\n".encode("latin-1"), 12, "not UTF-8"),
    "utf-16": (TEXT_HEAD.encode("utf-16"), 1, "not UTF-8"),
    "no header": (TEXT_HEAD.split("\n", 1)[1], 1, "the header is"),
    "no label": ("text,class\na,b\n", 1, "the header is"),
    "no text": ("words,label\na,b\n", 1, "the header is"),
    "two of a name": ("text,label,Text\na,b,c\n", 1, "one name"),
    "short row": (TEXT_HEAD + "alone\n", 12, "1 cells"),
    "long row": (TEXT_HEAD + "well, then,pos\n", 12, "3 cells"),
    "row after a line break in quotes": ('text,label\n"a\nb",x\nc\n', 4, "1 cells"),
    "open quote": (TEXT_HEAD + '"never closed,pos\nnext,neg\n', 12, "begins here"),
    "stray quote": (TEXT_HEAD + '"a" b,pos\n', 12, "begins here"),
    "empty text": (TEXT_HEAD + '" ",pos\n', 12, "text is empty"),
    "empty label": (TEXT_HEAD + "a,\n", 12, "label is empty"),
    "one class": (texts().replace("neg", "pos"), 11, "every label"),
    "too few": ("text,label\na,x\nb,y\n", 3, "held out"),
    "unknown split": ("text,label,split\na,x,train\nb,y,dev\n", 3, "split is 'dev'"),
    "no test split": ("text,label,split\na,x,train\nb,y,train\n", 3, "held out"),
    "no train split": ("text,label,split\na,x,test\nb,y,val\n", 3, "train on"),
    "class in test only": ("text,label,split\na,x,train\nb,y,train\nc,z,test\n", 4, "not in train"),
    "no channels": ("series,label\n1,a\n", 1, "0 channels"),
    "too many channels": ("series,label," + ",".join(f"c{i}" for i in range(1025)) + "\n", 1, "nothing below"),
    "word": (SERIES_HEAD + "z,a,1,high\n", 77, "y is 'high'"),
    "nan": (SERIES_HEAD + "z,a,nan,1\n", 77, "x is 'nan'"),
    "infinite": (SERIES_HEAD + "z,a,1,1e39\n", 77, "y is '1e39'"),
    "decimal comma": (SERIES_HEAD.replace(",", ";") + "z;a;1,5;1\n", 77, "x is '1,5'"),
    "underscore": (SERIES_HEAD + "z,a,1_0,1\n", 77, "x is '1_0'"),
    "missing": (SERIES_HEAD + "z,a,,1\n", 77, "x is ''"),
    "no id": (SERIES_HEAD + ",a,1,1\n", 77, "series is empty"),
    "two labels": (SERIES_HEAD + "s0,b,1,1\n", 77, "label is 'b'"),
    "time in words": ("id,time,label,x\n1,noon,a,1\n", 2, "time is 'noon'"),
    "two groups": ("id,group,label,x\n1,p,a,1\n1,q,a,2\n", 3, "group is 'q'"),
    "two splits": ("id,split,label,x\n1,test,a,1\n1,train,a,2\n", 3, "split is 'train'"),
    "group in two splits": ("id,group,split,label,x\n1,p,test,a,1\n2,p,train,b,2\n", 3, "the group 'p'"),
    "one group": (series(extra=lambda i, t: ",p", header=",group"), 76, "held out"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line_and_a_cure(write: Write, name: str) -> None:
    content, line, words = BROKEN[name]
    with pytest.raises(DataError) as caught:
        load(write(content))
    assert caught.value.message.startswith(f"data.csv, line {line}:")
    assert words in caught.value.message
    assert caught.value.hint


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv", "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            load(str(path))


WORDS = "text label series id time group split x -2.5 nan train test"
LINES = ["text,label\n", "series,label,x\n", "1,a,2\n", "2,b,3\n", "w,a\n"]
PIECES = st.sampled_from([*',;\t\n\r"\x00\ufeff\u2028 é1ab', *WORDS.split(), *LINES])


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=40).map(lambda pieces: "".join(pieces).encode()), st.binary(max_size=60)))
def test_no_file_gives_anything_but_a_data_set_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "data.csv"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert len(load(str(path)).test)


@settings(max_examples=100, deadline=None)
@given(
    st.booleans(), st.integers(0, 400), st.sampled_from(["", ",", '"', "\n", "\r", "\0", "x", "1e999", "\xff", "_", ";", "-"])
)
def test_a_damaged_file_gives_a_data_set_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, words: bool, place: int, damage: str
) -> None:
    whole = (TEXT_HEAD if words else SERIES_HEAD).encode()
    path = tmp_path_factory.mktemp("damaged") / "data.csv"
    path.write_bytes(whole[:place] + damage.encode("latin-1") + whole[place + 1 :])
    with contextlib.suppress(DataError):
        assert len(load(str(path)).test)
