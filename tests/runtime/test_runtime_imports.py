"""What ships to the device stays small: which modules a fresh process has loaded, read from inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.bundle import Bundle

HEAVY = {"torch", "onnx", "onnxscript", "PIL", "pandas", "tensorrt", "tensorrt_rtx", "scipy", "jinja2", "safetensors"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a process that ran ``code``."""
    tail = "\nimport sys, json\nprint('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_loads_nothing() -> None:
    assert not loaded_after("import edgekit") & (HEAVY | {"numpy", "onnxruntime", "msgspec", "click"})


@pytest.mark.parametrize(("stated", "found"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_reports_to_nobody(tmp_path: Path, stated: str | None, found: str) -> None:
    """It leaves a session's identifier in the folder of temporary files when it is loaded with its telemetry on."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    if stated is not None:
        environment["ORT_DISABLE_TELEMETRY"] = stated
    load = "import onnxruntime;" if stated is None else ""
    code = f"import os, edgekit.runtime; {load} print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == found
    assert not list(tmp_path.iterdir())


def test_the_runtime_loads_numpy_and_nothing_heavy() -> None:
    found = loaded_after("import edgekit.runtime")
    assert "numpy" in found
    assert not found & (HEAVY | {"click", "onnxruntime"})


def test_inference_loads_one_backend_and_nothing_heavy(digits_bundle: Bundle) -> None:
    found = loaded_after(f"""
import numpy
from edgekit.runtime import Model
with Model.open({str(digits_bundle.path)!r}) as model:
    assert model(numpy.zeros((40, 31, 3), numpy.uint8)).label in "0123456789"
""")
    assert "onnxruntime" in found
    assert not found & (HEAVY | {"click"})


@pytest.mark.parametrize("command", [[], ["bench"], ["doctor"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    arguments = [*command, "--help"]
    found = loaded_after(f"""
from edgekit.cli import main
try:
    main({arguments!r})
except SystemExit as exit:
    assert exit.code == 0, exit.code
""")
    assert "click" in found
    assert not found & (HEAVY | {"onnxruntime"})


def test_the_source_of_the_runtime_names_no_heavy_module() -> None:
    """Imports inside functions too: read_image's Pillow is the one exception, and it is not in the runtime."""
    import edgekit.runtime

    for file in Path(edgekit.runtime.__file__).parent.glob("*.py"):
        lines = [line.split() for line in file.read_text().splitlines()]
        imported = {words[1].partition(".")[0] for words in lines if len(words) > 1 and words[0] in ("import", "from")}
        # A TensorRT backend may import its own library: its file is loaded only when that backend is asked for.
        own = {"tensorrt", "tensorrt_rtx"} if "tensorrt" in file.name else set()
        assert not imported & (HEAVY - own), file.name
