"""Temperatures, clocks, throttling and power, read from trees as boards lay them out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.benchmarking.device import Sensors
from edgekit.benchmarking.sensors import PowerMeter, clocks_mhz, temperatures, throttle_events, throttling

I2C = "sys/bus/i2c/drivers"
#: Orin NX and Nano, L4T 35 and 36: one INA3221 whose first channel feeds the module.
ORIN_NX = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48062\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "46750\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # off: reading its temp fails
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "sys/class/thermal/cooling_device2/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device2/cur_state": "1\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1984000\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "729600\n",
    "sys/class/hwmon/hwmon4/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon4/oc3_event_cnt": "7\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in1_label": "VDD_IN\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in1_input": "5000\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr1_input": "1400\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in2_input": "5000\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr2_input": "300\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in7_label": "sum of shunt voltages\n",
}
#: AGX Orin: two chips, a channel that stands on nothing, none that feeds the whole module.
AGX_ORIN = {
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in1_input": "19000\n",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr1_input": "200\n",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon4/in1_label": "NC\n",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon4/in1_input": "0\n",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon4/curr1_input": "0\n",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO\n",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon4/in2_input": "4900\n",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon4/curr2_input": "100\n",
}
#: The first Nano, L4T 32: the same chip under IIO.
NANO = {
    f"{I2C}/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN\n",
    f"{I2C}/ina3221x/6-0040/iio:device0/in_voltage0_input": "5080\n",
    f"{I2C}/ina3221x/6-0040/iio:device0/in_current0_input": "500\n",
    f"{I2C}/ina3221x/6-0040/iio:device0/rail_name_1": "POM_5V_GPU\n",
    f"{I2C}/ina3221x/6-0040/iio:device0/in_voltage1_input": "5080\n",
    f"{I2C}/ina3221x/6-0040/iio:device0/in_current1_input": "100\n",
    "sys/class/devfreq/57000000.gpu/cur_freq": "921600000\n",
}
SERVER = {
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "5000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1000000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "1\n",
}


def grow(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_orin_nx(tmp_path: Path) -> None:
    tree = grow(tmp_path, ORIN_NX)
    assert temperatures(tree) == {"cpu-thermal": 48.062, "gpu-thermal": 46.75}
    assert clocks_mhz(tree) == {"cpu0": 1984.0, "cpu4": 729.6, "gpu": 918.0}
    assert throttle_events(tree) == 7
    assert throttling(tree) == ["cpu-throttle-alert"]  # the fan holds no clock down
    with PowerMeter(tree) as meter:
        time.sleep(0.06)
    assert meter.energy is not None
    assert meter.energy.whole == "VDD_IN"
    assert meter.energy.watts == pytest.approx({"VDD_IN": 7.0, "VDD_CPU_GPU_CV": 1.5})
    record = meter.energy.record(10)
    assert record["mj_per_inference"]["VDD_IN"] == pytest.approx(7.0 * meter.energy.seconds * 100)


def test_an_agx_orin_has_no_rail_for_all(tmp_path: Path) -> None:
    with PowerMeter(grow(tmp_path, AGX_ORIN)) as meter:
        pass
    assert meter.energy is not None
    assert meter.energy.whole is None
    assert meter.energy.watts == pytest.approx({"VDD_GPU_SOC": 3.8, "VDDQ_VDD2_1V8AO": 0.49})


def test_a_nano_of_l4t_32(tmp_path: Path) -> None:
    tree = grow(tmp_path, NANO)
    with PowerMeter(tree) as meter:
        pass
    assert meter.energy is not None
    assert meter.energy.whole == "POM_5V_IN"
    assert meter.energy.watts == pytest.approx({"POM_5V_IN": 2.54, "POM_5V_GPU": 0.508})
    assert clocks_mhz(tree) == {"gpu": 921.6}


def test_a_changing_load_is_integrated(tmp_path: Path) -> None:
    current = grow(tmp_path, ORIN_NX) / f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr1_input"
    with PowerMeter(tmp_path) as meter:
        time.sleep(0.15)
        current.write_text("4200\n")
        time.sleep(0.15)
    assert meter.energy is not None
    assert 8 < meter.energy.watts["VDD_IN"] < 20  # 7 W, then 21 W


@pytest.mark.parametrize(("after", "joules"), [("9000000", 4.0), ("1000000", 262139.32885)])
def test_a_counter_of_energy_that_may_begin_anew(tmp_path: Path, after: str, joules: float) -> None:
    tree = grow(tmp_path, SERVER)
    with PowerMeter(tree) as meter:
        (tree / "sys/class/powercap/intel-rapl:0/energy_uj").write_text(after)
    assert meter.energy is not None
    assert meter.energy.whole == "package-0"
    assert meter.energy.watts["package-0"] * meter.energy.seconds == pytest.approx(joules)
    assert "core" not in meter.energy.watts
    assert throttle_events(tree) == 4


def test_a_machine_without_rails(tmp_path: Path) -> None:
    meter = PowerMeter(tmp_path)
    assert not meter
    with meter:
        pass
    assert meter.energy is None
    assert (temperatures(tmp_path), clocks_mhz(tmp_path), throttle_events(tmp_path), throttling(tmp_path)) == ({}, {}, 0, [])


@pytest.mark.parametrize(
    ("kind", "slows"),
    [
        *[
            (kind, True)
            for kind in ("Processor", "thermal-cpufreq-0", "cpufreq-cpu0", "gpu-throttle-alert", "intel_powerclamp")
        ],
        *[(kind, True) for kind in ("devfreq-17000000.gpu", "cpu-throttle-alert", "cv0-throttle-alert")],
        *[(kind, False) for kind in ("LCD", "Fan", "pwm-fan", "cpu-fan", "iwlwifi_1", "TCC Offset", "charger", "")],
    ],
)
def test_only_what_takes_clocks_away_counts(tmp_path: Path, kind: str, slows: bool) -> None:
    """A dimmed screen is a cooling device too, and no bench on that laptop would ever be trusted."""
    device = "sys/class/thermal/cooling_device0"
    tree = grow(tmp_path, {f"{device}/type": f"{kind}\n", f"{device}/cur_state": "3\n"})
    assert throttling(tree) == ([kind] if slows else [])


def test_clocks_that_were_held_down_before_count_too(tmp_path: Path) -> None:
    earlier = Sensors(grow(tmp_path, ORIN_NX))
    now = grow(tmp_path, {"sys/class/thermal/cooling_device2/cur_state": "0\n"})
    assert Sensors(now).since(earlier).held == ("cpu-throttle-alert",)
    assert Sensors(now).since(Sensors(now)).held == ()


def test_clocks_that_are_held_down_make_a_figure_doubtful(tmp_path: Path) -> None:
    earlier = Sensors(grow(tmp_path, {**ORIN_NX, "sys/class/hwmon/hwmon4/oc3_event_cnt": "5\n"}))
    reasons = Sensors(grow(tmp_path, ORIN_NX)).since(earlier).reasons(6, 1)
    assert any("throttled 2 times" in reason for reason in reasons)
    assert any("held down by cpu-throttle-alert" in reason for reason in reasons)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(ORIN_NX | NANO | SERVER)), st.binary(max_size=20)))
def test_hostile_files_do_not_break_it(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    with PowerMeter(root):
        assert all(-60 < degrees < 200 for degrees in temperatures(root).values())
        assert all(mhz > 0 for mhz in clocks_mhz(root).values())
        assert throttle_events(root) >= 0
        assert isinstance(throttling(root), list)


def test_zones_of_one_type_are_told_apart(tmp_path: Path) -> None:
    """x86 boards have two of acpitz, or more: the hot one must not be lost."""
    for number, millidegrees in enumerate((95_000, 40_000)):
        (zone := tmp_path / f"sys/class/thermal/thermal_zone{number}").mkdir(parents=True)
        (zone / "type").write_text("acpitz\n")
        (zone / "temp").write_text(f"{millidegrees}\n")
    assert temperatures(tmp_path) == {"acpitz": 95.0, "acpitz (thermal_zone1)": 40.0}
