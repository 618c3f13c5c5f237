"""The tokenizer for training from scratch: what it keeps of a text, its limits, and that it is the same every time."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgekit.errors import DataError, UsageError
from edgekit.manifest import TextPreprocessing
from edgekit.preprocess.text import TextPreprocessor
from edgekit.training.tokenizer import fit_tokenizer

SPAM = "CONGRATULATIONS YOU WON a FREE phone!!! Call 08001234567 now, claim $1,000"
HAM = "Dear John, the meeting is moved to Thursday at 10:30. Größe und Café, über 你好 \U0001f600"


def mails(count: int = 200) -> list[str]:
    draw = random.Random(0)
    words = f"{SPAM} {HAM}".split()
    return [" ".join(draw.choices(words, k=40)) + f" {draw.randrange(10**6)}" for _ in range(count)]


@pytest.fixture(scope="module")
def fitted() -> bytes:
    return fit_tokenizer(mails(), 600)


def tokens(fitted: bytes, text: str) -> list[str]:
    tokenizer = Tokenizer.from_buffer(fitted)
    return [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]


def test_padding_is_0_unknown_is_1_and_the_vocabulary_holds(fitted: bytes):
    tokenizer = Tokenizer.from_buffer(fitted)
    assert (tokenizer.token_to_id("[PAD]"), tokenizer.token_to_id("[UNK]")) == (0, 1)
    assert tokenizer.get_vocab_size() <= 600
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert Tokenizer.from_buffer(fit_tokenizer(mails(), 300)).get_vocab_size() == 300


def test_words_digits_and_signs(fitted: bytes):
    assert tokens(fitted, "the  meeting\n is moved") == [" the", " meeting", " is", " moved"]
    assert tokens(fitted, "Thursday") == tokens(fitted, " thursday") == [" thursday"]
    assert "!!!" in tokens(fitted, "phone!!!")
    assert tokens(fitted, "über Größe") == [" über", " größe"]
    digits = tokens(fitted, "08001234567")
    assert max(len(piece.strip()) for piece in digits) <= 3
    assert "".join(digits) == " 08001234567"


def test_a_run_of_capitals_is_marked_once(fitted: bytes):
    assert tokens(fitted, "you won a free phone")[0] == " you"
    assert tokens(fitted, "YOU WON a FREE phone") == ["\x01", " you", " won", " a", "\x01", " free", " phone"]
    assert tokens(fitted, "a \x01 phone") == [" a", " phone"]


def test_zero_width_characters_and_compatibility_forms_hide_nothing(fitted: bytes):
    assert tokens(fitted, "fr\u200bee ｐｈｏｎｅ") == [" free", " phone"]


def test_a_written_pad_is_no_padding(fitted: bytes):
    ids = Tokenizer.from_buffer(fitted).encode("[PAD] free [UNK]").ids
    assert not {0, 1} & set(ids)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text_is_spelled_without_unknowns(text: str):
    spec = TextPreprocessing(256, 0)
    x = TextPreprocessor(spec, ANY)(text)
    assert x.shape == (1, 256)
    assert not (x == 1).any()
    length = int((x != 0).sum())
    assert np.all(x[0, length:] == 0)
    assert np.all(x[0, :length] != 0)


ANY = fit_tokenizer([SPAM, HAM], 300)


def test_the_same_texts_give_the_same_bytes_in_every_process(fitted: bytes):
    assert fit_tokenizer(iter(mails()), 600) == fitted
    code = (
        "import sys, hashlib; from edgekit.training.tokenizer import fit_tokenizer;"
        "texts = sys.stdin.buffer.read().decode().split('\\0');"
        "print(hashlib.sha256(fit_tokenizer(texts, 600)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], input="\0".join(mails()).encode(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == hashlib.sha256(fitted).hexdigest()
    assert not done.stderr


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_no_text_is_refused(texts: list[str]):
    with pytest.raises(DataError, match="no text"):
        fit_tokenizer(texts)


def test_a_tiny_vocabulary_is_refused():
    with pytest.raises(UsageError, match="too small"):
        fit_tokenizer([SPAM], 100)


def test_lone_surrogates_and_one_text_are_enough():
    assert Tokenizer.from_buffer(fit_tokenizer(["\ud800 free"])).get_vocab_size() >= 258
