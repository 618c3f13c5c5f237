"""`doctor`: what works on this machine, what is missing, and the command that brings it. Imports no heavy library."""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from base64 import b64decode
from importlib import metadata
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.errors import EdgekitError, MissingExtra
from edgekit.manifest import FORMAT, Manifest, TensorSpec, Tolerance
from edgekit.runtime import BACKENDS, check_golden, open_runner
from edgekit.runtime.backends import ENGINE_MODULES
from edgekit.runtime.golden import save_golden
from edgekit.version import __version__

from .device import Sensors, fingerprint

__all__ = ["doctor"]

#: An ONNX file, opset 13, IR 7: y = x + x, float32 (2,). 63 bytes by ``onnx.helper``, kept so that onnx is not needed.
_ADDITION = b64decode("CAc6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAmIPCgF5EgoKCAgBEgQKAggCQgQKABAN")
_LOW_DISK = 2e9  # bytes: a training environment and a few bundles


class _Need(NamedTuple):
    """One line of a distribution's requirements."""

    name: str
    extras: tuple[str, ...]
    specifier: str
    extra: str | None


def doctor(root: str | os.PathLike[str] = "/") -> dict[str, Any]:
    """Look the machine over; raises nothing, changes nothing. ``root`` is the tree that device facts are read from.

    Returns ``edgekit``, ``python``, ``platform``, ``device`` (see `fingerprint`), ``tensorrt`` (versions of what is
    there), ``disk_free_gb`` (10^9 bytes, where the command runs), ``extras`` (``extra``, ``ready``, ``installed`` name ->
    version, ``missing``, ``install``: the pip command or None), ``backends`` (``backend``, ``works``, ``reason``,
    ``latency_ms``: each runs a two-number graph) and ``checks`` (rows of ``check``, ``ok``,
    ``found``, ``hint``: the answer as a list).
    """
    device = fingerprint(root)
    extras, backends = _extras(), _backends()
    tensorrt = _tensorrt(Path(root))
    free = shutil.disk_usage("." if os.path.isdir(".") else "/").free  # a shell may stand in a folder that is gone
    slow = Sensors(root).slow_governor
    gpu = [*device["gpu"], *([device["jetson"]["model"]] if device["jetson"] else [])]
    checks = [
        _check("python", True, f"{platform.python_version()} on {platform.platform(terse=True)}"),
        _check("cpu", True, f"{device['cpu']}, {device['cores']} cores"),
        _check("cpu governor", not slow, device["governor"] or "not shown by the kernel", slow),
        _check(
            "gpu", bool(gpu), ", ".join(gpu) or "none seen", "engines for rtx-* targets still build; Jetson targets give kits"
        ),
        _check(
            "gpu driver", bool(device["driver"]), device["driver"] or "none seen", "needed to run engines, not to build them"
        ),
        _check(
            "jetpack", bool(device["jetson"]), _jetpack(device["jetson"]), "this is no Jetson: build kits here, compile there"
        ),
        _check("tensorrt", bool(tensorrt), _pairs(tensorrt) or "none", "pip install 'edgekit[rtx]', or JetPack's on a Jetson"),
        _check("disk", free > _LOW_DISK, f"{free / 1e9:.1f} GB free", "bundles and engines need room: free some space"),
    ]
    checks += [_backend_check(backend, bool(gpu or device["driver"])) for backend in backends]
    checks += [_check(f"extra {e['extra']}", e["ready"], _extra_words(e), e["install"]) for e in extras]
    return {
        "edgekit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "tensorrt": tensorrt,
        "disk_free_gb": round(free / 1e9, 1),
        "extras": extras,
        "backends": backends,
        "checks": checks,
    }


def _backend_check(row: dict[str, Any], gpu: bool) -> dict[str, Any]:
    """Where there is no GPU, that is the reason; CUDA calls it a conflict of versions (``backends`` has its words)."""
    name = f"backend {row['backend']}"
    if not row["works"] and not gpu and row["backend"] in ENGINE_MODULES and "CUDA" in row["reason"]:
        return _check(
            name, False, "no NVIDIA GPU and driver here", "runs engines where there is one; build them here all the same"
        )
    return _check(name, row["works"], row["reason"] or f"runs, {row['latency_ms']:.3f} ms a call", row["install"])


def _check(name: str, ok: bool, found: str, hint: str | None = None) -> dict[str, Any]:
    return {"check": name, "ok": ok, "found": found, "hint": None if ok else hint}


def _pairs(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _jetpack(jetson: dict[str, Any] | None) -> str:
    return f"L4T {jetson['l4t']}, power mode {jetson['power_mode']}" if jetson else "no"


def _extra_words(extra: dict[str, Any]) -> str:
    return f"lacks {', '.join(extra['missing'])}" if extra["missing"] else _pairs(extra["installed"])


def _tensorrt(tree: Path) -> dict[str, str]:
    """Python bindings by module and the library by file name; nothing is loaded."""
    found = {}
    for module, distribution in (("tensorrt_rtx", "tensorrt-rtx-cu13"), ("tensorrt", "tensorrt")):
        if importlib.util.find_spec(module) is not None:
            found[module] = _version(distribution) or _version(module) or "of unknown version"
    libraries = sorted(glob.glob("usr/lib/*/libnvinfer.so.*.*", root_dir=tree))
    if libraries:
        found["libnvinfer"] = libraries[-1].split(".so.")[1]
    return found


def _backends() -> list[dict[str, Any]]:
    """Each backend runs a tiny bundle, an engine compiled on the spot, and is held to its golden output."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgekit-doctor-") as folder:
        for name in BACKENDS:
            row: dict[str, Any] = {"backend": name, "works": True, "reason": None, "install": None, "latency_ms": None}
            bundle = _tiny_bundle(Path(folder) / f"{name}.edge")
            try:
                if name == "onnxruntime" and importlib.util.find_spec(name) is None:
                    raise MissingExtra("runtime", name)  # the runtime would name the bundle, which is nobody's
                if name in ENGINE_MODULES:
                    from edgekit.runtime.selftest import add_tiny_engine

                    bundle = add_tiny_engine(bundle, ENGINE_MODULES[name])
                check_golden(bundle, FLOAT_GRAPH, name)
                row["latency_ms"] = _latency_ms(bundle, name)
            except EdgekitError as error:
                row |= {"works": False, "reason": error.message, "install": error.hint}
            except Exception as error:  # noqa: BLE001  a broken installation fails in its own ways; doctor reports it
                row |= {"works": False, "reason": f"{type(error).__name__}: {error}", "install": "install it again"}
            rows.append(row)
    return rows


def _latency_ms(bundle: Bundle, backend: str) -> float:
    """The median of 100 runs of two numbers: what a call costs before any model."""
    x = np.zeros(2, np.float32)
    with open_runner(bundle, backend) as runner:
        samples = []
        for _ in range(120):
            start = perf_counter_ns()
            runner.run({"x": x})
            samples.append((perf_counter_ns() - start) / 1e6)
    return float(np.median(samples[20:]))


def _tiny_bundle(path: Path) -> Bundle:
    x = np.array([1.5, -2.0], np.float32)
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, _ADDITION)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": x + x}))
        draft.manifest = Manifest(
            format=FORMAT,
            name="tiny",
            task="tensor",
            inputs=(TensorSpec("x", "float32", (2,)),),
            outputs=(TensorSpec("y", "float32", (2,)),),
            golden={FLOAT_GRAPH: Tolerance("relative", 1e-6)},
        )
    return Bundle.open(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needs() -> list[_Need]:
    """edgekit's own requirements. ``name[extras]specifier; ... extra == "x"`` (PEP 508), as far as edgekit uses it."""
    try:
        lines = metadata.requires("edgekit") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return []
    needs = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        parts = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?\s*(.*?)\s*$", requirement)
        extra = re.search(r"""extra\s*==\s*["']([\w.-]+)["']""", marker)
        if parts:
            inner = tuple(name.strip() for name in (parts[2] or "").split(",") if name.strip())
            needs.append(_Need(parts[1], inner, parts[3], extra[1] if extra else None))
    return needs


def _extras() -> list[dict[str, Any]]:
    """Every extra with what it brings, extras it contains included."""
    needs = _needs()
    rows = []
    for extra in dict.fromkeys(need.extra for need in needs if need.extra and need.extra != "dev"):
        wanted: dict[str, str] = {}
        todo, seen = [extra], set()
        while todo:
            current = todo.pop(0)
            seen.add(current)
            for need in needs:
                if need.extra == current and need.name == "edgekit":
                    todo += [name for name in need.extras if name not in seen]
                elif need.extra == current:
                    wanted[need.name] = need.specifier
        installed = {name: version for name in wanted if (version := _version(name))}
        missing = [
            f"{name}{specifier}"
            for name, specifier in wanted.items()
            if name not in installed or not _satisfies(installed[name], specifier)
        ]
        install = f"pip install 'edgekit[{extra}]'" if missing else None
        rows.append({"extra": extra, "ready": not missing, "installed": installed, "missing": missing, "install": install})
    return rows


def _satisfies(version: str, specifier: str) -> bool:
    """Whether a release fits ``>=1.2,<2``; other clauses are taken as met."""
    for clause in specifier.strip("()").split(","):
        parts = re.match(r"\s*(>=|<)\s*([\d.]+)\s*$", clause)
        if parts:
            least, found = _numbers(parts[2]), _numbers(version)
            if (found >= least) != (parts[1] == ">="):
                return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """``1.27.0rc1`` -> (1, 27); trailing zeros do not count."""
    numbers = [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
