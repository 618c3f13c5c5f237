"""Files that are no files, links that lead out, names that are two at once: nothing hangs, and nothing outside is touched."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekit.bundle import FLOAT_GRAPH, MANIFEST, Bundle
from edgekit.compiler.reading import read_model
from edgekit.data import folder
from edgekit.errors import BundleError, DataError, EdgekitError, GraphError
from edgekit.files import atomic_write
from edgekit.manifest import is_safe_name
from edgekit.preprocess import read_image
from edgekit.quantization.samples import read_npz

from . import seeds

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A graph whose weights lie in ``weights.bin`` beside it."""
    path = tmp_path / "m" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(seeds.graphs()[-1])
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_outside_weights_are_plain_files(model: Path, kind: str) -> None:
    place = model.with_name("weights.bin")
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(place))
    with pytest.raises(GraphError, match=r"missing|symbolic link"):
        read_model(model)


def test_a_link_above_outside_weights_is_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "weights.bin").write_bytes(bytes(24))
    model.with_name("sub").symlink_to(tmp_path / "secret")
    made = onnx.load_model(model, load_external_data=False)
    made.graph.initializer[0].external_data[0].value = "sub/weights.bin"
    model.write_bytes(made.SerializeToString())
    with pytest.raises(GraphError, match="outside the model's folder"):
        read_model(model)


@pytest.mark.parametrize("location", ["a\0b", "weights.bin\0", "x" * 300, "", ".", "//etc/passwd", "./../x"])
def test_odd_places_of_outside_weights_are_refused(model: Path, location: str) -> None:
    made = onnx.load_model(model, load_external_data=False)
    made.graph.initializer[0].external_data[0].value = location
    model.write_bytes(made.SerializeToString())
    with pytest.raises((GraphError, OSError)):
        read_model(model)


@pytest.mark.parametrize("name", [MANIFEST, FLOAT_GRAPH])
def test_a_pipe_in_a_bundle_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = seeds.write_files(tmp_path / "tiny.edge")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_pipes_and_links_in_a_folder_of_pictures(tmp_path: Path) -> None:
    """A pipe is passed over; a link to a picture is one, a link to a folder is not walked."""
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "set" / label / f"{number}.png").write_bytes(seeds.images()[1])
    os.mkfifo(tmp_path / "set" / "a" / "pipe.png")
    (tmp_path / "set" / "a" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "other.png").write_bytes(seeds.images()[0])
    (tmp_path / "set" / "b" / "walk").symlink_to(tmp_path / "outside")
    found = folder.load(str(tmp_path / "set")).all.ids
    assert not {"a/pipe.png", "a/zero.png", "b/walk/other.png"} & set(found)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_picture_is_a_plain_file(tmp_path: Path, make) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(DataError, match="no regular file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_sample_is_a_plain_file(tmp_path: Path, make) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DataError):
        read_npz(tmp_path / "a.npz", ())


@pytest.mark.parametrize("name", ["../x.npy", "/tmp/x.npy", "a\0b.npy", "."])
def test_the_names_of_an_npz_reach_no_path(tmp_path: Path, name: str) -> None:
    import io
    import zipfile

    array = io.BytesIO()
    np.save(array, np.zeros(3, np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), array.getvalue())
    with pytest.raises(DataError):
        read_npz(tmp_path / "a.npz", ())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_link_in_the_place_of_an_output_is_replaced_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"kept")
    (tmp_path / "out").symlink_to(kept)
    atomic_write(tmp_path / "out", b"new")
    assert kept.read_bytes() == b"kept"
    assert (tmp_path / "out").read_bytes() == b"new"
    assert not (tmp_path / "out").is_symlink()


def test_a_bundle_is_not_made_over_a_link(tmp_path: Path) -> None:
    (tmp_path / "b.edge").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgekitError, match="exists already"), Bundle.create(tmp_path / "b.edge"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "name", ["é.onnx", "ｍodel.onnx", "model.onnx\u200b", "model.onnx ", " model.onnx", "a//b", "a/./b", "a\\b", "C:b"]
)
def test_names_that_a_file_system_may_take_for_others_are_none(name: str) -> None:
    for form in ("NFC", "NFD", "NFKC"):
        spelt = unicodedata.normalize(form, name)
        assert not is_safe_name(spelt) or spelt.isascii()
    assert not is_safe_name(name)
