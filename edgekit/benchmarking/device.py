"""The device a figure belongs to, and what disturbed it: read from procfs, sysfs and package metadata; no GPU is touched.

Every reader takes the root of a file tree, so that the trees of real boards can be read back in tests.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import resource
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.version import __version__

from .sensors import clocks_mhz, read_text, temperatures, throttle_events, throttling

__all__ = ["Load", "Sensors", "fingerprint", "package_versions", "resident_mb"]

#: Distributions whose version changes figures.
PACKAGES = ("edgekit", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings")
#: In powersave these drivers still clock up under load; with all others it pins the lowest clock.
_PREEMPTED = 50.0  # a second: at a few ms each that is a tenth of the time
_SELF_CLOCKING = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.M)
    return match[1].strip() if match else None


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed version by distribution name, from metadata alone: nothing is imported. Absent ones are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["edgekit"] = __version__  # metadata of an editable install may be older than the code
    return versions


def fingerprint(root: str | os.PathLike[str] = "/") -> dict[str, Any]:
    """What a figure depends on beside the model, JSON-plain; absent parts are None.

    ``cpu`` (model), ``cores`` (usable by this process), ``architecture``, ``governor``, ``mhz`` and ``mhz_max``
    (None where the kernel does not say), ``memory_mb``, ``kernel``, ``gpu`` (models), ``driver``, ``jetson``
    (``model``, ``l4t`` release, ``power_mode``), ``python``, ``versions`` by package.
    """
    tree = Path(root)
    return {
        **_cpu(tree),
        "architecture": platform.machine(),
        "memory_mb": _memory_mb(tree),
        "kernel": read_text(tree, "proc/sys/kernel/osrelease") or None,
        "gpu": _gpus(tree),
        "driver": _found(r"NVRM version:.*?\s(\d{3,}\.\d+(?:\.\d+)?)\b", read_text(tree, "proc/driver/nvidia/version")),
        "jetson": _jetson(tree),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def _cpu(tree: Path) -> dict[str, Any]:
    info = read_text(tree, "proc/cpuinfo")
    model = _found(r"^(?:model name|Model)\s*:\s*(.+)$", info)
    if model is None and (part := _found(r"^CPU part\s*:\s*(\S+)", info)):  # 64-bit Arm names no model
        vendor = _found(r"^CPU implementer\s*:\s*(\S+)", info)
        model = f"implementer {vendor} part {part}"
    usable = len(os.sched_getaffinity(0)) if tree == Path("/") else len(re.findall(r"^processor\s*:", info, re.M))
    clock = "sys/devices/system/cpu/cpu0/cpufreq"
    now = read_text(tree, f"{clock}/scaling_cur_freq")  # kHz
    top = read_text(tree, f"{clock}/cpuinfo_max_freq")
    shown = _found(r"^cpu MHz\s*:\s*([\d.]+)", info)
    return {
        "cpu": model,
        "cores": usable,
        "governor": read_text(tree, f"{clock}/scaling_governor") or None,
        "mhz": int(now) // 1000 if now.isdigit() else round(float(shown)) if shown else None,
        "mhz_max": int(top) // 1000 if top.isdigit() else None,
    }


def _memory_mb(tree: Path) -> int | None:
    kilobytes = _found(r"^MemTotal:\s*(\d+) kB", read_text(tree, "proc/meminfo"))
    return int(kilobytes) // 1024 if kilobytes else None


def _gpus(tree: Path) -> list[str]:
    """Names of discrete NVIDIA GPUs; the kernel driver lists them without CUDA being touched."""
    files = sorted(glob.glob("proc/driver/nvidia/gpus/*/information", root_dir=tree))
    models = [_found(r"^Model:\s*(.+)$", read_text(tree, name)) for name in files]
    return [model for model in models if model]


def _jetson(tree: Path) -> dict[str, Any] | None:
    """Board, L4T release (``36.4.3``) and power mode of a Jetson; None elsewhere."""
    model, release = read_text(tree, "proc/device-tree/model"), read_text(tree, "etc/nv_tegra_release")
    if not release and "jetson" not in model.lower():
        return None
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", release)
    return {
        "model": model or None,
        "l4t": f"{found[1]}.{found[2]}" if found else None,
        "power_mode": _power_mode(tree),
    }


def _power_mode(tree: Path) -> str | None:
    """nvpmodel's mode by name: the status file holds its number, the configuration its name."""
    number = _found(r"pmode:(\d+)", read_text(tree, "var/lib/nvpmodel/status"))
    if number is None:
        return None
    name = _found(rf"<\s*POWER_MODEL\s+ID=0*{int(number)}\s+NAME=(\S+)\s*>", read_text(tree, "etc/nvpmodel.conf"))
    return name or f"mode {int(number)}"


def resident_mb() -> float | None:
    """This process's resident memory (VmRSS) in MB (10^6 bytes)."""
    kilobytes = _found(r"^VmRSS:\s*(\d+) kB", read_text(Path("/"), "proc/self/status"))
    return int(kilobytes) * 1024 / 1e6 if kilobytes else None


class Load(NamedTuple):
    """What else ran between two `Sensors` readings.

    ``others``: cores that other processes kept busy; ``stolen``: cores that the hypervisor gave away;
    ``preempted``: times a second that this process lost its core; ``throttled``: times that heat or current slowed the
    machine; ``held``: cooling devices that held clocks down before or after.
    """

    others: float
    stolen: float
    preempted: float
    throttled: int
    held: tuple[str, ...] = ()

    def reasons(self, cores: int, threads: int) -> list[str]:
        """Why figures taken under this load are not to be trusted; empty where they are."""
        mine = threads or cores
        found = []
        if self.others > max(0.1, 0.5 * (cores - mine)):
            found.append(f"other processes kept {self.others:.1f} of {cores} cores busy")
        if self.preempted > _PREEMPTED:
            found.append(f"this process lost its core {self.preempted:.0f} times a second to others")
        if self.stolen > 0.02 * cores:
            found.append(f"the hypervisor took {self.stolen:.2f} cores away")
        return found + self.slowed()

    def slowed(self) -> list[str]:
        """Why the machine itself was not at its pace."""
        found = []
        if self.throttled:
            found.append(f"the machine throttled {self.throttled} times, on heat or current")
        if self.held:
            found.append(f"clocks are held down by {', '.join(self.held)}: cool the board, or lower its power mode")
        return found


def _ticks(tree: Path) -> list[int]:
    """Eight kinds of ticks of the cores that this process may use; of all, where ``tree`` is another machine's."""
    text = read_text(tree, "proc/stat")
    names = [f"cpu{core}" for core in sorted(os.sched_getaffinity(0))] if tree == Path("/") else ["cpu"]
    rows = [[int(n) for n in (_found(rf"^{name}\s+(.+)$", text) or "").split()] + [0] * 8 for name in names]
    return [sum(row[kind] for row in rows) for kind in range(8)]


class Sensors:
    """Counters at one moment; `since` turns two of them into a `Load`."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        tree = Path(root)
        user, nice, system, _idle, _iowait, irq, softirq, steal = _ticks(tree)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        hertz = os.sysconf("SC_CLK_TCK")
        self.seconds = time.perf_counter()
        self.busy = (user + nice + system + irq + softirq) / hertz  # all cores that this process may use, s
        self.stolen = steal / hertz
        self.own = usage.ru_utime + usage.ru_stime
        self.switches = usage.ru_nivcsw
        self.throttled, self.throttling = throttle_events(tree), throttling(tree)
        self.temperatures, self.clocks_mhz = temperatures(tree), clocks_mhz(tree)
        self.load_average = _found(r"^(\S+)", read_text(tree, "proc/loadavg"))
        clock = "sys/devices/system/cpu/cpu0/cpufreq"
        self.governor, self.driver = read_text(tree, f"{clock}/scaling_governor"), read_text(tree, f"{clock}/scaling_driver")

    def since(self, earlier: Sensors) -> Load:
        wall = max(self.seconds - earlier.seconds, 1e-9)
        return Load(
            others=max(0.0, (self.busy - earlier.busy - (self.own - earlier.own)) / wall),
            stolen=max(0.0, (self.stolen - earlier.stolen) / wall),
            preempted=(self.switches - earlier.switches) / wall,
            throttled=max(0, self.throttled - earlier.throttled),
            held=tuple(dict.fromkeys([*earlier.throttling, *self.throttling])),
        )

    @property
    def slow_governor(self) -> str | None:
        """A reason where the CPU is pinned to a low clock."""
        if self.governor == "powersave" and self.driver not in _SELF_CLOCKING:
            return "the CPU governor is powersave; set performance: cpupower frequency-set -g performance"
        return None
