"""Other ways to a faster net, each held to edgekit's own fine-tuning: Torch-Pruning's cuts, a small net from scratch.

A peer's one knob (the pruning ratio, the width) is turned by measured speed, not by its own measure: the first net that is
as fast as wanted is the one that is fine-tuned, so that all stand side by side at the same latency; where no setting gets
there, the fastest net is taken. `pruning.py` calls this.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.manifest import ModelConfig
from edgekit.models import preset_named
from edgekit.models.export import export_onnx
from edgekit.models.module import create, macs, parameters, write_model
from edgekit.models.module import load as load_module
from edgekit.pruning.latency import paired_latency
from edgekit.pruning.recover import Recovery
from edgekit.runtime.golden import load_golden
from edgekit.training.objective import Distillation

#: Of the wanted speedup, which two measurements of one graph differ by. edgekit's own gate allows as much.
TOLERANCE = 0.98
RATIOS = [round(0.02 * i, 2) for i in range(1, 49)]
MULTIPLIERS = [round(1 - 0.05 * i, 2) for i in range(1, 19)]


class Unreached(Exception):
    """No setting of a peer's knob makes the net faster."""


class Case:
    """A trained classifier of pictures, and what edgekit fine-tunes its pruned nets with."""

    def __init__(self, path: Path, data: str) -> None:
        self.bundle, self.data = Bundle.open(path), data
        self.graph = self.bundle.file(FLOAT_GRAPH).read_bytes()
        assert self.bundle.manifest.model is not None
        self.model = self.bundle.manifest.model
        self.preset = preset_named(self.model.name)
        trained = self.bundle.last("train")
        assert trained is not None
        self.epochs, self.macs = trained.config["epochs"], trained.figures["macs"]
        self.sample = load_golden(self.bundle)[0]["x"][:1]

    def module(self) -> nn.Module:
        return load_module(self.bundle)

    @functools.cached_property
    def _recovery(self) -> Recovery:
        return Recovery.of(self.bundle, self.data, 1, 0)

    def recovery(self, seed: int, fresh: bool) -> Recovery:
        """edgekit's own loss, teacher, rate and augmentation; for a net with ``fresh`` weights the preset's rate, and as much
        of the teacher as `train` takes."""
        found = self._recovery
        if fresh:
            objective = found.objective
            assert isinstance(objective, Distillation)
            objective = Distillation(objective.inner, objective.teacher, objective.teacher_digest)
            return replace(found, config=replace(found.config, seed=seed, lr=self.preset.lr), objective=objective)
        return replace(found, config=replace(found.config, seed=seed))

    def speedup(self, module: nn.Module) -> float:
        """Of an export of ``module`` over the base, both timed in turns."""
        graph = export_onnx(module, torch.from_numpy(np.repeat(self.sample, 2, 0)))
        before, after = paired_latency(self.graph, graph, self.sample)
        return before / after


@dataclass(frozen=True)
class Candidate:
    """A net before fine-tuning: ``knob`` is the setting that made it, ``config`` what a bundle says of it.

    ``fresh``: its weights are not trained.
    """

    module: nn.Module
    knob: dict[str, Any]
    config: ModelConfig
    fresh: bool = False


def candidates(case: Case, tool: str) -> Iterator[Candidate]:
    """Nets of ``tool``, those first that are cut least."""
    if tool.startswith("scratch"):
        return small_nets(case)
    kind = re.fullmatch(r"tp-(uniform|global)(?:-(\d+))?", tool)
    assert kind is not None, tool
    return torch_pruning(case, kind[1] == "global", int(kind[2]) if kind[2] else None)


def torch_pruning(case: Case, whole: bool, round_to: int | None) -> Iterator[Candidate]:
    """Magnitude pruning (L1) in one step, the classifier kept; ``whole``: ranked over all layers, else in each."""
    import torch_pruning as tp  # a peer's package: edgekit's own row does without

    base = case.module()
    classifier = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    example = torch.from_numpy(np.repeat(case.sample, 2, 0))
    for ratio in RATIOS:
        module = copy.deepcopy(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                module,
                example,
                importance=tp.importance.MagnitudeImportance(p=1),
                global_pruning=whole,
                pruning_ratio=ratio,
                round_to=round_to,
                ignored_layers=[module.get_submodule(classifier)],
            )
            pruner.step()
        yield Candidate(module, {"ratio": ratio}, case.model)


def small_nets(case: Case) -> Iterator[Candidate]:
    """The preset at smaller widths in multiples of 8 or 16, by falling multiply-accumulates, with fresh weights."""
    home, _, name = case.preset.home.partition(":")
    signature = inspect.signature(getattr(__import__(home, fromlist=[name]), name)).parameters
    own = {key: case.model.args.get(key, signature[key].default) for key in ("widths", "head") if key in signature}
    found: dict[str, tuple[int, ModelConfig, dict[str, Any]]] = {}
    for multiplier in MULTIPLIERS:
        for unit in (8, 16):
            args = {key: _scaled(value, multiplier, unit) for key, value in own.items()}
            config = ModelConfig(case.model.name, {**case.model.args, **args})
            work = macs(create(config), torch.from_numpy(case.sample))
            found.setdefault(repr(args), (work, config, args))
    for _, config, args in sorted(found.values(), key=lambda item: -item[0]):
        yield Candidate(create(config), args, config, fresh=True)


def _scaled(value: Any, multiplier: float, unit: int) -> Any:
    if isinstance(value, int):
        return max(unit, round(value * multiplier / unit) * unit)
    return [_scaled(width, multiplier, unit) for width in value]


def fast_enough(case: Case, tool: str, wanted: float, knob: dict[str, Any] | None) -> Candidate:
    """The first of the tool's nets whose measured speedup is ``wanted``, else its fastest; or what ``knob`` made before.

    Raises `Unreached` where none is faster than the base.
    """
    seen: set[tuple[tuple[int, ...], ...]] = set()
    best, fastest = 1.0, None
    for candidate in candidates(case, tool):
        if knob is not None:
            if candidate.knob == knob:
                return candidate
            continue
        shapes = tuple(tuple(p.shape) for p in candidate.module.parameters())
        if shapes in seen:
            continue
        seen.add(shapes)
        found = case.speedup(candidate.module)
        print(f"  {tool} {candidate.knob}: {found:.2f}x", flush=True)
        if found >= wanted * TOLERANCE:
            return candidate
        if found > best:
            best, fastest = found, candidate
    if fastest is None:
        raise Unreached("no setting of it is faster than the base")
    return fastest


def make(
    case: Case, tool: str, wanted: float, epochs: int, seed: int, target: Path, knob: dict[str, Any] | None
) -> dict[str, Any]:
    """Cut, fine-tune and write one peer's bundle at ``target``; what it was made with.

    ``knob``: of an earlier seed, so that one net is fine-tuned with several seeds. Raises `Unreached`.
    """
    candidate = fast_enough(case, tool, wanted, knob)
    module = candidate.module
    if candidate.fresh:
        torch.manual_seed(seed)
        module = create(candidate.config)
    length = epochs + (case.epochs if tool == "scratch-long" else 0)
    recovery = case.recovery(seed, candidate.fresh)
    recovery.config = replace(recovery.config, epochs=length)
    started = time.perf_counter()
    checkpoint = target.with_name(f"{target.name}.checkpoint")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    curve = recovery.fit(module, checkpoint)
    seconds = round(time.perf_counter() - started, 1)
    settings = {"data": case.data, "data_digest": recovery.dataset.digest, "tool": tool, "seed": seed}
    manifest = msgspec.structs.replace(
        case.bundle.manifest, name=target.name.removesuffix(".edge"), files={}, model=candidate.config
    )
    entry = case.bundle.entry("prune", settings, {"curve": curve})
    write_model(target, module, recovery.splits.held_out.x, manifest, entry)
    checkpoint.unlink(missing_ok=True)
    work = macs(module, torch.from_numpy(case.sample))
    return {
        "knob": candidate.knob,
        **({"torch_pruning": version("torch-pruning")} if tool.startswith("tp") else {}),
        "lr": recovery.config.lr,
        "teacher": recovery.objective.share if isinstance(recovery.objective, Distillation) else 0,
        "fitted_epochs": length,
        "macs": work,
        "macs_share": work / case.macs,
        "parameters": parameters(module),
        "seconds": seconds,
    }
