"""`explain`: samples in, one picture each and explanation.json out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, WEIGHTS, Bundle, refuse_inside_bundle
from edgekit.errors import DataError, InputError, MissingExtra, OutputExists, UsageError
from edgekit.files import atomic_write, check_new, given_path, printable
from edgekit.progress import say, track
from edgekit.runtime import Model

from .agreement import spearman
from .faithfulness import faithfulness
from .images import Images
from .modality import Modality, View
from .question import Question
from .series import Series
from .sources import RECORD, Pictures, Source, collect
from .texts import Texts

__all__ = ["METHODS", "RECORD", "explain"]

METHODS = ("activations", "gradcam", "lime", "occlusion", "rollout")
PRECISIONS = ("auto", "float", "int8")
MODALITIES: dict[str, type[Modality]] = {kind.task: kind for kind in (Images, Series, Texts)}
#: These explain the PyTorch weights, not a graph.
OF_WEIGHTS = ("gradcam", "rollout")


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked against the bundle. ``graph``: the file of that ``precision``. ``target``: the class, None
    for the predicted one."""

    modality: type[Modality]
    method: str
    precision: Any
    graph: str
    target: int | None
    samples: int
    compare: bool


def explain(
    bundle: Bundle | str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    method: str = "occlusion",
    label: str | None = None,
    precision: str = "auto",
    samples: int = 1000,
    compare: bool = False,
) -> dict[str, Any]:
    """Explain a bundle's answers, with a picture each and ``explanation.json`` in ``out``.

    ``images``: files or folders of what the model takes, which may be texts or series; a str that is no path is a text.
    ``method``: ``occlusion`` and ``lime`` ask the graph through the runtime, ``gradcam`` and ``rollout`` (transformer
    presets) the PyTorch weights; ``activations`` reports each layer's range, zeros, dead channels and saturation instead
    of a map. ``label``: the class in question (default: the predicted). ``precision``: which graph. ``samples``: how often
    LIME asks. ``compare``: the float graph's map beside the int8 graph's, for the class that the latter answers.
    Returns ``out``, ``method``, ``images`` (one entry a sample: ``source``, ``label``, ``score``, ``overlay``, and for maps
    ``explained``, ``deletion_auc`` and ``insertion_auc`` with their controls; ``words`` of a text; ``time_steps``,
    ``channels`` and ``channel_names`` of a series, and its name (``series``) where a file holds several; ``compared``:
    ``spearman`` and the figures of ``float`` and ``int8``), ``skipped`` (for activations also ``layers``); of the bundle
    ``bundle`` and ``digest``; of what ran it ``backend``, ``version``, ``provider``, ``graph``, ``threads``, ``int8`` and
    ``passed_over`` (as `evaluate`).
    Raises `UsageError` for a bundle or a method that cannot be served, `DataError` for a missing sample or where none can
    be read.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    settings = _settings(opened, method, label, precision, samples, compare)
    folder = given_path(out, "out")
    kind = settings.modality
    sources = collect(images if isinstance(images, Iterable) and not isinstance(images, str) else [images], folder, kind)
    if folder.exists() and not folder.is_dir():
        raise OutputExists(folder)
    check_new(folder / RECORD)
    refuse_inside_bundle(folder / RECORD)
    _check_pillow()
    pictures = Pictures(folder, method, [source.file for source in sources if source.file])
    rows, skipped, rest = _rows(opened, settings, sources, pictures)
    result = {
        "method": method,
        "bundle": printable(opened.path),
        "digest": opened.digest,
        "graph": WEIGHTS if method in OF_WEIGHTS else settings.graph,
        "images": rows,
        "skipped": skipped,
        **rest,
    }
    atomic_write(folder / RECORD, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return {"out": str(folder), **result}


def _rows(
    bundle: Bundle, settings: Settings, sources: list[Source], pictures: Pictures
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """An entry a sample, what was skipped, and what explanation.json says of the run. Raises `DataError` without any entry."""
    first: DataError | InputError | None = None
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model.open(bundle.path, precision=settings.precision))
        reference = stack.enter_context(Model.open(bundle.path, precision="float")) if settings.compare else None
        judge = _Judge(model, settings, reference)
        for source in track(sources, f"explaining by {settings.method}"):
            try:
                answers = judge(source)
            except (DataError, InputError) as error:
                first = first or error
                skipped.append(source.shown)
                say(f"skipped {source.shown}: {error.message}")
                continue
            for name, row, png in answers:
                stem = f"{source.stem}-{name}" if name else source.stem
                named = {"series": name} if name else {}
                rows.append({"source": source.shown, **named, **row, "overlay": pictures.write(stem, png)})
        if not rows:
            kind = settings.modality
            reason, hint = (first.message, first.hint) if first else (f"it holds no {kind.noun}", "")
            message = f"none of {len(sources)} {kind.plural} can be explained; {sources[0].shown}: {reason}"
            raise DataError(message, hint or kind.advice)
        layers = judge.layers()
        return rows, skipped, {**({"layers": layers} if layers else {}), **model.runner.describe()}


def _settings(bundle: Bundle, method: str, label: str | None, precision: str, samples: int, compare: bool) -> Settings:
    """Refuse what cannot work before any sample is read."""
    labels = bundle.manifest.labels
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"choose one of: {', '.join(METHODS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision {precision!r}", f"choose one of: {', '.join(PRECISIONS)}")
    kind = MODALITIES.get(bundle.manifest.task)
    if kind is None or bundle.manifest.preprocessing is None:
        what = "takes raw tensors" if bundle.manifest.preprocessing is None else f"does {bundle.manifest.task}"
        raise UsageError(
            f"{bundle.path} {what}, so there is no sample to explain",
            f"explain is for {', '.join(MODALITIES)}: make one with edgekit train --data SPEC --out B",
        )
    if method not in kind.methods:
        raise UsageError(f"{method} is not for {bundle.manifest.task}", f"choose one of: {', '.join(kind.methods)}")
    if label is not None and label not in labels:
        raise UsageError(f"the model has no class {label!r}", f"choose one of: {', '.join(labels[:12]) or 'none'}")
    if method in ("rollout", "activations") and label is not None:
        raise UsageError(f"{method} is the same for all classes", "leave --label out, or use --method occlusion")
    if method in OF_WEIGHTS:
        if not bundle.has(WEIGHTS) or precision == "int8":
            what = "explains the float weights" if bundle.has(WEIGHTS) else f"needs PyTorch weights, which {bundle.path} lacks"
            raise UsageError(f"{method} {what}", "use --method occlusion or lime: they need only the graph")
        precision = "float"  # score and faithfulness come from the same weights as the map
    if compare:
        _check_compare(bundle, method, precision)
        precision = "int8"
    graph = {"auto": bundle.graph, "float": FLOAT_GRAPH, "int8": INT8_GRAPH}[precision]
    if precision != "auto":
        bundle.file(graph)
    if type(samples) is not int or not 50 <= samples <= 20_000:
        raise UsageError(f"samples: {samples!r} is no number from 50 to 20000", "choose another: --samples 1000")
    return Settings(kind, method, precision, graph, None if label is None else labels.index(label), samples, compare)


def _check_pillow() -> None:
    """What reads and draws pictures comes with several extras: name the one that brings all of `explain`."""
    try:
        importlib.import_module("PIL")
    except ImportError:
        raise MissingExtra("explain", "PIL") from None


def _check_compare(bundle: Bundle, method: str, precision: str) -> None:
    if method not in ("lime", "occlusion"):
        raise UsageError(f"{method} does not ask both graphs", "compare with --method occlusion or lime")
    if precision != "auto":
        raise UsageError(f"--compare explains both graphs, not {precision} alone", "leave --precision out")
    if missing := [name for name in (INT8_GRAPH, FLOAT_GRAPH) if not bundle.has(name)]:
        raise UsageError(
            f"{bundle.path} has no {missing[0]} to compare", f"make a bundle with both: edgekit quantize {bundle.path} --out B"
        )


class _Judge:
    """One source -> of each of its samples the name, a row of figures and the picture."""

    def __init__(self, model: Model, settings: Settings, reference: Model | None = None) -> None:
        self._model, self._settings, self._reference = model, settings, reference
        self._modality = settings.modality(model)
        self._probe: Any = None
        if settings.method == "activations":
            self._probe = importlib.import_module(".activations", __package__).Probe(model.bundle, settings.graph)
        else:
            attribute = importlib.import_module(f".{settings.method}", __package__).attribute
            self._attribute = functools.partial(attribute, samples=settings.samples) if settings.method == "lime" else attribute

    def __call__(self, source: Source) -> list[tuple[str, dict[str, Any], bytes]]:
        samples = [("", source.text)] if source.file is None else self._modality.read(source.file)
        shown = "" if source.file is None else printable(source.file.name)  # a text is its own picture
        return [(name, *self._explain(sample, f"{shown} {name}".strip())) for name, sample in samples]

    def _explain(self, sample: Any, name: str) -> tuple[dict[str, Any], bytes]:
        question = self._modality.question(sample, 0)
        logits = question.logits(question.x)
        best = int(logits[0].argmax())
        score = float(replace(question, target=best).probability(logits)[0])
        question = replace(question, target=best if self._settings.target is None else self._settings.target)
        row: dict[str, Any] = {"label": self._name(best), "score": score}
        caption = f"{_answer(row['label'], score)} · {self._settings.method}"
        if self._probe is not None:
            from . import picture

            maps = self._probe(question.x)
            maps = question.x[0] if maps is None else maps
            return row, picture.sheet(sample, maps, f"{caption}: first feature maps · {name}")
        if question.target != best:
            explained = float(question.probability(logits)[0])
            caption = f"why {_answer(self._name(question.target), explained)}? answer {caption}"
        figures, view, verdict = self._map(question)
        caption += f" · {verdict}"
        row |= {"explained": self._name(question.target), **figures}
        views = [view]
        if self._reference is not None:
            compared, other = self._against(sample, row, view, question.target)
            row["compared"] = compared
            agreement = compared["spearman"]
            caption += "" if agreement is None else f" · Spearman {agreement:.3f}"
            views = [other, view._replace(title=f"int8: {_answer(row['label'], score)}")]
        return row, self._modality.picture(sample, views, f"{caption} · {name}" if name else caption)

    def _map(self, question: Question) -> tuple[dict[str, Any], View, str]:
        """Figures, the map, and what its check says."""
        attribution = self._attribute(question)
        check = faithfulness(question, attribution.heat)
        detail = self._modality.detail(question, attribution)
        view = View("", np.asarray(attribution.heat, np.float32), detail)
        return {**check.figures(), **attribution.figures, **detail}, view, check.words()

    def _against(self, sample: Any, row: dict[str, Any], view: View, target: int) -> tuple[dict[str, Any], View]:
        """The float graph's map of the same class, and what both come to."""
        question = self._modality.question(sample, target, self._reference)
        logits = question.logits(question.x)
        best = int(logits[0].argmax())
        score = float(replace(question, target=best).probability(logits)[0])
        figures, other, _ = self._map(question)
        answer = {"label": self._name(best), "score": score}
        kept = ("label", "score", "deletion_auc", "misplaced_auc", "insertion_auc", "misplaced_insertion_auc")
        compared = {
            "spearman": spearman(other.heat, view.heat),
            "float": {name: {**answer, **figures}[name] for name in kept},
            "int8": {name: row[name] for name in kept},
        }
        return compared, other._replace(title=f"float: {_answer(self._name(best), score)}")

    def layers(self) -> list[dict[str, Any]]:
        return [layer.figures() for layer in self._probe.layers.values()] if self._probe is not None else []

    def _name(self, index: int) -> str:
        labels = self._model.labels
        return labels[index] if index < len(labels) else str(index)


def _answer(label: str, score: float) -> str:
    """In brackets, so that the class 0 of 67.8% is not read as 067.8%."""
    return f"{label} ({score:.1%})"
