"""Text -> token ids, with the ``tokenizers`` library and the tokenizer that the bundle carries. No transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, InputError, MissingExtra, first_line
from edgekit.manifest import TextPreprocessing

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = ["TextPreprocessor"]

#: A text is cut here before it is tokenized: what lies behind could not fit into any model, but would cost time.
CHARACTERS_A_TOKEN = 64


def _refused(error: BaseException, what: str) -> BaseException:
    """The library raises bare `Exception`, and where its Rust panics a `BaseException` of a type that it does not export."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return BundleError(f"tokenizer.json {what}: {first_line(error)}", "restore the bundle, or make it again")


class TextPreprocessor:
    """Call with a str, get int64 (1, length)."""

    def __init__(self, spec: TextPreprocessing, tokenizer: bytes) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtra("text", "tokenizers") from None
        self.spec = spec
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer)
            self.tokenizer.enable_truncation(spec.length)
            self.tokenizer.no_padding()
        except BaseException as error:  # noqa: BLE001
            raise _refused(error, "cannot be read") from None

    def __call__(self, text: str) -> NDArray[np.int64]:
        """Raises `InputError` for what is no str."""
        out = np.full((1, self.spec.length), self.spec.pad, np.int64)
        ids = self.encode(text).ids[: self.spec.length]  # a post-processor may add to what was cut
        out[0, : len(ids)] = ids
        return out

    def encode(self, text: str) -> Encoding:
        """The tokens that the model sees, with the characters of ``text`` that each stands for (``offsets``).

        Raises `InputError` for what is no str, `BundleError` where the tokenizer has no token for a part of it.
        """
        if not isinstance(text, str):
            raise InputError(f"a {type(text).__name__} arrived, the model takes a str", "pass the text itself")
        clean = text[: self.spec.length * CHARACTERS_A_TOKEN].encode("utf-8", "replace").decode()  # no lone surrogates
        try:
            return self.tokenizer.encode(clean)
        except BaseException as error:  # noqa: BLE001
            raise _refused(error, "cannot take this text") from None
