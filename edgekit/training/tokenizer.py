"""A tokenizer for training from scratch: byte-level BPE, fitted to the training texts with the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from edgekit.errors import DataError, MissingExtra, UsageError

__all__ = ["fit_tokenizer"]

#: 256 bytes, [PAD] and [UNK], and room for some merges.
SMALLEST = 300
#: What is read of each text: more than any model's tokens hold.
CHARACTERS = 8192
#: Of longer words no entry is made: they are keys, addresses and base64, never seen again.
LONGEST_ENTRY = 24
#: Stands before a run of words in capitals. A control character: one byte, one entry, and no cleaned text holds it.
CAPITALS = "\x01"
#: Words with the space before them, digits by three, runs of one sign; `CAPITALS` is such a sign.
PIECES = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?([^\s\p{L}\p{M}\p{N}])\1*|\s+"


def fit_tokenizer(texts: Iterable[str], vocabulary: int = 10_000) -> bytes:
    """A ``tokenizer.json`` of at most ``vocabulary`` entries, [PAD] = 0 and [UNK] = 1, fitted to ``texts``.

    Byte-pair encoding (Sennrich et al., arXiv:1508.07909) over bytes (Radford et al., GPT-2): a small vocabulary spells
    what it does not know ("v1agra") and never answers [UNK], in any script. Text is put into NFKC, freed of control and
    zero-width characters, and lowercased; one entry marks where a run of words in capitals begins. Accents stay: "frëe"
    says something. Digits are split by three, so that no entry is spent on one telephone number; runs like "!!!" stay
    together. No start or end tokens; cutting and padding are the caller's. The same texts give the same bytes: WordPiece
    of the same library numbers its entries by the order of a hash map.

    Raises `DataError` where no text has a character, `UsageError` for a vocabulary below `SMALLEST`, `MissingExtra`.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        raise MissingExtra("text", "tokenizers") from None
    if vocabulary < SMALLEST:
        raise UsageError(f"a vocabulary of {vocabulary} entries is too small", f"choose {SMALLEST} or more; 10000 suits mails")
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))  # noqa: S106  no password
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),  # a word is the same entry at the start as behind a space
            normalizers.Replace(Regex(r"(?<!\p{Lu}) (?=\p{Lu}{2,}(?!\p{L}))"), f"{CAPITALS} "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=["[PAD]", "[UNK]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_ENTRY,
        show_progress=False,
    )
    seen = _Seen(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.any:
        raise DataError("there is no text to make a tokenizer from", "give texts with at least one character")
    document = json.loads(tokenizer.to_str())
    # The library would read a literal "[PAD]" in a text as padding, which models do not look at. Both stay in the vocabulary.
    document["added_tokens"] = []
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


class _Seen:
    """The texts, cut and free of lone surrogates; ``any`` tells afterwards whether one had a character."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.any = texts, False

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            clean = text[:CHARACTERS].encode("utf-8", "replace").decode()
            self.any = self.any or bool(clean.strip())
            yield clean
