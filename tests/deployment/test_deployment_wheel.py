"""The wheel: pure Python, small, reproducible, the same from the sdist, and at work in environments of other Pythons."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_is_pure_small_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    data = ("edgekit/data/digits/digits.npz", "edgekit/data/spam/spam.tsv.xz")
    assert wheel.stat().st_size - sum(entries[name].compress_size for name in data) <= 2_000_000
    for name in ("edgekit/py.typed", "edgekit/targets.toml", "edgekit/data/digits/SOURCE.md", *data):
        assert name in entries
    assert any(name.endswith("licenses/LICENSE") for name in entries)
    licences = [name.rpartition("/")[2] for name in entries if "LICENSE" in name]
    assert len(licences) == len(set(licences))  # once, in dist-info/licenses
    assert len(licences) > 20
    assert not [name for name in entries if name.startswith("tests") or name.endswith((".so", ".key"))]
    # Everything that git knows of the package is in it.
    listed = subprocess.run(["git", "ls-files", "edgekit"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    kept = {name.partition("dist-info/licenses/")[2] for name in entries}
    assert set(listed) <= entries.keys() | kept
    assert {name for name in entries if name.startswith("edgekit/")} <= set(listed)


@pytest.mark.slow
def test_the_same_sources_give_the_same_wheel_also_by_way_of_the_sdist(
    tmp_path: Path, wheel: Path, build_wheel: Callable[[Path, Path], Path]
) -> None:
    (other := tmp_path / "elsewhere").mkdir()
    words = [sys.executable, "-c", "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])", str(tmp_path)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    source = wheel.parent / "source"
    subprocess.run(words, cwd=source, env=environment, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(other, filter="data")
    again = build_wheel(next(other.iterdir()), tmp_path / "again")
    assert contents(again) == contents(wheel)
    assert again.read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment_of_the_oldest_python(wheel: Path, python_of: Callable[[str], str]) -> None:
    """3.12 runs what the Dockerfile installs, and the python3 of this machine what the provisioning script does."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # its pip serves all environments
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["sh", ROOT / "deploy" / "check_wheel.sh", wheel, python_of("3.10")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installs a signed pack and scans" in done.stdout
    dockerfile, script = (ROOT / "deploy" / name for name in ("Dockerfile", "jetson/provision.sh"))
    extras = re.search(r"the wheel with (\S+) runs", done.stdout)
    assert extras
    assert f".whl)[{extras[1]}]" in dockerfile.read_text()
    assert f'extras="{extras[1]}"\n' in script.read_text()


def test_check_wheel_refuses_what_is_no_wheel_for_all(tmp_path: Path) -> None:
    script = ROOT / "deploy" / "check_wheel.sh"
    (odd := tmp_path / "edgekit-0.1.0-cp311-cp311-linux_x86_64.whl").write_bytes(b"")
    for words, said in (
        ([], "give a wheel"),
        ([tmp_path / "no.whl", "python3"], "there is no wheel"),
        ([odd, "python3"], "py3-none-any"),
    ):
        done = subprocess.run(["sh", script, *map(str, words)], capture_output=True, text=True)
        assert (done.returncode, said in done.stderr) == (1, True)
