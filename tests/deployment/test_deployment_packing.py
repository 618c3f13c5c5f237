"""pack and verify: the same bytes every time, and not one bit of them may change."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import CALIBRATION, EXAMPLES, FLOAT_GRAPH, GOLDEN, MANIFEST, REPORT, Bundle
from edgekit.deployment import archive as archive_module
from edgekit.deployment import contents, keygen, pack, verify
from edgekit.deployment.signing import TRAILER_BYTES, Statement, blank_trailer, sign_file
from edgekit.errors import BundleError, EdgekitError, OutputExists, SignatureError, UsageError

BLANK = blank_trailer(Statement(1))


def resign(path: Path, keys) -> Path:
    """Sign whatever a test has made of a zip: a signer who is trusted but whose tool is not ours."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = BLANK
    with path.open("r+b") as file:
        sign_file(file, keys.key)
    return path


# pack


def test_same_bundle_same_bytes(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    moved = tmp_path / "elsewhere" / "other-name.edge"
    shutil.copytree(tiny_bundle.path, moved)
    for path in moved.rglob("*"):
        os.utime(path, (0, 0))
        path.chmod(0o600)
    again = pack(moved, out=tmp_path / "again.zip", key=keys.key)
    assert again.read_bytes() == signed.read_bytes()
    unsigned = [pack(tiny_bundle, out=tmp_path / f"u{i}.zip").read_bytes() for i in range(2)]
    assert unsigned[0] == unsigned[1]


def test_a_pack_is_a_plain_zip(tmp_path: Path, tiny_bundle: Bundle, signed: Path) -> None:
    with zipfile.ZipFile(signed) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [MANIFEST, *sorted(tiny_bundle.manifest.files)]
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "out.edge")
    opened = Bundle.open(tmp_path / "out.edge")
    assert opened.digest == tiny_bundle.digest
    assert (
        shutil.which("unzip") is None
        or subprocess.run(["unzip", "-tq", signed], capture_output=True, check=False).returncode == 0
    )


def test_what_the_device_does_not_need_stays_at_home(tmp_path: Path, keys) -> None:
    with Bundle.create(tmp_path / "b.edge") as draft:
        for name in (FLOAT_GRAPH, GOLDEN, CALIBRATION, "weights.safetensors"):
            draft.write(name, name.encode())
        draft.manifest = msgspec.convert(
            {"format": 1, "name": "b", "task": "tensor", "inputs": [], "outputs": []}, type=archive_module.Manifest
        )
    bundle = Bundle.open(tmp_path / "b.edge")
    bundle = bundle.extend(
        {REPORT: b"<html>", "bench/a.json": b"{}", EXAMPLES: b"{}", "engines/t.engine": b"plan"}, bundle.entry("build", {}, {})
    )
    held = contents(pack(bundle, out=tmp_path / "b.zip"))
    assert [f["name"] for f in held["files"]] == [CALIBRATION, "engines/t.engine", GOLDEN, FLOAT_GRAPH]
    assert held["key_id"] is None
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        manifest = archive_module.decode_manifest(archive.read(MANIFEST), "b")
    assert manifest.history[-1].stage == "pack"
    assert manifest.history[-1].parent == bundle.digest
    assert manifest.history[-1].time == bundle.manifest.history[-1].time
    assert manifest.history[-1].config == {"left_out": ["bench/a.json", EXAMPLES, REPORT, "weights.safetensors"]}


def test_a_damaged_bundle_is_not_packed(tmp_path: Path, tiny_bundle: Bundle) -> None:
    path = tiny_bundle.path / FLOAT_GRAPH
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="damaged"):
        pack(tiny_bundle, out=tmp_path / "t.zip")
    assert not (tmp_path / "t.zip").exists()


def test_a_failed_pack_leaves_nothing(tmp_path: Path, tiny_bundle: Bundle, keys) -> None:
    with pytest.raises(SignatureError, match="not a private key"):
        pack(tiny_bundle, out=tmp_path / "out" / "t.zip", key=keys.pub)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "t.zip").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        pack(tiny_bundle, out=tmp_path / "t.zip")
    assert (tmp_path / "t.zip").read_bytes() == b"mine"


# keys


def test_keys_are_not_put_into_a_bundle(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="lies inside the bundle"):
        keygen(tiny_bundle.path / "keys")
    assert not (tiny_bundle.path / "keys").exists()


def test_keygen_never_overwrites_and_keeps_the_secret(tmp_path: Path) -> None:
    made = keygen(tmp_path / "k")
    assert stat.S_IMODE(os.stat(made["key"]).st_mode) == 0o600
    before = Path(made["key"]).read_bytes()
    with pytest.raises(OutputExists):
        keygen(tmp_path / "k")
    Path(made["key"]).unlink()
    with pytest.raises(OutputExists):
        keygen(tmp_path / "k")  # the public half alone is enough to refuse
    assert b"PRIVATE KEY" in before
    assert not Path(made["key"]).exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_that_is_no_key(tmp_path: Path, signed: Path, content: bytes) -> None:
    (tmp_path / "no.pub").write_bytes(content)
    with pytest.raises(SignatureError, match="not a public key"):
        verify(signed, pub=tmp_path / "no.pub")
    with pytest.raises(SignatureError, match="no key file"):
        verify(signed, pub=tmp_path / "absent.pub")


def test_another_algorithm_is_no_key_of_ours(tmp_path: Path, signed: Path) -> None:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pub").write_bytes(pem)
    with pytest.raises(SignatureError, match="not an Ed25519"):
        verify(signed, pub=tmp_path / "ec.pub")


# verify


def test_verify_tells_what_is_inside(signed: Path, tiny_bundle: Bundle, keys) -> None:
    found = verify(signed, pub=keys.pub)
    assert found["verified"] is True
    assert found["key_id"] == keys.key_id
    assert found["name"] == "tiny"
    assert found["digest"] == tiny_bundle.digest
    assert {f["name"]: f["sha256"] for f in found["files"]} == tiny_bundle.manifest.files


def test_every_flip_is_refused_before_any_parser_sees_it(signed: Path, keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stated and signed, and the zip's end, with each of its bits; the free lines; 600 places elsewhere."""
    for place, parser in ((archive_module.zipfile, "ZipFile"), (archive_module, "decode_manifest")):
        monkeypatch.setattr(place, parser, lambda *_: pytest.fail("parsed before it was verified"))
    good = signed.read_bytes()
    tail = len(good) - TRAILER_BYTES
    said = tail + sum(len(line) + 1 for line in BLANK.splitlines()[:2])
    places = [(at, bit) for at in range(tail - 60, said) for bit in range(8)]
    places += [(at, at % 8) for at in range(said, len(good))]
    random = np.random.default_rng(0)
    places += [(int(random.integers(0, tail)), int(random.integers(0, 8))) for _ in range(600)]
    with signed.open("r+b", buffering=0) as file:
        for at, bit in places:
            os.pwrite(file.fileno(), bytes([good[at] ^ (1 << bit)]), at)
            with pytest.raises(SignatureError):
                verify(signed, pub=keys.pub)
            os.pwrite(file.fileno(), good[at : at + 1], at)
    assert signed.read_bytes() == good


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data[: len(data) // 2],
        lambda data: b"\0" + data,
        lambda data: b"",
        lambda data: data[-TRAILER_BYTES:],
        lambda data: data[:-TRAILER_BYTES] + data[-TRAILER_BYTES:].lower(),
        lambda data: data[:100] + data[101:],
    ],
)
def test_longer_shorter_and_moved_packs_are_refused(signed: Path, keys, change: Callable[[bytes], bytes]) -> None:
    signed.write_bytes(change(signed.read_bytes()))
    with pytest.raises(SignatureError):
        verify(signed, pub=keys.pub)


def test_unsigned_foreign_and_stripped_packs_are_refused(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    unsigned = pack(tiny_bundle, out=tmp_path / "u.zip")
    with pytest.raises(SignatureError, match="not signed"):
        verify(unsigned, pub=keys.pub)
    other = keygen(tmp_path / "other")
    with pytest.raises(SignatureError, match=keys.key_id):
        verify(signed, pub=other["pub"])
    line = len(BLANK.splitlines()[1]) + 1
    at = len(BLANK.splitlines()[0]) + 1 - TRAILER_BYTES  # of the first signature, from the end
    stripped = bytearray(signed.read_bytes())
    stripped[at : at + line] = BLANK.splitlines()[1] + b"\n"
    assert stripped == unsigned.read_bytes()  # a signature is its line and nothing else
    with pytest.raises(BundleError, match="no packed bundle"):
        verify(tmp_path / "none.zip", pub=keys.pub)
    with pytest.raises(BundleError, match="no packed bundle"):
        verify(tmp_path, pub=keys.pub)


# A trusted signer may still have packed nonsense: what is inside is held to the format


def rewritten(source: Path, out: Path, edit: Callable[[zipfile.ZipFile], None], skip: str = "") -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            if info.filename != skip:
                new.writestr(zipfile.ZipInfo(info.filename), old.read(info))
        edit(new)
    return out


def link_entry(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("engines/link")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


def deflated(archive: zipfile.ZipFile) -> None:
    archive.writestr("bomb", bytes(50 << 20), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda a: a.writestr("../out", b"x"), "unsafe name"),
        (lambda a: a.writestr("/abs", b"x"), "unsafe name"),
        (lambda a: a.writestr("a/../../b", b"x"), "unsafe name"),
        (lambda a: a.writestr("C:\\x", b"x"), "unsafe name"),
        (lambda a: a.writestr("engines/", b""), "unsafe name"),
        (lambda a: a.writestr("mod\u0435l.onnx", b"x"), "unsafe name"),  # a Cyrillic e
        (lambda a: a.writestr("MODEL.onnx", b"x"), "more than once"),
        (lambda a: a.writestr("model.onnx/x", b"x"), "more than once"),
        (lambda a: [a.writestr("E/x", b"x"), a.writestr("e/y", b"x")], "more than once"),
        (lambda a: a.writestr("extra", b"x"), "not in both"),
        (link_entry, "not a regular file"),
        (deflated, "compressed"),
        (lambda a: a.writestr("small", b"x" * 999, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda a: [a.writestr(f"f{i}", b"") for i in range(1100)], "at most"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives_are_refused_though_signed(tmp_path: Path, signed: Path, keys, edit, reason: str) -> None:
    bad = resign(rewritten(signed, tmp_path / "bad.zip", edit), keys)
    with pytest.raises(BundleError, match=reason):
        verify(bad, pub=keys.pub)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_missing_files_and_wrong_hashes_are_refused_though_signed(tmp_path: Path, signed: Path, keys) -> None:
    twice = resign(rewritten(signed, tmp_path / "1.zip", lambda a: a.writestr(FLOAT_GRAPH, b"another")), keys)
    with pytest.raises(BundleError, match="more than once"):
        verify(twice, pub=keys.pub)
    less = resign(rewritten(signed, tmp_path / "2.zip", lambda a: None, skip=FLOAT_GRAPH), keys)
    with pytest.raises(BundleError, match="not in both"):
        verify(less, pub=keys.pub)
    wrong = resign(rewritten(signed, tmp_path / "3.zip", lambda a: a.writestr(GOLDEN, b"wrong"), skip=GOLDEN), keys)
    with pytest.raises(BundleError, match="damaged"):
        verify(wrong, pub=keys.pub)
    none = resign(rewritten(signed, tmp_path / "4.zip", lambda a: None, skip=MANIFEST), keys)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        verify(none, pub=keys.pub)
    junk = resign(rewritten(signed, tmp_path / "5.zip", lambda a: a.writestr(MANIFEST, b"{}"), skip=MANIFEST), keys)
    with pytest.raises(BundleError, match="not valid"):
        verify(junk, pub=keys.pub)


def test_a_signed_file_that_is_no_zip(tmp_path: Path, keys) -> None:
    path = tmp_path / "no.zip"
    path.write_bytes(b"anything" * 99 + BLANK)
    with path.open("r+b") as file:
        sign_file(file, keys.key)
    with pytest.raises(BundleError, match="no sound zip"):
        verify(path, pub=keys.pub)


def test_size_limits(signed: Path, keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MAX_PACK_BYTES", 1000)
    with pytest.raises(BundleError, match="larger than"):
        verify(signed, pub=keys.pub)


def test_a_name_cut_short_by_a_null_is_refused(tmp_path: Path, signed: Path, keys) -> None:
    path = rewritten(signed, tmp_path / "bad.zip", lambda a: a.writestr("modelXonnx", b"x"))
    path.write_bytes(path.read_bytes().replace(b"modelXonnx", b"model\0onnx"))
    with path.open("ab") as file:
        file.write(BLANK)
    with path.open("r+b") as file:
        file.seek(-TRAILER_BYTES - 2, os.SEEK_END)
        file.write(TRAILER_BYTES.to_bytes(2, "little"))
        sign_file(file, keys.key)
    with pytest.raises(BundleError, match="unsafe name"):
        verify(path, pub=keys.pub)


def test_overlapping_entries_are_refused(signed: Path, keys) -> None:
    """Two names for the same bytes: the sum of the sizes then exceeds the file (a bomb without compression)."""
    with zipfile.ZipFile(signed, "a") as archive:
        info = archive.getinfo(FLOAT_GRAPH)
        for i in range(9):
            other = zipfile.ZipInfo(f"f{i}")
            other.header_offset, other.file_size, other.compress_size = info.header_offset, info.file_size, info.file_size
            other.CRC = info.CRC
            archive.filelist.append(other)
        archive._didModify = True
        archive.comment = BLANK
    with signed.open("r+b") as file:
        sign_file(file, keys.key)
    with pytest.raises(BundleError, match=r"more bytes than the pack|no sound zip"):
        verify(signed, pub=keys.pub)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_archive_is_read_or_refused(tmp_path: Path, tiny_bundle: Bundle, data: st.DataObject) -> None:
    """Unsigned bytes reach the zip reader in `contents`: whatever they are, it answers or raises an EdgekitError."""
    buffer = io.BytesIO()
    small = msgspec.structs.replace(tiny_bundle.manifest, files={GOLDEN: tiny_bundle.manifest.files[GOLDEN]})
    archive_module.write_archive(buffer, tiny_bundle, small, b"")
    mutated = bytearray(buffer.getvalue())
    directory = mutated.rfind(b"PK\x01\x02")
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(directory, len(mutated) - 1) | st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.zip"
    path.write_bytes(mutated)
    with contextlib.suppress(EdgekitError):
        contents(path)


def test_verify_streams(tmp_path: Path, keys) -> None:
    """A pack of 50 MB costs less than 20 MB of memory, by the kernel's high-water mark."""
    with Bundle.create(tmp_path / "b.edge") as draft:
        draft.write(FLOAT_GRAPH, np.random.default_rng(0).bytes(50_000_000))
        draft.manifest = msgspec.convert(
            {"format": 1, "name": "b", "task": "tensor", "inputs": [], "outputs": []}, type=archive_module.Manifest
        )
    packed = pack(tmp_path / "b.edge", out=tmp_path / "b.zip", key=keys.key)
    code = (
        "import sys, zipfile, cryptography.hazmat.primitives.asymmetric.ed25519\n"
        "from edgekit.deployment import verify\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "verify(sys.argv[1], pub=sys.argv[2])\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, packed, keys.pub], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000, f"{done.stdout} KiB for a pack of 50 MB"
