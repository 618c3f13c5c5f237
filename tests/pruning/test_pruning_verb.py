"""`prune`, the verb and the command: targets, gates, resuming, every kind of model, and what the bundle says afterwards."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import BudgetNotMet, UsageError
from edgekit.models import PRESETS
from edgekit.models.export import export_onnx
from edgekit.models.module import load as load_module
from edgekit.pruning import prune, reach
from edgekit.pruning.prune import _gate
from edgekit.pruning.search import Judge
from edgekit.pruning.target import Target
from edgekit.runtime import Model, check_golden
from edgekit.training import train


class Branching(nn.Module):
    """Takes another way for dark pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else x


class Undecided(nn.Module):
    """Cannot be traced, and so cannot be pruned."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.branch = Branching()
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.branch(self.conv(x)).mean((2, 3)))


def last(bundle: Bundle) -> dict[str, Any]:
    return dict(bundle.manifest.history[-1].figures)


def test_a_speedup_is_measured_and_the_macs_stand_beside_it(trained_bundle: Bundle, tmp_path: Path):
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", speedup=1.2, epochs=1, max_drop=100)
    figures = last(pruned)
    assert figures["speedup"] == pytest.approx(figures["latency_before_ms"] / figures["latency_ms"])
    assert figures["macs_share"] < 1
    assert figures["latency_predicted_ms"] > 0
    assert figures["device"]
    rows = figures["layers"]
    assert {row["layer"] for row in rows} >= {"stem.0", "classifier"}
    assert sum(row["macs"] for row in rows) == figures["macs"]
    assert sum(row["us"] for row in rows) < sum(row["us_before"] for row in rows)
    assert figures["kept"] == {"classifier": "it is the model's output"}
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_as_many_epochs_as_fit_into_the_minutes(cli, trained_bundle: Bundle, tmp_path: Path):
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", keep=0.9, epochs=10_000, minutes=0.06)
    done = pruned.manifest.history[-1].config["epochs"]
    assert 1 <= done < 10_000
    assert len(last(pruned)["curve"]) == done
    refused = cli("prune", str(trained_bundle.path), "--keep", "0.9", "--minutes", "1e-6", "--out", str(tmp_path / "q.edge"))
    assert refused.code == 2
    assert "longer than --minutes 1e-06" in refused.err
    assert not list(tmp_path.glob("q.edge*"))


def test_a_search_that_was_stopped_goes_on_from_its_cuts(
    trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, asked = tmp_path / "p.edge", {"keep": 0.7, "epochs": 1}
    before, healed = Judge.heal, list[nn.Module]()

    def stopped(self: Judge, module: nn.Module) -> float:
        healed.append(module)
        if len(healed) > 3:
            raise KeyboardInterrupt
        return before(self, module)

    monkeypatch.setattr(Judge, "heal", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(trained_bundle, out=out, **asked)
    monkeypatch.setattr(Judge, "heal", before)
    assert not out.exists()
    capsys.readouterr()
    figures = last(prune(trained_bundle, out=out, **asked))
    assert "going on from cut 1" in capsys.readouterr().err
    assert figures["macs_share"] <= 0.7
    assert len(figures["cuts"]) > 1
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_blocks_that_are_left_out_stay_out(cli, trained_bundle: Bundle, tmp_path: Path):
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", keep=0.06, epochs=1)
    model = pruned.manifest.model
    assert model is not None
    assert model.edits.skipped
    check_golden(pruned)
    with Model.open(pruned.path) as model:
        assert model(np.zeros((28, 28), np.uint8)).label in set("0123456789")
    again = prune(pruned, out=tmp_path / "q.edge", keep=0.9, epochs=1)
    assert [entry.stage for entry in again.manifest.history] == ["train", "prune", "prune"]
    assert last(again)["macs"] < last(pruned)["macs"]
    assert again.manifest.model.edits.skipped[: len(pruned.manifest.model.edits.skipped)] == pruned.manifest.model.edits.skipped
    quantized = edgekit.quantize(pruned, out=tmp_path / "i.edge", samples=16)
    assert [entry.stage for entry in quantized.manifest.history] == ["train", "prune", "quantize"]
    assert quantized.manifest.history[1].parent == trained_bundle.digest
    assert cli("build", quantized.path, "--target", "rtx-ada", "--json").code == 0


def shallow(preset: str, patch: pytest.MonkeyPatch) -> None:
    """One block of a transformer: an export takes time by the layer."""
    patch.setitem(PRESETS, preset, PRESETS[preset]._replace(args={"depth": 1}))


def test_heads_are_cut_and_the_bundle_says_so(few_digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shallow("vit", monkeypatch)
    trained = train(data=few_digits, out=tmp_path / "v.edge", model="vit", width=0.34, epochs=1, batch=64)
    frozen = "blocks.*.norm*"  # no block goes, and not the stream that the norms read
    pruned = prune(trained, out=tmp_path / "p.edge", keep=0.45, max_drop=100, freeze=frozen)
    assert len(last(pruned)["curve"]) == 1  # as many epochs as it was trained for
    kinds = {cut["kind"] for cut in last(pruned)["cuts"]}
    assert kinds == {"channels", "heads"}
    module = load_module(pruned)
    assert sum(p.numel() for p in module.parameters()) == last(pruned)["parameters"] < last(pruned)["parameters_before"]
    check_golden(pruned)
    assert pruned.manifest.model.edits.attributes
    assert all(name.endswith(".heads") for name in pruned.manifest.model.edits.attributes)


@pytest.mark.slow
def test_text_models_are_pruned(short_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shallow("transformer-text", monkeypatch)
    texts = [(f"{'cheap pills offer' if i % 2 else 'meeting notes attached'} {i % 7}", i % 2) for i in range(60)]
    path = tmp_path / "mails.csv"
    path.write_text("text,label\n" + "\n".join(f"{text},{'spam' if y else 'ham'}" for text, y in texts) + "\n")
    for name, model in (("l", "lstm-text"), ("t", "transformer-text")):
        trained = train(data=f"csv:{path}", out=tmp_path / f"{name}.edge", model=model, width=0.5, epochs=1, batch=16)
        pruned = prune(trained, out=tmp_path / f"{name}p.edge", keep=0.5, epochs=1, max_drop=100)
        assert last(pruned)["macs_share"] <= 0.5
        assert {row["layer"] for row in last(pruned)["layers"]} >= {"classifier"}
        check_golden(pruned)
        with Model.open(pruned.path) as opened:
            assert opened("cheap pills").label in ("spam", "ham")


def test_size_in_bytes(cli, trained_bundle: Bundle, tmp_path: Path):
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", "--size", "80k", "--epochs", "1", "--json")
    assert outcome.code == 0
    assert outcome.json["parameters"] * 4 <= 80_000


def test_a_named_target_is_predicted_and_this_machine_measured(cli, trained_bundle: Bundle, tmp_path: Path):
    arguments = ["--speedup", "1.3", "--on", "jetson-orin-nano", "--epochs", "1", "--plot", tmp_path / "layers.svg"]
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", *arguments)
    assert outcome.code == 0
    assert "a roofline, not a measurement" in outcome.out
    assert "MACs" in outcome.out
    assert (tmp_path / "layers.svg").read_text().startswith("<svg")
    on = last(Bundle.open(tmp_path / "p.edge"))["on"]
    assert on["prediction"] is True
    assert on["speedup"] >= 1.3


def test_frozen_layers_may_leave_too_little(cli, trained_bundle: Bundle, tmp_path: Path):
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "q.edge", "--keep", "0.5", "--freeze", "*")
    assert outcome.code == 2
    assert "is frozen" in outcome.err
    assert "freeze less" in outcome.err
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "q.edge", "--speedup", "9", "--freeze", "*")
    assert outcome.code == 2
    assert "freeze less" in outcome.err
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "q.edge", "--freeze", "stmm.0")
    assert outcome.code == 2
    assert "there is no such layer" in outcome.err
    assert "stem.0" in outcome.err
    assert not (tmp_path / "q.edge").exists()


def test_what_meets_its_latency_is_not_cut(trained_bundle: Bundle, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(reach, "CORRECTIONS", 1)
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", latency_ms=1e4, epochs=1, freeze="*")
    assert "nothing is cut: it meets --latency-ms 10000 as it is" in capfd.readouterr().err
    assert last(pruned)["cuts"] == []
    assert last(pruned)["parameters"] == last(pruned)["parameters_before"]
    with suppress(BudgetNotMet):  # this machine may be slower by then: what is missed is the business of `test_gates`
        prune(trained_bundle, out=tmp_path / "q.edge", latency_ms=0.5 * last(pruned)["latency_before_ms"], epochs=1)
    assert last(Bundle.open(tmp_path / "q.edge"))["cuts"]


def test_more_than_can_go_is_refused_before_anything_is_trained(cli, trained_bundle: Bundle, tmp_path: Path):
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", "--keep", "0.001")
    assert outcome.code == 2
    assert "all that can be cut leaves" in outcome.err
    assert "fine-tuning" not in outcome.err


def test_one_target_has_two_names_and_is_given_once(cli, trained_bundle: Bundle, tmp_path: Path):
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", "--keep", "0.5", "--macs", "0.4")
    assert outcome.code == 2
    assert "--keep and --macs arrived together" in outcome.err
    assert cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", "--macs", "0.001").code == 2  # reaches the verb


@pytest.mark.parametrize(
    "arguments",
    [{"max_drop": "a"}, {"minutes": "1"}, {"freeze": 5}, {"freeze": [3]}, {"unit": 0}, {"unit": 16.5}, {"epochs": "3"},
     {"epochs": 0}, {"seed": -1}, {"keep": True}],
    ids=str,
)  # fmt: skip
def test_wrong_kinds_of_arguments_are_named(trained_bundle: Bundle, tmp_path: Path, arguments: dict[str, Any]):
    with pytest.raises(UsageError, match=f"--{next(iter(arguments)).replace('_', '-')} "):
        prune(trained_bundle, out=tmp_path / "p.edge", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_gates(trained_bundle: Bundle):
    figures = {"top1": 0.9, "drop": 0.6, "speedup": 1.9, "latency_ms": 5.2, "macs": 1, "parameters": 1}
    _gate(trained_bundle, figures, Target("speedup", 1 / 1.9), 0.6)
    for target, drop, words in (
        (None, 0.5, "top-1 fell by 0.60 points, allowed 0.5"),
        (Target("speedup", 0.5), None, "1.90x faster, asked 2x"),
        (Target("latency", 5.0), None, "takes 5.200 ms, asked 5"),
    ):
        with pytest.raises(BudgetNotMet, match=words):
            _gate(trained_bundle, figures, target, drop)


def test_a_model_that_cannot_be_traced_says_where(tmp_path: Path):
    from edgekit.errors import GraphError
    from edgekit.pruning.groups import analyse

    for follow in (analyse, export_onnx):
        with pytest.raises(GraphError, match=r"branch \(Branching"):
            follow(Undecided(3), torch.randn(2, 1, 8, 8))


def test_24_goes_with_a_cut_that_spares_frozen_layers(trained_bundle: Bundle, tmp_path: Path):
    from edgekit.graphs.sparsity import dense_layers

    pruned = prune(trained_bundle, out=tmp_path / "p.edge", keep=0.7, sparsity="2:4", freeze=["stem.*"], epochs=1)
    figures = last(pruned)
    assert figures["macs_share"] <= 0.7
    assert load_module(pruned).get_submodule("stem.0").out_channels == 16
    assert figures["kept"]["stem.0"] == "stem.* is frozen"
    layers = dense_layers(onnx.load(pruned.file(FLOAT_GRAPH)))
    assert sum(layer.sparse for layer in layers) == figures["sparse_layers"] > 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--importance", "luck"], "choose one of: activation, magnitude, norm-scale, taylor"),
        (["--size", "many"], "wanted bytes, for example 100k"),
        (["--speedup", "2", "--latency-ms", "3"], "give one of them"),
        (["--speedup", "2", "--on", "jetson-orin-nan"], "choose one of: jetson-orin-nano"),
        (["--speedup", "2", "--on", "x86-cpu"], "no fp16 peak"),
        (["--max-drop", "-1"], "points of top-1"),
        (["--minutes", "nan"], "--minutes nan is no time"),
        (["--minutes", "inf"], "--minutes inf is no time"),
        (["--latency-ms", "1e-9"], "--latency-ms 1e-09 cannot be reached"),
    ],
)
def test_wrong_options(cli, trained_bundle: Bundle, tmp_path: Path, arguments: list[str], words: str):
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert list(tmp_path.iterdir()) == []
