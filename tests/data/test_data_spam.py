"""The built-in spam: fixed for good, no mailing on both sides, nothing in the texts that gives the class away by itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgekit.data import Dataset
from edgekit.data.dataset import digest_of
from edgekit.data.spam import load
from edgekit.data.spam.make import Mail, distinct, folded, groups_of, read
from edgekit.manifest import TextPreprocessing


@pytest.fixture(scope="module")
def spam() -> Dataset:
    return load("")


def test_the_mails_and_their_split_are_fixed(spam: Dataset) -> None:
    """Figures of different days compare only if this never changes: the digests are those of the first release."""
    assert (len(spam.train), len(spam.test), len(spam.all)) == (4608, 1151, 5759)
    assert np.bincount(spam.train.targets).tolist() == [3266, 1342]
    assert np.bincount(spam.test.targets).tolist() == [816, 335]
    assert spam.digest == "d6fd1bdc40b7a74b4b6d6d941b1e497ea6d4d48e6a155aa56bdf2f8944c9acc0"
    assert digest_of(spam.test.ids) == "f8f14bbfe389a8b6ee289f7b5e73dc9ae5431c04129b9ae7b3eafb0055d31208"


def test_what_it_is(spam: Dataset) -> None:
    assert (spam.spec, spam.labels, spam.task, spam.augmentation) == ("spam", ("ham", "spam"), "text-classification", "text")
    assert spam.preprocessing == TextPreprocessing(length=192)
    for i in range(0, len(spam.all), 7):
        subject, _, body = spam.all.read(i).partition("\n")
        assert len(subject) <= 150
        assert len(body) <= 400
        assert body.isprintable()


def test_no_group_and_no_start_straddles_the_split(spam: Dataset) -> None:
    assert not set(spam.train.groups) & set(spam.test.groups)
    sides = [[folded(part.read(i)) for i in range(len(part))] for part in (spam.train, spam.test)]
    assert len({text for side in sides for text in side}) == len(spam.all)
    assert not {text[:200] for text in sides[0]} & {text[:200] for text in sides[1]}


def test_addresses_and_the_way_of_the_mail_are_gone(spam: Dataset) -> None:
    traces = re.compile(r"\w(?:@|%40)\w+\.\w|DeathToSpam|\[ILUG\]|\[Razor-users\]|mailman/listinfo")
    assert not [text for text in map(spam.all.read, range(len(spam.all))) if traces.search(text)]


@pytest.mark.parametrize("evidence", [r"https?://\w", r"<(?:a|br|body|font|html|p|table)\b"])
def test_urls_and_markup_are_there_and_in_both_classes(spam: Dataset, evidence: str) -> None:
    found = Counter(t for i, t in enumerate(spam.all.targets.tolist()) if re.search(evidence, spam.all.read(i), re.I))
    assert min(found[0], found[1]) > 100  # not a mark of one class


# make.py


def mail(tmp_path: Path, text: str, group: str = "spam-1") -> Mail | None:
    path = tmp_path / "mail.json"
    path.write_text(json.dumps({"id": "00001", "group": group, "text": text}), "utf-8")
    return read(path)


def test_a_mail_becomes_what_a_filter_sees(tmp_path: Path) -> None:
    text = (
        "Subject: =?iso-8859-1?Q?Re:_[ILUG]_caf=E9?=\nContent-Type: text/html; charset=iso-8859-1\n"
        "Content-Transfer-Encoding: quoted-printable\n\n<head><title>no</title><style>p {}</style></head><p>Gr=FC=\n"
        "&szlig;e to <b>me@example.org</b>,\n\n see <a href=3D'http://x'>http://example.org/a?b=3D1</a> to"
        "<!-- x -->day ----------</p>"
    )
    assert mail(tmp_path, text) == Mail(
        "spam-1/00001",
        "spam",
        "Re: café",
        "<head><title>no</title><style>p {}</style></head><p>Grü&szlig;e to <b>EMAIL</b>, "
        "see <a href='http://x'>http://example.org/a?b=1</a> to<!-- x -->day ----------</p>",
        "grüße to email see today",
    )


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("<mailto:a.b+c@x-y.example.org?subject=out>", "<mailto:EMAIL?subject=out>"),
        ("http://x.org/out.asp?e=me@example.org&n=1", "http://x.org/out.asp?e=EMAIL&n=1"),
        ("http://x.org/me%40example.org/", "http://x.org/EMAIL/"),
        ("http://bank.example@10.0.0.1/login", "http://EMAIL/login"),
        ("two @ 3 dollars, @home", "two @ 3 dollars, @home"),
    ],
)
def test_of_a_url_only_the_address_is_masked(tmp_path: Path, text: str, masked: str) -> None:
    found = mail(tmp_path, f"Subject: twenty letters of a subject\n\n{text}\n")
    assert found is not None
    assert found.body == masked


def test_the_first_part_with_words_is_the_body(tmp_path: Path) -> None:
    part = "--b\nContent-Type: text/{}\n\n{}\n"
    parts = part.format("plain", "see below") + part.format("html", "<p>The words are in this part</p>")
    found = mail(tmp_path, f"Subject: two\nContent-Type: multipart/alternative; boundary=b\n\n{parts}--b--\n")
    assert found is not None
    assert found.body == "<p>The words are in this part</p>"


@pytest.mark.parametrize(
    "encoding",
    [
        "base64\nContent-Type: text/plain; charset=nonsense\n\naGVsbG8gd29ybGQsIHRoaXMgaXMgYSBsaW5l",
        "base64\n\n!!",
        "quoted-printable\n\n=ZZ=\n",
    ],
)
def test_odd_encodings_do_no_harm(tmp_path: Path, encoding: str) -> None:
    found = mail(tmp_path, f"Subject: twenty letters of a subject\nContent-Transfer-Encoding: {encoding}")
    assert found is not None
    assert "hello world" in found.body or "aGVs" not in encoding


def test_boilerplate_of_lists_and_feeds_is_cut(tmp_path: Path) -> None:
    footer = (
        "________________________________________\nilug mailing list ilug@linux.ie\nhttp://www.linux.ie/mailman/listinfo/ilug"
    )
    found = mail(tmp_path, f"Subject: [ILUG] a question\n\nWhere do I find the manual?\n\n{footer}\n", "easy-ham-1")
    assert found == Mail("easy-ham-1/00001", "ham", "a question", "Where do I find the manual?", "where do i find the manual")
    found = mail(tmp_path, "Subject: news\n\nURL: http://x.org/1\nDate: Not supplied\n\nA story about something.\n")
    assert found is not None
    assert found.body == "A story about something."
    assert mail(tmp_path, "Subject: hi\n\nhttp://x.org/\n") is None  # fewer than twenty letters


def test_duplicates_leave_and_near_duplicates_are_one_group() -> None:
    body = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    page = f"<html><body bgcolor=red><p>{body}</p>"
    other = "nothing of that sort is to be found in here, it is another mail"
    mails = [
        Mail("a", "spam", "win 100 dollars", body, body),
        Mail("b", "spam", "Win 250 DOLLARS!", body, body),
        Mail("c", "spam", "another subject", body.replace("three", "3 3 3"), body.replace("three ", "")),
        Mail("d", "ham", "another thing", other, folded(other)),
        Mail("e", "ham", "both", "classes", "classes"),
        Mail("f", "spam", "both", "classes", "classes"),
        Mail("g", "spam", "win dollars", page, body),  # to its reader it is the first
        Mail("h", "spam", "yet another subject", page, body),
        Mail("i", "ham", "equal markup without words", "<table><tr>" * 30 + "<img src=1>", ""),
        Mail("j", "ham", "and once again", "<table><tr>" * 30 + "<img src=two>", ""),
    ]
    kept = distinct(mails)
    assert [m.name for m in kept] == ["a", "c", "d", "h", "i", "j"]
    assert groups_of(kept) == [0, 0, 2, 0, 4, 4]
