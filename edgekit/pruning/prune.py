"""`prune`: a smaller bundle from a trained one. Cut, fine-tune, export, measure both on the same machine in turn."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import nn

from edgekit.bundle import FLOAT_GRAPH, Bundle, new_path
from edgekit.errors import BudgetNotMet, UsageError
from edgekit.manifest import ModelEdits
from edgekit.models.module import load as load_module
from edgekit.models.module import macs, parameters, write_model
from edgekit.progress import say
from edgekit.targets import target_named

from .groups import Network, analyse
from .importance import importance_named
from .network import layer_of
from .price import LatencyPrice, MacsPrice, Price, RooflinePrice, layer_rows, size_price
from .reach import Meter, reach
from .recover import Recovery
from .resume import Cut, Resume
from .search import Judge, Step, sensitivity, too_narrow
from .sparsity import Mask24, check_exported, maskable, permute_channels
from .table import LatencyTable
from .target import Target, target_of

__all__ = ["prune"]

UNIT = 16


class Options(NamedTuple):
    """What `prune` was asked for, and how."""

    target: Target | None
    on: str
    max_drop: float | None
    sparse: bool
    importance: str
    freeze: tuple[str, ...]
    unit: int
    seed: int
    minutes: float | None

    def record(self) -> dict[str, Any]:
        """For the history; what it has of its own, the target and the seed, is left out."""
        kept = ("on", "max_drop", "importance", "unit")
        return {**{name: getattr(self, name) for name in kept}, "freeze": list(self.freeze)}


def prune(
    bundle: Bundle | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    keep: float | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    size: float | None = None,
    on: str = "onnxruntime",
    max_drop: float | None = None,
    sparsity: str | None = None,
    data: str | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    importance: str = "magnitude",
    freeze: str | Sequence[str] = (),
    unit: int = UNIT,
    seed: int = 0,
) -> Bundle:
    """Remove channels, recurrent units, attention heads and blocks until a target is reached; fine-tune; measure.

    The target is one of ``keep`` (share of the MACs), ``size`` (bytes of float32 weights and buffers), ``speedup`` and
    ``latency_ms`` (of one sample); none: ``keep=0.5``, or no cut with ``sparsity="2:4"``. Latency is measured on ONNX Runtime,
    one thread, or ``on`` a target's name predicted by the roofline model, with float16; both are recorded. What is lost
    least is cut first: KL divergence on training samples over the cost that goes. ``importance`` ranks the channels of a
    group (`CRITERIA`), ``freeze`` names layers (patterns) that keep their width, ``unit`` is what widths are multiples of: 16
    suits a CPU and fp16 tensor cores, 32 those of int8. Then ``epochs`` of fine-tuning (default: as many as the bundle was
    trained for), fewer if these would take longer than what the search for cuts leaves of ``minutes`` (one is done in any
    case), on ``data`` (default: what it was trained on), with the unpruned model as the teacher of a classifier. A stopped
    run goes on from ``OUT.checkpoint``.
    ``max_drop``: points of top-1 (of the character error rate, of readers) on the held-out split that may be lost.
    Raises `BudgetNotMet` (exit 3) where ``speedup``, ``latency_ms`` (by more than 2%, which two measurements of one graph
    differ by) or ``max_drop`` is missed; the best found is written all the same. `UsageError` for a target that cannot be
    reached, `GraphError` for a model that cannot be traced.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    target = new_path(out)
    _check_numbers(sparsity, max_drop, minutes, unit, epochs, seed)
    importance_named(importance)
    wanted = target_of(keep, size, speedup, latency_ms, whole=sparsity is not None)
    options = Options(wanted, on, max_drop, sparsity is not None, importance, _patterns(freeze), unit, seed, minutes)
    roofline = None if on == "onnxruntime" else RooflinePrice(target_named(on), "fp16")
    module = load_module(source)
    _check(source, module, options)
    recovery = Recovery.of(source, data, epochs, seed)
    if minutes is not None and (seconds := recovery.epoch_seconds(module)) > 60 * minutes:
        raise UsageError(f"an epoch takes {seconds:.1f} s, longer than --minutes {minutes:g}", "give more")
    target.parent.mkdir(parents=True, exist_ok=True)
    run = _Run(source, module, recovery, options, Resume(target, _about(source, options, epochs, recovery)), roofline)
    cut = run.fitted(run.cut())
    graph = run.meter.exported(cut.module)
    figures = {**run.figures(cut, graph), "seconds": round(time.perf_counter() - run.started, 1)}
    stated = {"keep": keep, "speedup": speedup, "latency_ms": latency_ms, "size": size, "sparsity": sparsity}
    pruned = _write(target, source, cut, recovery, {**stated, **options.record()}, figures, graph)
    run.resume.forget()
    _gate(pruned, figures, None if roofline else options.target, max_drop)
    return pruned


def _about(source: Bundle, options: Options, epochs: int | None, recovery: Recovery) -> str:
    """What a stopped run must have in common with one that goes on from it: not the epochs that fit into minutes, which are
    timed."""
    return f"{source.digest} {options} {epochs} {replace(recovery.config, epochs=1)} {recovery.dataset.digest}"


def _check_numbers(
    sparsity: str | None, max_drop: float | None, minutes: float | None, unit: int, epochs: int | None, seed: int
) -> None:
    if sparsity not in (None, "2:4"):
        raise UsageError(f"there is no sparsity {sparsity!r}", "the one pattern that tensor cores know is 2:4")
    if max_drop is not None and not (_is_number(max_drop) and 0 <= max_drop <= 100):
        raise UsageError(f"--max-drop {max_drop!r} is no number of points", "give points of top-1, for example 0.5")
    if minutes is not None and not (_is_number(minutes) and 0 < minutes < math.inf):
        raise UsageError(f"--minutes {minutes!r} is no time", "give minutes, for example 10")
    for name, value, least, most in (("unit", unit, 1, 128), ("epochs", epochs, 1, None), ("seed", seed, 0, 2**32 - 1)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
            said = f"from {least} to {most}" if most is not None else f"of {least} or more"
            raise UsageError(f"--{name} {value!r} is out of range", f"give a whole number {said}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _patterns(freeze: object) -> tuple[str, ...]:
    patterns = (freeze,) if isinstance(freeze, str) else tuple(freeze) if isinstance(freeze, Sequence) else (freeze,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(f"--freeze {pattern!r} names no layer", "give names of layers, or patterns")
    return patterns


def _write(
    target: Path,
    source: Bundle,
    cut: Cut,
    recovery: Recovery,
    settings: dict[str, Any],
    figures: dict[str, Any],
    graph: bytes,
) -> Bundle:
    """The pruned module as a bundle that names its parent."""
    model = source.manifest.model
    assert model is not None
    edits = cut.edits if cut.edits != ModelEdits() else msgspec.UNSET
    manifest = msgspec.structs.replace(
        source.manifest,
        name=target.name.removesuffix(".edge"),
        files={},
        model=msgspec.structs.replace(model, edits=edits),
    )
    learnt = {"data": recovery.dataset.spec, **asdict(recovery.config), "data_digest": recovery.dataset.digest}
    entry = source.entry("prune", {**settings, **learnt}, figures)
    return write_model(target, cut.module, recovery.splits.held_out.x, manifest, entry, recovery.tokenizer, graph)


class _Run:
    """One `prune`: the network as it was, what it costs, cutting and fine-tuning."""

    def __init__(
        self,
        source: Bundle,
        module: nn.Module,
        recovery: Recovery,
        options: Options,
        resume: Resume,
        roofline: RooflinePrice | None,
    ) -> None:
        self.recovery, self.options, self.module, self.started = recovery, options, module, time.perf_counter()
        sample = recovery.splits.held_out.x[:1]
        self.example = recovery.samples[:2]
        if len(self.example) < 2:
            raise UsageError(f"{recovery.dataset.spec} has too few samples to train on", "add samples")
        self.meter = Meter(source.file(FLOAT_GRAPH).read_bytes(), sample)
        self.resume = resume
        edits = (source.manifest.model.edits if source.manifest.model else None) or ModelEdits()
        say("finding what goes together")
        self.network = analyse(module, self.example, edits, options.freeze)
        ranked = importance_named(options.importance)
        self.judge = Judge.of(module, recovery.samples, recovery.targets, ranked, recovery.taught)
        self.table, self.roofline = LatencyTable(), roofline
        self.wanted = options.target  # a latency becomes a share of the original's, which is measured beside it
        self.macs, self.parameters = macs(module, self.example), parameters(module)
        self.price = self._price()
        self.whole = self.price(self.network)
        self.before = recovery.judge(module)

    def _price(self) -> Price:
        kind = self.options.target.kind if self.options.target else "macs"
        if kind in ("speedup", "latency") and self.roofline is not None:
            return self.roofline
        if kind in ("speedup", "latency"):
            say("timing layers on ONNX Runtime")
            price = LatencyPrice(self.table)
            if kind == "latency" and self.wanted:
                self.wanted = self.wanted.share(self.meter.compared(self.meter.graph)[0])
            return price.anchored(self.network, 1.0)
        return size_price if kind == "size" else MacsPrice.of(self.network, self.macs)

    def cut(self) -> Cut:
        """The network within the target, before fine-tuning; that of a stopped run, if there is one."""
        kept = self.resume.load(self.module)
        if kept is not None and kept.found:
            self.recovery.config = replace(self.recovery.config, epochs=kept.epochs)
            return kept
        module, edits, steps, predicted = copy.deepcopy(self.module), self.network.edits, list[dict[str, Any]](), None
        if self.wanted is not None:
            network, predicted, steps = self._reached(self.wanted, kept)
            if steps:
                module, edits = network.module, network.edits
            else:
                say(f"nothing is cut: it meets {self.options.target} as it is")
        if self.options.sparse:
            groups = [g for g in analyse(module, self.example).groups if len(g.rows) == 1 and not g.heads]
            channels = [[{a: i.tolist() for a, i in c.slices.items()} for c in g.rows[0]] for g in groups]
            permute_channels(module, channels, self.example, seed=self.options.seed)
        if (minutes := self.options.minutes) is not None:
            self._shorten(module, minutes)
        found = Cut(module, edits, steps, predicted, self.recovery.config.epochs, [])
        self.resume.save(found)
        return found

    def _reached(self, wanted: Target, kept: Cut | None) -> tuple[Network, float | None, list[dict[str, Any]]]:
        """The network that meets ``wanted``, from the cuts of a stopped search on, what it was predicted, and all cuts."""
        network, done = self.network, list[dict[str, Any]]()
        if kept is not None:
            network, done = analyse(kept.module, self.example, kept.edits, self.options.freeze), kept.steps

        def keep(steps: Sequence[Step]) -> None:
            last, rows = steps[-1].network, [*done, *map(_row, steps)]
            self.resume.save(Cut(last.module, last.edits, rows, None, self.recovery.config.epochs, [], found=False))

        reached = reach(network, self.judge, wanted, self.price, self.meter, self.whole, self.options.unit, keep)
        return reached.network, reached.predicted, [*done, *map(_row, reached.steps)]

    def _shorten(self, module: nn.Module, minutes: float) -> None:
        left = 60 * minutes - (time.perf_counter() - self.started)
        fitting = max(int(left / self.recovery.epoch_seconds(module)), 1)
        if fitting < self.recovery.config.epochs:
            say(f"{max(left, 0):.0f} s of {minutes:g} minutes are left for fine-tuning: epochs {fitting}")
            self.recovery.config = replace(self.recovery.config, epochs=fitting)

    def fitted(self, cut: Cut) -> Cut:
        """The same after fine-tuning."""
        mask = Mask24(cut.module, self.example) if self.options.sparse else None
        curve = self.recovery.fit(cut.module, self.resume.fitting, mask)
        return cut._replace(curve=curve, mask=mask)

    def figures(self, cut: Cut, graph: bytes) -> dict[str, Any]:
        """What the pruned model is, beside what it was; ``graph`` is its own. Latencies are taken in turns."""
        judged = self.recovery.judge(cut.module)
        old_ms, new_ms = self.meter.compared(graph)
        after = analyse(cut.module, self.example)
        sparse = {"share": cut.mask.share} if cut.mask else {"share": 0.0}
        if cut.mask:
            sparse |= check_exported(graph, cut.mask)
        now = macs(cut.module, self.example)
        return {
            **judged,
            "drop": self.recovery.drop(self.before, judged),
            "before": {key: self.before[key] for key in ("top1", "cer") if key in self.before},
            "speedup": old_ms / new_ms,
            "latency_before_ms": old_ms,
            "latency_ms": new_ms,
            "latency_predicted_ms": None if cut.predicted is None else cut.predicted * old_ms,
            "macs": now,
            "macs_share": now / self.macs,
            "parameters": parameters(cut.module),
            "parameters_before": self.parameters,
            "cuts": cut.steps,
            "layers": layer_rows(self.network, after, self.table),
            "kept": {**too_narrow(self.network, self.options.unit), **self.network.kept},
            "sensitivity": sensitivity(self.network, self.judge, self.options.unit),
            "sparse_share": float(sparse["share"]),
            "sparse_layers": int(sparse.get("layers", 0)),
            "device": self.table.device,
            **self._predicted(after),
            "curve": cut.curve,
        }

    def _predicted(self, after: Network) -> dict[str, Any]:
        """Milliseconds on the named target, by the roofline."""
        if self.roofline is None:
            return {}
        before_ms, ms = self.roofline(self.network), self.roofline(after)
        named = {"target": self.roofline.target.name, "precision": self.roofline.precision, "prediction": True}
        return {"on": {**named, "before_ms": before_ms, "ms": ms, "speedup": before_ms / ms}}


def _check(source: Bundle, module: nn.Module, options: Options) -> None:
    """Raises `UsageError` for what no training would make possible."""
    if (former := source.last("prune")) and former.figures.get("sparse_layers") and not options.sparse:
        say("its 2:4 zeros are trained away: --sparsity 2:4 keeps the pattern")
    layers = sorted({layer_of(name) for name, _ in module.named_parameters()})
    names = [name for name, _ in module.named_modules() if name]
    for pattern in options.freeze:
        if not fnmatch.filter([*layers, *names], pattern):
            near = difflib.get_close_matches(pattern, [*layers, *names], n=3, cutoff=0.4) or layers
            raise UsageError(f"--freeze {pattern}: there is no such layer", f"layers are: {', '.join(near[:8])}")
    if options.sparse and not maskable(module):
        raise UsageError("no layer has input channels in multiples of four: none can be 2:4", "leave --sparsity out")


def _row(step: Step) -> dict[str, Any]:
    return {"layer": step.name, "kind": step.kind, "before": step.before, "after": step.after, "kl": step.kl}


def _gate(bundle: Bundle, figures: dict[str, Any], target: Target | None, max_drop: float | None) -> None:
    result = {"bundle": str(bundle.path), **{k: figures[k] for k in ("top1", "drop", "speedup", "macs", "parameters")}}
    if max_drop is not None and figures["drop"] > max_drop + 1e-6:
        what = "the character error rate rose" if "cer" in figures else "top-1 fell"
        raise BudgetNotMet(
            f"{what} by {figures['drop']:.2f} points, allowed {max_drop:g}; {bundle.path} is the best found",
            "keep more, or fine-tune longer (--epochs)",
            result,
        )
    if target is not None and target.kind == "speedup" and figures["speedup"] < 0.98 / target.value:
        raise BudgetNotMet(
            f"{bundle.path}, the best found, is {figures['speedup']:.2f}x faster, asked {1 / target.value:g}x",
            "measure on an idle machine, or ask for less",
            result,
        )
    if target is not None and target.kind == "latency" and figures["latency_ms"] > target.value * 1.02:
        raise BudgetNotMet(
            f"the pruned model takes {figures['latency_ms']:.3f} ms, asked {target.value:g}; {bundle.path} is the best found",
            "measure on an idle machine, or ask for less",
            result,
        )
