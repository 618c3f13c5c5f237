"""Sensor series: the time steps and channels that the model uses are found, from every kind of file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import DataError, UsageError
from edgekit.explanation import explain
from edgekit.manifest import FORMAT, Manifest, SeriesPreprocessing, TensorSpec, history_entry

LENGTH, CHANNELS = 60, 2


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Class "burst" has the sum of channel 0 over steps 20 to 30 for its logit; channel 1 is not looked at."""
    weight = np.zeros((LENGTH, CHANNELS + 1, 2), np.float32)
    weight[20:30, 0, 1] = 0.3
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LENGTH, CHANNELS + 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor("w", 1, [LENGTH * (CHANNELS + 1), 2], weight.tobytes(), raw=True),
            helper.make_tensor("b", 1, [2], [0.0, -1.5]),
        ],
    )
    path = tmp_path_factory.mktemp("machine") / "machine.edge"
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
        draft.manifest = Manifest(
            format=FORMAT,
            name="machine",
            task="series-classification",
            inputs=(TensorSpec("x", "float32", ("n", LENGTH, CHANNELS + 1)),),
            outputs=(TensorSpec("y", "float32", ("n", 2)),),
            labels=("rest", "burst"),
            preprocessing=SeriesPreprocessing(LENGTH, CHANNELS, (0.0, 0.0), (1.0, 1.0)),
            history=(history_entry("import", {}, {}),),
        )
    return Bundle.open(path)


def burst(steps: int = LENGTH) -> np.ndarray[Any, Any]:
    series = np.random.default_rng(0).normal(0, 0.05, (steps, CHANNELS)).astype(np.float32)
    series[20:30] += 1.0
    series[40:50] += 1.0  # as large, and of no interest to the model
    return series


@pytest.mark.parametrize("method", ["lime", "occlusion"])
def test_the_steps_and_the_channel_that_the_model_uses_are_found(
    cli: Callable[..., Any], machine: Bundle, tmp_path: Path, method: str
) -> None:
    np.save(tmp_path / "press.npy", burst(55))
    answer = cli("explain", machine.path, tmp_path / "press.npy", "--out", tmp_path / "why", "--method", method, "--json")
    assert answer.code == 0, answer.err
    row = answer.json["images"][0]
    assert (row["label"], row["overlay"]) == ("burst", f"press.{method}.png")
    steps, channels = np.array(row["time_steps"]), np.array(row["channels"])
    assert (steps.shape, channels.shape) == ((55,), (CHANNELS, 55))
    assert steps[21:29].mean() > 5 * np.abs(steps[40:50]).mean()
    assert channels[0, 21:29].mean() > 0.5
    assert np.abs(channels[1]).max() < 1e-4
    assert row["deletion_auc"] < row["misplaced_auc"]
    assert row["insertion_auc"] > row["misplaced_insertion_auc"]
    with Image.open(tmp_path / "why" / row["overlay"]) as picture:
        colours = picture.getcolors(1 << 20)
    assert any(red > blue + 80 for _, (red, _, blue) in colours)


def test_series_are_read_from_csv_and_npz(machine: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    series = burst()
    rows = [f"{name};{t};{a:.5f};{b:.5f}" for name in ("left", "right/2") for t, (a, b) in enumerate(series)]
    (folder / "long.csv").write_text("series;time;force;speed\n" + "\n".join(rows) + "\n")
    (folder / "plain.csv").write_text("\n".join(f"{a},{b}" for a, b in series))
    np.savez(folder / "two.npz", a=series, b=series[:30])
    (folder / "notes.txt").write_text("no series")
    result = explain(machine, folder, out=tmp_path / "why")
    names = ["long-left", "long-right_2", "plain", "two-a", "two-b"]
    assert [row["overlay"] for row in result["images"]] == [f"{name}.occlusion.png" for name in names]
    assert {row["label"] for row in result["images"]} == {"burst"}
    assert [row.get("series") for row in result["images"]] == ["left", "right/2", None, "a", "b"]
    assert [len(row["time_steps"]) for row in result["images"]] == [60, 60, 60, 60, 30]


def test_channels_have_the_names_of_the_header(machine: Bundle, tmp_path: Path) -> None:
    """In the record and in the picture, which differs from that of the numbered channels; also where they are quoted."""
    rows = "\n".join(f"{t};1;{a:.5f};{b:.5f}" for t, (a, b) in enumerate(burst()))
    pictures = []
    for header in ('time;label;"Vib";temp', "time;label;A very long name of a sensor;ch 2", "time;label;ch 1;ch 2"):
        (tmp_path / "press.csv").write_text(f"{header}\n{rows}\n")
        row = explain(machine, tmp_path / "press.csv", out=tmp_path / "why")["images"][0]
        assert row["channel_names"] == header.replace('"', "").split(";")[2:]
        pictures.append((tmp_path / "why" / row["overlay"]).read_bytes())
    assert len(set(pictures)) == 3
    np.savetxt(tmp_path / "bare.csv", burst(), delimiter=",")
    assert "channel_names" not in explain(machine, tmp_path / "bare.csv", out=tmp_path / "why")["images"][0]


def test_without_pillow_the_extra_of_explain_is_named(
    cli: Callable[..., Any], machine: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "press.npy", burst())
    monkeypatch.setitem(sys.modules, "PIL", None)
    answer = cli("explain", machine.path, tmp_path / "press.npy", "--out", tmp_path / "why")
    assert (answer.code, "hint: pip install 'edgekit[explain]'" in answer.err) == (1, True)


def test_a_csv_is_read_as_training_reads_it(machine: Bundle, tmp_path: Path) -> None:
    """By time, not by line; the series of one file need not stand together."""
    series = burst()
    rows = [f"{name},{t},rest,{a:.5f},{b:.5f}" for t, (a, b) in enumerate(series) for name in ("a", "b")]
    np.random.default_rng(0).shuffle(rows)
    (tmp_path / "shuffled.csv").write_text("series,time,label,force,speed\n" + "\n".join(rows) + "\n")
    np.save(tmp_path / "sorted.npy", series)
    found = explain(machine, [tmp_path / "shuffled.csv", tmp_path / "sorted.npy"], out=tmp_path / "why")["images"]
    assert [row["label"] for row in found] == ["burst"] * 3
    for row in found[:2]:
        assert row["time_steps"] == pytest.approx(found[2]["time_steps"], abs=1e-3)


def test_a_row_that_counts_columns_is_no_time_step(cli: Callable[..., Any], machine: Bundle, tmp_path: Path) -> None:
    """What pandas writes above columns without a name."""
    (tmp_path / "pandas.csv").write_text("0,1\n" + "\n".join(f"{a},{b}" for a, b in burst()))
    answer = cli("explain", machine.path, tmp_path / "pandas.csv", "--out", tmp_path / "why")
    assert (answer.code, "line 1: '0,1' may be a header or the first time step" in answer.err) == (1, True)
    (tmp_path / "pandas.csv").write_text("0.0,1\n1,1\n")
    assert len(explain(machine, tmp_path / "pandas.csv", out=tmp_path / "why")["images"][0]["time_steps"]) == 2


def test_steps_beyond_the_model_are_said(cli: Callable[..., Any], machine: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.tile(burst(), (3, 1)))
    asked = ("explain", machine.path, tmp_path / "long.npy", "--out", tmp_path / "why")
    row = cli(*asked, "--json").json["images"][0]
    assert (len(row["time_steps"]), row["unread"]) == (LENGTH, 2 * LENGTH)
    assert "the model reads the first 60 of 180 time steps" in cli(*asked).out


def test_one_step_or_a_flat_series_has_its_map_too(machine: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", one=np.zeros((1, 2), np.float32), flat=np.ones((LENGTH, 2), np.float32))
    result = explain(machine, tmp_path / "odd.npz", out=tmp_path / "why")
    assert [len(row["time_steps"]) for row in result["images"]] == [1, LENGTH]
    assert all(np.isfinite(row["deletion_auc"]) for row in result["images"])


def test_what_is_no_series_is_named_and_skipped(machine: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "a.npy", burst())
    np.save(folder / "three.npy", np.zeros((5, 3), np.float32))
    (folder / "cells.csv").write_text("force,speed\n1,2\n3,x\n")
    (folder / "damaged.npz").write_bytes(b"PK\x03\x04 no zip")
    (folder / "empty.csv").write_text("")
    result = explain(machine, folder, out=tmp_path / "why")
    assert len(result["images"]) == 1
    assert [Path(name).name for name in result["skipped"]] == ["cells.csv", "damaged.npz", "empty.csv", "three.npy"]
    with pytest.raises(DataError, match="none of 1 series"):
        explain(machine, folder / "cells.csv", out=tmp_path / "none")
    with pytest.raises(UsageError, match="gradcam is not for series") as caught:
        explain(machine, folder, out=tmp_path / "none", method="gradcam")
    assert "occlusion" in caught.value.hint
