"""What a device believes: releases, expiry, several keys, lists of revocations, and its memory of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.deployment import archive as archive_module
from edgekit.deployment import contents, install, keygen, pack, revoke, sign, trusted, verify
from edgekit.deployment.signing import LINE_BYTES, TRAILER_BYTES, Statement, blank_trailer, read_trailer
from edgekit.errors import EdgekitError, OutputExists, SignatureError, UsageError


@pytest.fixture
def second(tmp_path: Path):
    made = keygen(tmp_path / "second")
    return Path(made["key"]), Path(made["pub"]), made["key_id"]


@pytest.fixture
def signed(tmp_path: Path, tiny_bundle: Bundle, keys) -> Path:
    return pack(tiny_bundle, out=tmp_path / "t.edge.zip", key=keys.key)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the clock of the device."""
    return lambda time: monkeypatch.setattr(trusted, "_clock", lambda: time)


def released(tmp_path: Path, bundle: Bundle, keys, *numbers: int) -> list[Path]:
    return [pack(bundle, out=tmp_path / f"r{number}.zip", key=keys.key, release=number) for number in numbers]


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


# Revocation


def test_a_revoked_key_is_not_believed(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys, second) -> None:
    both, out = [keys.pub, second[1]], tmp_path / "lists" / "gone.txt"
    made = revoke([keys.key_id], out=out, key=second[0])
    assert (made["keys"], made["key_id"]) == ([keys.key_id], second[2])
    assert verify(signed, pub=both)["verified"]
    with pytest.raises(SignatureError, match="is revoked"):
        verify(signed, pub=both, revoked=out)
    with pytest.raises(SignatureError, match="no trusted key has signed"):
        verify(signed, pub=keys.pub, revoked=out)
    sign(signed, key=second[0])
    assert verify(signed, pub=both, revoked=out)["key_ids"] == [second[2]]


def test_a_pack_or_a_bundle_is_revoked_by_its_digest(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    found = verify(signed, pub=keys.pub)
    assert found["pack_digest"] != found["digest"]
    for digest in (found["pack_digest"], found["digest"]):
        revoke([digest], out=tmp_path / f"{digest}.txt", key=keys.key)
        with pytest.raises(SignatureError, match="is revoked"):
            verify(signed, pub=keys.pub, revoked=tmp_path / f"{digest}.txt")


def test_a_list_beside_the_pack_is_looked_at(tmp_path: Path, signed: Path, keys, second, capsys) -> None:
    beside = tmp_path / "revoked.txt"
    revoke([keys.key_id], out=beside, key=second[0])
    assert verify(signed, pub=keys.pub)["verified"]  # signed by a stranger: it says nothing here
    assert "is not believed" in capsys.readouterr().err
    with pytest.raises(SignatureError, match="is revoked"):
        verify(signed, pub=[keys.pub, second[1]])
    data = beside.read_bytes()
    beside.write_bytes(data.replace(b"number=0", b"number=1"))
    with pytest.raises(SignatureError, match="does not match"):
        verify(signed, pub=[keys.pub, second[1]])


def test_a_list_grows(tmp_path: Path, keys, second) -> None:
    out = tmp_path / "revoked.txt"
    first = revoke(["0" * 16], out=out, key=keys.key)
    then = revoke(["1" * 16, "a" * 64], out=out, key=keys.key)
    assert then["number"] > first["number"]
    assert (then["keys"], then["digests"]) == (["0" * 16, "1" * 16], ["a" * 64])
    before = out.read_bytes()
    with pytest.raises(SignatureError, match="another key"):
        revoke(["2" * 16], out=out, key=second[0])
    for bad in ("2" * 15, "A" * 16, "٣" * 16, "2" * 16 + "\n", ""):
        with pytest.raises(UsageError, match="no id"):
            revoke([bad], out=out, key=keys.key)
    assert out.read_bytes() == before


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_list_is_not_believed(tmp_path: Path, signed: Path, keys, data: st.DataObject) -> None:
    out = tmp_path / "list.txt"
    out.unlink(missing_ok=True)
    revoke(["0" * 16], out=out, key=keys.key)
    body = bytearray(out.read_bytes())
    where = data.draw(st.integers(0, len(body) - 1))
    body[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(min_size=1, max_size=3))
    if bytes(body) != out.read_bytes():
        out.write_bytes(body)
        with pytest.raises(SignatureError):
            verify(signed, pub=keys.pub, revoked=out)


# What a device remembers


def test_an_older_release_is_refused_and_the_same_is_not(tmp_path: Path, tiny_bundle: Bundle, keys) -> None:
    root, (one, two) = tmp_path / "root", released(tmp_path, tiny_bundle, keys, 1, 2)
    install(two, root=root, pub=keys.pub)
    before = (root / "state.json").read_bytes()
    with pytest.raises(SignatureError, match="release 1 of tiny is older than 2") as error:
        install(one, root=root, pub=keys.pub)
    assert "--allow-older" in error.value.hint
    assert (root / "state.json").read_bytes() == before
    assert install(two, root=root, pub=keys.pub)["unchanged"]
    install(one, root=root, pub=keys.pub, allow_older=True)
    with pytest.raises(SignatureError, match="older than 2"):  # the exception was for once
        install(one, root=root, pub=keys.pub)


def test_what_was_revoked_stays_revoked(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys, second) -> None:
    root, both = tmp_path / "root", [keys.pub, second[1]]
    install(signed, root=root, pub=both)
    beside = tmp_path / "revoked.txt"
    revoke([keys.key_id], out=beside, key=second[0])
    with pytest.raises(SignatureError, match="is revoked"):
        install(signed, root=root, pub=both)
    beside.unlink()
    with pytest.raises(SignatureError, match="is revoked"):  # the stick may forget, the device does not
        install(signed, root=root, pub=both)
    comeback = tmp_path / "comeback.txt"
    revoke([second[2]], out=comeback, key=keys.key)  # by the stolen key, against the one that revoked it
    with pytest.raises(SignatureError, match="no trusted key"):
        install(signed, root=root, pub=both, revoked=comeback)
    sign(signed, key=second[0])
    assert install(signed, root=root, pub=both)["unchanged"]


def test_a_key_may_revoke_itself(tmp_path: Path, signed: Path, keys) -> None:
    root, own = tmp_path / "root", tmp_path / "own.txt"
    install(signed, root=root, pub=keys.pub)
    revoke([keys.key_id], out=own, key=keys.key)
    for _ in range(2):
        with pytest.raises(SignatureError, match="which is revoked"):
            install(signed, root=root, pub=keys.pub, revoked=own)


def test_a_clock_set_back_revives_nothing(tmp_path: Path, tiny_bundle: Bundle, keys, at) -> None:
    root = tmp_path / "root"
    limited = pack(tiny_bundle, out=tmp_path / "l.zip", key=keys.key, expires="2027-12-31")
    for never in ("1970-01-01T00:00:07Z", "2025-12-31T23:59:59Z"):
        at(never)
        with pytest.raises(SignatureError, match="nobody can tell"):
            install(limited, root=root, pub=keys.pub)
    at("2027-06-01T12:00:00Z")
    install(limited, root=root, pub=keys.pub)
    at("1970-01-01T00:00:07Z")
    install(limited, root=root, pub=keys.pub)  # the time that was seen before counts
    at("2028-01-01T00:00:00Z")
    with pytest.raises(SignatureError, match="expired"):
        install(limited, root=root, pub=keys.pub)
    install(pack(tiny_bundle, out=tmp_path / "n.zip", key=keys.key), root=root, pub=keys.pub)  # the time is noted again
    at("2027-06-01T12:00:00Z")
    with pytest.raises(SignatureError, match="though its clock shows 2027-06-01"):
        install(limited, root=root, pub=keys.pub)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\xff" * 40,
        lambda data: data.replace(b'"tiny": 2', b'"tiny": 1'),
        lambda data: b"[" * 100_000,
    ],
)
def test_a_damaged_memory_accepts_nothing(tmp_path: Path, tiny_bundle: Bundle, keys, damage) -> None:
    root, (two, three) = tmp_path / "root", released(tmp_path, tiny_bundle, keys, 2, 3)
    install(two, root=root, pub=keys.pub)
    memory = root / "trust.json"
    damaged = damage(memory.read_bytes())
    assert damaged != memory.read_bytes()
    memory.write_bytes(damaged)
    with pytest.raises(SignatureError, match=r"trust\.json is damaged"):
        install(three, root=root, pub=keys.pub)
    memory.unlink()
    install(three, root=root, pub=keys.pub)


def test_killed_anywhere_the_memory_is_whole(
    tmp_path: Path, tiny_bundle: Bundle, keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each system call of `remember` that changes the disk is the last one once: the memory is the old one or the new one."""
    root, (two, three) = tmp_path / "root", released(tmp_path, tiny_bundle, keys, 2, 3)
    install(two, root=root, pub=keys.pub)
    before = json.loads((root / "trust.json").read_text())["releases"]
    trust = trusted.believe(keys.pub, root=root)
    with three.open("rb") as file:
        signed = trust.check(file)

    class Killed(BaseException):
        pass

    for name in ("fsync", "replace"):
        genuine = getattr(os, name)
        for after in (False, True):

            def last(*args: object, genuine=genuine, after: bool = after) -> None:
                if after:
                    genuine(*args)
                raise Killed

            monkeypatch.setattr(os, name, last)
            with pytest.raises(Killed):
                trusted.remember(root, trust, signed, "tiny")
            monkeypatch.setattr(os, name, genuine)
            found = trusted.memory(root).releases
            assert found in (before, {"tiny": 3})
    trusted.remember(root, trust, signed, "tiny")
    assert trusted.memory(root).releases == {"tiny": 3}
    assert [path.name for path in root.glob(".trust*")] == []


# The list of what is inside


def test_the_list_of_what_is_inside(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    out = tmp_path / "sbom" / "t.cdx.json"
    found = verify(signed, pub=keys.pub, sbom=out)
    graph = next(file for file in found["files"] if file["name"] == "model.onnx")
    assert graph["kind"] == "float graph"
    assert graph["producer"]["stage"] == tiny_bundle.manifest.history[0].stage
    bill = json.loads(out.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    assert bill["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": found["pack_digest"]}]
    listed = {c["name"]: c["hashes"][0]["content"] for c in bill["components"] if "hashes" in c}
    assert listed == tiny_bundle.manifest.files
    with pytest.raises(OutputExists):
        verify(signed, pub=keys.pub, sbom=out)
    verify(signed, pub=keys.pub, sbom=tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_the_list_is_valid_cyclonedx(tmp_path: Path, tiny_bundle: Bundle, keys) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    bundle = tiny_bundle.extend(
        {"engines/t.engine": b"plan"}, tiny_bundle.entry("build", {"target": "t"}, {"tensorrt": "10.3.0"})
    )
    history = (*bundle.manifest.history, msgspec.structs.replace(bundle.manifest.history[0], figures={"data_digest": "d" * 64}))
    manifest = msgspec.structs.replace(bundle.manifest, history=history)
    from edgekit.deployment.inventory import write_sbom

    found = verify(pack(bundle, out=tmp_path / "x.zip", key=keys.key, expires="2099-01-01"), pub=keys.pub)
    assert next(f for f in found["files"] if f["kind"] == "engine")["producer"]["tensorrt"] == "10.3.0"
    write_sbom(tmp_path / "bom.json", manifest, found)
    text = (tmp_path / "bom.json").read_text()
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    wrong = text.replace('"SHA-256"', '"SHA-255"')
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(wrong) is not None


# The command line


def test_the_way_of_a_key_on_the_command_line(tmp_path: Path, tiny_bundle: Bundle, cli, monkeypatch) -> None:
    """Old key, new key, both on one pack, the old one revoked: the rotation of docs/deploy.md."""
    monkeypatch.chdir(tmp_path)

    def edgekit(*args: object, code: int = 0) -> dict:
        done = cli(*args, "--json")
        assert done.code == code, done.err
        return done.json

    old, new = (edgekit("keygen", "--out", name) for name in ("old", "new"))
    packed = edgekit("pack", tiny_bundle.path, "--out", "t.zip", "--key", old["key"], "--release", 7, "--expires", "2099-12-31")
    assert (packed["release"], packed["expires"], packed["key_id"]) == (7, "2099-12-31T23:59:59Z", old["key_id"])
    assert edgekit("sign", "t.zip", "--key", new["key"])["key_ids"] == [old["key_id"], new["key_id"]]
    assert edgekit("revoke", old["key_id"], "--out", "revoked.txt", "--key", new["key"])["keys"] == [old["key_id"]]
    both = ("--pub", old["pub"], "--pub", new["pub"])
    assert edgekit("verify", "t.zip", *both, "--sbom", "t.cdx.json")["key_ids"] == [new["key_id"]]
    assert edgekit("install", "t.zip", "--root", "root", *both)["key_id"] == new["key_id"]
    edgekit("pack", tiny_bundle.path, "--out", "u.zip", "--key", old["key"], "--release", 8)
    assert "is revoked" in edgekit("install", "u.zip", "--root", "root", *both, code=1)["error"]
    edgekit("sign", "u.zip", "--key", new["key"])
    edgekit("install", "u.zip", "--root", "root", *both)
    assert "older than 8" in edgekit("install", "t.zip", "--root", "root", *both, code=1)["error"]
    edgekit("install", "t.zip", "--root", "root", *both, "--allow-older")
