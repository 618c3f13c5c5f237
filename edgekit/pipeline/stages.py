"""The stages of a recipe: each names a verb and its options. A new stage is a struct here and a name in `AnyStage`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

import edgekit
from edgekit.compiler import parse_batch
from edgekit.data import SOURCES, find, load
from edgekit.data.samples import write_samples
from edgekit.errors import DataError, UsageError
from edgekit.explanation import RECORD
from edgekit.files import sha256_file
from edgekit.models import DEFAULT, check_model, is_custom, trust
from edgekit.runtime.model import Precision
from edgekit.targets import buildable

from .stage import Context, Made, Stage, staging_name

__all__ = [
    "Bench",
    "Build",
    "Eval",
    "Explain",
    "Making",
    "Prune",
    "Quantize",
    "Report",
    "Samples",
    "Scan",
    "Train",
]


Positive = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 32)]
Backend = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]
Names = Annotated[tuple[str, ...], Meta(min_length=1)]


def _check_data(spec: str | None) -> None:
    if not spec:
        raise UsageError("there is no data", 'add data = "digits" at the top, or to the stage')
    find(spec)


class Making(Stage, frozen=True):
    """A stage that makes the bundle ``out``."""

    out: str

    def label(self) -> str:
        return f"{type(self).__name__.lower()} {self.out}"

    def claims(self) -> tuple[str, ...]:
        return (f"{self.out}.edge",)


class Train(Making, frozen=True):
    data: str | None = None
    model: str | None = None
    epochs: Positive | None = None
    batch: Annotated[int, Meta(ge=2)] | None = None
    lr: Annotated[float, Meta(gt=0, lt=10)] | None = None
    size: Annotated[int, Meta(ge=8, le=1024)] | None = None
    width: Annotated[float, Meta(ge=0.1, le=4)] | None = None
    seed: Seed | None = None
    augment: str | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    weight_decay: Annotated[float, Meta(ge=0, le=10)] | None = None
    smoothing: Annotated[float, Meta(ge=0, lt=1)] | None = None
    validation: Annotated[float, Meta(ge=0, lt=1)] | None = None
    patience: Annotated[int, Meta(ge=0)] | None = None
    balance: bool | None = None
    teacher: str | None = None

    def bundles_read(self) -> tuple[str, ...]:
        return (self.teacher,) if self.teacher else ()

    def check(self, data: str | None) -> None:
        _check_data(self.data or data)
        check_model(self.model or DEFAULT)
        if self.model is not None and is_custom(self.model):
            trust(self.model)  # the recipe is the user's word; later stages load what this one makes
        if self.model is not None and self.model.startswith("hf:") and not Path(self.model[3:]).is_dir():
            raise DataError(f"there is no folder {self.model[3:]}", "hf:FOLDER wants a Hugging Face checkpoint on disk")

    def contents_read(self, context: Context) -> dict[str, str]:
        return {
            "data": context.content(self.data or context.data),
            "model": context.content(self.model[3:]) if self.model and self.model.startswith("hf:") else "",
            "seed": str(context.seed if self.seed is None else self.seed),
        }

    def run(self, context: Context) -> Made:
        options = {"data": context.data, "seed": context.seed, **self.options("out", "teacher")}
        if self.teacher:
            options["teacher"] = context.bundle(self.teacher)
        made = edgekit.train(out=context.path(self.out), **options)
        return Made([f"{self.out}.edge"], {"top1": made.manifest.history[-1].figures["top1"]})


class Prune(Making, frozen=True):
    bundle: str
    keep: Annotated[float, Meta(gt=0, le=1)] | None = None
    speedup: Annotated[float, Meta(gt=1, le=100)] | None = None
    latency_ms: Annotated[float, Meta(gt=0)] | None = None
    size: Annotated[float, Meta(gt=0)] | None = None
    on: str | None = None
    max_drop: Annotated[float, Meta(ge=0, le=100)] | None = None
    importance: str | None = None
    freeze: tuple[str, ...] | None = None
    unit: Positive | None = None
    minutes: Annotated[float, Meta(gt=0)] | None = None
    sparsity: Literal["2:4"] | None = None
    data: str | None = None
    epochs: Positive | None = None
    seed: Seed | None = None

    def bundles_read(self) -> tuple[str, ...]:
        return (self.bundle,)

    def check(self, data: str | None) -> None:
        if len(stated := [n for n in ("keep", "speedup", "latency_ms", "size") if getattr(self, n) is not None]) > 1:
            raise UsageError(f"{' and '.join(stated)} are both stated", "state one of them")
        if self.data:
            find(self.data)

    def contents_read(self, context: Context) -> dict[str, str]:
        seed = context.seed if self.seed is None else self.seed
        return {"data": context.content(self.data), "seed": str(seed)}

    def run(self, context: Context) -> Made:
        options = {"seed": context.seed, **self.options("bundle", "out")}
        made = edgekit.prune(context.bundle(self.bundle), out=context.path(self.out), **options)
        return Made([f"{self.out}.edge"], {"top1": made.manifest.history[-1].figures["top1"]})


class Quantize(Making, frozen=True):
    bundle: str
    calib: str | None = None
    max_drop: Annotated[float, Meta(ge=0, le=100)] | None = None
    min_snr: Annotated[float, Meta(ge=0, le=200)] | None = None
    share: Annotated[float, Meta(ge=0, le=1)] | None = None
    method: Literal["auto", "mse", "entropy", "percentile", "minmax"] | None = None
    samples: Positive | None = None
    data: str | None = None
    seed: Seed | None = None

    def check(self, data: str | None) -> None:
        if sum(value is not None for value in (self.max_drop, self.min_snr, self.share)) > 1:
            raise UsageError("max_drop, min_snr and share: more than one is stated", "state one budget")
        for spec in (self.calib, self.data):
            if spec is not None and (spec is self.data or spec.partition(":")[0] in SOURCES):
                find(spec)

    def paths_read(self) -> tuple[str | None, ...]:
        return (None if self.calib is None or self.calib.partition(":")[0] in SOURCES else self.calib,)

    def bundles_read(self) -> tuple[str, ...]:
        return (self.bundle,)

    def contents_read(self, context: Context) -> dict[str, str]:
        seed = context.seed if self.seed is None else self.seed
        return {"calib": context.content(self.calib), "data": context.content(self.data), "seed": str(seed)}

    def run(self, context: Context) -> Made:
        options = {"seed": context.seed, **self.options("bundle", "out")}
        edgekit.quantize(context.bundle(self.bundle), out=context.path(self.out), **options)
        return Made([f"{self.out}.edge"], {})


class Eval(Stage, frozen=True):
    bundles: Names
    data: str | None = None
    backend: Backend | None = None

    def label(self) -> str:
        return " ".join(["eval", *self.bundles, *(f"{k}={v}" for k, v in self.options("bundles").items())])

    def bundles_read(self) -> tuple[str, ...]:
        return self.bundles

    def check(self, data: str | None) -> None:
        _check_data(self.data or data)

    def intact(self, context: Context) -> bool:
        """A bundle that was made again has no figures, though it is the same model."""
        data = self.data or context.data
        bundles = [context.bundle(name) for name in self.bundles]
        judged = [
            any(e.stage == "eval" and e.parent == b.digest and e.config.get("data") == data for e in b.manifest.history)
            for b in bundles
        ]
        return all(judged)

    def contents_read(self, context: Context) -> dict[str, str]:
        return {"data": context.content(self.data or context.data)}

    def run(self, context: Context) -> Made:
        options = {"data": context.data, **self.options("bundles")}
        found = {name: edgekit.evaluate(context.bundle(name), save=True, **options)["top1"] for name in self.bundles}
        return Made([], found)


class Build(Stage, frozen=True):
    bundle: str
    target: str
    precision: Literal["fp32", "fp16", "int8", "best"] | None = None
    batch: str | None = None

    always = True  # `build` has a cache of its own, which knows TensorRT's version as well

    def check(self, data: str | None) -> None:
        buildable(self.target)
        parse_batch(self.batch)

    def label(self) -> str:
        return f"build {self.bundle} for {self.target}"

    def bundles_read(self) -> tuple[str, ...]:
        return (self.bundle,)

    def run(self, context: Context) -> Made:
        built = edgekit.build(context.bundle(self.bundle), **self.options("bundle"))
        file = built.engine or built.kit
        return Made([str(Path(file).relative_to(context.folder))] if file else [], built.figures(), built.cached)


class Bench(Stage, frozen=True):
    bundles: Names
    scenario: Literal["single-stream", "offline", "server"] | None = None
    seconds: Annotated[float, Meta(ge=0.01, le=3600)] | None = None
    threads: Annotated[int, Meta(ge=0, le=1024)] | None = None
    backend: Backend | None = None
    precision: Precision | None = None
    batch: Positive | None = None
    rate: Annotated[float, Meta(gt=0, le=1e6)] | None = None

    def check(self, data: str | None) -> None:
        if self.rate is not None and self.scenario != "server":
            raise UsageError("a rate is for the server scenario", 'add scenario = "server"')
        if self.batch is not None and self.scenario != "offline":
            raise UsageError("a batch is for the offline scenario", 'add scenario = "offline"')

    def label(self) -> str:
        return " ".join(["bench", *self.bundles, *(f"{k}={v}" for k, v in self.options("bundles", "seconds").items())])

    def bundles_read(self) -> tuple[str, ...]:
        return self.bundles

    def run(self, context: Context) -> Made:
        files, figures = [], {}
        for name in self.bundles:
            result = edgekit.bench(context.bundle(name), **self.options("bundles"))
            files.append(str(Path(result["file"]).relative_to(context.folder)))
            figures[name] = {key: result["latency_ms"][key] for key in ("p50", "p99")}
            figures[name]["trustworthy"] = result["trustworthy"]
        return Made(files, figures)


class Samples(Stage, frozen=True):
    """Held-out pictures as files."""

    out: str
    count: Positive = 20
    data: str | None = None

    def label(self) -> str:
        return f"samples {self.out}"

    def claims(self) -> tuple[str, ...]:
        return (staging_name(self.out),)

    def check(self, data: str | None) -> None:
        _check_data(self.data or data)

    def contents_read(self, context: Context) -> dict[str, str]:
        return {"data": context.content(self.data or context.data)}

    def run(self, context: Context) -> Made:
        with context.staging(self.out) as work:
            paths = write_samples(load(str(self.data or context.data)), work, self.count)
        return Made([f"{self.out}/{path.name}" for path in paths], {})


class Explain(Stage, frozen=True):
    bundle: str
    images: str
    out: str
    method: Literal["activations", "gradcam", "lime", "occlusion", "rollout"] | None = None
    label_: str | None = msgspec.field(name="label", default=None)
    samples: Annotated[int, Meta(ge=50, le=20_000)] | None = None
    precision: Precision | None = None

    def label(self) -> str:
        return f"explain {self.out}"

    def claims(self) -> tuple[str, ...]:
        return (staging_name(self.out), f"{self.out}/{RECORD}")

    def check(self, data: str | None) -> None:
        if self.method in ("gradcam", "rollout") and self.precision == "int8":
            raise UsageError(f"{self.method} explains the float weights", "leave precision out, or choose occlusion or lime")

    def paths_read(self) -> tuple[str | None, ...]:
        return (self.images,)

    def bundles_read(self) -> tuple[str, ...]:
        return (self.bundle,)

    def contents_read(self, context: Context) -> dict[str, str]:
        return {"images": context.content(self.images)}

    def run(self, context: Context) -> Made:
        options = self.options("bundle", "images", "out", "label_") | ({"label": self.label_} if self.label_ else {})
        with context.staging(self.out) as work:
            answer = edgekit.explain(context.bundle(self.bundle), [context.resolve(self.images)], out=work, **options)
        names = [*(image["overlay"] for image in answer["images"]), RECORD]
        return Made([f"{self.out}/{name}" for name in names], {})


class Report(Stage, frozen=True):
    bundles: Names
    out: str = "report.html"
    explanations: str | None = None

    def label(self) -> str:
        return f"report {self.out}"

    def claims(self) -> tuple[str, ...]:
        return (self.out,)

    def paths_read(self) -> tuple[str | None, ...]:
        return (self.explanations,)

    def bundles_read(self) -> tuple[str, ...]:
        return self.bundles

    def contents_read(self, context: Context) -> dict[str, str]:
        """The page shows derived files and history as well: the whole manifest counts."""
        shown = {name: sha256_file(context.path(name) / "manifest.json") for name in self.bundles}
        return {**shown, "explanations": context.content(self.explanations)}

    def run(self, context: Context) -> Made:
        explanations = context.resolve(self.explanations) if self.explanations else None
        page = context.folder / self.out
        edgekit.report([context.bundle(name) for name in self.bundles], out=page, explanations=explanations)
        return Made([self.out], {"report": str(page)})


class Scan(Stage, frozen=True):
    bundle: str
    source: Annotated[str, Meta(min_length=1)]
    codes: bool | None = None
    out: str = "scan.jsonl"

    always = True  # the point of it is to see the runtime answer

    def label(self) -> str:
        return f"scan {self.source} with {self.bundle}"

    def paths_read(self) -> tuple[str | None, ...]:
        return (self.source,)

    def claims(self) -> tuple[str, ...]:
        return (self.out,)

    def bundles_read(self) -> tuple[str, ...]:
        return (self.bundle,)

    def run(self, context: Context) -> Made:
        from edgekit.scanner import scan

        events = context.folder / self.out
        source = str(context.resolve(self.source))
        summary = scan(context.bundle(self.bundle), source=source, sinks=[f"jsonl:{events}"], codes=bool(self.codes))
        if not summary.inferred:
            raise DataError(
                f"none of the {summary.captured} images in {source} could be read", "see the reasons in " + str(events)
            )
        lines = events.read_text(encoding="utf-8").splitlines()
        for line in lines:
            json.loads(line)
            if context.on_event:
                context.on_event(line)
        return Made([self.out], {"captured": summary.captured, "inferred": summary.inferred, "events": str(events)})
