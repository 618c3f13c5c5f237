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
    "decode_manifest",
    "is_safe_name",
    "locked",
    "sha256_file",
    "sync_path",
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
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")


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
    with _staged({path: data}) as names:
        os.replace(names[path], path)
    sync_path(path.parent)


@contextlib.contextmanager
def _staged(files: Mapping[Path, bytes]) -> Iterator[dict[Path, str]]:
    """Contents on disk beside their final paths: all that can fail for lack of space, before anything changes.

    Yields final path -> temporary name; what the block has not renamed is removed.
    """
    names: dict[Path, str] = {}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, names[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(names[path], 0o644)
        yield names
    finally:
        for name in names.values():
            with contextlib.suppress(OSError):
                os.unlink(name)


def is_safe_name(name: str) -> bool:
    """Whether a bundle may hold a file of this name: ASCII, at most one folder deep, nothing hidden, no way out."""
    return len(name) <= 255 and _SAFE_NAME.fullmatch(name) is not None


def decode_manifest(data: bytes, where: str | os.PathLike[str]) -> Manifest:
    """The manifest in ``data``; ``where`` names its bundle in errors. Raises `BundleError` for anything but a valid one."""
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found > FORMAT:
            raise BundleError(
                f"{where} has bundle format {found}; this edgekit {__version__} reads up to {FORMAT}", "upgrade edgekit"
            )
        if found < 1:
            raise BundleError(f"{where} has bundle format {found}, which never was", "restore the bundle, or make it again")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: the manifest is not valid: {error}", "restore the bundle, or make it again") from None
    bad = [name for name in manifest.files if not is_safe_name(name)]
    if bad:
        raise BundleError(f"{where}: the manifest names an unsafe file {bad[0]!r}", "do not trust this bundle")
    return manifest


@dataclass
class Draft:
    """A bundle being written. Put files under ``path`` (or `write` them); set ``manifest`` before the block ends."""

    path: Path
    manifest: Manifest | None = None

    def write(self, name: str, data: bytes) -> None:
        if not is_safe_name(name):
            raise ValueError(f"not a name for a bundle's file: {name!r}")
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
        if folder.is_symlink():  # an install's `current`: followed once, so that a switch meanwhile cannot mix two bundles
            folder = folder.resolve()
        manifest_file = folder / MANIFEST
        if not folder.is_dir() or not manifest_file.is_file():
            if folder.is_file() and folder.suffix == ".zip":
                hint = f"install it: edgekit install {folder} --root DIR"
            else:
                hint = "make one with edgekit train or edgekit import"
            raise BundleError(f"there is no bundle at {folder}", hint)
        bundle = cls(folder, _read_manifest(folder))
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
            draft.write(MANIFEST, _checked_encoding(msgspec.structs.replace(draft.manifest, files=files), target))
            for path in work.rglob("*"):
                sync_path(path)
            sync_path(work)
            if target.exists() or target.is_symlink():
                raise OutputExists(target)
            os.rename(work, target)
            sync_path(target.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def extend(self, files: Mapping[str, bytes], entry: History | None = None) -> Bundle:
        """Add or replace derived files, and a history entry; returns the bundle as it is now.

        All new contents are on disk before anything changes, so a full disk changes nothing. A replaced file leaves the
        manifest before it changes on disk and comes back after, so that a crash between the steps costs the derived
        file, never the bundle.
        """
        if bad := [name for name in files if not is_safe_name(name) or name in (*IDENTITY, MANIFEST)]:
            raise ValueError(f"not a derived file: {bad[0]}")
        with locked(self.path):
            manifest = _read_manifest(self.path)
            for name in files:
                if (self.path / name).parent.is_symlink():
                    raise BundleError(f"{(self.path / name).parent} is a symbolic link", "do not trust this bundle")
            before = {name: digest for name, digest in manifest.files.items() if name not in files}
            after = before | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            replaced = before.keys() != manifest.files.keys()
            without = msgspec.structs.replace(manifest, files=before)
            history = (*manifest.history, entry) if entry else manifest.history
            manifest = msgspec.structs.replace(manifest, files=dict(sorted(after.items())), history=history)
            contents = {self.path / name: data for name, data in files.items()}
            index = self.path / MANIFEST
            with _staged({**contents, index: _checked_encoding(manifest, self.path)}) as names:
                if replaced:
                    atomic_write(index, encode_manifest(without))
                for path in contents:
                    os.replace(names[path], path)
                    sync_path(path.parent)
                os.replace(names[index], index)
            sync_path(self.path)
        return Bundle(self.path, manifest)


def history_entry(stage: str, config: Mapping[str, Any], figures: Mapping[str, Any], parent: str | None = None) -> History:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return History(stage, now, __version__, dict(config), parent, dict(figures))


def encode_manifest(manifest: Manifest) -> bytes:
    """Manifest as indented JSON, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if path.is_symlink():
        raise BundleError(f"{path} is a symbolic link", "do not trust this bundle")
    with path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB", "do not trust this bundle")
    return decode_manifest(data, folder)


def _checked_encoding(manifest: Manifest, where: Path) -> bytes:
    """`encode_manifest`, proved to be readable: a NaN or a file name that no reader takes fails here, not on the device."""
    try:
        data = encode_manifest(manifest)
    except UnicodeEncodeError as error:  # a path of undecodable bytes in a history entry
        raise BundleError(f"the manifest of {where} cannot be written: {error.reason}", "use names in UTF-8") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest of {where} would exceed {MAX_MANIFEST_BYTES >> 20} MiB", "record fewer figures")
    decode_manifest(data, where)
    return data


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder, across processes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_path(path: Path) -> None:
    """Flush a folder's entries (or a file's contents) to disk, so that a rename survives a power cut in the right order."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
