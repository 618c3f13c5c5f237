"""Texts: words are hidden, all tokens of one at once; the picture is the text with its words coloured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import TOKENIZER
from edgekit.errors import DataError, InputError
from edgekit.files import printable
from edgekit.manifest import TextPreprocessing
from edgekit.preprocess import TextPreprocessor
from edgekit.runtime import Model

from .modality import Modality, View
from .question import Attribution, Mask, Question

__all__ = ["TextQuestion", "Texts", "Word"]

#: A run of letters and digits with its apostrophes, or a run of one sign.
WORD = re.compile(r"\w+(?:['’]\w+)*|([^\w\s])\1*")
MASKS = ("[MASK]", "<mask>")
UNKNOWNS = ("[UNK]", "<unk>")
STRANGE = "ꙮ"  # a letter of one manuscript: a tokenizer that has an unknown token in use answers it here
MAX_BYTES = 1 << 20


class Word(NamedTuple):
    """Characters ``start`` to ``stop`` of the sample.

    ``tokens``: their places in the model's input; none where the model does not read the word.
    """

    text: str
    start: int
    stop: int
    tokens: list[int]


@dataclass(frozen=True)
class TextQuestion(Question):
    """``x`` int64 (1, T); masks and heat are (W,), over the ``words`` that the model reads.

    ``fill``: the token id that stands for a hidden word's tokens.
    """

    words: tuple[Word, ...]
    fill: int

    @property
    def size(self) -> tuple[int]:
        return (len(self.words),)

    def covered(self, masks: Mask) -> NDArray[Any]:
        batch = np.repeat(self.x, len(masks), 0)
        for index, word in enumerate(self.words):
            batch[np.ix_(np.flatnonzero(masks[:, index]), np.array(word.tokens))] = self.fill
        return batch

    def windows(self) -> Iterator[Mask]:
        yield from np.eye(len(self.words), dtype=bool)

    def parts(self) -> NDArray[np.int64]:
        return np.arange(len(self.words), dtype=np.int64)


class Texts(Modality):
    """See `Modality`. A sample is a str."""

    noun = "text"
    plural = "texts"
    task = "text-classification"
    suffixes = frozenset({".txt"})
    advice = "give a text of a word or more, or .txt files in UTF-8"
    methods = ("lime", "occlusion", "rollout")

    def __init__(self, model: Model) -> None:
        spec = model.bundle.manifest.preprocessing
        assert isinstance(spec, TextPreprocessing)
        self._model = model
        self._preprocess = TextPreprocessor(spec, model.bundle.read(TOKENIZER))
        self._fill, self._hidden_as = self._replacement()

    def read(self, path: Path) -> list[tuple[str, str]]:
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise DataError(f"{printable(path)} is over {MAX_BYTES >> 20} MiB", "give the part that the model reads")
            return [("", data.decode("utf-8-sig"))]
        except UnicodeDecodeError as error:
            raise DataError(f"{printable(path)} is not UTF-8: {error.reason}", "give a text, or a text file in UTF-8") from None

    def question(self, sample: str, target: int, model: Model | None = None) -> TextQuestion:
        words = tuple(word for word in self._words(sample) if word.tokens)
        if not words:
            raise InputError(f"the text {sample[:40]!r} has no word", "give a text of a word or more")
        return TextQuestion(model or self._model, self._preprocess(sample), target, words, self._fill)

    def detail(self, question: Question, attribution: Attribution) -> dict[str, Any]:
        assert isinstance(question, TextQuestion)
        words = [
            {"word": printable(word.text), "start": word.start, "stop": word.stop, "weight": float(weight)}
            for word, weight in zip(question.words, attribution.heat, strict=True)
        ]
        return {"hidden_as": self._hidden_as, "words": words}

    def picture(self, sample: str, views: Sequence[View], caption: str) -> bytes:
        from . import text_picture

        return text_picture.paragraphs(sample, views, caption)

    def _replacement(self) -> tuple[int, str]:
        """(id, name) of what stands for a hidden word: mask, else unknown, else padding.

        A byte-level tokenizer has an unknown token that no text ever gives: the model never learnt what it means.
        """
        tokenizer = self._preprocess.tokenizer
        given = set(tokenizer.encode(STRANGE).ids)
        for name in (*MASKS, *UNKNOWNS):
            found = tokenizer.token_to_id(name)
            if found is not None and (name in MASKS or found in given):
                return found, name
        pad = self._preprocess.spec.pad
        return pad, tokenizer.id_to_token(pad) or str(pad)

    def _words(self, text: str) -> list[Word]:
        words = [Word(match[0], match.start(), match.end(), []) for match in WORD.finditer(text)]
        place = 0
        for token, (start, stop) in enumerate(self._preprocess.encode(text).offsets):
            if start == stop:
                continue  # what the tokenizer adds around a text
            # A token of the space alone (a mark of capitals) belongs to the word behind it.
            while place < len(words) - 1 and words[place].stop <= start:
                place += 1
            if words and words[place].stop > start:
                words[place].tokens.append(token)
        return words
