"""Every preset: what it is made for, exports as torch answers, survives a bundle; padding never changes an answer."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import edgekit
from edgekit.compiler.cost import graph_cost
from edgekit.data.augment import POLICIES
from edgekit.errors import UsageError
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, ModelConfig, history_entry
from edgekit.models import DEFAULTS, PRESETS, preset_named, sized
from edgekit.models.export import export_onnx
from edgekit.models.module import create, load, macs, parameters, write_model
from edgekit.models.widths import scaled, widens
from edgekit.runtime.onnxruntime import session

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
#: Epochs that not the preset but the policy of its benchmark asks for.
EPOCHS = {"depthwise-m": POLICIES["photos"].epochs}
#: Rows of the benchmark, by preset.
RESULTS = {
    "depthwise": "digits-depthwise",
    "vit": "digits-vit",
    "gru-rows": "digits-gru-rows",
    "lstm-rows": "digits-lstm-rows",
    "lstm-text": "spam-lstm",
    "transformer-text": "spam-transformer",
    "gru-series": "watch-gru",
    "crnn": "labels-clean",
    "depthwise-m": "groceries",
}
INPUTS: dict[str, dict[str, Any]] = {
    "image-classification": {"channels": 1, "height": 28, "width": 28},
    "text-classification": {"vocabulary": 400, "length": 24, "pad": 0},
    "series-classification": {"channels": 3, "length": 20},
    "text-recognition": {"channels": 1, "height": 32, "width": 64},
}


def make(name: str, **changes: Any) -> torch.nn.Module:
    preset = PRESETS[name]
    torch.manual_seed(0)
    return create(ModelConfig(name, {"classes": 5, **INPUTS[preset.task], **preset.args, **changes})).eval()


def sample(task: str, count: int = 3, steps: int | None = None) -> Tensor:
    """Random input; the first text and series end before the others."""
    given = INPUTS[task]
    generator = torch.Generator().manual_seed(1)
    if task == "text-classification":
        x = torch.randint(1, 399, (count, steps or given["length"]), generator=generator)
        x[0, 9:] = 0
        return x
    if task == "series-classification":
        x = torch.randn(count, steps or given["length"], given["channels"] + 1, generator=generator)
        x[:, :, -1] = 1
        x[0, 9:] = 0
        return x
    return torch.randn(count, given["channels"], given["height"], given["width"], generator=generator)


@cache
def exported(name: str) -> bytes:
    """The graph of `make(name)`: seconds each, and more than one test reads it."""
    return export_onnx(make(name), sample(PRESETS[name].task)[:2])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_exports_what_it_answers(name: str):
    module, x, graph = make(name), sample(PRESETS[name].task), exported(name)
    with torch.no_grad():
        expected = module(x).numpy()
    found = session(graph).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # What torch runs, where attention and an LSTM are one operator, and what ONNX holds: counted apart, the same.
    assert macs(module, x) == graph_cost(onnx.load_from_string(graph)).macs
    assert parameters(module) > 0
    assert macs(module, x) > 1000
    operators = {node.op_type for node in onnx.load_from_string(graph).graph.node}
    if any(cell in name for cell in ("gru", "lstm", "crnn")):
        assert operators & {"LSTM", "GRU"}  # one operator, not unrolled
        assert not operators & {"Expand", "Shape"}  # no shapes computed at run time


@pytest.mark.parametrize("name", ["lstm-text", "transformer-text", "gru-series", "lstm-series"])
def test_padding_never_changes_an_answer(name: str):
    """The first sample has 9 steps: cut to them, and padded to 24 or 20, it answers the same; so a packed sequence would."""
    module, x = make(name), sample(PRESETS[name].task)
    with torch.no_grad():
        np.testing.assert_allclose(module(x[:1]), module(x[:1, :9]), rtol=1e-4, atol=1e-5)


def test_a_recurrence_over_padding_is_the_packed_one():
    module, x = make("lstm-text"), sample("text-classification")
    lengths = (x != 0).sum(1)
    with torch.no_grad():
        embedded = module.embedding(x)
        packed = torch.nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        expected, _ = torch.nn.utils.rnn.pad_packed_sequence(module.lstm(packed)[0], batch_first=True)
        found = module.lstm(embedded)[0]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=1e-6)


def test_weights_come_back_from_a_bundle(tmp_path: Path):
    name = "vit"  # convolutions, linear layers, batch norms, layer norms, positions
    module, x = make(name), sample("image-classification")
    manifest = Manifest(
        format=FORMAT,
        name="m",
        task="image-classification",
        inputs=(),
        outputs=(),
        model=ModelConfig(name, {"classes": 5, **INPUTS["image-classification"], **PRESETS[name].args}),
        preprocessing=ImagePreprocessing(28, 28, 1, (0.5,), (0.25,)),
        labels=tuple("abcde"),
    )
    bundle = write_model(tmp_path / "m.edge", module, x.numpy(), manifest, history_entry("train", {}, {}))
    with torch.no_grad():
        np.testing.assert_allclose(load(bundle)(x), module(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm-text", "transformer-text", "gru-series", "lstm-rows", "crnn", "vit", "residual"])
def test_a_preset_compiles_to_an_engine(name: str, tmp_path: Path):
    """TensorRT-RTX 1.7 refuses forward recurrences as they stand, and crashed on a transposed product behind one."""
    file = tmp_path / "m.onnx"
    file.write_bytes(exported(name))
    bundle = edgekit.import_onnx(file, out=tmp_path / "m.edge")
    built = edgekit.build(bundle, target="rtx-ada")
    assert built.engine is not None
    assert Path(built.engine).stat().st_size > 10_000


def test_widths_suit_tensor_cores():
    for name in ("depthwise-n", "depthwise-s", "depthwise-m", "residual", "crnn", "vit"):
        for layer in make(name).modules():
            if isinstance(layer, torch.nn.Conv2d):
                assert layer.out_channels % 8 == 0, name


def test_sizes_stay_within_what_is_promised():
    def count(name: str, **given: Any) -> int:
        return parameters(make(name, **given))

    large = {"classes": 43, "channels": 3, "height": 112, "width": 112}
    assert count("depthwise") <= 60_000
    assert count("depthwise-n", **large) < count("depthwise-s", **large) < count("depthwise-m", **large) <= 500_000
    assert count("vit", classes=10) <= 300_000
    assert max(count("gru-rows", classes=10), count("lstm-rows", classes=10)) <= 100_000
    assert count("crnn", classes=75, width=320) <= 2_000_000
    assert sized("depthwise", 28) == "depthwise"
    assert sized("depthwise", 112) == "depthwise-m"


@pytest.mark.parametrize("name", [name for name in PRESETS if widens(name)])
def test_a_width_scales_a_preset_in_multiples_of_eight(name: str):
    sizes = []
    for width in (0.1, 0.5, 1.0, 1.5, 2.5):
        args = scaled(name, width)
        assert (not args) == (width == 1)
        assert all(value % 8 == 0 for given in args.values() for value in (given if isinstance(given, tuple) else (given,)))
        module = make(name, **args)
        with torch.no_grad():
            assert torch.isfinite(module(sample(PRESETS[name].task))).all()
        sizes.append(parameters(module))
    assert sizes == sorted(set(sizes))


def test_what_has_one_width_says_so():
    for name in ("textbook", "hf:folder", "my_nets:make"):
        assert not widens(name)
        assert scaled(name, 1.0) == {}
        with pytest.raises(UsageError, match="has one width"):
            scaled(name, 0.5)
    for width in (0.0, -1.0, 5.0, float("nan"), "2"):
        with pytest.raises(UsageError, match="times as wide"):
            scaled("depthwise", width)  # type: ignore[arg-type]


def test_every_task_has_a_default():
    assert {preset_named(name).task for name in DEFAULTS.values()} == set(DEFAULTS)
    with pytest.raises(UsageError, match="there is no model"):
        preset_named("nonsense")


def test_the_documented_sizes_are_true():
    """docs/models.md: | `name` | input | parameters | MACs |."""
    rows = re.findall(r"^\| \**`([\w-]+)`\** \| ([^|]+) \| ([\d,]+) \| ([\d,]+) \|", DOCS.read_text(encoding="utf-8"), re.M)
    assert {name for name, *_ in rows} == set(PRESETS)
    for name, described, stated_parameters, stated_macs in rows:
        numbers = [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", described)]
        preset = PRESETS[name]
        if preset.task in ("image-classification", "text-recognition"):
            width, height, channels, classes = numbers
            given = {"channels": channels, "height": height, "width": width}
            x = torch.zeros(1, channels, height, width)
        elif preset.task == "text-classification":
            given = {"length": numbers[0], "vocabulary": numbers[1], "pad": 0}
            x, classes = torch.ones(1, numbers[0], dtype=torch.long), numbers[2]
        else:
            given = {"length": numbers[0], "channels": numbers[1]}
            x, classes = torch.ones(1, numbers[0], numbers[1] + 1), numbers[2]
        module = create(ModelConfig(name, {"classes": classes, **given, **preset.args}))
        assert f"{parameters(module):,}" == stated_parameters, name
        assert f"{macs(module, x):,}" == stated_macs, name


def test_the_documented_accuracies_were_measured_on_these_models():
    """A figure in docs/models.md stands for a row of the results, of a model with as many parameters."""
    rows = json.loads((DOCS.parents[1] / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))["rows"]
    found = re.findall(
        r"^\| \**`([\w-]+)`\** \| [^|]+ \| ([\d,]+) \| [\d,]+ \| ([^|]*)\|", DOCS.read_text(encoding="utf-8"), re.M
    )
    measured = [(name, stated, cell) for name, stated, cell in found if name in RESULTS and "%" in cell]
    assert measured
    for name, stated, cell in measured:
        row = rows[RESULTS[name]][0]
        assert f"{row['parameters']:,}" == stated, name
        assert row["epochs"] == max(PRESETS[name].epochs, EPOCHS.get(name, 0)), name
        assert re.findall(r"[\d.]+%", cell)[0] == f"{row['cer' if 'cer' in row else 'top1']:.1%}", name
