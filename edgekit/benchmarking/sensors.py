"""What a board says of itself while it works: temperatures, clocks, throttling and power, from sysfs.

Every reader takes the root of a file tree, so that the trees of real boards can be read back in tests; what a board does not
have is left out. Layouts: Linux' thermal, devfreq and powercap classes; the INA3221 of Jetsons as L4T 32 shows it
(``ina3221x``, IIO) and as 34 and later do (``ina3221``; kernel documentation, hwmon/ina3221).
"""

from __future__ import annotations

import glob
import os
import threading
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

__all__ = ["Energy", "PowerMeter", "clocks_mhz", "read_text", "temperatures", "throttle_events", "throttling"]

Root = str | os.PathLike[str]
#: Rails that feed the whole module: Orin NX and Nano, Xavier NX, TX2; the older Nano and NX name theirs by voltage.
_WHOLE = ("VDD_IN", "POM_5V_IN", "5V_IN")
#: Types of cooling devices that take clocks away: ACPI's, the kernel's (thermal-cpufreq-0, devfreq-17000000.gpu), Jetsons'.
_SLOWING = ("processor", "cpufreq*", "thermal-cpufreq*", "cpu-*", "gpu-*", "devfreq*", "*throttle*", "intel_powerclamp")
_PERIOD_S = 0.02  # between two readings of the rails
_ZONES, _COOLING = "sys/class/thermal/thermal_zone*", "sys/class/thermal/cooling_device*"


def read_text(root: Path, name: str) -> str:
    """Text of a small file below ``root``, stripped (device tree strings end in NUL); "" where it cannot be read."""
    try:
        with (root / name).open("rb") as file:
            return file.read(1 << 20).decode(errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def _number(root: Path, name: str) -> int | None:
    text = read_text(root, name)
    return int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() else None


def _folders(root: Path, pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, root_dir=root))


def temperatures(root: Root = "/") -> dict[str, float]:
    """Degrees Celsius by thermal zone. A zone that is switched off (Jetsons' cv0 without its engine) cannot be read."""
    tree, found = Path(root), dict[str, float]()
    for zone in _folders(tree, _ZONES):
        millidegrees = _number(tree, f"{zone}/temp")
        if millidegrees is not None and -60_000 < millidegrees < 200_000:
            number = zone.rpartition("/")[2]
            kind = read_text(tree, f"{zone}/type") or number
            found[kind if kind not in found else f"{kind} ({number})"] = millidegrees / 1e3  # x86 has several acpitz
    return found


def clocks_mhz(root: Root = "/") -> dict[str, float]:
    """``cpu0``, ``cpu4``, ... (one a cluster) and devfreq devices, such as ``gpu`` on Jetsons."""
    tree, found = Path(root), dict[str, float]()
    for policy in _folders(tree, "sys/devices/system/cpu/cpufreq/policy*"):
        if kilohertz := _number(tree, f"{policy}/scaling_cur_freq"):
            found[f"cpu{policy.rpartition('policy')[2]}"] = kilohertz / 1e3
    for device in _folders(tree, "sys/class/devfreq/*"):
        if hertz := _number(tree, f"{device}/cur_freq"):
            name = device.rpartition("/")[2]  # 17000000.gpu, 17000000.gv11b, 57000000.gpu
            chip = name.rpartition(".")[2]
            found["gpu" if chip in ("gpu", "gv11b", "gp10b", "ga10b", "gb10b") else name] = hertz / 1e6
    return found


def throttle_events(root: Root = "/") -> int:
    """How often the machine slowed itself since it started: x86 counts heat, a Jetson's soctherm over-current."""
    tree = Path(root)
    counters = _folders(tree, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    counters += _folders(tree, "sys/class/hwmon/hwmon*/oc*_event_cnt")
    return sum(count for name in counters if (count := _number(tree, name)) is not None and count > 0)


def throttling(root: Root = "/") -> list[str]:
    """Cooling devices that hold clocks down right now; a fan does not, nor a dimmed screen, a modem or a charger."""
    tree, found = Path(root), list[str]()
    for device in _folders(tree, _COOLING):
        kind = read_text(tree, f"{device}/type")
        slows = any(fnmatchcase(kind.lower(), pattern) for pattern in _SLOWING) and "fan" not in kind.lower()
        if slows and (_number(tree, f"{device}/cur_state") or 0) > 0:
            found.append(kind)
    return found


class _Rail(NamedTuple):
    """``watts`` now, or the ``joules`` that a counter has summed, which begins anew beyond ``wrap``."""

    watts: Callable[[], float | None] | None
    joules: Callable[[], float | None] | None = None
    wrap: float = 0.0


def _rails(tree: Path) -> dict[str, _Rail]:
    """By name. What stands on no rail (label NC) is left out."""
    found: dict[str, _Rail] = {}

    def product(volts: str, amperes: str) -> Callable[[], float | None]:
        def watts() -> float | None:
            millivolts, milliamperes = _number(tree, volts), _number(tree, amperes)
            return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6

        return watts

    for chip in _folders(tree, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):
        for label in _folders(tree, f"{chip}/in[1-3]_label"):
            channel = label.rpartition("/in")[2][0]
            found[read_text(tree, label)] = _Rail(product(f"{chip}/in{channel}_input", f"{chip}/curr{channel}_input"))
    for chip in _folders(tree, "sys/bus/i2c/drivers/ina3221x/*/iio:device*"):
        for label in _folders(tree, f"{chip}/rail_name_[0-2]"):
            channel = label[-1]
            volts, amperes = f"{chip}/in_voltage{channel}_input", f"{chip}/in_current{channel}_input"
            found[read_text(tree, label)] = _Rail(product(volts, amperes))
    for package in _folders(tree, "sys/class/powercap/intel-rapl:[0-9]*"):
        if package.count(":") > 1 or _number(tree, f"{package}/energy_uj") is None:
            continue  # parts of a package; a counter that only root may read

        def counted(file: str = f"{package}/energy_uj") -> float | None:
            micro = _number(tree, file)
            return None if micro is None else micro / 1e6

        wrap = (_number(tree, f"{package}/max_energy_range_uj") or 0) / 1e6
        found[read_text(tree, f"{package}/name") or package] = _Rail(None, counted, wrap)
    return {name: rail for name, rail in found.items() if name not in ("", "NC")}


class Energy(NamedTuple):
    """``watts``: mean by rail. ``whole``: the rail that feeds the whole module or package; None where none does, and rails must
    not be added up, for one may feed another."""

    seconds: float
    watts: Mapping[str, float]
    whole: str | None

    def record(self, inferences: int) -> dict[str, Any]:
        """``watts`` and ``mj_per_inference`` by rail, and ``whole``."""
        each = {name: 1e3 * watts * self.seconds / max(inferences, 1) for name, watts in self.watts.items()}
        return {"whole": self.whole, "watts": dict(self.watts), "mj_per_inference": each, "seconds": self.seconds}


class PowerMeter:
    """Integrates the power of every rail over a ``with`` block, in a thread of its own; ``energy`` is None without rails."""

    def __init__(self, root: Root = "/") -> None:
        self._rails = _rails(Path(root))
        self._sums = {name: [0.0, 0.0] for name, rail in self._rails.items() if rail.watts}  # joules, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="edgekit-power", daemon=True)
        self.energy: Energy | None = None

    def __bool__(self) -> bool:
        return bool(self._rails)

    def __enter__(self) -> PowerMeter:
        self._counted = {name: rail.joules() for name, rail in self._rails.items() if rail.joules}
        self._started = time.perf_counter()
        if self._sums:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        if self._sums:
            self._thread.join()
        seconds = time.perf_counter() - self._started
        watts = {name: joules / spent for name, (joules, spent) in self._sums.items() if spent > 0}
        for name, before in self._counted.items():
            rail = self._rails[name]
            after = rail.joules() if rail.joules else None
            if before is not None and after is not None:
                watts[name] = (after - before + (rail.wrap if after < before else 0.0)) / seconds
        if watts:
            packages = [name for name in watts if name.startswith("package")]
            whole = next((name for name in _WHOLE if name in watts), packages[0] if len(packages) == 1 else None)
            self.energy = Energy(seconds, watts, whole)

    def _sample(self) -> None:
        """By the trapezoidal rule; a rail that cannot be read for a moment is left out of that moment."""
        last: dict[str, tuple[float, float]] = {}
        while True:
            stopping = self._stop.is_set()
            for name in self._sums:
                reader = self._rails[name].watts
                watts, now = reader() if reader else None, time.perf_counter()
                if watts is not None and name in last:
                    before, then = last[name]
                    self._sums[name][0] += (watts + before) / 2 * (now - then)
                    self._sums[name][1] += now - then
                if watts is not None:
                    last[name] = watts, now
            if stopping:
                return
            self._stop.wait(_PERIOD_S)
