"""Texts: the words that the model uses are found, whatever the tokenizer, and what cannot be read is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from edgekit.bundle import FLOAT_GRAPH, TOKENIZER, Bundle
from edgekit.errors import DataError, UsageError
from edgekit.explanation import explain
from edgekit.manifest import FORMAT, Manifest, TensorSpec, TextPreprocessing, history_entry
from edgekit.training.tokenizer import fit_tokenizer

LENGTH = 12


def write(path: Path, tokenizer: bytes, scores: dict[int, float], vocabulary: int) -> Bundle:
    """Class "spam" has the sum of its tokens' ``scores`` for its logit, class "ham" a fixed one."""
    weight = np.zeros((vocabulary, 1), np.float32)
    for token, score in scores.items():
        weight[token] = score
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["e"]),
        helper.make_node("ReduceSum", ["e", "axis"], ["s"], keepdims=0),
        helper.make_node("Sub", ["half", "s"], ["h"]),
        helper.make_node("Concat", ["h", "s"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor("w", 1, weight.shape, weight.tobytes(), raw=True),
            helper.make_tensor("axis", 7, [1], [1]),
            helper.make_tensor("half", 1, [1], [0.5]),
        ],
    )
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
        draft.write(TOKENIZER, tokenizer)
        draft.manifest = Manifest(
            format=FORMAT,
            name=path.stem,
            task="text-classification",
            inputs=(TensorSpec("x", "int64", ("n", LENGTH)),),
            outputs=(TensorSpec("y", "float32", ("n", 2)),),
            labels=("ham", "spam"),
            preprocessing=TextPreprocessing(LENGTH),
            history=(history_entry("import", {}, {}),),
        )
    return Bundle.open(path)


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A byte-level tokenizer, as `edgekit train` makes it; "prize" speaks for spam, "parcel" against it."""
    data = fit_tokenizer(["hello prize parcel monday street"] * 20, 400)
    ids = {word: Tokenizer.from_buffer(data).encode(word).ids for word in ("prize", "parcel")}
    scores = {ids["prize"][0]: 2.0, ids["parcel"][0]: -1.0}
    return write(tmp_path_factory.mktemp("mails") / "mails.edge", data, scores, 400)


@pytest.mark.parametrize("method", ["lime", "occlusion"])
def test_the_words_that_the_model_uses_are_found(cli: Callable[..., Any], mails: Bundle, tmp_path: Path, method: str) -> None:
    text = "Hello, PRIZE\nparcel monday!"
    answer = cli("explain", mails.path, text, "--out", tmp_path / "why", "--method", method, "--json")
    assert answer.code == 0, answer.err
    row = answer.json["images"][0]
    assert (row["source"], row["label"], row["overlay"]) == ("Hello, PRIZE parcel monday!", "spam", f"text.{method}.png")
    assert row["hidden_as"] == "[PAD]"  # nothing ever gave this tokenizer's [UNK]
    weights = {word["word"]: word["weight"] for word in row["words"]}
    assert list(weights) == ["Hello", ",", "PRIZE", "parcel", "monday", "!"]
    assert all(text[word["start"] : word["stop"]] == word["word"] for word in row["words"])
    assert weights["PRIZE"] > 2 > 0.2 > abs(weights["monday"])
    assert weights["parcel"] < -1
    assert row["deletion_auc"] < row["misplaced_auc"]
    assert row["insertion_auc"] > row["misplaced_insertion_auc"]
    with Image.open(tmp_path / "why" / row["overlay"]) as picture:
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert any(red > blue + 80 for red, _, blue in colours)
    assert any(blue > red + 60 for red, _, blue in colours)
    table = cli("explain", mails.path, text, "--out", tmp_path / "why", "--method", method)
    assert "for: PRIZE" in table.out
    assert "against: parcel" in table.out


def test_texts_come_from_files_and_folders(mails: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("the prize", encoding="utf-8-sig")
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "c.txt").write_text("  \n")
    (folder / "d.png").write_bytes(b"no text")
    result = explain(mails, [folder, folder / "a.txt"], out=tmp_path / "why")
    assert [row["overlay"] for row in result["images"]] == ["a.occlusion.png", "a-2.occlusion.png"]
    assert [word["word"] for word in result["images"][0]["words"]] == ["the", "prize"]
    assert result["skipped"] == [str(folder / "b.txt"), str(folder / "c.txt")]
    with pytest.raises(DataError, match="there is no text"):
        explain(mails, "missing.txt", out=tmp_path / "none")
    with pytest.raises(DataError, match="none of 1 texts"):
        explain(mails, "", out=tmp_path / "none")
    assert explain(mails, ["the prize", ""], out=tmp_path / "why")["skipped"] == ["''"]
    with pytest.raises(UsageError, match="gradcam is not for text-classification"):
        explain(mails, "the prize", out=tmp_path / "none", method="gradcam")
    assert not (tmp_path / "none").exists()


def test_only_words_that_the_model_reads_are_judged(mails: Bundle, tmp_path: Path) -> None:
    row = explain(mails, "prize " * 40, out=tmp_path / "why")["images"][0]
    assert len(row["words"]) == LENGTH
    one = explain(mails, "prize", out=tmp_path / "why")["images"][0]
    assert len(one["words"]) == 1
    assert (one["misplaced_auc"], one["misplaced_insertion_auc"]) == (None, None)  # the only map is its own control
    assert one["unchecked"] == "a map of fewer than 3 parts cannot be misplaced"
    long = explain(mails, "zażółć" * 2000, out=tmp_path / "why")["images"][0]
    assert len(long["words"]) == 1


@pytest.mark.parametrize("mask", [True, False])
def test_a_mask_or_a_known_unknown_stands_for_a_hidden_word(tmp_path: Path, mask: bool) -> None:
    words = ["[PAD]", "[UNK]", "prize", "[MASK]" if mask else "mask"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bundle = write(tmp_path / "words.edge", tokenizer.to_str().encode(), {2: 2.0}, 4)
    row = explain(bundle, "a prize", out=tmp_path / "why")["images"][0]
    assert row["hidden_as"] == ("[MASK]" if mask else "[UNK]")
    assert json.loads((tmp_path / "why" / "explanation.json").read_text())["images"][0]["words"][1]["weight"] > 1
