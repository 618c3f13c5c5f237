"""The trailer of a pack, in its one spelling; several keys; what a signer states."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.deployment import archive as archive_module
from edgekit.deployment import contents, keygen, pack, sign, verify
from edgekit.deployment.signing import LINE_BYTES, TRAILER_BYTES, Statement, blank_trailer, read_trailer
from edgekit.errors import EdgekitError, SignatureError, UsageError


def trailer_of(path: Path) -> bytes:
    return path.read_bytes()[-TRAILER_BYTES:]


# The statement


def test_a_pack_states_its_release_and_its_end(tmp_path: Path, tiny_bundle: Bundle, keys, at) -> None:
    first = pack(tiny_bundle, out=tmp_path / "a.zip", key=keys.key, release=12, expires="2027-12-31")
    again = pack(tiny_bundle, out=tmp_path / "b.zip", key=keys.key, release=12, expires="2027-12-31")
    assert first.read_bytes() == again.read_bytes()
    at("2027-12-31T23:59:59Z")  # the last second belongs to it
    found = verify(first, pub=keys.pub)
    assert (found["release"], found["expires"]) == (12, "2027-12-31T23:59:59Z")
    at("2028-01-01T00:00:00Z")
    with pytest.raises(SignatureError, match="expired at 2027-12-31"):
        verify(first, pub=keys.pub)
    line = trailer_of(first).splitlines()[0]
    assert line == b"edgekit-pack-1 release=0000000000000012 expires=2027-12-31T23:59:59Z"


def test_without_words_the_last_change_is_the_release(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    found = verify(signed, pub=keys.pub)
    last = tiny_bundle.manifest.history[-1].time
    assert found["release"] == int(re.sub(r"\D", "", last))
    assert found["expires"] is None
    limited = pack(tiny_bundle, out=tmp_path / "d.zip", expires="1d")
    assert contents(limited)["expires"] > last


@pytest.mark.parametrize("words", ["", "tomorrow", "2027-02-30", "2027-2-3", "0d", "99999999d", "-1d", "9999-12-31", "٣d"])
def test_what_is_no_day_is_refused(tmp_path: Path, tiny_bundle: Bundle, words: str) -> None:
    with pytest.raises(UsageError, match="no day"):
        pack(tiny_bundle, out=tmp_path / "x.zip", expires=words)
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize("number", [-1, 10**16])
def test_a_release_has_sixteen_digits(tmp_path: Path, tiny_bundle: Bundle, number: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        pack(tiny_bundle, out=tmp_path / "x.zip", release=number)


def change(old: str, new: str) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        change("release=0000000000000012", "release=0000000000000013"),
        change("release=0000000000000012", "release=              12"),
        change("release=0000000000000012", "release=+000000000000012"),
        change("release=0000000000000012", "release=٣00000000000012"),  # a digit to Unicode
        change("expires=2027-12-31", "expires=2028-12-31"),
        change("expires=2027-12-31", "expires=2027-13-31"),
        change("expires=2027-12-31T23:59:59Z", "expires=2027-12-31T23:59:60Z"),
        change("expires=2027-12-31T23:59:59Z", "expires=2027-12-31t23:59:59z"),
        change("Z\nedgekit-signature", "Z\r\nedgekit-signature"),
        change("Z\nedgekit-signature", "Z edgekit-signature"),
        change("edgekit-pack-1 ", "edgekit-pack-2 "),
        change("edgekit-signature -", "edgekit-signature +"),
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data[:69] + data,  # two statements
        lambda data: data[:69] + data[69 + LINE_BYTES :] + data[69 : 69 + LINE_BYTES],  # a gap before the signature
        lambda data: data[: 69 + LINE_BYTES] + data[69 : 69 + LINE_BYTES] + data[69 + 2 * LINE_BYTES :],  # the same twice
        lambda data: data[:69] + data[69 : 69 + 19].upper() + data[69 + 19 :],
        lambda data: data[:69] + data[69 : 69 + LINE_BYTES].upper() + data[69 + LINE_BYTES :],
        lambda data: data + b"\n",
        lambda data: data[:-1],
    ],
)
def test_a_trailer_has_one_spelling(tmp_path: Path, tiny_bundle: Bundle, keys, edit, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tiny_bundle, out=tmp_path / "a.zip", key=keys.key, release=12, expires="2027-12-31")
    data = path.read_bytes()
    path.write_bytes(data[:-TRAILER_BYTES] + edit(data[-TRAILER_BYTES:]))
    monkeypatch.setattr(archive_module.zipfile, "ZipFile", lambda *_: pytest.fail("parsed before it was verified"))
    with pytest.raises(SignatureError):
        verify(path, pub=keys.pub)


@given(st.binary(max_size=2 * TRAILER_BYTES) | st.just(blank_trailer(Statement(3))), st.integers(0, 700), st.binary(max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_trailer_of_that_spelling_or_none(tmp_path: Path, data: bytes, where: int, junk: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(b"x" + data[:where] + junk + data[where + len(junk) :])
    with path.open("rb") as file:
        found = read_trailer(file)
    if found is not None:
        assert trailer_of(path)[:69] == found.statement.line()


# Several keys


def test_one_good_signature_of_several_is_enough(tmp_path: Path, tiny_bundle: Bundle, keys, second) -> None:
    both = pack(tiny_bundle, out=tmp_path / "both.zip", key=[keys.key, second[0]])
    assert verify(both, pub=keys.pub)["key_ids"] == [keys.key_id]
    assert verify(both, pub=second[1])["key_ids"] == [second[2]]
    ring = tmp_path / "ring.pub"
    ring.write_bytes(b"# ours\n" + keys.pub.read_bytes() + second[1].read_bytes())
    folder = tmp_path / "ring"
    folder.mkdir()
    shutil.copy(keys.pub, folder / "a.pub")
    shutil.copy(second[1], folder / "b.pub")
    (folder / "README").write_text("not a key, and not called one")
    for pub in (ring, folder, [keys.pub, second[1]]):
        assert verify(both, pub=pub)["key_ids"] == [keys.key_id, second[2]]
    data = bytearray(both.read_bytes())
    place = len(data) - TRAILER_BYTES + 69 + LINE_BYTES + 60  # within the second signature
    data[place] = ord("A") if data[place] != ord("A") else ord("B")
    both.write_bytes(data)
    assert verify(both, pub=keys.pub)["key_ids"] == [keys.key_id]  # a signature by an unknown key is not read
    with pytest.raises(SignatureError, match="does not match"):
        verify(both, pub=ring)


def test_a_pack_is_signed_again(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys, second) -> None:
    sign(signed, key=second[0])
    together = pack(tiny_bundle, out=tmp_path / "both.zip", key=[keys.key, second[0]])
    assert signed.read_bytes() == together.read_bytes()
    before = signed.read_bytes()
    with pytest.raises(SignatureError, match=r"signed by key \w+ already"):
        sign(signed, key=keys.key)
    more = [keygen(tmp_path / f"k{i}")["key"] for i in range(3)]
    with pytest.raises(SignatureError, match="4 signatures"):
        sign(signed, key=more)
    assert signed.read_bytes() == before
    assert sorted(p.name for p in tmp_path.glob(".*")) == []
    unsigned = pack(tiny_bundle, out=tmp_path / "later.zip")
    sign(unsigned, key=keys.key)
    assert verify(unsigned, pub=keys.pub)["key_ids"] == [keys.key_id]


def test_a_damaged_pack_is_not_signed(signed: Path, second) -> None:
    data = bytearray(signed.read_bytes())
    data[2000] ^= 1
    signed.write_bytes(data)
    with pytest.raises(EdgekitError):
        sign(signed, key=second[0])
    assert signed.read_bytes() == data


def test_keys_of_the_wrong_kind(tmp_path: Path, signed: Path, keys, second) -> None:
    pem = serialization.Encoding.PEM
    other = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "rsa.pub").write_bytes(other.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "cut.pub").write_bytes(keys.pub.read_bytes() + second[1].read_bytes()[:60])
    (tmp_path / "large.pub").write_bytes(keys.pub.read_bytes() + b"#" * 70_000)
    (tmp_path / "none").mkdir()
    (tmp_path / "many").mkdir()
    for i in range(300):
        (tmp_path / "many" / f"{i}.pub").write_bytes(keys.pub.read_bytes())
    for name, reason in {
        "rsa.pub": "not an Ed25519",
        "cut.pub": "no whole PEM",
        "large.pub": "larger than",
        "none": r"no \.pub file",
        "many": "at most 256",
    }.items():
        with pytest.raises(SignatureError, match=reason):
            verify(signed, pub=[keys.pub, tmp_path / name])  # fail closed: the good key beside does not help
    with pytest.raises(SignatureError, match="holds a private one"):
        verify(signed, pub=keys.key)
    with pytest.raises(SignatureError, match="0 public keys"):
        verify(signed, pub=[])
