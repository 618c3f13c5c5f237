"""The C++ example: compiled with every warning and the sanitizers, it answers as `Model.open` does and refuses what it must."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import install, pack
from edgekit.preprocess import read_image
from edgekit.runtime import Model

EMBED = Path(__file__).parents[2] / "deploy" / "embed"


def needs(there: bool, what: str) -> None:
    if not there:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{what} is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with ``classify`` and ``fuzz``."""
    for program in ("g++", "make"):
        needs(shutil.which(program) is not None, program)
    for package, header in (("nlohmann-json3-dev", "nlohmann/json.hpp"), ("libssl-dev", "openssl/evp.h")):
        needs(Path("/usr/include", header).exists(), package)
    out = tmp_path_factory.mktemp("embed")
    capi = Path(pytest.importorskip("onnxruntime").__file__).parent / "capi"
    library = next(capi.glob("libonnxruntime.so.*"))
    words = ["make", "-j2", f"OUT={out}", f"ORT={library}", "SANITIZE=1", "CXXFLAGS=-O0 -g0"]
    made = subprocess.run(words, cwd=EMBED, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return out


def call(*words: object) -> subprocess.CompletedProcess[str]:
    # ONNX Runtime keeps its own tables until the process ends, which is no leak of the example's.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment, timeout=60)


def pictures_of(folder: Path, frames: list[np.ndarray[Any, Any]]) -> list[Path]:
    folder.mkdir()
    paths = []
    for i, frame in enumerate(frames):
        kind = "P5" if frame.ndim == 2 else "P6"
        path = folder / f"{i}.ppm"
        path.write_bytes(f"{kind}\n# a comment\n{frame.shape[1]} {frame.shape[0]}\n255\n".encode() + frame.tobytes())
        paths.append(path)
    return paths


def frames(digits: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Grey and coloured, of the model's size, larger, smaller, wide and tall."""
    large = np.kron(digits[0], np.ones((9, 9, 1), np.uint8))
    noise = np.random.default_rng(3).integers(0, 256, (97, 61, 3), np.uint8)
    return [digits[0], digits[1][:, :, 0], large[:, :, 0], large[20:120], large[:, 30:100], noise, digits[2][4:24:2, 5:20:2]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits_bundle", "pictures_bundle"])  # letterbox: padded; stretch: three channels
def test_it_answers_as_the_model_does(
    request: pytest.FixtureRequest, tmp_path: Path, built: Path, keys: Any, coloured_digits: list[Any], kind: str
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    packed = pack(bundle, out=tmp_path / "m.edge.zip", key=keys.key)
    install(packed, root=tmp_path / "root", pub=keys.pub)
    paths = pictures_of(tmp_path / "pictures", frames(coloured_digits))
    with Model.open(tmp_path / "root" / "current") as model:
        expected = [model(read_image(path)) for path in paths]
    for where in (["--verified", packed], [tmp_path / "root" / "current"]):
        done = call(built / "classify", *where, *paths)
        assert (done.returncode, done.stderr) == (0, "")
        for line, prediction, path in zip(done.stdout.splitlines(), expected, paths, strict=True):
            label, score, name = line.split(" ", 2)
            assert (label, name) == (prediction.label, str(path))
            assert float(score) == pytest.approx(prediction.score, abs=1e-4)


@pytest.mark.slow
def test_it_refuses_what_was_not_verified_or_is_damaged(tmp_path: Path, built: Path, keys: Any, digits_bundle: Bundle) -> None:
    packed = pack(digits_bundle, out=tmp_path / "m.edge.zip", key=keys.key)
    done = call(built / "classify", packed)
    assert (done.returncode, "edgekit verify" in done.stderr) == (1, True)
    done = call(built / "classify", digits_bundle.path)
    assert (done.returncode, "edgekit install" in done.stderr) == (1, True)
    install(packed, root=tmp_path / "root", pub=keys.pub)
    assert call(built / "classify", tmp_path / "root" / "current").stdout == "the bundle is in order\n"
    graph = tmp_path / "root" / "slots" / "a" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    done = call(built / "classify", tmp_path / "root" / "current")
    assert (done.returncode, "sha256" in done.stderr) == (1, True)
    (bad := tmp_path / "bad.ppm").write_bytes(b"P6 4000 4000 255\n123")
    done = call(built / "classify", "--verified", packed, bad)
    assert (done.returncode, "truncated" in done.stderr) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-classification", "text-recognition"])
def test_it_refuses_another_task_by_name(tmp_path: Path, built: Path, keys: Any, digits_bundle: Bundle, task: Any) -> None:
    """A detector or a reader takes pictures as well: what its answer means is another thing."""
    if task == "text-classification":
        made = Path(__file__).parents[2] / "calibration/spam-lstm-text/float.edge"
    else:
        made = tmp_path / "reader.edge"
        with Bundle.create(made) as draft:
            for name in digits_bundle.manifest.files:
                draft.write(name, digits_bundle.file(name).read_bytes())
            draft.manifest = msgspec.structs.replace(digits_bundle.manifest, name="reader", task=task)
    packed = pack(made, out=tmp_path / "m.edge.zip", key=keys.key)
    done = call(built / "classify", "--verified", packed)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the bundle's task is {task}, image-classification was expected" in done.stderr


@pytest.mark.slow
def test_it_reads_the_headers_of_pictures_strictly(tmp_path: Path, built: Path, keys: Any, digits_bundle: Bundle) -> None:
    packed = pack(digits_bundle, out=tmp_path / "m.edge.zip", key=keys.key)
    pixels = bytes(range(256)) * 4
    path = tmp_path / "p.pgm"
    good = (b"P5 28 28 255\n", b"P5\n#a\n#b\r28\t28 # c\n255 ", b"P5\r\n28 28\n255\n")
    odd = (
        b"P5 28 28 255#",
        b"P528 28 255\n",
        b"P5 28 28 255a",
        b"P5 28 28 255",
        b"P5 2 8 28 255\n",
        b"P5 28 28 0255000000000 ",
    )
    odd += (b"P5 28,28 255\n", b"P5 -28 28 255\n", b"P5 28 28 65535\n", b"P5 # 28 28 255", b"P5 0 28 255\n", b"P5 28 +28 255\n")
    for header in good:
        path.write_bytes(header + pixels)
        assert call(built / "classify", "--verified", packed, path).returncode == 0, header
    for header in odd:
        path.write_bytes(header if header.endswith(b"255") else header + pixels)
        done = call(built / "classify", "--verified", packed, path)
        assert (done.returncode, done.stdout) == (1, ""), header
        assert done.stderr.startswith(f"classify: {path}: "), done.stderr
    path.unlink()
    os.mkfifo(path)
    done = call(built / "classify", "--verified", packed, path)
    assert (done.returncode, "no file" in done.stderr) == (1, True)


@pytest.mark.slow
def test_its_reader_stands_changed_packs(tmp_path: Path, built: Path, keys: Any, digits_bundle: Bundle) -> None:
    """The sanitizers end the process at the first byte read outside the file."""
    packed = pack(digits_bundle, out=tmp_path / "m.edge.zip", key=keys.key)
    done = call(built / "fuzz", packed, 1000, 1)
    assert (done.returncode, done.stderr) == (0, "")
    refused, accepted = (int(word) for word in done.stdout.split() if word.isdigit())
    assert refused + accepted == 1000
    assert refused > 300
    (picture := tmp_path / "p.ppm").write_bytes(b"P6 3 5 255\n" + bytes(45))
    done = call(built / "fuzz", picture, 1000, 1)
    assert (done.returncode, done.stderr) == (0, "")
