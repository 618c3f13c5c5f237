"""`manifest.json` as a file that anybody may have written: it reads back as it was written, or is refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError
from edgekit.manifest import (
    FORMAT,
    History,
    ImagePreprocessing,
    Manifest,
    ModelConfig,
    TensorSpec,
    Tolerance,
    decode_manifest,
    encode_manifest,
    history_entry,
    is_safe_name,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3),
    max_leaves=6,
)
safe_names = st.from_regex(r"[a-z0-9_][a-zA-Z0-9_.\-]{0,9}(/[a-z0-9_][a-z.]{0,5})?", fullmatch=True)
tensors = st.builds(TensorSpec, texts, texts, st.lists(st.integers(0, 9999) | texts, max_size=4).map(tuple))
images = st.builds(
    ImagePreprocessing,
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.just(1),
    st.tuples(st.floats(-9, 9)),
    st.tuples(st.floats(0.1, 9)),
    st.sampled_from(["stretch", "crop", "letterbox"]),
)
entries = st.builds(History, texts, texts, texts, st.dictionaries(texts, plain, max_size=3), st.none() | texts)
manifests = st.builds(
    Manifest,
    st.just(FORMAT),
    texts,
    st.sampled_from(["tensor", "image-classification"]),
    st.lists(tensors, max_size=3).map(tuple),
    st.lists(tensors, max_size=3).map(tuple),
    st.none() | st.builds(ModelConfig, texts, st.dictionaries(texts, plain, max_size=3)),
    st.none() | images,
    st.lists(texts, max_size=3).map(tuple),
    st.dictionaries(safe_names, st.builds(Tolerance, st.sampled_from(["relative", "snr_db"]), st.floats(0, 99)), max_size=2),
    st.dictionaries(safe_names, st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3),
    st.lists(entries, max_size=3).map(tuple),
)


@given(manifests)
@settings(max_examples=200, deadline=None)
def test_manifest_round_trip(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert decode_manifest(data, "here") == manifest
    assert encode_manifest(decode_manifest(data, "here")) == data


@given(st.binary(max_size=200) | plain.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_a_manifest_or_a_bundle_error(data: bytes) -> None:
    with pytest.raises(BundleError):
        decode_manifest(data, "here")


@given(manifests, st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_manifest_is_a_manifest_or_a_bundle_error(manifest: Manifest, data: st.DataObject) -> None:
    encoded = bytearray(encode_manifest(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        decoded = decode_manifest(bytes(encoded), "here")
    except BundleError:
        return
    assert all(is_safe_name(name) for name in decoded.files)


@pytest.mark.parametrize(
    "data",
    [
        b'{"format": 1, "name": "\xff"}',
        b'{"format": 1, "x": ' + b"[" * 100_000,
        b'{"format": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": 1e999}',
        b'{"format": 1, "name": "\\ud800"}',
    ],
)
def test_hostile_json_is_a_bundle_error(data: bytes) -> None:
    with pytest.raises(BundleError):
        decode_manifest(data, "here")


@given(st.text(max_size=20) | safe_names)
def test_a_safe_name_stays_inside(name: str) -> None:
    if is_safe_name(name):
        root = Path("/root-of-bundle")
        assert Path(os.path.normpath(root / name)).is_relative_to(root)
        assert name.isascii()
        assert not any(c.isspace() for c in name)


@pytest.mark.parametrize("bit", [1, 4, 32])
def test_a_flipped_byte_in_the_manifest_is_refused(tiny_bundle: Bundle, bit: int) -> None:
    """Whatever it hits, a label, a mean, a figure; only the case of an exponent (1e-05, 1E-05) says the same."""
    good = (tiny_bundle.path / MANIFEST).read_bytes()
    taken = 0
    for at in range(len(good) - 1):
        with contextlib.suppress(BundleError):
            assert decode_manifest(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :], "here") == tiny_bundle.manifest
            taken += 1
    assert taken <= good.count(b"e-0")


# Provenance


def test_an_entry_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.invalid")
        return subprocess.run(["git", *identity, *args], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert history_entry("train", {}, {}).commit is msgspec.UNSET
    git("init", "-q")
    assert history_entry("train", {}, {}).commit is msgspec.UNSET  # nothing is committed yet
    Path("a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    git("tag", "-am", "a name is no commit", "v1")
    head = git("rev-parse", "HEAD")
    assert history_entry("train", {}, {}).commit == head
    Path("beside").write_text("an output, not a source")
    assert history_entry("train", {}, {}).commit == head
    Path("a").write_text("2")
    assert history_entry("train", {}, {}).commit == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert history_entry("train", {}, {}).commit is msgspec.UNSET


def test_an_entry_without_provenance_reads_as_before() -> None:
    """A manifest of before has neither field, and its seal must hold."""
    entry = History("train", "2026-01-01T00:00:00Z", "0.1.0")
    data = encode_manifest(Manifest(FORMAT, "old", "tensor", (), (), history=(entry,)))
    assert b"commit" not in data
    assert b"tools" not in data
    assert decode_manifest(data, "here").history == (entry,)


def test_an_entry_names_the_tools_that_were_loaded() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    tools = history_entry("bench", {}, {}).tools
    assert isinstance(tools, dict)
    assert tools["onnxruntime"] == onnxruntime.__version__
