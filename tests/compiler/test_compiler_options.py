"""What `edgekit build` asks of TensorRT beyond the graph: set by name, written down, refused where it cannot be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import build, build_engine
from edgekit.errors import UsageError

Builder = Callable[..., Any]


def record(bundle: Bundle, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Bundle.open(bundle.path).file(f"engines/{target}.json").read_bytes())
    return found


def in_kit(kit: Path | None, name: str = "build.json") -> str:
    assert kit is not None
    with zipfile.ZipFile(kit) as archive:
        return archive.read(name).decode()


def compile_with(simulated: Any, bundle: Bundle, **spec: Any) -> Any:
    """The kit's own function, with a simulated TensorRT, on a bundle's float graph."""
    wanted = {"precision": "fp16", "profiles": {}, "flags": [], **spec}
    return build_engine.build(simulated.module, bundle.read(FLOAT_GRAPH), wanted)


# Workspace


def test_the_workspace_limit_reaches_every_tensorrt(release: str, simulated_builder: Builder, tiny_bundle: Bundle) -> None:
    simulated = simulated_builder(release)
    compile_with(simulated, tiny_bundle, options={"workspace_mb": 64})
    assert simulated.told["WORKSPACE"] == 64 << 20
    unlimited = simulated_builder(release)
    compile_with(unlimited, tiny_bundle)
    assert "WORKSPACE" not in unlimited.told


def test_the_workspace_limit_is_in_kit_record_and_key(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = build(tiny_bundle, target="jetson-orin-nano", workspace_mb=256)
    assert json.loads(in_kit(made.kit))["options"] == {"workspace_mb": 256}
    assert "--memPoolSize=workspace:256" in in_kit(made.kit, "README.txt")
    command = ("build", tiny_bundle.path, "--target", "rtx-ada", "--json")
    keys = set()
    for options in ((), ("--workspace-mb", 64), ("--workspace-mb", 128)):
        assert cli(*command, *options).json["cached"] is False
        assert cli(*command, *options).json["cached"] is True
        keys.add(record(tiny_bundle, "rtx-ada")["key"])
    assert len(keys) == 3
    assert record(tiny_bundle, "rtx-ada")["options"] == {"workspace_mb": 128}
    assert cli(*command, "--workspace-mb", 0).code == 2


def test_a_workspace_larger_than_the_device_is_refused(tiny_bundle: Bundle) -> None:
    for target, megabytes, why in (("jetson-orin-nano", 8193, "8 GB"), ("rtx-ada", 0, "no memory")):
        with pytest.raises(UsageError, match=why):
            build(tiny_bundle, target=target, workspace_mb=megabytes)
    assert Bundle.open(tiny_bundle.path).last("build") is None
