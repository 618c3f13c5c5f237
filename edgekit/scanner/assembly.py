"""The parts of a scan, opened as its config says; an `ExitStack` closes them in the other order."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.bundle import Bundle
from edgekit.errors import BundleError, EdgekitError, UsageError
from edgekit.installed import CURRENT, SLOTS
from edgekit.progress import say
from edgekit.runtime import Model

from .batching import fastest_batch, refuse_fixed_batch
from .codes import CodeReader
from .config import ModelOptions, ScanConfig
from .outbox import Outbox, default_outbox
from .promotion import keep_promoted, promoted_file, read_promoted
from .reading import FrameModel, Reading
from .sinks import Sink, open_sink
from .sinks.forward import ForwardSink
from .sources import open_source, open_sources
from .sources.address import LIVE, kind_of, shown
from .sources.frames import frames_of
from .steps import Step
from .steps.crosscheck import CrossCheck
from .steps.drift import Drift
from .steps.duplicates import Duplicates
from .steps.harvest import Harvest
from .steps.incident import Incidents
from .steps.ring import Ring
from .steps.selftest import SelfTest
from .steps.shadow import Shadow, ShadowedModel, ShadowOptions
from .steps.triggers import Trigger
from .steps.votes import Votes
from .stop import Stop
from .trigger_inputs import open_trigger_input

__all__ = ["Parts", "assemble"]

#: Less free disk than this, and events may soon find no place.
LEAST_FREE = 1 << 20


@dataclass
class Parts:
    source: Iterable[Any] = ()
    reading: Reading | None = None
    steps: list[Step] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    outbox: Outbox | None = None
    batch: int = 1
    #: What `Summary.model` tells.
    model: dict[str, Any] = field(default_factory=dict)

    def running_model(self) -> dict[str, Any]:
        """`model`, with what a promotion changed."""
        running = self.reading.model if self.reading else None
        if not self.model or running is None:
            return self.model
        bundle = running.bundle
        return {**self.model, "bundle": os.fspath(bundle.path), "digest": bundle.digest}

    def reasons(self, figures: dict[str, Any]) -> list[str]:
        """Why the scan is not ready, from its figures and its disk."""
        rows = [row for row in figures["sources"] if row.get("state", "up") not in ("up", "ended", "removed")]
        found = [f"{row['source']} is {row['state']}" + (f": {row['reason']}" if row.get("reason") else "") for row in rows]
        found += [f"the {row['step']} failed" for row in figures["steps"] if row.get("healthy") is False]
        inputs = [each for row in figures["steps"] for each in row.get("inputs", ())]
        found += [f"no triggers come from {each['input']}" for each in inputs if each.get("subscribed") is False]
        if self.outbox is not None:
            folder = self.outbox.path.parent
            if not os.access(folder, os.W_OK):
                found.append(f"the outbox cannot write to {folder}")
            elif shutil.disk_usage(folder).free < LEAST_FREE:
                found.append(f"the outbox's disk is full: {folder}")
        return found


def assemble(config: ScanConfig, stack: contextlib.ExitStack, stop: Stop, frames: Iterable[Any] | None = None) -> Parts:
    """Open models, codes and steps, then the sources, so that no frame waits for a model that loads, then the sinks.

    ``frames`` take the place of the config's sources. Raises whatever one of them raises; the stack closes the others.
    """
    parts = Parts()
    opened = _model(config, stack, parts)
    sources = () if frames is not None else config.source
    cameras = [source.name or shown(source.address) for source in sources if kind_of(source.address)]
    if opened is not None:
        parts.batch, measured = fastest_batch(opened, len(cameras))
        parts.model |= {"batch": parts.batch} | ({"ms_a_frame": measured} if measured else {})
    model: FrameModel | None = opened
    if opened is not None and config.shadow is not None and config.model is not None:
        model = _shadowed(config, config.model, config.shadow, opened, parts)
        stack.callback(model.close)
    parts.reading = _reading(config, stack, model)
    parts.source = frames_of(frames) if frames is not None else _source(config, stop)
    if close := getattr(parts.source, "close", None):
        stack.callback(close)
    parts.sinks = _sinks(config, stack, parts, stop)
    parts.steps = _steps(config, parts, model, cameras)
    if config.incidents is not None:  # first to see what comes, last to see what is sent
        incidents = Incidents(config.incidents)
        incidents.watch(parts.reading, parts.steps, config)
        parts.steps.insert(0, incidents)
        parts.sinks.append(incidents)
    for trigger in [step for step in parts.steps if isinstance(step, Trigger)]:
        for address in trigger.options.inputs:
            opened_input = open_trigger_input(address, trigger.fire)
            stack.callback(opened_input.close)
            trigger.inputs.append(opened_input.status)
    return parts


def _steps(config: ScanConfig, parts: Parts, model: FrameModel | None, cameras: list[str]) -> list[Step]:
    """In their order: what looks at single frames stands before the trigger, which makes one event of several."""
    region = config.region.region() if config.region else None
    shadowed = model if isinstance(model, ShadowedModel) else None
    steps: list[Step] = []
    if shadowed is not None:
        steps.append(Shadow(shadowed, region))
    if config.selftest is not None:
        steps.append(SelfTest(model, config.selftest))
    if config.drift is not None and model is not None:
        steps.append(Drift(model, config.drift, region))
    if config.harvest is not None:
        harvest = Harvest(config.harvest, shadowed, region)
        steps.append(harvest)
        parts.sinks.append(harvest)
    if config.votes is not None:
        steps.append(Votes(config.votes))
    trigger = Trigger(config.trigger, cameras=cameras) if config.trigger else None
    if trigger is not None:
        steps.append(trigger)
    if config.crosscheck is not None:
        steps.append(CrossCheck(config.crosscheck))
    if config.duplicates is not None:
        steps.append(Duplicates(config.duplicates))
    if config.ring is not None:
        steps.append(Ring(config.ring, trigger.picture) if trigger else Ring(config.ring))
    return steps


def _model(config: ScanConfig, stack: contextlib.ExitStack, parts: Parts) -> Model | None:
    options = config.model
    if options is None:
        return None
    with _cured(options.bundle):
        model = _promoted(config, options, stack) or stack.enter_context(_of(options, options.bundle))
    refuse_fixed_batch(model)
    parts.model = _about(model)
    return model


def _of(options: ModelOptions, bundle: Bundle | str) -> Model:
    return Model.open(bundle, options.backend, precision=options.precision, threads=options.threads)


@contextlib.contextmanager
def _cured(bundle: str) -> Iterator[None]:
    """What is wrong with an installed bundle, with the cure that a device has."""
    try:
        yield
    except BundleError as error:
        root = Path(bundle).parent
        if Path(bundle).name != CURRENT or not (root / SLOTS).is_dir():
            raise
        cure = f"edgekit status --root {root} shows what else is there; edgekit rollback --root {root}, or install again"
        raise BundleError(error.message, cure) from None


def _about(model: Model) -> dict[str, Any]:
    return {"bundle": os.fspath(model.bundle.path), "digest": model.bundle.digest, "backend": model.runner.name}


def _promoted(config: ScanConfig, options: ModelOptions, stack: contextlib.ExitStack) -> Model | None:
    """The model that an earlier scan ended with; None, said where it is gone, for the configured one."""
    if config.shadow is None:
        return None
    kept = promoted_file(config.shadow.kept, config.shadow.candidate, options.bundle)
    bundle, why = read_promoted(kept, Bundle.open(options.bundle, verify=False))
    if bundle is not None:
        try:
            model = stack.enter_context(_of(options, bundle))
        except EdgekitError as error:
            why = error.message
        else:
            say(f"the scan begins with {bundle.path}, which was promoted in the place of {options.bundle}")
            return model
    if why:
        say(f"the bundle that was promoted cannot run ({why}); the scan begins with {options.bundle}", level="warning")
    return None


def _shadowed(config: ScanConfig, options: ModelOptions, shadow: ShadowOptions, model: Model, parts: Parts) -> ShadowedModel:
    configured = Bundle.open(options.bundle, verify=False).digest
    kept = promoted_file(shadow.kept, shadow.candidate, options.bundle)

    def adopted(fresh: Model) -> None:
        parts.model |= _about(fresh)
        if why := keep_promoted(kept, fresh.bundle, configured):
            say(f"a restarted scan will not know what was promoted ({why})", level="warning")

    how: Any = {"backend": options.backend, "precision": options.precision, "threads": options.threads}
    return ShadowedModel(model, shadow, adopted=adopted, **how)


def _reading(config: ScanConfig, stack: contextlib.ExitStack, model: FrameModel | None) -> Reading:
    codes: CodeReader | None = None
    if config.codes is not None:
        live = not config.source or any(kind_of(source.address) in {"pattern", *LIVE} for source in config.source)
        codes = CodeReader(config.codes.budget(live), config.codes.formats or None)
    text: Model | None = None
    if found := config.text:
        with _cured(found.bundle):
            text = Model.open(found.bundle, found.backend, precision=found.precision, threads=found.threads, beam=found.beam)
        refuse_fixed_batch(stack.enter_context(text))
    line = config.text.line() if config.text else None
    return Reading(model, codes, text, config.region.region() if config.region else None, line)


def _sinks(config: ScanConfig, stack: contextlib.ExitStack, parts: Parts, stop: Stop) -> list[Sink]:
    def the_outbox() -> Outbox:
        if parts.outbox is None:
            parts.outbox = Outbox(config.outbox.path or default_outbox(), config.outbox.limits())
            stack.callback(parts.outbox.close)
        return parts.outbox

    targets: list[Sink] = []
    for options in config.sink:
        sink = open_sink(options.address, the_outbox)
        if isinstance(sink, ForwardSink):
            sink.stop = stop
        stack.callback(sink.close)
        if any(_place(sink) == _place(other) for other in targets):
            raise UsageError(f"the sink {sink.name} is named twice", "name each sink once")
        targets.append(sink)
    if parts.outbox is not None:
        for name, count in parts.outbox.others({sink.name for sink in targets}).items():
            say(f"{count} events for {name}, which is no sink of this scan, wait in {parts.outbox.path}", level="warning")
    return targets


def _source(config: ScanConfig, stop: Stop) -> Iterable[Any]:
    only = config.source[0]
    if len(config.source) == 1 and (not only.name or not kind_of(only.address)):  # files have names of their own
        return open_source(only.address, watch=only.watch, stop=stop, options=only.camera())
    names = [source.name or shown(source.address) for source in config.source]
    if doubles := [each for number, each in enumerate(names) if each in names[:number]]:
        raise UsageError(f"there are two sources {doubles[0]}", "give each a name of its own: [[source]] name")
    addresses = dict(zip(names, (source.address for source in config.source), strict=True))
    return open_sources(addresses, {name: source.camera() for name, source in zip(names, config.source, strict=True)}, stop)


def _place(sink: Sink) -> str:
    """Where a sink writes, whichever way its path was spelled."""
    kind, _, path = sink.name.partition(":")
    return f"{kind}:{Path(path).absolute()}" if kind in ("jsonl", "sqlite") and path != "-" else sink.name
