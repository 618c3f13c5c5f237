"""install, rollback, status: the running slot is whole at every instant, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.deployment import checks, install, keygen, pack, rollback, status
from edgekit.deployment import installing as module
from edgekit.errors import BundleError, EdgekitError, GoldenError, SignatureError
from edgekit.runtime import Model


def test_installed_models_run(tmp_path: Path, tiny_bundle: Bundle, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    done = install(versions[0], root=root, pub=keys.pub)
    assert (done["slot"], done["sequence"], done["unchanged"]) == ("a", 1, False)
    assert done["golden"]["relative"] <= 1e-4
    x = np.random.default_rng(5).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with Model.open(root / "current") as installed, Model.open(tiny_bundle.path) as original:
        assert np.array_equal(installed.run({"x": x})["y"], original.run({"x": x})["y"])
    assert sorted(p.name for p in root.iterdir()) == [".lock", "current", "slots", "state.json", "trust.json"]
    assert os.readlink(root / "current") == "slots/a"


def test_an_update_goes_to_the_other_slot_and_back(tmp_path: Path, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    names = []
    for version in versions:
        install(version, root=root, pub=keys.pub)
        names.append((status(root)["slot"], status(root)["name"]))
    assert names == [("a", "v0"), ("b", "v1"), ("a", "v2")]
    now = status(root)
    assert now["healthy"]
    assert now["key_id"] == keys.key_id
    assert (now["previous"]["name"], now["previous"]["slot"], now["sequence"]) == ("v1", "b", 3)
    back = rollback(root)
    assert (back["name"], back["slot"], back["left"]) == ("v1", "b", now["digest"])
    assert Bundle.open(root / "current").manifest.name == "v1"
    assert status(root)["previous"] is None
    with pytest.raises(BundleError, match="no older bundle"):
        rollback(root)  # never forward again to what was left
    again = install(versions[0], root=root, pub=keys.pub)
    assert (again["slot"], again["sequence"]) == ("a", 4)


def test_an_open_model_survives_the_switch(tmp_path: Path, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    opened = Model.open(root / "current")
    install(versions[1], root=root, pub=keys.pub)
    with opened as model:
        assert model.labels == ("v0",)
        assert model.run({"x": np.zeros((1, 3, 32, 32), np.float32)})["y"].shape == (1, 10)


def test_installing_what_runs_changes_nothing(tmp_path: Path, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    install(versions[1], root=root, pub=keys.pub)
    before = (root / "state.json").read_bytes()
    again = install(versions[1], root=root, pub=keys.pub)
    assert (again["unchanged"], again["name"], again["slot"]) == (True, "v1", "b")
    assert (root / "state.json").read_bytes() == before
    assert status(root)["previous"]["name"] == "v0"  # the way back was not spent


def test_a_damaged_running_bundle_is_installed_again(tmp_path: Path, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    graph = root / "slots" / "a" / FLOAT_GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    assert not status(root)["healthy"]
    assert "damaged" in status(root)["reason"]
    assert install(versions[0], root=root, pub=keys.pub)["unchanged"] is False
    assert status(root)["healthy"]


def test_untrusted_packs_do_not_touch_the_device(tmp_path: Path, tiny_bundle: Bundle, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    unsigned = pack(tiny_bundle, out=tmp_path / "u.zip")
    other = keygen(tmp_path / "other")["pub"]
    flipped = tmp_path / "flip.zip"
    data = bytearray(versions[0].read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    for path, pub, unsigned_too in (
        (versions[0], None, False),
        (unsigned, None, False),
        (unsigned, keys.pub, False),
        (unsigned, keys.pub, True),
        (versions[0], other, False),
        (flipped, keys.pub, False),
    ):
        with pytest.raises(SignatureError):
            install(path, root=root, pub=pub, unsigned=unsigned_too)
    with pytest.raises(BundleError, match=r"damaged|no sound zip"):
        install(flipped, root=root, unsigned=True)
    assert not root.exists()
    assert install(unsigned, root=root, unsigned=True)["key_id"] is None


def test_a_pack_that_changes_after_the_first_look(
    tmp_path: Path, versions: list[Path], keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stick may answer otherwise the second time: the private copy is checked again."""
    root = tmp_path / "root"
    genuine = module.copy_of

    def swapped(source, size, target, pack):
        data = bytearray(source.read())
        data[len(data) // 2] ^= 1
        target.write(data)

    monkeypatch.setattr(module, "copy_of", swapped)
    with pytest.raises(SignatureError, match="does not match"):
        install(versions[0], root=root, pub=keys.pub)
    assert not root.exists()
    monkeypatch.setattr(module, "copy_of", genuine)
    install(versions[0], root=root, pub=keys.pub)


def test_a_bundle_that_answers_otherwise_here_is_refused(tmp_path: Path, versions: list[Path], liar: Path, keys) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    before = (root / "state.json").read_bytes()
    with pytest.raises(GoldenError, match="golden outputs"):
        install(liar, root=root, pub=keys.pub)
    assert status(root)["name"] == "v0"
    assert (root / "state.json").read_bytes() == before
    assert sorted(p.name for p in root.iterdir()) == [".lock", "current", "slots", "state.json", "trust.json"]
    assert sorted(p.name for p in (root / "slots").iterdir()) == [".lock", "a"]


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, versions: list[Path], keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    disk = namedtuple("disk", "f_frsize f_bavail f_files f_favail")
    for found, words in (
        (disk(4096, 256, 1000, 1000), "1 MiB free"),
        (disk(4096, 1 << 20, 1000, 70), "70 more files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checks.os, "statvfs", lambda path, found=found: found)
            patch.setattr(module, "copy_of", None)  # not even reached
            with pytest.raises(EdgekitError, match=words):
                install(versions[1], root=root, pub=keys.pub)
    assert status(root)["name"] == "v0"


def test_an_empty_or_missing_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    empty = status(tmp_path / "root")
    assert (empty["slot"], empty["bundle"], empty["healthy"], empty["previous"]) == (None, None, False, None)
    assert empty["reason"] == "nothing is installed"
    with pytest.raises(BundleError, match="nothing is installed"):
        rollback(tmp_path / "root")
    for verb in (status, rollback):
        with pytest.raises(BundleError, match="there is no folder"):
            verb(tmp_path / "none")


def test_a_damaged_older_bundle_is_no_way_back(tmp_path: Path, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    install(versions[1], root=root, pub=keys.pub)
    (root / "slots" / "a" / FLOAT_GRAPH).unlink()
    with pytest.raises(BundleError, match="older bundle cannot run"):
        rollback(root)
    assert status(root)["name"] == "v1"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"version": 2}', b"[" * 100_000, b'{"slots": {"c": {}}}'])
def test_a_damaged_state_is_one_clear_error(tmp_path: Path, versions: list[Path], keys, content: bytes) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    (root / "state.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"state\.json is damaged"):
        status(root)
    with Model.open(root / "current") as model:
        assert model.labels == ("v0",)
    (root / "state.json").unlink()
    assert "does not know" in status(root)["reason"]
    install(versions[1], root=root, pub=keys.pub)
    assert status(root)["healthy"]


@pytest.mark.parametrize("target", ["../elsewhere", "slots/c", "slots/b", "/etc"])
def test_a_current_that_leads_elsewhere_is_not_followed(tmp_path: Path, versions: list[Path], keys, target: str) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    (root / "current").unlink()
    (root / "current").symlink_to(target)
    assert status(root)["slot"] is None
    assert "leads to no slot" in status(root)["reason"]
    install(versions[1], root=root, pub=keys.pub)
    assert status(root)["name"] == "v1"


@given(st.lists(st.sampled_from([0, 1, 2, "back"]), max_size=8))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_installs_and_rollbacks(versions: list[Path], keys, steps: list[object]) -> None:
    """Against a model of three lines: what runs, and the one way back, which a rollback spends."""
    with tempfile.TemporaryDirectory() as folder:
        running, back = None, None
        for step in steps:
            if step == "back":
                if back is None:
                    with pytest.raises(BundleError):
                        rollback(folder)
                    continue
                rollback(folder)
                running, back = back, None
            else:
                assert isinstance(step, int)
                install(versions[step], root=folder, pub=keys.pub, again=True)
                if running != f"v{step}":
                    running, back = f"v{step}", running
            now = status(folder)
            assert (now["healthy"], now["name"]) == (True, running)
            assert (now["previous"] or {"name": None})["name"] == back


# Killed anywhere (`test_deployment_crashes`: at every step)


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path, versions: list[Path], keys) -> None:
    """A process that installs and rolls back without end, killed 40 times from outside. It leaves out the checks, in whose
    time nothing changes on the disk: else most kills would meet those."""
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    code = """
    import sys
    from edgekit.deployment import install, installing, rollback
    from edgekit.errors import BundleError
    installing._tried = lambda *arguments: {}
    print("ready", flush=True)
    while True:
        for pack in sys.argv[3:]:
            install(pack, root=sys.argv[1], pub=sys.argv[2], again=True)
            try:
                rollback(sys.argv[1])
            except BundleError as error:  # a kill may have spent the way back
                assert "no older bundle" in str(error), error
    """
    random = np.random.default_rng(0)
    for _ in range(40):
        command = [sys.executable, "-c", textwrap.dedent(code), root, keys.pub, *versions]
        with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(float(random.uniform(0, 0.3)))
            process.send_signal(signal.SIGKILL)
        assert status(root)["healthy"]
    install(versions[2], root=root, pub=keys.pub, again=True)
    assert not list(root.glob(".incoming*"))


def test_two_installs_at_once_both_end_well(tmp_path: Path, versions: list[Path], keys) -> None:
    root = tmp_path / "root"
    code = "import sys; from edgekit.deployment import install; install(sys.argv[1], root=sys.argv[2], pub=sys.argv[3])"
    running = [
        subprocess.Popen([sys.executable, "-c", code, version, root, keys.pub], stderr=subprocess.PIPE) for version in versions
    ]
    for process in running:
        _, error = process.communicate()
        assert process.returncode == 0, error
    now = status(root)
    assert now["healthy"]
    assert now["sequence"] == 3
    assert now["previous"]["sequence"] == 2


# The command line


def test_the_way_of_a_bundle_on_the_command_line(cli, tmp_path: Path, digits_bundle: Bundle) -> None:
    keys = cli("keygen", "--out", tmp_path / "keys", "--json").json
    packed = cli("pack", digits_bundle.path, "--out", tmp_path / "d.zip", "--key", keys["key"], "--json").json
    assert packed["bundle"] == str(tmp_path / "d.zip")
    assert packed["key_id"] == keys["key_id"]
    checked = cli("verify", tmp_path / "d.zip", "--pub", keys["pub"], "--json").json
    assert checked["verified"] is True
    assert checked["digest"] == packed["digest"] == digits_bundle.digest
    done = cli("install", tmp_path / "d.zip", "--root", tmp_path / "root", "--pub", keys["pub"], "--json")
    assert done.code == 0
    assert done.json["bundle"] == str(tmp_path / "root" / "current")
    shown = cli("status", "--root", tmp_path / "root")
    assert shown.code == 0
    assert "slot a, whole" in shown.out
    with Model.open(done.json["bundle"]) as model:
        assert model(np.zeros((28, 28), np.uint8)).label in model.labels
    graph = tmp_path / "root" / "current" / FLOAT_GRAPH
    graph.write_bytes(b"damaged")
    broken = cli("status", "--root", tmp_path / "root", "--json")
    assert broken.code == 1
    assert broken.json["healthy"] is False
    assert "error" in broken.json
    assert len(broken.err.splitlines()) == 2


def test_status_of_an_empty_root(cli, tmp_path: Path) -> None:
    answer = cli("status", "--root", tmp_path, "--json")
    assert (answer.code, answer.json["slot"], answer.err) == (0, None, "")
    assert "nothing is installed" in cli("status", "--root", tmp_path).out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("verify", "none.zip", "--pub", "none.pub"), 1),
        (("verify", "none.zip"), 2),
        (("pack", "none.edge", "--out", "x.zip"), 1),
        (("pack", "none.edge"), 2),
        (("install", "none.zip", "--root", "r", "--unsigned"), 1),
        (("install", "none.zip"), 2),
        (("rollback", "--root", "none"), 1),
        (("status", "--root", "none"), 1),
        (("keygen",), 2),
    ],
)
def test_refusals_are_short(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*args)
    assert (done.code, done.out) == (code, "")
    assert 0 < len(done.err.strip().splitlines()) <= 4
    as_json = cli(*args, "--json")
    assert as_json.code == code
    assert json.loads(as_json.out)["error"]
    assert list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; from edgekit.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "keygen", "--out", tmp_path / "k"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'edgekit[sign]'" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_the_device_loads_nothing_heavy(tmp_path: Path, versions: list[Path], keys) -> None:
    code = """
    import sys
    from edgekit.deployment import install
    install(sys.argv[1], root=sys.argv[2], pub=sys.argv[3])
    heavy = {"torch", "onnx", "PIL", "pandas", "tensorrt_rtx"} & set(sys.modules)
    assert not heavy, heavy
    """
    command = [sys.executable, "-c", textwrap.dedent(code), versions[0], tmp_path / "root", keys.pub]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
