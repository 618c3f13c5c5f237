"""Keys, and packs that differ, for the deployment room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.deployment import keygen, pack, trusted
from edgekit.manifest import FORMAT, Manifest, TensorSpec, Tolerance
from edgekit.runtime.golden import save_golden


class Keys(NamedTuple):
    key: Path
    pub: Path
    key_id: str


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    made = keygen(tmp_path_factory.mktemp("keys"))
    return Keys(Path(made["key"]), Path(made["pub"]), made["key_id"])


@pytest.fixture
def versions(tmp_path: Path, tiny_bundle: Bundle, keys: Keys) -> list[Path]:
    """Three signed packs of the same graph under names v0, v1, v2, so that their digests differ (labels)."""
    packs = []
    for i in range(3):
        with Bundle.create(tmp_path / f"v{i}.edge") as draft:
            for name in (FLOAT_GRAPH, GOLDEN):
                draft.write(name, tiny_bundle.file(name).read_bytes())
            old = tiny_bundle.manifest
            draft.manifest = Manifest(
                FORMAT, f"v{i}", "tensor", old.inputs, old.outputs, labels=(f"v{i}",), golden=old.golden, history=old.history
            )
        packs.append(pack(tmp_path / f"v{i}.edge", out=tmp_path / f"v{i}.zip", key=keys.key))
    return packs


@pytest.fixture
def liar(tmp_path: Path, tiny_bundle: Bundle, keys: Keys) -> Path:
    """A well-signed pack whose graph does not give its golden outputs."""
    x = np.zeros((1, 3, 32, 32), np.float32)
    with Bundle.create(tmp_path / "liar.edge") as draft:
        draft.write(FLOAT_GRAPH, tiny_bundle.file(FLOAT_GRAPH).read_bytes())
        draft.write(GOLDEN, save_golden({"x": x}, {"y": np.full((1, 10), 7, np.float32)}))
        spec = TensorSpec("x", "float32", ("n", 3, 32, 32))
        golden = {FLOAT_GRAPH: Tolerance("relative", 1e-3)}
        draft.manifest = Manifest(FORMAT, "liar", "tensor", (spec,), (spec,), golden=golden)
    return pack(tmp_path / "liar.edge", out=tmp_path / "liar.zip", key=keys.key)


def _wheel_of(source: Path, out: Path) -> Path:
    """A wheel of the sources in a folder, by the setuptools that is here: an isolated build downloads its own."""
    out.mkdir()
    words = [sys.executable, "-c", "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])", str(out)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(words, cwd=source, env=environment, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def build_wheel() -> Callable[[Path, Path], Path]:
    return _wheel_of


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; the sources that it was made of lie in ``source`` beside it."""
    root, out = Path(__file__).parents[2], tmp_path_factory.mktemp("wheel")
    source = out / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "edgekit"):
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(root / name, source)
    (source / "build/lib/edgekit").mkdir(parents=True)
    (source / "build/lib/edgekit/of_an_earlier_version.py").touch()  # as setuptools leaves it behind
    made = _wheel_of(source, out / "made")
    return made.rename(out / made.name)


@pytest.fixture(scope="session")
def python_of() -> Callable[[str], str]:
    """The Python of a version, pyenv's or on the path; this one where there is none."""

    def find(version: str) -> str:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        return str(pyenv[-1]) if pyenv else shutil.which(f"python{version}") or sys.executable

    return find


@pytest.fixture
def second(tmp_path: Path) -> tuple[Path, Path, str]:
    """Another key: its private half, its public half, its id."""
    made = keygen(tmp_path / "second")
    return Path(made["key"]), Path(made["pub"]), made["key_id"]


@pytest.fixture
def signed(tmp_path: Path, tiny_bundle: Bundle, keys) -> Path:
    return pack(tiny_bundle, out=tmp_path / "t.edge.zip", key=keys.key)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the clock of the device."""
    return lambda time: monkeypatch.setattr(trusted, "_clock", lambda: time)
