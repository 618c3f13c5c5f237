"""The bundle: one directory, ``NAME.edge/``, that flows through every stage.

This is the only room that knows file names. A bundle is complete or absent: `Bundle.create` writes beside the final
path and renames; `Bundle.extend` adds derived files one atomic replacement at a time. Reading one validates the
manifest's schema and the hashes, runs no code from it and never follows a path out of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from .errors import BundleError, OutputExists
from .version import __version__

__all__ = [
    "CALIBRATION",
    "FLOAT_GRAPH",
    "FORMAT",
    "GOLDEN",
    "INT8_GRAPH",
    "MANIFEST",
    "REPORT",
    "WEIGHTS",
    "Bundle",
    "Draft",
    "History",
    "ImagePreprocessing",
    "Manifest",
    "ModelConfig",
    "TensorSpec",
    "Tolerance",
    "atomic_write",
    "sha256_file",
]

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FLOAT_GRAPH = "model.onnx"
INT8_GRAPH = "model.int8.onnx"
CALIBRATION = "calibration.json"
GOLDEN = "golden.npz"
REPORT = "report.html"

#: Files that say what the model is; everything else is derived from them.
IDENTITY = (WEIGHTS, FLOAT_GRAPH, INT8_GRAPH, CALIBRATION, GOLDEN)
MAX_MANIFEST_BYTES = 16 << 20
_SAFE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?$")


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph input or output; a string in ``shape`` names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class ImagePreprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image", tag_field="kind"):
    """uint8 (H, W, 3) RGB -> float32 (1, channels, height, width): resize, then ``(x / 255 - mean) / std``.

    ``fit`` says what happens to another aspect ratio: ``stretch`` ignores it, ``crop`` cuts the centre,
    ``letterbox`` pads with black.
    """

    width: int
    height: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["stretch", "crop", "letterbox"] = "stretch"

    def __post_init__(self) -> None:
        if not (0 < self.width <= 8192 and 0 < self.height <= 8192):
            raise ValueError(f"width and height must lie in 1..8192, not {self.width} x {self.height}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A preset's name and its arguments. Pruned widths need no entry: the weights' shapes say them."""

    name: str
    args: dict[str, Any] = {}


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a graph may be from the golden outputs.

    ``relative``: max |out - golden| <= limit * max |golden|. ``snr_db``: signal-to-noise ratio >= limit.
    """

    kind: Literal["relative", "snr_db"]
    limit: float


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished stage: what ran, on which parent (bundle digest), and what it measured."""

    stage: str
    time: str
    edgekit: str
    config: dict[str, Any] = {}
    parent: str | None = None
    figures: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``manifest.json``. ``golden`` maps a graph file to the tolerance it is held to; ``files`` maps names to sha256."""

    format: int
    name: str
    task: Literal["image-classification", "tensor"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model: ModelConfig | None = None
    preprocessing: ImagePreprocessing | None = None
    labels: tuple[str, ...] = ()
    golden: dict[str, Tolerance] = {}
    files: dict[str, str] = {}
    history: tuple[History, ...] = ()


class _Format(msgspec.Struct):
    format: int


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(path: Path, data: bytes) -> None:
    """Write beside ``path``, flush to disk, then replace: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _decode_manifest(data: bytes, where: Path) -> Manifest:
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found > FORMAT:
            raise BundleError(
                f"{where} has bundle format {found}; this edgekit {__version__} reads up to {FORMAT}", "upgrade edgekit"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{where}: the manifest is not valid: {error}", "restore the bundle, or make it again") from None
    bad = [name for name in manifest.files if not _SAFE_NAME.match(name)]
    if bad:
        raise BundleError(f"{where}: the manifest names an unsafe file {bad[0]!r}", "do not trust this bundle")
    return manifest


@dataclass
class Draft:
    """A bundle being written. Put files under ``path`` (or `write` them); set ``manifest`` before the block ends."""

    path: Path
    manifest: Manifest | None = None

    def write(self, name: str, data: bytes) -> None:
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: ``path`` and its validated ``manifest``."""

    path: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read a bundle. ``verify`` hashes every file now; else each is hashed when it is first used.

        Raises `BundleError` where the bundle is missing, damaged or of a newer format.
        """
        folder = Path(path)
        manifest_file = folder / MANIFEST
        if not folder.is_dir() or not manifest_file.is_file():
            if folder.is_file() and folder.suffix == ".zip":
                hint = f"install it: edgekit install {folder} --root DIR"
            else:
                hint = "make one with edgekit train or edgekit import"
            raise BundleError(f"there is no bundle at {folder}", hint)
        if manifest_file.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{manifest_file} is larger than {MAX_MANIFEST_BYTES >> 20} MiB", "do not trust this bundle")
        bundle = cls(folder, _decode_manifest(manifest_file.read_bytes(), folder))
        if verify:
            for name in bundle.manifest.files:
                bundle.file(name)
        return bundle

    @property
    def digest(self) -> str:
        """sha256 over what the model is (not its history, not its derived files): the name a child gives its parent."""
        manifest = self.manifest
        identity = {
            "task": manifest.task,
            "model": manifest.model,
            "inputs": manifest.inputs,
            "outputs": manifest.outputs,
            "preprocessing": manifest.preprocessing,
            "labels": manifest.labels,
            "files": {name: manifest.files[name] for name in IDENTITY if name in manifest.files},
        }
        return hashlib.sha256(msgspec.json.encode(identity, order="sorted")).hexdigest()

    @property
    def graph(self) -> str:
        """The graph that this bundle is about: int8 where it was quantized, else float."""
        return INT8_GRAPH if INT8_GRAPH in self.manifest.files else FLOAT_GRAPH

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a file, its hash checked on first use. Raises `BundleError` where it is absent or damaged."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise BundleError(f"{self.path} has no {name}", f"it holds: {', '.join(sorted(self.manifest.files)) or 'nothing'}")
        path = self.path / name
        if name not in self._checked:
            if any(
                part.is_symlink() for part in (path, *[self.path / p for p in PurePosixPath(name).parents if str(p) != "."])
            ):
                raise BundleError(f"{path} is a symbolic link", "do not trust this bundle")
            if not path.is_file():
                raise BundleError(f"{path} is missing", "restore the bundle, or make it again")
            if sha256_file(path) != expected:
                raise BundleError(
                    f"{path} is damaged: its sha256 is not the manifest's", "restore the bundle, or make it again"
                )
            self._checked.add(name)
        return path

    def size_bytes(self) -> int:
        """Size of the files that a device needs to run the model's graph."""
        return (self.path / self.graph).stat().st_size

    def last(self, stage: str) -> History | None:
        """The newest history entry of a stage."""
        return next((entry for entry in reversed(self.manifest.history) if entry.stage == stage), None)

    def entry(self, stage: str, config: Mapping[str, Any], figures: Mapping[str, Any]) -> History:
        """A history entry whose parent is this bundle."""
        return history_entry(stage, config, figures, parent=self.digest)

    @classmethod
    @contextlib.contextmanager
    def create(cls, out: str | os.PathLike[str]) -> Iterator[Draft]:
        """Write a new bundle: the block fills the draft; leaving it hashes the files and renames into place.

        Raises `OutputExists` before any work where ``out`` is there. On any error, Ctrl-C or a full disk nothing is left.
        """
        target = Path(out)
        if target.exists() or target.is_symlink():
            raise OutputExists(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            os.chmod(work, 0o755)  # noqa: S103  mkdtemp made it private; a bundle is for all to read
            draft = Draft(work)
            yield draft
            if draft.manifest is None:
                raise RuntimeError("a draft needs a manifest")
            files = {str(p.relative_to(work).as_posix()): sha256_file(p) for p in sorted(work.rglob("*")) if p.is_file()}
            files.pop(MANIFEST, None)
            draft.write(MANIFEST, encode_manifest(msgspec.structs.replace(draft.manifest, files=files)))
            _sync(work)
            if target.exists():
                raise OutputExists(target)
            os.rename(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def extend(self, files: Mapping[str, bytes], entry: History | None = None) -> Bundle:
        """Add or replace derived files, and a history entry; returns the bundle as it is now.

        A replaced file leaves the manifest before it changes on disk and comes back after, so that a crash between
        the steps costs the derived file, never the bundle.
        """
        if bad := [name for name in files if not _SAFE_NAME.match(name) or name in (*IDENTITY, MANIFEST)]:
            raise ValueError(f"not a derived file: {bad[0]}")
        with _locked(self.path):
            manifest = _decode_manifest((self.path / MANIFEST).read_bytes(), self.path)
            kept = {name: digest for name, digest in manifest.files.items() if name not in files}
            if kept != manifest.files:
                atomic_write(self.path / MANIFEST, encode_manifest(msgspec.structs.replace(manifest, files=kept)))
            for name, data in files.items():
                atomic_write(self.path / name, data)
                kept[name] = hashlib.sha256(data).hexdigest()
            history = (*manifest.history, entry) if entry else manifest.history
            manifest = msgspec.structs.replace(manifest, files=dict(sorted(kept.items())), history=history)
            atomic_write(self.path / MANIFEST, encode_manifest(manifest))
        return Bundle(self.path, manifest)


def history_entry(stage: str, config: Mapping[str, Any], figures: Mapping[str, Any], parent: str | None = None) -> History:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return History(stage, now, __version__, dict(config), parent, dict(figures))


def encode_manifest(manifest: Manifest) -> bytes:
    """Manifest as indented JSON, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time in a bundle, across processes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Flush every file of a folder to disk, so that the rename never outlives its contents."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
