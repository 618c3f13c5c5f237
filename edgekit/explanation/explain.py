"""`explain`: images in, one picture an image and explanation.json out."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, WEIGHTS, Bundle, refuse_inside_bundle
from edgekit.errors import DataError, InputError, OutputExists, UsageError
from edgekit.files import atomic_write, printable
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import IMAGE_SUFFIXES, Frame, read_image
from edgekit.progress import say, track
from edgekit.runtime import Model

from .faithfulness import faithfulness
from .question import Question

__all__ = ["METHODS", "RECORD", "explain"]

METHODS = ("activations", "gradcam", "lime", "occlusion")
PRECISIONS = ("auto", "float", "int8")
RECORD = "explanation.json"

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked against the bundle. ``target``: the class, None for the predicted one."""

    method: str
    precision: Any
    target: int | None
    samples: int


def explain(
    bundle: Bundle | str | os.PathLike[str],
    images: Source | Sequence[Source],
    *,
    out: str | os.PathLike[str],
    method: str = "occlusion",
    label: str | None = None,
    precision: str = "auto",
    samples: int = 1000,
) -> dict[str, Any]:
    """Explain a bundle's answers on images (files or folders), with a picture each and ``explanation.json`` in ``out``.

    ``method``: ``occlusion`` and ``lime`` ask the graph through the runtime, ``gradcam`` the PyTorch weights,
    ``activations`` reports each layer's range, zeros, dead channels and saturation instead of a map. ``label``: the class
    in question (default: the predicted). ``precision``: which graph. ``samples``: how often LIME asks.
    Returns ``out``, ``method``, ``images`` (``source``, ``label``, ``score``, ``overlay``, and for maps ``explained``,
    ``deletion_auc`` and ``insertion_auc`` with their controls), ``skipped`` and, for activations, ``layers``.
    Raises `UsageError` for a bundle without images or a method it cannot serve, `DataError` for a missing image or
    where none can be read.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    settings = _settings(opened, method, label, precision, samples)
    folder = Path(out)
    files = _files([images] if isinstance(images, str | os.PathLike) else images, folder)
    if folder.exists() and not folder.is_dir():
        raise OutputExists(folder)
    refuse_inside_bundle(folder / RECORD)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    pictures = _Pictures(folder, method, files)
    with Model.open(opened.path, precision=settings.precision) as model:
        judge = _Judge(model, settings)
        for file in track(files, f"explaining by {method}"):
            try:
                frame = read_image(file)
                row, png = judge(frame, printable(file.name))
            except (DataError, InputError) as error:
                skipped.append(printable(file))
                say(f"skipped {printable(file)}: {error.message}")
                continue
            rows.append({"source": printable(file), **row, "overlay": pictures.write(file, png)})
        described = model.runner.describe()
    if not rows:
        raise DataError(f"none of {len(files)} images can be read; the first is {files[0]}", "give PNG or JPEG files")
    layers = judge.layers()
    graph = {"auto": opened.graph, "float": FLOAT_GRAPH, "int8": INT8_GRAPH}[settings.precision]
    result = {
        "method": method,
        "bundle": printable(opened.path),
        "digest": opened.digest,
        "graph": WEIGHTS if method == "gradcam" else graph,
        "images": rows,
        "skipped": skipped,
        **({"layers": layers} if layers else {}),
        **described,
    }
    atomic_write(folder / RECORD, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return {"out": str(folder), **result}


def _settings(bundle: Bundle, method: str, label: str | None, precision: str, samples: int) -> Settings:
    """Refuse what cannot work before any image is read."""
    labels = bundle.manifest.labels
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"choose one of: {', '.join(METHODS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision {precision!r}", f"choose one of: {', '.join(PRECISIONS)}")
    if bundle.manifest.task != "image-classification" or not isinstance(bundle.manifest.preprocessing, ImagePreprocessing):
        what = "takes raw tensors" if bundle.manifest.preprocessing is None else f"does {bundle.manifest.task}"
        raise UsageError(
            f"{bundle.path} {what}, so there is no image to explain",
            "explain is for image models: make one with edgekit train --data SPEC --out B",
        )
    if label is not None and label not in labels:
        raise UsageError(f"the model has no class {label!r}", f"choose one of: {', '.join(labels[:12]) or 'none'}")
    if method == "gradcam":
        if not bundle.has(WEIGHTS) or precision == "int8":
            what = "explains the float weights" if bundle.has(WEIGHTS) else f"needs PyTorch weights, which {bundle.path} lacks"
            raise UsageError(f"gradcam {what}", "use --method occlusion or lime: they need only the graph")
        precision = "float"  # score and faithfulness come from the same weights as the map
    if precision != "auto":
        bundle.file(FLOAT_GRAPH if precision == "float" else INT8_GRAPH)
    if not 50 <= samples <= 20_000:
        raise UsageError(f"{samples} samples are too few or too many", "choose --samples from 50 to 20000")
    return Settings(method, precision, None if label is None else labels.index(label), samples)


def _files(images: Sequence[Source], out: Path) -> list[Path]:
    """Files as given, folders as their images, without what an earlier explanation put into ``out``.

    Raises `DataError` for what is not there.
    """
    found: list[Path] = []
    for path in map(Path, images):
        if path.is_dir():
            shown = (p for p in path.iterdir() if not p.name.startswith("."))
            made = _earlier_pictures(path / RECORD) if path.resolve() == out.resolve() else set()
            shown = (p for p in shown if p.name not in made)
            inside = sorted(p for p in shown if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{path} holds no images", f"add images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image {path}", "check the path")
    if not found:
        raise UsageError("no image was named", "edgekit explain B IMAGE... --out DIR")
    return found


class _Pictures:
    """Names and writes one picture an image; equal stems are numbered.

    Only what an earlier explanation wrote here is replaced, as its ``explanation.json`` lists it; sources never are.
    Raises `OutputExists` where that file is somebody else's.
    """

    def __init__(self, folder: Path, method: str, sources: Sequence[Path]) -> None:
        self._folder, self._method = folder, method
        self._taken = {source.resolve() for source in sources}
        self._names: set[str] = set()
        self._ours = _earlier_pictures(folder / RECORD)

    def write(self, source: Path, png: bytes) -> str:
        name = next(
            n
            for n in self._candidates(printable(source.stem).replace("\\", "_"))
            if n not in self._names and self._free(n, png)
        )
        self._names.add(name)
        atomic_write(self._folder / name, png)
        return name

    def _candidates(self, stem: str) -> Iterator[str]:
        yield f"{stem}.{self._method}.png"
        number = 2
        while True:
            yield f"{stem}-{number}.{self._method}.png"
            number += 1

    def _free(self, name: str, png: bytes) -> bool:
        path = self._folder / name
        if path.resolve() in self._taken:
            return False
        # The same picture: left by an explanation that was cut off before it wrote its record.
        return name in self._ours or not os.path.lexists(path) or (path.is_file() and path.read_bytes() == png)


def _earlier_pictures(record: Path) -> set[str]:
    """The pictures that an earlier explanation lists. Raises `OutputExists` where ``record`` is none."""
    try:
        return {image.overlay for image in msgspec.json.decode(record.read_bytes(), type=_Record).images}
    except FileNotFoundError:
        return set()
    except msgspec.DecodeError:
        raise OutputExists(record) from None


class _Image(msgspec.Struct):
    overlay: str


class _Record(msgspec.Struct):
    """What marks an ``explanation.json`` as ours."""

    method: str
    digest: str
    images: list[_Image]


class _Judge:
    """One frame -> its row of figures and its picture."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._probe: Any = None
        if settings.method == "activations":
            graph = {"auto": model.bundle.graph, "float": FLOAT_GRAPH, "int8": INT8_GRAPH}[settings.precision]
            self._probe = importlib.import_module(".activations", __package__).Probe(model.bundle, graph)
        else:
            attribute = importlib.import_module(f".{settings.method}", __package__).attribute
            self._attribute = functools.partial(attribute, samples=settings.samples) if settings.method == "lime" else attribute

    def __call__(self, frame: Frame, name: str) -> tuple[dict[str, Any], bytes]:
        from . import picture

        x = self._model.preprocess(frame)
        question = Question(self._model, x, 0)
        logits = question.logits(x)
        best = int(logits[0].argmax())
        question = Question(self._model, x, best if self._settings.target is None else self._settings.target)
        score = float(Question(self._model, x, best).probability(logits)[0])
        row: dict[str, Any] = {"label": self._name(best), "score": score}
        caption = f"{row['label']} {score:.1%} · {self._settings.method}"
        if self._probe is not None:
            maps = self._probe(x)
            maps = x[0] if maps is None else maps
            return row, picture.sheet(frame, maps, f"{caption}: first feature maps · {name}")
        attribution = self._attribute(question)
        check = faithfulness(question, attribution.heat)
        if question.target != best:
            explained = float(question.probability(logits)[0])
            caption = f"why {self._name(question.target)} ({explained:.1%})? answer {caption}"
        row |= {"explained": self._name(question.target), **check.figures(), **attribution.figures}
        spec = self._model.bundle.manifest.preprocessing
        assert isinstance(spec, ImagePreprocessing)
        return row, picture.overlay(frame, np.asarray(attribution.heat, np.float32), spec, f"{caption} · {name}")

    def layers(self) -> list[dict[str, Any]]:
        return [layer.figures() for layer in self._probe.layers.values()] if self._probe is not None else []

    def _name(self, index: int) -> str:
        labels = self._model.labels
        return labels[index] if index < len(labels) else str(index)
