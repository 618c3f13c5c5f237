"""Which engine of a bundle runs here, and the checks that come before one is loaded: nothing in this file loads one.

`build` writes ``engines/TARGET.engine`` beside ``engines/TARGET.json``, the record of what the engine was made from; of a
build kit the device keeps both in its own state folder (`edgekit.trust`).
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BackendError, BundleError
from edgekit.manifest import ImagePreprocessing, Tolerance
from edgekit.trust import TRUST_ALL, check_private, is_trusted, local_builds

from .cuda import Device

__all__ = ["Choice", "Options", "Record", "choose", "engine_graphs", "records"]

_FLOATS = ("fp32", "fp16")


class Options(msgspec.Struct, frozen=True):
    """What of `build`'s options matters when an engine is loaded."""

    dla: int | None = None
    compatible: str | None = None


class Record(msgspec.Struct, frozen=True):
    """What ``engines/TARGET.json`` says, as far as running it needs; `build` writes more.

    ``frames``: the preprocessing that is compiled into an engine which takes bytes (``--uint8-input``).
    """

    target: str
    kind: str
    module: str
    tensorrt: str
    compute_capability: str
    precision: str
    file: str
    key: str
    graph_sha256: str
    sources: dict[str, str]
    golden: Tolerance
    engine_sha256: str = ""
    options: Options = Options()
    frames: ImagePreprocessing | None = None

    @property
    def graph(self) -> str:
        """The graph of the bundle that this engine runs."""
        return FLOAT_GRAPH if self.precision in _FLOATS else INT8_GRAPH


class _LocalBuild(msgspec.Struct, frozen=True):
    """What a kit's ``build_engine.py`` writes beside the engine."""

    tensorrt: str
    module: str
    engine_sha256: str
    graph_sha256: str
    key: str


@dataclass(frozen=True)
class Choice:
    """An engine to load: its record and its bytes, hashed as they were read. ``suboptimal`` says why it may be slow."""

    record: Record
    plan: bytes
    suboptimal: str = ""


#: (plan) -> (whether it is valid here, what is amiss or suboptimal): TensorRT-RTX says so without loading the engine.
Validity = Callable[[bytes], tuple[bool, str]]


def records(bundle: Bundle, module: str) -> list[Record]:
    """The engines and build kits of a bundle for one TensorRT module. Raises `BundleError` for a damaged record."""
    found = []
    for name in bundle.manifest.files:
        if not name.startswith("engines/") or not name.endswith(".json") or name.endswith(".layers.json"):
            continue
        try:
            record = msgspec.json.decode(bundle.read(name), type=Record)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"{bundle.path / name} is not a record of a build: {error}", "build it again") from None
        if record.module == module:
            found.append(record)
    return found


def engine_graphs(bundle: Bundle, module: str) -> tuple[str, ...]:
    """The graphs of a bundle that have an engine or a build kit for a TensorRT module, the float one first."""
    having = {record.graph for record in records(bundle, module)}
    return tuple(graph for graph in (FLOAT_GRAPH, INT8_GRAPH) if graph in having)


def choose(bundle: Bundle, graph: str, module: str, version: str, device: Device, validity: Validity | None = None) -> Choice:
    """The engine of ``graph`` that runs on ``device`` with TensorRT ``version``, checked.

    Checked in order: made for this module and graph; of this very graph; by this TensorRT; for this GPU; the bytes by
    manifest and record; made or installed on this machine. Raises `BackendError` that says what of this does not hold for
    the likeliest engine, `BundleError` for a damaged file.
    """
    fitting = [record for record in records(bundle, module) if record.graph == graph]
    if not fitting:
        raise BackendError(
            f"{bundle.path} has no {module} engine of {graph}",
            f"build one: edgekit build {_quoted(bundle.path)} --target {_target_for(device, module) or 'NAME'}",
        )
    refusals: list[BackendError] = []
    for record in sorted(fitting, key=lambda record: record.compute_capability != device.sm):
        try:
            return _checked(bundle, record, version, device, validity)
        except BackendError as error:
            refusals.append(error)
    raise refusals[0]


def _checked(bundle: Bundle, record: Record, version: str, device: Device, validity: Validity | None) -> Choice:
    frames = " --uint8-input" if record.frames is not None else ""
    again = f"build it again: edgekit build {_quoted(bundle.path)} --target {record.target}{frames}"
    if any(bundle.manifest.files.get(name) != digest for name, digest in record.sources.items()):
        raise BackendError(f"the engine for {record.target} was made from another graph than {bundle.path} has now", again)
    if record.frames is not None and record.frames != bundle.manifest.preprocessing:
        raise BackendError(f"the engine for {record.target} normalises frames otherwise than {bundle.path} does", again)
    local = None if record.kind == "rtx" else _compiled(bundle, record, device)
    made_by = local[1].tensorrt if local else record.tensorrt
    if made_by != version and not (record.options.compatible == "version" and _runs_later(made_by, version)):
        raise BackendError(
            f"the engine for {record.target} was built by TensorRT {made_by}, here is {version}",
            _compile_command(bundle, record) if local else again,
        )
    if validity is None and record.compute_capability != device.sm and not _for_other_gpus(record, device):
        raise _other_device(bundle, record, device)
    plan = local[0].read_bytes() if local else bundle.read(record.file)
    expected = local[1].engine_sha256 if local else record.engine_sha256
    digest = hashlib.sha256(plan).hexdigest()
    if digest != expected:
        raise BackendError(f"the engine for {record.target} is not the one that its record describes", again)
    if local is None and not is_trusted(digest):
        raise BackendError(
            f"the engine for {record.target} was neither built here nor installed from a pack: an engine can run any code",
            f"edgekit install F.zip --root DIR --pub P; or edgekit build B --target {record.target} --again, here; "
            f"or vouch for its maker: {TRUST_ALL}=1",
        )
    if validity is not None:
        valid, words = validity(plan)
        if not valid and record.compute_capability != device.sm:
            raise _other_device(bundle, record, device)
        if not valid:
            raise BackendError(f"TensorRT calls the engine for {record.target} invalid here: {words}", again)
        return Choice(record, plan, words)
    return Choice(record, plan)


def _runs_later(made_by: str, version: str) -> bool:
    """Whether NVIDIA supports a version-compatible engine there: later in one major version, 8 with 10, and 10 with 11."""
    try:
        built, here = (tuple(int(part) for part in text.split(".")) for text in (made_by, version))
    except ValueError:
        return False
    return here >= built and (here[0] == built[0] or (built[0], here[0]) in ((8, 10), (10, 11)))


def _for_other_gpus(record: Record, device: Device) -> bool:
    return record.options.compatible == "hardware" and tuple(map(int, device.sm.split("."))) >= (8, 0)


def _compiled(bundle: Bundle, record: Record, device: Device) -> tuple[Path, _LocalBuild]:
    """(engine, its record) that this device compiled from the bundle's kit."""
    for folder in local_builds(record.key):
        engine, about = folder / f"{record.target}.engine", folder / f"{record.target}.json"
        if not engine.is_file() or not about.is_file():
            continue
        check_private(engine)
        check_private(about)
        try:
            made = msgspec.json.decode(about.read_bytes(), type=_LocalBuild)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BackendError(f"{about} is damaged: {error}", _compile_command(bundle, record)) from None
        if made.key == record.key:
            return engine, made
    if record.compute_capability != device.sm:
        raise _other_device(bundle, record, device)
    raise BackendError(
        f"{bundle.path} has a build kit for {record.target}, which this device has not compiled yet",
        _compile_command(bundle, record),
    )


def _compile_command(bundle: Bundle, record: Record) -> str:
    kit, folder = _quoted(bundle.path / record.file), _quoted(local_builds(record.key)[0])
    return f"once, for some minutes: unzip {kit} -d kit && python3 kit/build_engine.py --out {folder}"


def _other_device(bundle: Bundle, record: Record, device: Device) -> BackendError:
    target = _target_for(device, record.module)
    return BackendError(
        f"the engine for {record.target} is for SM {record.compute_capability}, this {device.name} is SM {device.sm}",
        f"build for this one: edgekit build {_quoted(bundle.path)} --target {target}"
        if target
        else f"edgekit has no {record.module} target of SM {device.sm}: choose --backend onnxruntime, or another GPU",
    )


def _target_for(device: Device, module: str) -> str:
    """The first target that fits a GPU; empty where none does."""
    from edgekit.targets import load_targets  # only where something is refused

    kind = "rtx" if module == "tensorrt_rtx" else "device"
    return next((name for name, target in load_targets().items() if target.kind == kind and target.sm == device.sm), "")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
