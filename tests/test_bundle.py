"""The bundle is complete or absent, and nothing in it is believed before it is checked."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit import bundle as module
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, MANIFEST, REPORT, Bundle, new_path
from edgekit.errors import BundleError, OutputExists, UsageError
from edgekit.files import atomic_write
from edgekit.manifest import (
    FORMAT,
    History,
    Manifest,
    TensorSpec,
    Tolerance,
)


def plain_manifest(**changes: Any) -> Manifest:
    inputs = (TensorSpec("x", "float32", ("n", 3)),)
    return Manifest(**{"format": FORMAT, "name": "t", "task": "tensor", "inputs": inputs, "outputs": inputs, **changes})


def make(path: Path, **files: bytes) -> Bundle:
    with Bundle.create(path) as draft:
        for name, data in (files or {"model_onnx": b"graph", "golden_npz": b"golden"}).items():
            draft.write(name.replace("_", "."), data)
        draft.manifest = plain_manifest()
    return Bundle.open(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | changes))


# Reading: schema, hashes, names


def test_a_bundle_reads_back_as_it_was_written(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge")
    assert bundle.manifest.files.keys() == {FLOAT_GRAPH, GOLDEN}
    assert bundle.file(FLOAT_GRAPH).read_bytes() == b"graph"
    assert bundle.graph == FLOAT_GRAPH
    assert [p.name for p in tmp_path.iterdir()] == ["a.edge"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": FORMAT + 1}, "format 2"),
        ({"format": 0}, "format 0"),
        ({"format": "1"}, "not valid"),
        ({"task": "telepathy"}, "not valid"),
        ({"surprise": 1}, "not valid"),
        ({"inputs": None}, "not valid"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "unsafe file"),
        ({"files": {"/etc/passwd": "0" * 64}}, "unsafe file"),
        ({"files": {"a/b/c": "0" * 64}}, "unsafe file"),
        ({"files": {".hidden": "0" * 64}}, "unsafe file"),
        ({"files": {"a\\b": "0" * 64}}, "unsafe file"),
        ({"files": {"model.onnx\n": "0" * 64}}, "unsafe file"),
        ({"files": {"mödel.onnx": "0" * 64}}, "unsafe file"),
        ({"preprocessing": {"kind": "image", "width": 0, "height": 1, "channels": 1, "mean": [0], "std": [1]}}, "not valid"),
        ({"preprocessing": {"kind": "image", "width": 1, "height": 1, "channels": 3, "mean": [0], "std": [1]}}, "not valid"),
        ({"preprocessing": {"kind": "image", "width": 1, "height": 1, "channels": 1, "mean": [0], "std": [0]}}, "not valid"),
        ({"golden": {"model.onnx": {"kind": "vibes", "limit": 1}}}, "not valid"),
    ],
)
def test_a_wrong_manifest_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    make(tmp_path / "a.edge")
    edit(tmp_path / "a.edge", **changes)
    with pytest.raises(BundleError, match=reason) as caught:
        Bundle.open(tmp_path / "a.edge")
    assert caught.value.hint


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    make(tmp_path / "a.edge")
    edit(tmp_path / "a.edge", format=FORMAT + 1, unheard_of={"a": 1})
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "a.edge")
    assert caught.value.hint == "upgrade edgekit"


def test_one_flipped_byte_in_any_file_is_refused(tiny_bundle: Bundle) -> None:
    for name in tiny_bundle.manifest.files:
        path = tiny_bundle.path / name
        good = path.read_bytes()
        for at in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(BundleError, match=f"{name} is damaged"):
                Bundle.open(tiny_bundle.path)
        path.write_bytes(good)
    Bundle.open(tiny_bundle.path)


def test_a_manifest_without_its_seal_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a.edge")
    edit(tmp_path / "a.edge", seal="")
    with pytest.raises(BundleError, match="does not fit its seal"):
        Bundle.open(tmp_path / "a.edge")


@pytest.mark.parametrize("name", [FLOAT_GRAPH, MANIFEST])
def test_symbolic_links_are_not_followed(tmp_path: Path, name: str) -> None:
    bundle = make(tmp_path / "a.edge")
    (bundle.path / name).rename(tmp_path / "outside")
    (bundle.path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(bundle.path)


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge").extend({"engines/t.engine": b"plan"})
    (bundle.path / "engines").rename(tmp_path / "outside")
    (bundle.path / "engines").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(bundle.path)
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.extend({"engines/other.engine": b"plan"})
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["t.engine"]


def test_a_link_to_a_bundle_is_followed_once(tmp_path: Path) -> None:
    one = make(tmp_path / "1.edge")
    make(tmp_path / "2.edge", model_onnx=b"other", golden_npz=b"golden")
    (tmp_path / "current").symlink_to("1.edge")
    opened = Bundle.open(tmp_path / "current", verify=False)
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("2.edge")
    assert opened.file(FLOAT_GRAPH).read_bytes() == b"graph"
    assert opened.digest == one.digest


def test_a_missing_bundle_or_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle") as caught:
        Bundle.open(tmp_path / "none.edge")
    assert "edgekit" in caught.value.hint
    (tmp_path / "p.edge.zip").write_bytes(b"PK")
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "p.edge.zip")
    assert "edgekit install" in caught.value.hint
    bundle = make(tmp_path / "a.edge")
    with pytest.raises(BundleError, match=r"has no report\.html"):
        bundle.file(REPORT)
    bundle.file(GOLDEN).unlink()
    with pytest.raises(BundleError, match=r"golden\.npz is missing"):
        Bundle.open(bundle.path)


def test_a_huge_manifest_is_refused_unread(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge")
    os.truncate(bundle.path / MANIFEST, 1 << 40)  # sparse: reading all of it would not end
    with pytest.raises(BundleError, match="larger than"):
        Bundle.open(bundle.path)


# Writing: complete or absent


def test_an_out_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path / "a.edge")
    before = contents(tmp_path)
    with pytest.raises(OutputExists), Bundle.create(tmp_path / "a.edge"):
        pytest.fail("the block must not run")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists), Bundle.create(tmp_path / "dangling"):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == before


def test_an_out_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), Bundle.create(tmp_path / "a.edge") as draft:  # noqa: PT012
        draft.manifest = plain_manifest()
        (tmp_path / "a.edge").mkdir()
        (tmp_path / "a.edge" / "mine").write_bytes(b"1")
    assert contents(tmp_path) == {"a.edge/mine": b"1"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.edge"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Bundle.create(tmp_path / "a.edge") as draft:  # noqa: PT012
        draft.write(FLOAT_GRAPH, b"graph")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"golden": {FLOAT_GRAPH: Tolerance("relative", float("nan"))}}, {"format": 99}])
def test_a_manifest_no_reader_takes_is_not_written(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(BundleError), Bundle.create(tmp_path / "a.edge") as draft:
        draft.manifest = plain_manifest(**change)
    assert list(tmp_path.iterdir()) == []
    bundle = make(tmp_path / "b.edge")
    before = contents(bundle.path)
    with pytest.raises(BundleError):
        bundle.extend({"engines/t.json": b"{}"}, History("build", "now", "0", {"path": "\udcff"}))
    assert contents(bundle.path) == before


def test_unsafe_names_are_not_written(tmp_path: Path) -> None:
    for name in ("../out", "a/b/c", ".hidden", "/abs", ""):
        with pytest.raises(ValueError, match="not a"), Bundle.create(tmp_path / "a.edge") as draft:
            draft.write(name, b"")
    bundle = make(tmp_path / "b.edge")
    for name in ("../out", FLOAT_GRAPH, MANIFEST):
        with pytest.raises(ValueError, match="not a derived file"):
            bundle.extend({name: b""})
    assert [p.name for p in tmp_path.iterdir()] == ["b.edge"]


def test_derived_files_do_not_change_the_digest(tiny_bundle: Bundle) -> None:
    entry = tiny_bundle.entry("build", {"target": "t"}, {"seconds": 1.0})
    larger = tiny_bundle.extend({"engines/t.engine": b"plan", REPORT: b"<html>"}, entry)
    assert larger.digest == tiny_bundle.digest == Bundle.open(tiny_bundle.path).digest
    assert larger.last("build") == entry
    assert entry.parent == tiny_bundle.digest
    replaced = larger.extend({"engines/t.engine": b"another plan"})
    assert replaced.digest == tiny_bundle.digest
    assert Bundle.open(tiny_bundle.path).file("engines/t.engine").read_bytes() == b"another plan"


def test_another_graph_changes_the_digest(tmp_path: Path) -> None:
    one, same = make(tmp_path / "1.edge"), make(tmp_path / "2.edge")
    other = make(tmp_path / "3.edge", model_onnx=b"other", golden_npz=b"golden")
    assert one.digest == same.digest != other.digest


# A full disk, a crash, two writers: in processes of their own


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, check=False
    )


LIMITED = """
import resource, signal, sys
from pathlib import Path
from edgekit.bundle import Bundle
from edgekit.manifest import Manifest, TensorSpec
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with EFBIG, as on a full disk
path, action = Path(sys.argv[1]), sys.argv[2]
bundle = Bundle.open(path) if path.exists() else None
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    if action == "extend":
        bundle.extend({"engines/a.json": b"new", "engines/b.engine": bytes(200_000)})
    else:
        with Bundle.create(path) as draft:
            draft.manifest = Manifest(1, "t", "tensor", (), ())
            draft.write("model.onnx", bytes(200_000))
except OSError as error:
    print(error.errno)
"""


def test_a_full_disk_leaves_the_old_files_intact(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge").extend({"engines/a.json": b"old", "engines/b.engine": b"old plan"})
    before = contents(bundle.path)
    done = run(LIMITED, bundle.path, "extend")
    assert done.stdout.split() == [str(27)], done.stderr  # EFBIG
    assert contents(bundle.path) == before
    assert Bundle.open(bundle.path).file("engines/b.engine").read_bytes() == b"old plan"


def test_a_full_disk_leaves_no_half_bundle(tmp_path: Path) -> None:
    done = run(LIMITED, tmp_path / "a.edge", "create")
    assert done.stdout.split() == [str(27)], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_file_system(tmp_path: Path) -> None:
    """The same on a tmpfs of 256 KiB, where this machine lets an unprivileged namespace mount one."""
    code = LIMITED.replace("resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))", "")
    script = tmp_path / "write.py"
    script.write_text(textwrap.dedent(code).replace("200_000", "400_000"))
    small = tmp_path / "small"
    small.mkdir()
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no namespaces here")
    done = subprocess.run(
        [
            *("unshare", "-rm", "sh", "-c"),
            f'mount -t tmpfs -o size=256k none "$1" && "{sys.executable}" "{script}" "$1/a.edge" create && ls -A "$1"',
            *("sh", str(small)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr:
        pytest.skip("no mount in a namespace here")
    assert done.stdout.split() == [str(28)], done.stderr  # ENOSPC, and nothing listed after it


CRASHING = """
import os, sys
from edgekit.bundle import Bundle
from edgekit.manifest import Manifest

path, action, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])

def count(event, args):
    global steps
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod"):
        steps -= 1
        if steps < 0:
            os._exit(9)

if action == "extend":
    bundle = Bundle.open(path)
    sys.addaudithook(count)
    new = {"engines/a.engine": b"new plan", "engines/a.json": b"new", "engines/c.json": b"more"}
    bundle.extend(new, bundle.entry("build", {}, {}))
else:
    sys.addaudithook(count)
    with Bundle.create(path) as draft:
        draft.manifest = Manifest(1, "t", "tensor", (), ())
        draft.write("model.onnx", b"graph")
"""


def crash_everywhere(action: str, path: Path, check: Any) -> int:
    """Kill the action before its 1st, 2nd, ... change on disk until it gets through; ``check`` after each."""
    for steps in range(200):
        done = run(CRASHING, path, action, steps)
        assert done.returncode in (0, 9), done.stderr
        check()
        if done.returncode == 0:
            return steps
    raise AssertionError("it never got through")


def test_a_crash_anywhere_in_extend_leaves_the_bundle_valid(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge").extend({"engines/a.engine": b"old plan", "engines/a.json": b"old"})

    def check() -> None:
        opened = Bundle.open(bundle.path)
        assert opened.digest == bundle.digest
        found = {n: opened.file(n).read_bytes() for n in opened.manifest.files if n.startswith("engines/")}
        assert set(found.values()) <= {b"old plan", b"old", b"new plan", b"new", b"more"}

    assert crash_everywhere("extend", bundle.path, check) > 8
    assert Bundle.open(bundle.path).file("engines/a.engine").read_bytes() == b"new plan"


def test_a_crash_anywhere_in_create_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.edge"

    def check() -> None:
        if path.exists():
            assert Bundle.open(path).has(FLOAT_GRAPH)
            shutil.rmtree(path)

    assert crash_everywhere("create", path, check) > 4


def test_sigkill_during_extends_leaves_the_bundle_valid(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge")
    code = """
    import sys
    from edgekit.bundle import Bundle
    bundle = Bundle.open(sys.argv[1])
    print("ready", flush=True)
    for i in range(10**9):
        bundle = bundle.extend({"engines/a.engine": bytes([i % 251]) * 5000})
    """
    for delay in (0.0, 0.003, 0.011, 0.02):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(bundle.path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(delay)
            process.send_signal(signal.SIGKILL)
        Bundle.open(bundle.path)


def test_two_writers_at_once_keep_both_files(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge")
    code = """
    import sys
    from edgekit.bundle import Bundle
    bundle = Bundle.open(sys.argv[1])
    for i in range(20):
        bundle.extend({f"bench/{sys.argv[2]}{i}.json": b"{}"}, bundle.entry("bench", {sys.argv[2]: i}, {}))
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(bundle.path), name], stderr=subprocess.PIPE)
        for name in "ab"
    ]
    for writer in writers:
        _, error = writer.communicate()
        assert writer.returncode == 0, error
    opened = Bundle.open(bundle.path)
    assert {f"bench/{w}{i}.json" for w in "ab" for i in range(20)} < opened.manifest.files.keys()
    assert len(opened.manifest.history) == 40


def test_atomic_write_replaces_or_keeps(tmp_path: Path) -> None:
    module.atomic_write(tmp_path / "f", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(OSError, match="large"):
            module.atomic_write(tmp_path / "f", b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert contents(tmp_path) == {"f": b"old"}
    assert oct((tmp_path / "f").stat().st_mode & 0o777) == "0o644"


def test_a_bundle_is_not_written_into_a_bundle(tmp_path: Path) -> None:
    outer = make(tmp_path / "a.edge")
    before = contents(outer.path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is no folder"):
        new_path(tmp_path / "file" / "m.edge")
    with pytest.raises(UsageError, match="lies inside the bundle"):
        make(outer.path / "b.edge")
    with pytest.raises(UsageError, match="lies inside the bundle"):
        make(outer.path / "deep" / "b.edge")
    assert contents(outer.path) == before


@pytest.mark.parametrize("path", ["/proc/m.edge", "/proc/new/m.edge", "n" * 250, "deep/" + "n" * 250])
def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path, path: str) -> None:
    """By trying: a superuser may write everywhere, and /proc takes nothing from anyone."""
    if path.startswith("/proc") and not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(UsageError, match="cannot be made") as caught:
        new_path(tmp_path / path)
    assert "--out" in caught.value.hint
    assert contents(tmp_path) == {}


def test_trying_a_path_leaves_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "a.edge", tmp_path / "new" / "folder" / "a.edge"):
        assert new_path(path) == path
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_measurement_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a.edge")
    for data, top1 in (("a", 0.1), ("b", 0.2), ("a", 0.3)):
        bundle = bundle.extend({}, bundle.entry("eval", {"data": data}, {"top1": top1}))
    found = [(entry.config["data"], entry.figures["top1"]) for entry in Bundle.open(bundle.path).manifest.history]
    assert found == [("b", 0.2), ("a", 0.3)]


def test_nan_figures_become_null(tmp_path: Path) -> None:
    """JSON has no NaN: a figure that could not be measured reads back as null."""
    bundle = make(tmp_path / "a.edge")
    bundle.extend({}, bundle.entry("bench", {}, {"p50": float("nan"), "share": float(np.float32(0.5))}))
    last = Bundle.open(bundle.path).last("bench")
    assert last is not None
    assert last.figures == {"p50": None, "share": 0.5}
    assert msgspec.json.decode((bundle.path / MANIFEST).read_bytes())["format"] == FORMAT


def test_temporary_names_are_short_enough(tmp_path: Path) -> None:
    """A long but legal name still has room for the temporary's prefix and suffix."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        module.atomic_write(Path(folder) / ("n" * 200), b"1")


def test_no_file_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="a pipe"):
        atomic_write(pipe, b"x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
