"""What a root is for, whom a device believes there while an install is at work, and what is in an install's way."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

import msgspec
import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import install, installing, pack, revoke, rollback, slots, status, trusted, verify
from edgekit.errors import BudgetNotMet, BundleError, EdgekitError, GoldenError, SignatureError, UsageError


def released(tmp_path: Path, bundle: Bundle, *keys: Path, numbers: tuple[int, ...]) -> list[Path]:
    """Packs of one name, whose bundles differ (labels) as releases do."""
    packs = []
    for number in numbers:
        with Bundle.create(tmp_path / f"r{number}.edge") as draft:
            for name in bundle.manifest.files:
                draft.write(name, bundle.file(name).read_bytes())
            draft.manifest = msgspec.structs.replace(bundle.manifest, files={}, labels=(f"r{number}",))
        packs.append(pack(tmp_path / f"r{number}.edge", out=tmp_path / f"r{number}.zip", key=keys, release=number))
    return packs


# What a root is for


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the golden and latency checks, which say nothing of trust."""
    monkeypatch.setattr(installing, "_tried", lambda *args: {})


def test_only_a_file_that_is_named_changes_the_name(
    tmp_path: Path, versions: list[Path], keys, untried: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """What lies in a folder, or on a server, others have chosen; the same by a damaged or a lost record of what runs."""
    root, stick = tmp_path / "root", tmp_path / "stick"
    stick.mkdir()
    install(versions[0], root=root, pub=keys.pub)
    shutil.copy(versions[1], stick)
    for unsigned in (False, True):
        with pytest.raises(BundleError, match=r"it holds v1, and .* runs v0") as error:
            install(stick, root=root, pub=None if unsigned else keys.pub, unsigned=unsigned)
        assert "--rename" in error.value.hint
    (root / "state.json").write_text("{")
    (root / "trust.json").unlink()
    with pytest.raises(BundleError, match="runs v0"):
        install(stick, root=root, pub=keys.pub)
    install(stick, root=root, pub=keys.pub, rename=True)
    capfd.readouterr()
    install(versions[2], root=root, pub=keys.pub)
    assert "v2 takes the place of v1" in capfd.readouterr().err


def test_a_folder_with_packs_of_two_products(tmp_path: Path, versions: list[Path], tiny_bundle, keys, untried: None) -> None:
    root, stick = tmp_path / "root", tmp_path / "stick"
    stick.mkdir()
    install(versions[0], root=root, pub=keys.pub)
    for name, source in (("v9", versions[1]), ("v8", versions[2])):
        shutil.copy(source, stick / f"{name}.zip")
    with pytest.raises(BundleError, match=r"v9\.zip: it holds v1, .* \(1 more for the same reason\)"):
        install(stick, root=root, pub=keys.pub)
    (stick / "a1.zip").write_bytes(versions[0].read_bytes()[:-700])
    with pytest.raises(SignatureError, match=r"a1\.zip: the pack is cut off.*; 2 more: it holds v1") as error:
        install(stick, root=root, pub=keys.pub)
    assert error.value.hint == "fetch or copy it again"
    shutil.copy(versions[0], stick / "a0.zip")
    assert install(stick, root=root, pub=keys.pub)["pack"] == str(stick / "a0.zip")


def test_what_a_stolen_key_has_vouched_for_goes_with_it(
    tmp_path: Path, tiny_bundle: Bundle, versions: list[Path], keys, second, untried: None
) -> None:
    """The key ``second`` is stolen: it signs the highest release there is, and then a name of its own."""
    root, both = tmp_path / "root", [keys.pub, second[1]]
    five, six = released(tmp_path, tiny_bundle, keys.key, numbers=(5, 6))
    install(five, root=root, pub=both)
    install(pack(tiny_bundle, out=tmp_path / "s.zip", key=second[0], release=10**16 - 1), root=root, pub=both)
    with pytest.raises(SignatureError, match="older than 9999999999999999"):
        install(six, root=root, pub=both)
    gone = tmp_path / "gone" / "revoked.txt"
    revoke([second[2]], out=gone, key=keys.key)
    with pytest.raises(SignatureError, match="older than 5"):  # what the other key has signed counts as before
        install(released(tmp_path, tiny_bundle, keys.key, numbers=(4,))[0], root=root, pub=both, revoked=gone)
    assert install(six, root=root, pub=both)["release"] == 6


def test_a_way_back_that_was_revoked(tmp_path: Path, tiny_bundle: Bundle, keys, second, untried: None) -> None:
    root, both = tmp_path / "root", [keys.pub, second[1]]
    one, two = released(tmp_path, tiny_bundle, second[0], keys.key, numbers=(1, 2))
    first = install(one, root=root, pub=both)
    assert list(first["key_ids"]) == [second[2], keys.key_id]
    install(two, root=root, pub=both)
    gone = tmp_path / "gone" / "revoked.txt"
    revoke([second[2]], out=gone, key=keys.key)  # one good signature is enough, there as at an install
    assert install(two, root=root, pub=both, revoked=gone)["unchanged"]
    assert trusted.memory(root).revoked.keys == {second[2]}
    revoke([verify(one, pub=both)["pack_digest"]], out=gone, key=keys.key)
    assert install(two, root=root, pub=both, revoked=gone)["unchanged"]
    with pytest.raises(BundleError, match="its makers have revoked it"):
        rollback(root)


def test_a_list_revokes_the_signer_of_the_next_one(tmp_path: Path, signed: Path, keys, second) -> None:
    first, then, both = tmp_path / "1.txt", tmp_path / "2.txt", [keys.pub, second[1]]
    revoke([second[2]], out=first, key=keys.key)
    revoke([keys.key_id], out=then, key=second[0])
    with pytest.raises(SignatureError, match=r"no trusted key has signed .*2\.txt"):
        verify(signed, pub=both, revoked=[first, then])


def test_what_is_revoked_during_an_install_counts(
    tmp_path: Path, tiny_bundle: Bundle, keys, second, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock another install has read a list."""
    root, both = tmp_path / "root", [keys.pub, second[1]]
    one, two = released(tmp_path, tiny_bundle, keys.key, numbers=(1, 2))
    install(one, root=root, pub=both)
    gone, genuine = tmp_path / "gone" / "revoked.txt", installing.copy_of
    revoke([keys.key_id], out=gone, key=second[0])

    def meanwhile(*args: object) -> None:
        genuine(*args)
        trusted._write_state(root, trusted.State(revoked=trusted.Revoked(1, frozenset([keys.key_id]))))

    monkeypatch.setattr(installing, "copy_of", meanwhile)
    with pytest.raises(SignatureError, match="which is revoked"):
        install(two, root=root, pub=both)
    assert status(root)["release"] == 1


def test_the_memory_is_written_before_the_switch(
    tmp_path: Path, tiny_bundle: Bundle, keys, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, (one, two) = tmp_path / "root", released(tmp_path, tiny_bundle, keys.key, numbers=(1, 2))
    install(one, root=root, pub=keys.pub)
    seen = []
    genuine = installing.place
    monkeypatch.setattr(
        installing, "place", lambda *args: (seen.append(trusted.memory(root).releases["tiny"]), genuine(*args))[1]
    )
    install(two, root=root, pub=keys.pub)
    assert seen == [{keys.key_id: 2}]


def test_files_that_were_exchanged_after_the_tests_are_noticed(
    tmp_path: Path, tiny_bundle: Bundle, keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another user who may write the root: what is noted and run is what was signed."""
    root, (one, two) = tmp_path / "root", released(tmp_path, tiny_bundle, keys.key, numbers=(1, 2))
    monkeypatch.setattr(installing, "_tried", lambda *args: {})  # the checks pass
    install(one, root=root, pub=keys.pub)
    for name in ("manifest.json", "model.onnx"):

        def exchanged(fresh: Path, *args: object, name: str = name) -> dict:
            (fresh / name).write_bytes((fresh / name).read_bytes().replace(b"r2", b"r3") + b" ")
            return {}

        monkeypatch.setattr(installing, "_tried", exchanged)
        with pytest.raises(BundleError, match="was changed during the install"):
            install(two, root=root, pub=keys.pub)
        assert (status(root)["release"], status(root)["healthy"]) == (1, True)


def test_an_engine_that_does_not_pass_is_not_noted(tmp_path: Path, liar: Path, keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Bundle.open(tmp_path / "liar.edge").extend({"engines/rtx-ada.engine": b"an engine"})
    bad = pack(tmp_path / "liar.edge", out=tmp_path / "bad.zip", key=keys.key)
    with pytest.raises(GoldenError):
        install(bad, root=tmp_path / "root", pub=keys.pub, backend="onnxruntime")
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "root").exists()
    monkeypatch.setattr(installing, "_tried", lambda *args: {})
    install(bad, root=tmp_path / "root", pub=keys.pub)
    assert [note.name for note in tmp_path.glob("state/edgekit/trusted/*")] == [hashlib.sha256(b"an engine").hexdigest()]


def test_what_is_installed_can_be_read_by_the_scan_whatever_the_umask(
    tmp_path: Path, versions: list[Path], keys, untried: None
) -> None:
    before = os.umask(0o077)
    try:
        install(versions[0], root=tmp_path / "a" / "root", pub=keys.pub)
    finally:
        os.umask(before)
    paths = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in paths if not path.is_symlink() and path.name != ".lock"}
    assert modes == {path: 0o755 if path.is_dir() else 0o644 for path in modes}


# What is in the way, and words


def test_roots_that_are_none(tmp_path: Path, versions: list[Path], keys, untried: None, monkeypatch) -> None:
    root = tmp_path / "root"
    for name in ("current", "slots"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine")
        with pytest.raises(EdgekitError, match=f"{name} is a file") as error:
            install(versions[0], root=root, pub=keys.pub)
        assert "mv " in error.value.hint
        (root / name).unlink()
    (root / ".incoming").write_text("mine")  # left, as it were
    (root / "current").mkdir()
    with pytest.raises(EdgekitError, match="current is a folder"):
        install(versions[0], root=root, pub=keys.pub)
    (root / "current").rmdir()
    (root / "trust.json").mkdir()
    with pytest.raises(SignatureError, match=r"trust\.json is damaged: it is a folder"):
        install(versions[0], root=root, pub=keys.pub)
    (root / "trust.json").rmdir()
    install(versions[0], root=root, pub=keys.pub)
    for inside in (root / "current", root / "slots" / "a", root / "current" / "deeper"):
        with pytest.raises(UsageError) as error:
            install(versions[0], root=inside, pub=keys.pub)
        assert error.value.hint == f"did you mean --root {root}"
    with pytest.raises(UsageError, match="is a bundle"):
        install(versions[0], root=tmp_path / "v0.edge", pub=keys.pub)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="pack: '' is no path"):
        install("", root=root, pub=keys.pub)
    with pytest.raises(UsageError, match="needs the public key of its signer"):
        install(versions[0], root=root, unsigned=True, revoked="revoked.txt")


def test_every_folder_above_a_new_root_is_on_disk_before_anything_lies_in_it(
    tmp_path: Path, signed: Path, keys, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, synced, genuine = tmp_path / "deep" / "down" / "root", [], slots.sync_path
    monkeypatch.setattr(slots, "sync_path", lambda path: (genuine(path), synced.append((path, any(root.iterdir())))))
    install(signed, root=root, pub=keys.pub)
    assert synced[:3] == [(each, False) for each in (tmp_path / "deep" / "down", tmp_path / "deep", tmp_path)]


def test_a_refused_first_install_leaves_no_root(tmp_path: Path, signed: Path, liar: Path, keys) -> None:
    for bad, words in (("http://127.0.0.1:9/t.zip", "over http"), (liar, "golden")):
        with pytest.raises(EdgekitError, match=words):
            install(bad, root=tmp_path / "deep" / "root", unsigned=True)
        assert not (tmp_path / "deep").exists()


def test_a_pack_that_was_cut_is_not_called_unsigned(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    data, cut = signed.read_bytes(), tmp_path / "cut.zip"
    for end in (200, len(data) // 2, len(data) - 600):
        cut.write_bytes(data[:end])
        with pytest.raises(SignatureError, match="cut off or damaged"):
            verify(cut, pub=keys.pub)
    with pytest.raises(SignatureError, match="is not signed"):
        verify(pack(tiny_bundle, out=tmp_path / "u.zip"), pub=keys.pub)


def test_what_runs_already_is_held_against_the_budget(tmp_path: Path, signed: Path, keys, untried: None, cli) -> None:
    root = tmp_path / "root"
    install(signed, root=root, pub=keys.pub)
    with pytest.raises(BudgetNotMet, match="1e-06 ms are allowed"):
        install(signed, root=root, pub=keys.pub, max_latency_ms=1e-6)
    done = cli("install", tmp_path, "--root", root, "--pub", keys.pub, "--max-latency-ms", 1e6)
    assert done.code == 0
    assert "runs already" in done.out
    assert f"pack      {signed}\n" in done.out
    assert ", release " in done.out
    assert "latency " in done.out
    assert ", release " in cli("status", "--root", root).out


# What others do meanwhile


def test_a_stick_that_holds_another_product_the_second_time(
    tmp_path: Path, versions: list[Path], keys, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, stick, genuine = tmp_path / "root", tmp_path / "stick", installing.copy_of
    stick.mkdir()
    install(versions[0], root=root, pub=keys.pub)
    shutil.copy(versions[0], stick / "p.zip")

    def swapped(source: object, *about: object) -> None:
        with versions[1].open("rb") as other:
            genuine(other, *about)

    monkeypatch.setattr(installing, "copy_of", swapped)
    with pytest.raises(BundleError, match=r"it holds v1, and .* runs v0"):
        install(stick, root=root, pub=keys.pub)
    assert status(root)["name"] == "v0"


def test_the_name_is_known_where_what_runs_is_damaged(tmp_path: Path, versions: list[Path], keys, untried: None) -> None:
    root, stick = tmp_path / "root", tmp_path / "stick"
    stick.mkdir()
    install(versions[0], root=root, pub=keys.pub)
    (root / "slots" / "a" / "manifest.json").write_text("{")
    shutil.copy(versions[1], stick)
    with pytest.raises(BundleError, match="runs v0"):
        install(stick, root=root, pub=keys.pub)


def test_the_same_bundle_in_another_pack_is_noted(tmp_path: Path, tiny_bundle: Bundle, keys, second, untried: None) -> None:
    """First unsigned, then signed, then by another key too."""
    root, both = tmp_path / "root", [keys.pub, second[1]]
    install(pack(tiny_bundle, out=tmp_path / "u.zip"), root=root, unsigned=True)
    assert status(root)["key_id"] is None
    one = pack(tiny_bundle, out=tmp_path / "1.zip", key=keys.key, release=4)
    assert install(one, root=root, pub=keys.pub)["unchanged"]
    found = status(root)
    assert (found["key_id"], found["release"], found["pack_digest"]) == (
        keys.key_id, 4, verify(one, pub=keys.pub)["pack_digest"],
    )  # fmt: skip
    two = pack(tiny_bundle, out=tmp_path / "2.zip", key=[keys.key, second[0]], release=4)
    assert list(install(two, root=root, pub=both)["key_ids"]) == [keys.key_id, second[2]]


def test_installs_that_remove_what_a_crash_left_do_not_meet(
    tmp_path: Path, versions: list[Path], keys, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work folder goes between its making and its lock, twice; what another install holds stays."""
    root, genuine, seen = tmp_path / "root", slots.locked, []
    install(versions[0], root=root, pub=keys.pub)

    def late(folder: Path, wait: bool = True):
        seen.append(folder)
        if len(seen) < 3:
            folder.rmdir()
        return genuine(folder, wait)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "locked", late)
        install(versions[1], root=root, pub=keys.pub)
    assert len(set(seen)) == 3
    with slots.incoming(root) as work:
        (work / "mine").write_text("x")
        install(versions[2], root=root, pub=keys.pub)
        assert (work / "mine").exists()
    assert not list(root.glob(".incoming*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_root_does_not_install_for_another_user(tmp_path: Path, signed: Path, keys) -> None:
    (tmp_path / "root").mkdir()
    os.chown(tmp_path / "root", 12345, 12345)
    with pytest.raises(EdgekitError, match="belongs to user 12345") as refused:
        install(signed, root=tmp_path / "root", pub=keys.pub)
    assert "sudo -u" in refused.value.hint
    assert list((tmp_path / "root").iterdir()) == []


def test_slots_that_lead_elsewhere_are_not_followed(tmp_path: Path, signed: Path, keys) -> None:
    (tmp_path / "victim").mkdir(mode=0o700)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "slots").symlink_to(tmp_path / "victim")
    with pytest.raises(EdgekitError, match="slots is a link"):
        install(signed, root=tmp_path / "root", pub=keys.pub)
    assert list((tmp_path / "victim").iterdir()) == []
    assert stat.S_IMODE((tmp_path / "victim").stat().st_mode) == 0o700
