"""A build kit's script as a device runs it, on a simulated TensorRT: timing caches, layers, memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest

from edgekit.bundle import Bundle
from edgekit.compiler import build, build_engine, build_options, check_engine
from edgekit.compiler.check_engine import Cuda
from edgekit.trust import check_private

pytestmark = pytest.mark.usefixtures("in_process")


def engine_of(folder: Path) -> Path:
    return folder / "jetson-agx-orin.engine"


def test_a_timing_cache_is_read_and_written_and_editable_where_it_can_be(
    script: Callable[..., Any], tmp_path: Path, release: str
) -> None:
    cache = tmp_path / "cache"
    assert script("--timing-cache", cache, release=release).code == 0
    second = script("--timing-cache", cache, release=release)
    if release == "rtx1.7":
        assert "does nothing" in second.err or "documented" in second.err
        assert not cache.exists()
        return
    assert (second.told["timing_cache"], cache.read_bytes()) == (b"timings", b"timingstimings")
    assert second.json["timing_cache"]["unused"] == ""
    editable = release in ("10.13", "10.16", "11.4")
    assert ("EDITABLE_TIMING_CACHE" in second.told["flags"]) == editable


def test_a_read_only_timing_cache_is_never_written(script: Callable[..., Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    missing = script("--timing-cache", cache, "--timing-cache-read-only")
    assert missing.code == 1
    assert f"there is no timing cache {cache}" in missing.err
    assert not engine_of(tmp_path / "kit").exists()
    cache.write_bytes(b"mine")
    cache.chmod(0o444)
    assert script("--timing-cache", cache, "--timing-cache-read-only").told["timing_cache"] == b"mine"
    assert cache.read_bytes() == b"mine"
    assert "needs --timing-cache FILE" in script("--timing-cache-read-only").err
    os.mkfifo(tmp_path / "pipe")  # nobody waits for what it may bring
    assert "is no file: it is a folder, a pipe or a device" in script("--timing-cache", tmp_path / "pipe").err


@pytest.mark.parametrize(("content", "why"), [(b"damaged", "Failed to deserialize"), (b"other", "another TensorRT")])
def test_a_timing_cache_that_does_not_fit_is_named_and_made_again(
    script: Callable[..., Any], tmp_path: Path, content: bytes, why: str
) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(content)
    done = script("--timing-cache", cache)
    assert done.code == 0
    assert why in done.err
    assert why in done.json["timing_cache"]["unused"]
    assert cache.read_bytes() == b"timings"


def test_no_disk_for_the_timing_cache_costs_the_cache_only(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"before")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == ".cache.tmp":
            write(path, data[:3])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = script("--timing-cache", cache)
    assert done.code == 1
    assert "is written, the timing cache is not" in done.json["error"]
    assert "No space left on device" in done.err
    assert engine_of(tmp_path / "kit").exists()
    assert cache.read_bytes() == b"before"
    assert not list(tmp_path.rglob("*.tmp"))
    nowhere = script("--timing-cache", tmp_path / "nowhere" / "cache")
    assert nowhere.code == 1
    assert "its folder is not there" in nowhere.err


def test_no_disk_for_the_record_leaves_the_engine_before_and_its_record(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script(verbose=True).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "kit").iterdir() if path.name.startswith("jetson")}
    assert len(before) == 3
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == ".jetson-agx-orin.json.tmp":
            write(path, data[:3])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = script(release="11.4", verbose=True)  # another engine
    assert done.code == 1
    assert "No space left on device" in done.err
    after = {path.name: path.read_bytes() for path in (tmp_path / "kit").iterdir() if "jetson" in path.name}
    assert after == before


def test_an_engine_is_private_under_any_umask(script: Callable[..., Any], tmp_path: Path) -> None:
    """As the runtime wants it, and readable for the service that runs it."""
    for umask in (0o002, 0o077):
        out = tmp_path / f"{umask}" / "edgekit" / "engines" / "key"
        before = os.umask(umask)
        try:
            assert script("--out", out, verbose=True).code == 0
        finally:
            os.umask(before)
        check_private(engine_of(out))
        check_private(out / "jetson-agx-orin.json")
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
        assert {path.stat().st_mode & 0o777 for path in (out, out.parent, out.parent.parent)} == {0o755}


def test_a_kit_without_golden_outputs_says_that_nobody_checks_it(script: Callable[..., Any]) -> None:
    done = script(cuda=SimpleNamespace(capability=lambda: "8.7"))
    assert (done.code, done.json["golden"]) == (0, None)
    assert "the kit has no golden outputs, so nobody has checked this engine" in done.err


def test_a_timing_cache_goes_along_with_the_kit(script: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_bytes(b"from the device")
    made = build(tiny_bundle, target="jetson-agx-orin", precision="fp32", timing_cache=given).kit
    assert made is not None
    for words in (("--timing-cache", tmp_path / "cache"), ()):
        assert script(*words, kit=made.read_bytes()).told["timing_cache"] == b"from the device"
    assert "--timingCacheFile=timing.cache" in (tmp_path / "kit/README.txt").read_text()
    assert "timing_cache" not in script().told


def test_a_timing_cache_for_rtx_is_a_stated_no_op(cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    cache = tmp_path / "cache"
    command = ("build", tiny_bundle.path, "--target", "rtx-ada", "--precision", "fp32", "--json")
    assert cli(*command, "--timing-cache", cache).code == 2
    cache.write_bytes(b"x")
    cli(*command)
    again = cli(*command, "--timing-cache", cache)
    assert again.json["cached"] is True
    assert "does nothing for TensorRT-RTX" in again.json["note"]


def test_a_device_reports_the_layers_of_its_engine(
    script: Callable[..., Any], tmp_path: Path, simulated_builder: Callable[..., Any], release: str
) -> None:
    done = script(release=release, verbose=True)
    report = json.loads((tmp_path / "kit/jetson-agx-orin.layers.json").read_text())
    assert (report["source"], [layer["Name"] for layer in report["layers"]]) == ("engine", ["fused", "out"])
    assert "2 layers: 1 CaskConvolution, 1 Reformat" in done.err
    assert (done.told.get("profiling_verbosity") == "DETAILED") == (release != "rtx1.7")
    blind = simulated_builder(release)
    blind.module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    script(simulated=blind, verbose=True)
    report = json.loads((tmp_path / "kit/jetson-agx-orin.layers.json").read_text())
    assert report["source"] == "network"
    assert report["layers"][0] == {"name": ANY, "type": "CONV", "precision": "half", "inputs": [], "outputs": [[-1, 4]]}


def test_a_device_is_warned_before_it_runs_out_of_memory(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(build_options, "MEMINFO", str(meminfo))
    assert "warning" not in script().err  # a system that does not say
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 2000000 kB\n")
    assert "warning" not in script().err
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 500000 kB\n")
    done = script()
    assert done.code == 0
    assert "needs about 1024 MB, by estimate, and 488 MB are available" in done.err
    assert (done.json["memory"]["estimated"], done.json["memory"]["available"]) == (1 << 30, 512_000_000)
    assert done.json["memory"]["peak"] > 1 << 20


def test_a_second_engine_is_compared_with_the_first(
    script: Callable[..., Any], tmp_path: Path, simulated_builder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script().json["changed"] == []
    assert script().json["changed"] == []
    assert script(workspace_mb=64).json["changed"] == ["options {} -> {'workspace_mb': 64}"]
    upgraded = script(release="11.4", workspace_mb=64)
    assert upgraded.json["changed"] == ["tensorrt 10.16 -> 11.4"]
    assert "rebuilt: tensorrt 10.16 -> 11.4" in upgraded.err
    other = simulated_builder("11.4")
    monkeypatch.setattr(other, "_build", lambda network, config: b"other kernels")
    assert "chosen by timing" in script(simulated=other, workspace_mb=64).json["changed"][0]


def test_a_kit_on_another_device_is_refused_before_it_is_built(script: Callable[..., Any], tmp_path: Path) -> None:
    done = script(cuda=SimpleNamespace(capability=lambda: "11.0"))
    assert done.code == 1
    assert "this kit is for jetson-agx-orin (SM 8.7), this GPU is SM 11.0" in done.err
    assert not engine_of(tmp_path / "kit").exists()


def test_a_gpu_that_this_tensorrt_does_not_compile_for_is_named(script: Callable[..., Any]) -> None:
    done = script("--compute-capability", "9.9", release="rtx1.7")
    assert done.code == 1
    assert "does not compile for compute capability 9.9 (SM99)" in done.err


def test_another_gpu_is_named_as_what_changed(script: Callable[..., Any]) -> None:
    script("--compute-capability", "8.9", release="rtx1.7")
    done = script("--compute-capability", "8.6", release="rtx1.7")
    assert "compute_capability 8.9 -> 8.6" in done.json["changed"]


@pytest.mark.parametrize("text", ["", "[1]", '{"files": 3}', "{"])
def test_a_build_json_of_no_kit_is_told(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "build.json").write_text(text)
    assert build_engine.main(["--kit", str(tmp_path)]) == 1
    assert "build.json is not that of a kit" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_told_before_the_build(script: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = script("--out", tmp_path / "file/out")
    assert done.code == 1
    assert "parsed_with" not in done.told


def test_a_kit_without_numpy_or_half_unzipped_says_so(script: Callable[..., Any], tmp_path: Path) -> None:
    script()
    (tmp_path / "kit/check_engine.py").unlink()
    done = subprocess.run([sys.executable, tmp_path / "kit/build_engine.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No module named 'check_engine': unzip the whole kit")


def test_a_machine_without_a_gpu_is_told_what_to_do(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(cudaDeviceGetAttribute=lambda *_: 100)  # cudaErrorNoDevice
    monkeypatch.setattr(check_engine.ctypes, "CDLL", lambda name: library)
    done = script(cuda=Cuda())
    assert done.code == 1
    assert "CUDA error 100: there is no GPU here: run this on the device, or with --no-check" in done.err
    assert not engine_of(tmp_path / "kit").exists()
