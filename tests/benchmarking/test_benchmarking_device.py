"""Fingerprints and sensors, read from trees as boards and servers lay them out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.benchmarking import device
from edgekit.benchmarking.device import Load, Sensors, fingerprint, package_versions, resident_mb

ORIN = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nCPU part\t: 0xd42\n\n"
    "processor\t: 1\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nCPU part\t: 0xd42\n",
    "proc/meminfo": "MemTotal:        7990272 kB\nMemFree:         123 kB\n",
    "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "# comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1728000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1728000\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
}
SERVER = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2.60GHz\ncpu MHz\t\t: 2596.134\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 2023\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 150\n",
    "proc/driver/nvidia/gpus/0000:41:00.0/information": "Model: \t\t NVIDIA L4\nIRQ:   \t\t 151\n",
}
PLAIN_ARM = {"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"}


def grow(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_jetson(tmp_path: Path) -> None:
    found = fingerprint(grow(tmp_path, ORIN))
    assert found["jetson"] == {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3",
        "power_mode": "MAXN_SUPER",
    }
    assert (found["cpu"], found["cores"]) == ("ARMv8 Processor rev 1 (v8l)", 2)
    assert (found["governor"], found["mhz"], found["mhz_max"]) == ("schedutil", 1728, 1728)
    assert (found["memory_mb"], found["driver"], found["gpu"]) == (7803, "540.4.0", [])
    assert found["kernel"] == "5.15.148-tegra"


def test_a_jetson_with_half_its_files(tmp_path: Path) -> None:
    files = {"etc/nv_tegra_release": "garbage", "var/lib/nvpmodel/status": "pmode:0007"}
    assert fingerprint(grow(tmp_path, files))["jetson"] == {"model": None, "l4t": None, "power_mode": "mode 7"}


def test_a_server_with_two_gpus(tmp_path: Path) -> None:
    found = fingerprint(grow(tmp_path, SERVER))
    assert found["gpu"] == ["NVIDIA GeForce RTX 4090", "NVIDIA L4"]
    assert found["driver"] == "535.129.03"
    assert found["mhz"] == 2596
    assert found["jetson"] is None


def test_an_arm_server_that_names_no_cpu(tmp_path: Path) -> None:
    assert fingerprint(grow(tmp_path, PLAIN_ARM))["cpu"] == "implementer 0x41 part 0xd0c"


def test_an_empty_tree_says_none(tmp_path: Path) -> None:
    found = fingerprint(tmp_path)
    assert [found[key] for key in ("cpu", "governor", "mhz", "mhz_max", "memory_mb", "driver", "jetson")] == [None] * 7
    json.dumps(found, allow_nan=False)


@given(st.dictionaries(st.sampled_from(sorted(ORIN | SERVER)), st.binary(max_size=60)))
def test_hostile_files_do_not_break_it(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    json.dumps(fingerprint(root), allow_nan=False)
    later, earlier = Sensors(root), Sensors(root)
    assert later.since(earlier).others >= 0


def test_this_machine() -> None:
    found = fingerprint()
    assert found["cores"] >= 1
    assert found["memory_mb"] > 100
    assert {"numpy", "onnxruntime", "edgekit"} <= set(found["versions"])
    assert (resident_mb() or 0) > 10


def test_absent_packages_are_left_out() -> None:
    assert set(package_versions(("numpy", "no-such-package"))) == {"numpy", "edgekit"}


def ticks(user: int, idle: int, steal: int = 0) -> dict[str, str]:
    return {"proc/stat": f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3\n", "proc/loadavg": "1.5 1.0 0.5 1/100 1\n"}


def test_load_is_what_changed_between_two_readings(tmp_path: Path) -> None:
    earlier = Sensors(grow(tmp_path, ticks(1000, 1000)))
    throttled = {"sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "3\n"}
    later = Sensors(grow(tmp_path, {**ticks(1300, 1100, 50), **throttled}))
    later.seconds, later.own = earlier.seconds + 2.0, earlier.own + 1.0
    load = later.since(earlier)
    assert load.others == pytest.approx(1.0)  # 3 s busy over 2 s, 1 s of it mine
    assert load.stolen == pytest.approx(0.25)
    assert load.throttled == 3
    assert later.load_average == "1.5"


@pytest.mark.parametrize(
    ("load", "threads", "words"),
    [
        (Load(0.0, 0.0, 0.0, 0), 1, []),
        (Load(0.4, 0.0, 9.0, 0), 1, []),  # one core of two is free for it
        (Load(0.4, 0.0, 120.0, 0), 1, ["lost its core 120 times a second"]),
        (Load(0.9, 0.0, 0.0, 0), 1, ["other processes kept 0.9 of 2 cores busy"]),
        (Load(0.2, 0.0, 0.0, 0), 2, ["other processes"]),
        (Load(0.2, 0.0, 0.0, 0), 0, ["other processes"]),  # 0: all cores
        (Load(0.0, 0.1, 0.0, 2), 1, ["hypervisor", "throttled 2 times"]),
    ],
)
def test_reasons_for_doubt(load: Load, threads: int, words: list[str]) -> None:
    found = load.reasons(2, threads)
    assert len(found) == len(words)
    for reason, word in zip(found, words, strict=True):
        assert word in reason


def test_only_cores_that_the_process_may_use_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A neighbour on the other 63 cores takes nothing from it."""
    text = "cpu  900 0 0 50 0 0 0 0\ncpu0 100 0 0 0 0 0 0 0\ncpu1 800 0 0 0 0 0 0 70\ncpu10 1 0 0 0 0 0 0 0\n"
    monkeypatch.setattr(device, "read_text", lambda tree, name: text if name == "proc/stat" else "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    hertz = os.sysconf("SC_CLK_TCK")
    assert Sensors().busy == 100 / hertz
    assert Sensors(tmp_path).busy == 900 / hertz


@pytest.mark.parametrize(("driver", "slow"), [("acpi-cpufreq", True), ("intel_pstate", False), ("amd-pstate-epp", False)])
def test_powersave_means_slow_only_where_it_pins_the_clock(tmp_path: Path, driver: str, slow: bool) -> None:
    clock = "sys/devices/system/cpu/cpu0/cpufreq/"
    root = grow(tmp_path, {f"{clock}scaling_governor": "powersave\n", f"{clock}scaling_driver": driver})
    assert bool(Sensors(root).slow_governor) is slow
