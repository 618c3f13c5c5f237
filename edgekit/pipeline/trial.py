"""One trial of `pareto`: a setting, the space that it is drawn from, and the stages that make a bundle of it."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import edgekit
from edgekit.bundle import Bundle
from edgekit.errors import BudgetNotMet, GraphError, UsageError
from edgekit.manifest import ImagePreprocessing, ModelConfig
from edgekit.models.module import create
from edgekit.models.widths import widens
from edgekit.targets import Target
from edgekit.training.fit import FitConfig
from edgekit.training.plan import Plan

from .stopwatch import Stopwatch

__all__ = ["Maker", "Setting", "Space"]

WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5)
SIDES = (0.5, 0.7, 0.85, 1.0, 1.25)  # of the data set's own
KEEPS = (1.0, 0.75, 0.5, 0.25)
#: Of the epochs of a training: a front tries many nets, and ranks them after less than `edgekit.prune` takes by itself.
FINE_TUNING = 0.75


class Setting(NamedTuple):
    """``width``: factor on the preset's channels; ``size``: height and width of pictures in pixels, None for the data's own;
    ``keep``: share of the MACs that pruning leaves, 1 for none; ``precision``: float or int8."""

    width: float
    size: int | None
    keep: float
    precision: str

    def words(self) -> str:
        parts = [f"width {self.width:g}", self.size and f"{self.size} px", self.keep < 1 and f"keep {self.keep:g}"]
        return ", ".join([part for part in parts if part] + [self.precision])


@dataclass(frozen=True)
class Space:
    """What can be tried, an axis a field of `Setting`; the first trial is of ``default``."""

    axes: Mapping[str, tuple[Any, ...]]
    default: Setting

    @classmethod
    def around(cls, plan: Plan, target: Target | None) -> Space:
        """The axes that this model, its data and, where latency is predicted, ``target`` have."""
        own, sizes = _sizes(plan)
        prunes = plan.dataset.task == "image-classification" and _has_inner_layers(plan.module(0))
        int8 = target is None or (target.int8_tops is not None and "int8" in target.precisions)
        axes = {
            "width": WIDTHS if widens(plan.model.name) else (1.0,),
            "size": sizes,
            "keep": KEEPS if prunes else (1.0,),
            "precision": ("float", "int8") if int8 else ("float",),
        }
        return cls(axes, Setting(1.0, own, 1.0, "float"))

    def draw(self, trial: Any) -> Setting:
        """Suggest a value on every axis that has a choice."""
        return self.setting({name: trial.suggest_categorical(name, self.axes[name]) for name in self.params(self.default)})

    def setting(self, params: Mapping[str, Any]) -> Setting:
        return self.default._replace(**params)

    def params(self, setting: Setting) -> dict[str, Any]:
        """`setting` undone."""
        return {name: getattr(setting, name) for name, values in self.axes.items() if len(values) > 1}

    def all(self) -> Iterator[Setting]:
        return itertools.starmap(Setting, itertools.product(*(self.axes[name] for name in Setting._fields)))


def _sizes(plan: Plan) -> tuple[int | None, tuple[int | None, ...]]:
    """(the data's own, all) square sizes around the data's own that the model takes; None alone for what is no square picture
    to classify."""
    spec = plan.preprocessing
    if not isinstance(spec, ImagePreprocessing) or plan.dataset.task != "image-classification" or spec.width != spec.height:
        return None, (None,)
    own, step = spec.height, 4 if spec.height < 64 else 8
    near = {min(max(math.floor(own * share / step + 0.5) * step, 8), 1024) for share in SIDES if share != 1}
    return own, tuple(side for side in sorted({own, *near}) if side == own or _takes(plan, side))


def _takes(plan: Plan, side: int) -> bool:
    """Whether the model can be made for pictures of ``side`` pixels, and run."""
    args = {**plan.model.args, "height": side, "width": side}
    try:
        module = create(ModelConfig(plan.model.name, args)).eval()
        with torch.no_grad():
            module(torch.zeros(1, args["channels"], side, side))
    except (UsageError, RuntimeError, ValueError):
        return False
    return True


def _has_inner_layers(module: nn.Module) -> bool:
    """Whether there is a layer with channels to cut, beside the last, whose outputs are the classes."""
    return sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in module.modules()) > 1


@dataclass(frozen=True)
class Maker:
    """Makes a bundle of a setting and judges it on ``spec``, a ``validation:`` part, so that nothing held out is read.

    ``options`` are those of `edgekit.train` that all trials share; ``target`` is what latency is predicted for, if it is.
    """

    spec: str
    options: Mapping[str, Any]
    config: FitConfig
    target: str | None

    @property
    def fine_tuning(self) -> int:
        return max(1, round(FINE_TUNING * self.config.epochs))

    def make(self, setting: Setting, out: Path) -> Bundle:
        """Train, then prune and quantize where the setting says so; ``out`` is the last bundle, those before lie beside it.

        Raises `GraphError` where this net cannot be pruned or quantized so; else what the stages raise.
        """
        steps = ["trained"] + ["pruned"] * (setting.keep < 1) + ["int8"] * (setting.precision == "int8")
        outs = {step: out if step == steps[-1] else out.with_name(f"{step}.edge") for step in steps}
        stated = {**self.options, "width": setting.width, "size": setting.size}
        bundle = edgekit.train(data=self.spec, out=outs["trained"], **stated)
        try:
            if "pruned" in outs:
                epochs, seed = self.fine_tuning, self.config.seed
                bundle = edgekit.prune(bundle, out=outs["pruned"], keep=setting.keep, epochs=epochs, seed=seed)
            if "int8" in outs:
                bundle = _quantized(bundle, outs["int8"], self.config.seed)
        except UsageError as error:  # of the net, not of the command that is searched with
            raise GraphError(error.message, error.hint) from None
        return bundle

    def judge(self, bundle: Bundle) -> tuple[float, dict[str, Any]]:
        """(accuracy, figures): top-1, or of a reader 1 - character error rate, in ONNX Runtime; what the bundle weighs."""
        judged = edgekit.evaluate(bundle, self.spec, save=True)
        accuracy = max(0.0, 1 - judged["cer"]) if "cer" in judged else judged["top1"]
        found = {name: _newest(bundle, name) for name in ("macs", "parameters")}
        return accuracy, {**found, "size_bytes": bundle.size_bytes(), "int8": judged.get("int8")}

    def latency(self, bundle: Bundle, stopwatch: Stopwatch) -> dict[str, Any]:
        """``latency_ms``, measured here or predicted for the target, and where it comes from."""
        if self.target is None:
            return dict(stopwatch.measure(bundle))
        predicted = edgekit.estimate(bundle, target=self.target)
        return {"latency_ms": predicted["latency_ms"], "runs_as": predicted["precision"]}

    def commands(self, setting: Setting, data: str, name: str) -> list[str]:
        """What makes this setting anew, of all the training split of ``data``."""
        last = f"{name}.edge"
        stated = {**self.options, "width": setting.width if setting.width != 1 else None, "size": setting.size}
        lines = [_command(["train", "--data", data], {**stated, "out": last})]
        for verb, wanted in (("prune", setting.keep < 1), ("quantize", setting.precision == "int8")):
            if wanted:
                out = f"{name}-{'int8' if verb == 'quantize' else 'pruned'}.edge"
                more = {"keep": setting.keep, "epochs": self.fine_tuning} if verb == "prune" else {}
                lines.append(_command([verb, last], {**more, "seed": self.options.get("seed"), "out": out}))
                last = out
        return lines


def _quantized(bundle: Bundle, out: Path, seed: int) -> Bundle:
    try:
        return edgekit.quantize(bundle, out=out, seed=seed)
    except BudgetNotMet:  # written all the same; its accuracy tells
        return Bundle.open(out)


def _newest(bundle: Bundle, name: str) -> int | None:
    return next((entry.figures[name] for entry in reversed(bundle.manifest.history) if entry.figures.get(name)), None)


def _command(words: list[str], options: Mapping[str, Any]) -> str:
    """Options as on the command line; what is None, off or 0 is what would be done anyway."""
    words = ["edgekit", *words]
    for key, value in options.items():
        if value:
            words += [f"--{key.replace('_', '-')}"] + (
                [] if value is True else [f"{value:g}" if isinstance(value, float) else str(value)]
            )
    return shlex.join(words)
