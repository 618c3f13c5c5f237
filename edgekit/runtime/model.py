"""`Model`: a bundle that answers. Frames, texts or series in, predictions out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, TOKENIZER, Bundle
from edgekit.errors import InputError, UsageError
from edgekit.manifest import TensorSpec
from edgekit.preprocess import Preprocess, Preprocessor, make_preprocessor

from .backends import Runner, open_runner
from .ctc import read_line
from .golden import run_samples

__all__ = ["Model", "Prediction"]

Precision = Literal["auto", "float", "int8"]
_GRAPHS: dict[str, str | None] = {"auto": None, "float": FLOAT_GRAPH, "int8": INT8_GRAPH}


class Prediction(NamedTuple):
    """One answer; ``latency_ms`` runs from sample to answer.

    Of a classifier: ``label``, its ``score``, and ``scores`` float32 (classes,), a softmax. Of a text reader: ``text``, the
    mean probability of its characters as ``score``, and ``scores`` float32 (steps, alphabet).
    """

    label: str | None
    score: float
    scores: NDArray[np.float32]
    text: str | None
    latency_ms: float


class Model:
    """An open bundle. Make one with `Model.open`; use it as a context manager, from one thread."""

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle = bundle
        self.runner = runner
        self.labels = bundle.manifest.labels
        self.beam = 1
        self._reads = bundle.manifest.task == "text-recognition"
        self._preprocess: Preprocess | None = None
        self._bytes: Preprocess | None = None
        self._open = False

    @classmethod
    def open(
        cls,
        path: Bundle | str | os.PathLike[str],
        backend: str = "auto",
        *,
        precision: Precision = "auto",
        threads: int = 1,
        beam: int = 1,
    ) -> Model:
        """Open a bundle for inference.

        ``backend``: a name from `BACKENDS` or ``auto``. ``precision``: which graph of the bundle; ``auto`` takes int8
        where the bundle was quantized. ``threads``: CPU cores for one inference, 0 for all. ``beam``: how many readings a
        text reader weighs against each other at each step; 1 is greedy.
        Files are read and hashed when the model is entered. Raises, here or there, `BundleError` for a damaged bundle,
        `BackendError` where nothing can run it, `UsageError` for an unknown name.
        """
        if precision not in _GRAPHS:
            raise UsageError(f"there is no precision {precision!r}", f"choose one of: {', '.join(_GRAPHS)}")
        if not 1 <= beam <= 1000:
            raise UsageError(f"a beam of {beam}", "1 is greedy; 8 is wide")
        bundle = path if isinstance(path, Bundle) else Bundle.open(path, verify=False)
        model = cls(bundle, open_runner(bundle, backend, _GRAPHS[precision], threads))
        model.beam = beam
        return model

    def __enter__(self) -> Model:
        self.runner.__enter__()  # hashes the graph as it reads it
        try:
            self.bundle.check_model()
            spec = self.bundle.manifest.preprocessing
            self._preprocess = make_preprocessor(spec, self._tokenizer()) if spec else None
        except BaseException:
            self.runner.__exit__(None, None, None)
            raise
        if isinstance(self._preprocess, Preprocessor) and self.runner.inputs[0].dtype == "uint8":
            # The engine or the graph normalises: the frame goes up as bytes. Engines take them as they lie in memory.
            self._bytes = self._preprocess.resized if self.runner.frames else self._preprocess.pixels
        self._input = self.runner.inputs[0].name
        self._output = self.runner.outputs[0].name
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._open = False
        self.runner.__exit__(kind, value, traceback)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.runner.outputs

    def _tokenizer(self) -> bytes | None:
        return self.bundle.read(TOKENIZER) if self.bundle.has(TOKENIZER) else None

    def preprocess(self, sample: Any) -> NDArray[Any]:
        """One sample -> the model's input, the batch axis in front, exactly as training saw it.

        uint8 (H, W, 3) RGB or (H, W) grey, any size -> float32 (1, C, H, W), or uint8 where the graph takes bytes, or uint8
        (1, H, W, C) where the engine was built with --uint8-input; str -> int64 (1, T); float32 (T, C) -> float32
        (1, T', C + 1).
        """
        if self._preprocess is None and (spec := self.bundle.manifest.preprocessing) is not None:
            self._preprocess = make_preprocessor(spec, self._tokenizer())
        if self._bytes is not None:
            return self._bytes(sample)
        if self._preprocess is None:
            raise InputError(
                f"{self.bundle.path} takes raw tensors: it has no preprocessing",
                "use model.run({name: array})",
            )
        return self._preprocess(sample)

    def __call__(self, sample: Any) -> Prediction:
        """One frame, text or series -> one `Prediction`. Raises `InputError` where it does not fit the model."""
        start = perf_counter_ns()
        outputs = self.run({self._input if self._open else "": self.preprocess(sample)})
        return self._decode(outputs[self._output][0], start, 1)

    def predict_batch(self, samples: Sequence[Any]) -> list[Prediction]:
        """Frames of any sizes, texts or series -> predictions in the same order; ``latency_ms`` is each one's share.

        Runs as one batch where the model's first axis is dynamic, else one by one.
        """
        if not len(samples):
            return []
        if not self._open or not isinstance(self.inputs[0].shape[0], str):
            return [self(sample) for sample in samples]
        start = perf_counter_ns()
        batch = np.concatenate([self.preprocess(sample) for sample in samples])
        rows = run_samples(self.runner, {self._input: batch})[self._output]
        return [self._decode(row, start, len(samples)) for row in rows]

    def share(self) -> Model:
        """Another `Model` for another thread, on the same weights; a context manager of its own.

        With TensorRT it has a context, a stream and memory of its own, so that several cameras share one engine. Raises
        `BackendError` where this one is not open.
        """
        model = Model(self.bundle, self.runner.share())
        model.beam = self.beam
        return model

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raw tensors by name, zero preprocessing. Raises `InputError` that names the input which does not fit."""
        if not isinstance(feeds, Mapping):
            raise InputError(
                f"{type(feeds).__name__} arrived, a mapping was expected",
                "model.run({name: array}); model.inputs has the names",
            )
        return self.runner.run(feeds)

    def _decode(self, logits: NDArray[Any], start: int, share: int) -> Prediction:
        """Logits (classes,), or (steps, alphabet) of a reader -> `Prediction`."""
        scores = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float32)
        scores /= scores.sum(-1, keepdims=True)
        if self._reads:
            read, score = read_line(scores, self.beam)
            text = "".join(self.labels[i] for i in read)
            return Prediction(None, score, scores, text, (perf_counter_ns() - start) / 1e6 / share)
        best = int(scores.argmax())
        label = self.labels[best] if best < len(self.labels) else str(best)
        return Prediction(label, float(scores[best]), scores, None, (perf_counter_ns() - start) / 1e6 / share)
