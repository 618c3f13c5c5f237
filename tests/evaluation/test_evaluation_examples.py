"""What an evaluation leaves of each confusion: few, small, real, and only of that evaluation."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import EXAMPLES, Bundle
from edgekit.data import Split, load
from edgekit.data.examples import MAX_TEXT, examples


def kept(samples: list[Any], truth: list[int], answers: list[int], scores: list[float]) -> list[dict[str, Any]]:
    ids = tuple(f"s{i}" for i in range(len(samples)))
    split = Split(ids, np.array(truth), lambda i: samples[i])
    data = examples(split, ids, np.array(truth), np.array(answers), np.array(scores), "digits")
    cells: list[dict[str, Any]] = json.loads(data)["cells"]
    return cells


def test_eval_keeps_samples_of_its_confusions(cli: Any, digits_bundle: Bundle) -> None:
    assert cli("eval", digits_bundle.path, "--data", "digits", "--no-save").code == 0
    assert not Bundle.open(digits_bundle.path).has(EXAMPLES)
    matrix = cli("eval", digits_bundle.path, "--data", "digits", "--json").json["confusion"]
    data = Bundle.open(digits_bundle.path).read(EXAMPLES)
    found = json.loads(data)
    assert found["data"] == "digits"
    assert len(data) < 1.3 * MAX_TEXT
    split = load("digits").test
    for cell in found["cells"]:
        assert matrix[cell["truth"]][cell["answer"]] >= len(cell["samples"]) > 0
        assert all(split.targets[split.ids.index(sample["id"])] == cell["truth"] for sample in cell["samples"])
    wrong = [matrix[c["truth"]][c["answer"]] for c in found["cells"] if c["truth"] != c["answer"]]
    assert wrong == sorted(wrong, reverse=True)


def test_the_surest_mistakes_and_the_least_sure_right_ones_are_kept() -> None:
    scores = [0.5, 0.9, 0.7, 0.8, 0.99, 0.6, 0.7, 0.8]
    cells = kept(["x"] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], scores)
    assert [(c["truth"], c["answer"], [s["score"] for s in c["samples"]]) for c in cells] == [
        (0, 1, [0.9, 0.8, 0.7]),
        (1, 1, [0.6, 0.7, 0.8]),
    ]


@given(st.integers(1, 130), st.integers(1, 130), st.booleans())
def test_a_thumbnail_is_a_small_picture_of_its_frame(height: int, width: int, colour: bool) -> None:
    from PIL import Image

    frame = np.full((height, width, 3) if colour else (height, width), 200, np.uint8)
    (cell,) = kept([frame], [0], [1], [0.5])
    picture = Image.open(io.BytesIO(base64.b64decode(cell["samples"][0]["png"])))
    assert picture.mode == ("RGB" if colour else "L")
    assert max(picture.size) <= 48
    assert np.all(np.asarray(picture) == 200)


def test_large_pictures_texts_and_series_stay_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 96, 96, 3), np.uint8)
    cells = kept(list(noise), list(range(60)), [60] * 60, [0.5] * 60)
    assert 0 < len(cells) < 60
    assert len(json.dumps(cells)) < 1.3 * MAX_TEXT
    (text,) = kept(["a" * 5000], [0], [1], [0.5])
    assert text["samples"][0]["text"] == "a" * 160
    (series,) = kept([np.full((500, 9), np.nan, np.float32)], [0], [1], [0.5])
    assert [len(line) for line in series["samples"][0]["series"]] == [40] * 3
