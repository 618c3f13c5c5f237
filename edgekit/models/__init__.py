"""Presets by name, in a plain dict. A new preset is a class in its family's file and a line here; torch loads on first use.

Every preset is an `nn.Module` made from ``classes`` and what describes its input: ``channels, height, width`` of a picture,
``vocabulary, length, pad`` of text, ``channels, length`` of a series. So is the user's own, ``package.module:factory``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from edgekit.errors import UsageError

__all__ = [
    "DEFAULT",
    "DEFAULTS",
    "PRESETS",
    "PRETRAINED",
    "Preset",
    "check_model",
    "is_custom",
    "preset_named",
    "sized",
    "trust",
]


class Preset(NamedTuple):
    """``home`` is ``module:Class``, ``task`` what it is for.

    ``lr`` is the peak learning rate that suits it (AdamW), ``batch`` and ``epochs`` what it was tried with; ``args`` are
    given to the class beside the input's description; ``resizes``: it takes pictures of any size.
    """

    home: str
    summary: str
    lr: float
    task: str = "image-classification"
    epochs: int = 40
    batch: int = 128
    args: Mapping[str, Any] = {}
    resizes: bool = False


_CNN, _RNN, _TRANSFORMER = "edgekit.models.cnn:", "edgekit.models.rnn:", "edgekit.models.transformer:"
_TEXT, _SERIES, _READING = "text-classification", "series-classification", "text-recognition"

PRESETS: dict[str, Preset] = {
    "textbook": Preset(_CNN + "Textbook", "Conv 32 - Conv 64 - Conv 64 - Dense 64, for 28x28 and near", 2e-3),
    "depthwise": Preset(
        _CNN + "Depthwise",
        "compact depthwise-separable net; above 48 px it stands for depthwise-m",
        5e-3,
        resizes=True,
    ),
    "depthwise-n": Preset(
        _CNN + "Inverted",
        "depthwise net of inverted residuals, nano: 64 px and up",
        5e-3,
        args={"widths": (8, 16, 24, 48), "depths": (2, 3, 3), "head": 160},
        resizes=True,
    ),
    "depthwise-s": Preset(
        _CNN + "Inverted",
        "the same, small: 64 px and up",
        4e-3,
        args={"widths": (16, 24, 40, 64), "depths": (2, 3, 4), "head": 256},
        resizes=True,
    ),
    "depthwise-m": Preset(_CNN + "Inverted", "the same, medium: 96 px and up", 3e-3, resizes=True),
    "residual": Preset(_CNN + "Residual", "plain residual net of dense 3x3 convolutions, 48 px and up", 3e-3, resizes=True),
    "gru-rows": Preset(_RNN + "RowsRnn", "a picture read row by row by two bidirectional GRU layers, 28x28 and near", 4e-3),
    "lstm-rows": Preset(_RNN + "RowsRnn", "the same with LSTM layers", 4e-3, args={"cell": "lstm", "hidden": 48}),
    "vit": Preset(
        _TRANSFORMER + "Vit", "compact vision transformer with a convolutional stem, 28 px and up", 1.5e-3, epochs=80
    ),
    "lstm-text": Preset(_RNN + "TextLstm", "Embedding 10,000 x 64 - LSTM 64 - Dense 64", 3e-3, _TEXT, epochs=12, batch=64),
    "transformer-text": Preset(
        _TRANSFORMER + "TextTransformer", "Embedding 10,000 x 64 - two attention blocks", 2e-3, _TEXT, epochs=12, batch=64
    ),
    "gru-series": Preset(_RNN + "SeriesRnn", "convolution - two GRU layers, for sensor series", 3e-3, _SERIES, batch=64),
    "lstm-series": Preset(
        _RNN + "SeriesRnn", "convolution - two LSTM layers, for sensor series", 3e-3, _SERIES, batch=64, args={"cell": "lstm"}
    ),
    "crnn": Preset(_RNN + "Crnn", "convolutions - two LSTM layers - CTC, reads a line of text", 1e-3, _READING, 10, 64),
}
#: A Hugging Face encoder, fine-tuned: ``hf:FOLDER`` on the command line.
PRETRAINED = Preset(
    "edgekit.models.pretrained:Pretrained", "a fine-tuned Hugging Face encoder", 5e-5, _TEXT, epochs=3, batch=16
)
#: What is trained where no model is named.
DEFAULTS = {
    "image-classification": "depthwise",
    _TEXT: "lstm-text",
    _SERIES: "gru-series",
    _READING: "crnn",
}
DEFAULT = DEFAULTS["image-classification"]

_CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
#: Factories that this process may call: named by the user, not by a bundle.
_trusted: set[str] = set()


def sized(name: str, side: int) -> str:
    """The preset that ``name`` stands for at pictures of ``side`` pixels."""
    return "depthwise-m" if name == "depthwise" and side > 48 else name


def is_custom(name: str) -> bool:
    """Whether ``name`` is the user's own factory, ``package.module:factory``."""
    return name not in PRESETS and not name.startswith("hf:") and _CUSTOM.fullmatch(name) is not None


def trust(name: str) -> None:
    """Let this process call the factory ``name``: the user named it."""
    _trusted.add(name)


def check_model(name: str) -> None:
    """Raise `UsageError` for what is neither a preset, nor ``hf:FOLDER``, nor ``package.module:factory``."""
    if not isinstance(name, str) or name in ("pretrained", "hf:"):
        raise UsageError(f"there is no model {name!r}", "a Hugging Face encoder is hf:FOLDER")
    if not (name.startswith("hf:") or is_custom(name)):
        preset_named(name)


def preset_named(name: str) -> Preset:
    """The preset called ``name``, or one that wraps the user's factory. Raises `UsageError` that lists all.

    A factory must be trusted: named on the command line or in a recipe, or listed, whole, in the environment's
    EDGEKIT_MODELS. A bundle must not make this process import what it likes.
    """
    if name == "pretrained" or name.startswith("hf:"):
        return PRETRAINED
    if is_custom(name):
        allowed = os.environ.get("EDGEKIT_MODELS", "").split(",")
        if name not in _trusted and name not in allowed:
            raise UsageError(
                f"the bundle was made from {name}, which is your code, not edgekit's",
                f"if you trust it: export EDGEKIT_MODELS={name}",
            )
        return Preset(name, "your own", 1e-3, task="any")
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UsageError(
            f"there is no model {name!r}",
            f"choose one of: {known}, hf:FOLDER of a Hugging Face encoder, package.module:factory",
        )
    return PRESETS[name]
