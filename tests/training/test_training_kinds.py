"""Training end to end on each kind of data, tiny: the bundle answers raw samples, is judged as trained, and goes on its way."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgekit
from edgekit.bundle import TOKENIZER, Bundle
from edgekit.data import load
from edgekit.errors import InputError, UsageError
from edgekit.evaluation import evaluate
from edgekit.runtime import Model, check_golden
from edgekit.training import train


@pytest.fixture(scope="module")
def texts(short_texts: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 short texts whose class one word gives away."""
    words = ["parcel", "invoice", "street", "monday", "hello", "order", "meeting", "report"]
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "mails.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(120):
            drawn = [*list(random.choice(words, 6)), f"number {i}"]
            drawn.insert(int(random.integers(6)), "winner" if i % 2 else "regards")
            writer.writerow([" ".join(drawn), "spam" if i % 2 else "ham"])
    return f"csv:{path}"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 series of 12 to 30 steps, fast or slow waves."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("series") / "waves.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["series", "label", "x", "y"])
        for i in range(60):
            steps, speed = int(random.integers(12, 31)), (0.3, 1.2)[i % 2]
            wave = np.sin(np.arange(steps) * speed + random.uniform(0, 6))
            writer.writerows([[i, ("slow", "fast")[i % 2], f"{w:.4f}", f"{random.normal():.4f}"] for w in wave])
    return f"csv:{path}"


@pytest.fixture(scope="module")
def text_bundle(texts: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(data=texts, out=tmp_path_factory.mktemp("text") / "t.edge", epochs=12, batch=16, lr=0.01)


@pytest.fixture(scope="module")
def series_bundle(series: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(data=series, out=tmp_path_factory.mktemp("series") / "s.edge", epochs=15, batch=16, lr=0.01)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(data="labels:lines,64", out=tmp_path_factory.mktemp("reader") / "r.edge", epochs=1, batch=32)


def test_a_text_classifier_answers_raw_text(text_bundle: Bundle, texts: str):
    manifest = text_bundle.manifest
    assert manifest.task == "text-classification"
    assert manifest.model is not None
    assert manifest.model.name == "lstm-text"
    assert text_bundle.has(TOKENIZER)
    assert manifest.history[-1].figures["top1"] > 0.8
    assert evaluate(text_bundle, texts)["top1"] == pytest.approx(manifest.history[-1].figures["top1"])
    assert check_golden(text_bundle).relative <= 1e-4
    with Model.open(text_bundle.path) as model:
        assert model("hello winner of the order").label == "spam"
        assert [p.label for p in model.predict_batch(["regards monday", "winner monday"])] == ["ham", "spam"]
        for odd in ("", "\ud800 \0 winner", "x" * 100_000, "日本語 🙂"):
            assert model(odd).label in ("ham", "spam")
        with pytest.raises(InputError, match="takes a str"):
            model(np.zeros((8, 8), np.uint8))


def test_the_device_needs_neither_torch_nor_transformers(text_bundle: Bundle):
    code = f"""
import sys
from edgekit.runtime import Model
with Model.open({str(text_bundle.path)!r}) as model: print(model("winner").label)
assert not [name for name in ("torch", "transformers", "onnx", "PIL", "click") if name in sys.modules]"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "spam\n"


def test_a_series_classifier_takes_any_length(series_bundle: Bundle, series: str):
    figures = series_bundle.manifest.history[-1].figures
    assert figures["top1"] >= 0.75
    assert evaluate(series_bundle, series)["top1"] == pytest.approx(figures["top1"])
    with Model.open(series_bundle.path) as model:
        for steps in (1, 15, 30, 500):
            wave = np.stack([np.sin(np.arange(steps) * 1.2), np.zeros(steps)], 1)
            assert model(wave).label in ("fast", "slow")
        with pytest.raises(InputError, match=r"takes float32 \(T, 2\)"):
            model(np.zeros((5, 3), np.float32))
        with pytest.raises(InputError, match="NaN"):
            model(np.full((5, 2), np.nan, np.float32))


def test_what_only_classifiers_or_readers_have_is_refused_elsewhere(series_bundle: Bundle, series: str, cli, tmp_path: Path):
    beam = cli("eval", series_bundle.path, "--data", series, "--beam", "4")
    assert (beam.code, "leave --beam out" in beam.err) == (2, True)
    balance = cli("train", "--data", "labels:lines,24", "--out", tmp_path / "m.edge", "--balance")
    assert (balance.code, "leave --balance out" in balance.err) == (2, True)


def test_a_reader_reads_text(reader: Bundle, cli, tmp_path: Path):
    figures = reader.manifest.history[-1].figures
    again = evaluate(reader, "labels:lines,64")
    assert (figures["top1"], figures["cer"]) == pytest.approx((again["top1"], again["cer"]))
    assert reader.manifest.labels[0] == ""
    judged = cli("eval", reader.path, "--data", "labels:lines,64", "--beam", "4", "--json").json
    assert {"cer", "top1", "samples"} <= judged.keys()
    with Model.open(reader.path, beam=4) as model:
        prediction = model(load("labels:lines,64").test.read(0))
        assert prediction.label is None
        assert isinstance(prediction.text, str)
        assert prediction.scores.shape == (80, len(reader.manifest.labels))
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((40, 300, 3), 255, np.uint8)).save(tmp_path / "in" / "line.png")
    assert cli("scan", reader.path, "--source", tmp_path / "in", "--sink", f"jsonl:{tmp_path / 'out.jsonl'}").code == 0
    event = json.loads((tmp_path / "out.jsonl").read_text())
    assert "text" in event
    assert "label" not in event


@pytest.mark.parametrize("kind", ["text_bundle", "series_bundle", "reader"])
def test_every_kind_quantizes_and_is_judged(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    bundle: Bundle = request.getfixturevalue(kind)
    data = str(bundle.manifest.history[0].config["data"])
    small = edgekit.quantize(bundle, out=tmp_path / "q.edge", samples=16)
    assert small.has("model.int8.onnx")
    float_one, int8 = (evaluate(one, data)["top1"] for one in (bundle, small))
    assert int8 >= float_one - 0.1
    assert edgekit.bench(small, seconds=0.05)["latency_ms"]["p50"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text_bundle", "series_bundle", "reader"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_kind_compiles(kind: str, precision: str, request: pytest.FixtureRequest):
    built = edgekit.build(request.getfixturevalue(kind), target="rtx-ada", precision=precision)
    assert built.engine is not None


def test_commands_for_pictures_refuse_the_rest(text_bundle: Bundle, cli, tmp_path: Path):
    image = tmp_path / "x.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(image)
    for words in (
        ["explain", text_bundle.path, image, "--method", "gradcam", "--out", tmp_path / "why"],
        ["scan", text_bundle.path, "--source", image, "--sink", f"jsonl:{tmp_path / 'o.jsonl'}"],
        ["eval", text_bundle.path, "--data", "digits"],
        ["quantize", text_bundle.path, "--out", tmp_path / "q.edge", "--calib", "digits"],
    ):
        outcome = cli(*words)
        assert outcome.code == 2, words
        assert len(outcome.err.strip().splitlines()) <= 2
    assert not (tmp_path / "q.edge").exists()
    outcome = cli("explain", text_bundle.path, image, "--out", tmp_path / "why")  # texts are explained; this is none
    assert outcome.code == 1
    assert "hint: give a text" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "crnn"}, "is for text-recognition"),
        ({"model": "depthwise"}, "is for image-classification"),
        ({"size": 64}, "leave --size out|is for pictures"),
        ({"augment": "photos"}, "the augmentation 'photos' is for image"),
        ({"patience": 3}, "needs a validation split"),
        ({"epochs": 0}, "epochs 0"),
        ({"lr": 0}, "lr 0"),
        ({"validation": 1.5}, "a validation share"),
        ({"model": "hf:/no/such/folder"}, "no"),
        ({"epochs": "3"}, "epochs=.3."),
        ({"lr": "fast"}, "lr=.fast."),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(texts: str, tmp_path: Path, options: dict[str, object], words: str):
    with pytest.raises((UsageError, edgekit.EdgekitError), match=words):
        train(data=texts, out=tmp_path / "m.edge", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
