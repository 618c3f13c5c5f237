"""What a device believes: lists of revocations, and its memory of releases and of time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.deployment import install, pack, revoke, sign, trusted, verify
from edgekit.errors import SignatureError, UsageError


def released(tmp_path: Path, bundle: Bundle, keys, *numbers: int) -> list[Path]:
    return [pack(bundle, out=tmp_path / f"r{number}.zip", key=keys.key, release=number) for number in numbers]


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
        lambda data: re.sub(rb'(": )2(?=\n)', rb"\g<1>1", data),
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
            assert found in (before, {"tiny": {keys.key_id: 3}})
    trusted.remember(root, trust, signed, "tiny")
    assert trusted.memory(root).releases == {"tiny": {keys.key_id: 3}}
    assert [path.name for path in root.glob(".trust*")] == []


def test_an_older_memory_is_read(tmp_path: Path, tiny_bundle: Bundle, keys) -> None:
    """As it was written before signers were noted."""
    root, (one, three) = tmp_path / "root", released(tmp_path, tiny_bundle, keys, 1, 3)
    root.mkdir()
    revoked = {"number": 0, "keys": [], "digests": []}
    old = {"version": 1, "releases": {"tiny": 2}, "revoked": revoked, "time": "2026-11-28T12:00:00Z", "seal": ""}
    compact = json.dumps(old, sort_keys=True, separators=(",", ":")).encode()
    (root / "trust.json").write_text(json.dumps({**old, "seal": hashlib.sha256(compact).hexdigest()}))
    with pytest.raises(SignatureError, match="older than 2"):
        install(one, root=root, pub=keys.pub)
    install(three, root=root, pub=keys.pub)
    assert trusted.memory(root).accepted("tiny") == {"": 2, keys.key_id: 3}


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
