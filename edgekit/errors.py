"""Every error edgekit raises on purpose.

    EdgekitError            exit 1   the base: what arrived, what was expected, and a hint that mends it
    ├── UsageError          exit 2   the call itself is wrong: unknown name, option or value
    │   └── OutputExists    exit 2   --out is there already; nothing is overwritten
    ├── BundleError         exit 1   a bundle is missing, damaged, of a newer format, or lacks a file
    │   ├── GoldenError     exit 1   a graph no longer reproduces the golden outputs
    │   └── TurnedDown      exit 3   a packed bundle was installed here before, and left: a trial is a gate
    ├── DataError           exit 1   a data set is missing, empty or too damaged to use
    ├── GraphError          exit 1   an ONNX graph cannot be imported, quantized or compiled
    ├── InputError          exit 1   a frame or tensor does not fit the model
    ├── BackendError        exit 1   no backend can run the model here
    ├── MissingExtra        exit 1   an optional dependency is not installed
    ├── SignatureError      exit 1   a packed bundle is not signed by a trusted key
    └── BudgetNotMet        exit 3   a stated budget or gate is not met; the best found is kept

The command line prints ``error:`` and ``hint:`` and exits with ``exit_code``; a library caller catches
``EdgekitError``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "BackendError",
    "BudgetNotMet",
    "BundleError",
    "DataError",
    "EdgekitError",
    "GoldenError",
    "GraphError",
    "InputError",
    "MissingExtra",
    "OutputExists",
    "SignatureError",
    "TurnedDown",
    "UsageError",
    "first_line",
]


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


#: Optional module -> the extra of pyproject.toml that brings it; the smallest, where several do.
_EXTRA_OF = {
    "PIL": "scan",
    "accelerate": "distributed",
    "asyncua": "opcua",
    "av": "video",
    "biip": "scan",
    "cryptography": "sign",
    "cuda": "cuda",
    "cv2": "camera",
    "jinja2": "report",
    "onnx": "onnx",
    "onnx_ir": "train",
    "onnxruntime": "runtime",
    "onnxscript": "train",
    "optuna": "search",
    "paho": "scan",
    "kornia": "train",
    "rich": "tui",
    "safetensors": "train",
    "seglearn": "watch",
    "serial": "serial",
    "tensorboardX": "logs",
    "tensorrt_rtx": "rtx",
    "tokenizers": "text",
    "torch": "train",
    "transformers": "finetune",
    "zxingcpp": "scan",
}


#: Control characters, line ends of Unicode, and what turns the direction of writing: a name out of a foreign file may hold
#: them, and would end a line of a log, or speak to the terminal.
_LINE_BREAKING = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


#: What a library says in several lines is one of ours.
_LINES = re.compile(r"[ \t]*[\r\n]+[ \t]*")


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class EdgekitError(Exception):
    """An error with a cause (``message``) and a cure (``hint``), each one line: what would break it is escaped."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = (_LINE_BREAKING.sub(_escaped, " ".join(_LINES.split(words))) for words in (message, hint))
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint and sys.version_info >= (3, 11):  # a traceback in someone's own program ends with the cure, too
            self.add_note(f"hint: {hint}")


class UsageError(EdgekitError):
    exit_code = 2


class OutputExists(UsageError):
    """``option``: the one that named the path."""

    def __init__(self, path: object, option: str = "--out") -> None:
        super().__init__(f"{path} exists already and is not overwritten", f"choose another {option}, or remove it first")


class BundleError(EdgekitError):
    pass


class GoldenError(BundleError):
    """``result``: how far the outputs were (a `GoldenResult`), where they were compared."""

    result: Any = None


class DataError(EdgekitError):
    pass


class GraphError(EdgekitError):
    pass


class InputError(EdgekitError):
    pass


class BackendError(EdgekitError):
    pass


class MissingExtra(EdgekitError):
    """``raise MissingExtra("rtx", "tensorrt_rtx")`` where an optional import failed, or ``raise MissingExtra.of(error)``.

    ``extra`` is empty where no extra brings ``module``.
    """

    def __init__(self, extra: str, module: str) -> None:
        hint = f"pip install 'edgekit[{extra}]'" if extra else f"install {module}, or edgekit anew: pip install edgekit"
        super().__init__(f"this needs the Python module '{module}', which is not installed", hint)
        self.extra, self.module = extra, module

    @classmethod
    def of(cls, error: ImportError) -> MissingExtra:
        """From the error of a failed import, which names the module; the extra by `_EXTRA_OF`."""
        module = error.name or "unknown"
        return cls(_EXTRA_OF.get(module.partition(".")[0], ""), module)


class SignatureError(EdgekitError):
    pass


class TurnedDown(BundleError):
    """A bundle that was installed here before, and left by a way back: no defect, a gate that it did not pass."""

    exit_code = 3


class BudgetNotMet(EdgekitError):
    """``result`` holds what was reached, with the keys the command would have answered."""

    exit_code = 3

    def __init__(self, message: str, hint: str = "", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint)
        self.result = dict(result or {})
