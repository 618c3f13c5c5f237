"""--shape, --dynamic, --batch: the texts and the profiles they make."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.compiler import import_onnx
from edgekit.compiler.shapes import Axis, parse_batch, parse_shapes, profiles_for
from edgekit.errors import UsageError
from edgekit.manifest import FORMAT, Manifest, TensorSpec, history_entry

names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
axes = st.builds(lambda a, b: Axis(min(a, b), max(a, b)), st.integers(1, 4096), st.integers(1, 4096))


@given(names, st.lists(axes, min_size=1, max_size=6))
def test_what_is_written_is_read_back(name: str, shape: list[Axis]) -> None:
    text = f"{name}:{'x'.join(map(str, shape))}"
    assert parse_shapes([text], ranges=True) == {name: tuple(shape)}


@given(st.text(max_size=40))
def test_any_text_is_axes_or_a_usage_error(text: str) -> None:
    found: dict[str, tuple[Axis, ...]] = {}
    with contextlib.suppress(UsageError):
        found = parse_shapes([text], ranges=True)
    assert all(1 <= axis.low <= axis.high for shape in found.values() for axis in shape)


@pytest.mark.parametrize("text", ["1x3", "x:", ":1x3", "x:1x0", "x:1x-3", "x:1x3x", "x:1..8x3", "x:1×3", "x:99999999999"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_shapes([text])


def test_a_name_stated_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_shapes(["x:1x3", "x:2x3"])


def test_a_name_may_hold_a_colon() -> None:
    assert parse_shapes(["input:0:1x3"]) == {"input:0": (Axis(1, 1), Axis(3, 3))}


def test_batch_is_a_number_or_a_range() -> None:
    assert parse_batch(None) is None
    assert parse_batch(4) == Axis(4, 4)
    assert parse_batch("1..8") == Axis(1, 8)
    for wrong in ("0", "8..1", "many", "-1"):
        with pytest.raises(UsageError):
            parse_batch(wrong)


def bundle(tmp_path: Path, shape: tuple[int | str, ...], dynamic: dict[str, str] | None = None) -> Bundle:
    path = tmp_path / "b.edge"
    with Bundle.create(path) as draft:
        draft.manifest = Manifest(
            FORMAT,
            "b",
            "tensor",
            (TensorSpec("x", "float32", shape),),
            (TensorSpec("y", "float32", (1,)),),
            history=(history_entry("import", {"dynamic": dynamic or {}}, {}),),
        )
    return Bundle.open(path)


def test_a_fixed_graph_needs_no_profile(tmp_path: Path) -> None:
    fixed = bundle(tmp_path, (2, 3, 8, 8))
    assert profiles_for(fixed) == {}
    assert profiles_for(fixed, 2) == {}
    with pytest.raises(UsageError, match="fixed at 2"):
        profiles_for(fixed, 4)


def test_the_batch_is_one_unless_stated(tmp_path: Path) -> None:
    dynamic = bundle(tmp_path, ("n", 3, 8, 8))
    assert profiles_for(dynamic) == {"x": [[1, 3, 8, 8]] * 3}
    assert profiles_for(dynamic, "1..8") == {"x": [[1, 3, 8, 8], [8, 3, 8, 8], [8, 3, 8, 8]]}


def test_ranges_of_the_import_become_the_profile(tmp_path: Path) -> None:
    ranged = bundle(tmp_path, ("n", 3, 8, "w"), {"x": "1..4x3x8x16..320"})
    assert profiles_for(ranged) == {"x": [[1, 3, 8, 16], [4, 3, 8, 320], [4, 3, 8, 320]]}
    assert profiles_for(ranged, 2) == {"x": [[2, 3, 8, 16], [2, 3, 8, 320], [2, 3, 8, 320]]}
    with pytest.raises(UsageError, match="outside"):
        profiles_for(ranged, 8)


def test_a_dynamic_axis_without_range_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'w'"):
        profiles_for(bundle(tmp_path, ("n", 3, 8, "w")))


def test_profiles_are_plain_json(tmp_path: Path) -> None:
    made = profiles_for(bundle(tmp_path, ("n", 3, 8, 8)), 3)
    assert msgspec.json.decode(msgspec.json.encode(made)) == made
    assert np.array(made["x"]).shape == (3, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8..1", "--batch '8..1' ends below its start"),
        ("0..4", "--batch 0..4: an axis of 0; it has 1 to 16777216"),
        ("1..99999999999", "an axis of 99999999999"),
        ("1..8..9", "--batch '1..8..9' is not an axis; a size such as 8, or a range such as 1..8, was expected"),
    ],
)
def test_each_contradiction_of_a_range_has_its_own_words(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        parse_batch(text)
    assert "1..8" in caught.value.hint


def test_a_range_for_shape_and_one_backwards_are_told_apart() -> None:
    with pytest.raises(UsageError, match="is a range, and --shape fixes sizes") as caught:
        parse_shapes(["x:1..8x3"])
    assert "--dynamic x:1..8x3" in caught.value.hint
    with pytest.raises(UsageError, match="ends below its start") as caught:
        parse_shapes(["x:8..1x3"], "--dynamic", ranges=True)
    assert caught.value.hint == "write the smaller size first: 1..8"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"shape": [("x", 1)]}, "is no text"),
        ({"dynamic": 5}, "is no text"),
        ({"shape": [None]}, "is no text"),
        ({"shape": 0}, "is no text"),
        ({"name": 5}, "is not called 5"),
        ({"name": "two\nlines"}, "is not called"),
        ({"timeout_s": -1}, "a timeout of -1"),
        ({"timeout_s": float("nan")}, "a timeout of nan"),
    ],
)
def test_arguments_of_another_kind_are_told(tmp_path: Path, tiny_onnx: Path, wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        import_onnx(tiny_onnx, out=tmp_path / "b.edge", **wrong)
    assert not (tmp_path / "b.edge").exists()
