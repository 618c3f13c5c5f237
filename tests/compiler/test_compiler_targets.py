"""targets.toml: what it states, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError, UsageError
from edgekit.targets import TARGETS, JetPack, load_targets, target_named


def test_every_jetson_gets_a_kit_and_every_other_target_an_engine() -> None:
    targets = load_targets()
    assert {n for n, t in targets.items() if t.kind == "device"} == {n for n in targets if n.startswith("jetson-")}
    assert {"jetson-xavier-nx", "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor"} <= set(targets)
    assert targets["rtx-ada"].sm == "8.9"


def test_orin_has_neither_fp8_nor_fp4() -> None:
    for name, target in load_targets().items():
        if target.sm == "8.7":
            assert target.precisions == ("fp32", "fp16", "int8"), name


def test_a_near_miss_is_answered_with_the_near_name() -> None:
    with pytest.raises(UsageError) as caught:
        target_named("jetson-orin-nan")
    assert "jetson-orin-nano" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('sm = "8.9"', 'sm = "ada"', "sm"),
        ('kind = "rtx"', 'kind = "phone"', "kind"),
        ('title = "DGX', 'colour = "gold"\ntitle = "DGX', "colour"),
        ("value = 8,", "value = -8,", "value"),
        ("[rtx-ada]", "[rtx-ada", "targets"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = tmp_path / "targets.toml"
    shutil.copy(TARGETS, path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(EdgekitError, match=why):
        load_targets(path)


@pytest.mark.parametrize(("tensorrt", "opset"), [("8.5.2", 0), ("8.6.2", 17), ("10.3.0", 21), ("10.16.2", 22), ("11.4.1", 22)])
def test_each_tensorrt_reads_its_opsets(tensorrt: str, opset: int) -> None:
    assert JetPack("1", tensorrt, "12", "3.10", "a test's own").opset == opset
