"""The bundle: one directory, ``NAME.edge/``, that flows through every stage.

This is the only room that knows file names. A bundle is complete or absent: `Bundle.create` writes beside the final
path and renames; `Bundle.extend` adds derived files one atomic replacement at a time. Reading one validates the
manifest's schema and the hashes, runs no code from it and never follows a path out of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from .errors import BundleError, OutputExists, UsageError
from .files import atomic_write, given_path, locked, naming, sha256_file, staged, sync_path
from .manifest import (
    MAX_MANIFEST_BYTES,
    History,
    Manifest,
    checked_encoding,
    decode_manifest,
    encode_manifest,
    history_entry,
    is_safe_name,
)

__all__ = [
    "CALIBRATION",
    "EXAMPLES",
    "FLOAT_GRAPH",
    "GOLDEN",
    "INT8_GRAPH",
    "MANIFEST",
    "REPORT",
    "TOKENIZER",
    "WEIGHTS",
    "Bundle",
    "Draft",
    "new_path",
    "refuse_inside_bundle",
]

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FLOAT_GRAPH = "model.onnx"
INT8_GRAPH = "model.int8.onnx"
CALIBRATION = "calibration.json"
GOLDEN = "golden.npz"
REPORT = "report.html"
EXAMPLES = "eval/examples.json"
TOKENIZER = "tokenizer.json"

#: Files that say what the model is; everything else is derived from them.
IDENTITY = (WEIGHTS, FLOAT_GRAPH, INT8_GRAPH, CALIBRATION, GOLDEN, TOKENIZER)


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
        with naming(file):
            file.write_bytes(data)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: ``path`` and its validated ``manifest``."""

    path: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, but: str = "") -> Bundle:
        """Read a bundle. ``verify`` hashes every file now, those below the folder ``but`` left out; else each is hashed when
        it is first used.

        Raises `BundleError` where the bundle is missing, damaged or of a newer format.
        """
        folder = given_path(path, "bundle")
        if folder.is_symlink():  # an install's `current`: followed once, so that a switch meanwhile cannot mix two bundles
            folder = Path(os.path.realpath(folder))  # without an error for a link that leads to itself
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
                if not but or not name.startswith(f"{but}/"):
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

    @property
    def form(self) -> str:
        """What ``model.int8.onnx`` holds, whatever its name says: int8, or another ``--format`` of `quantize`."""
        made = self.last("quantize")
        form = made.figures.get("format") if made is not None else None
        return form if isinstance(form, str) else "int8"

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    def check_model(self) -> None:
        """Hash the files that say what the model is. Derived ones (engines, figures) are checked when they are used."""
        for name in IDENTITY:
            if self.has(name):
                self.file(name)

    def file(self, name: str) -> Path:
        """The path of a file, its hash checked on first use. Raises `BundleError` where it is absent or damaged."""
        path = self._path(name)
        if name not in self._checked:
            self._check(name, sha256_file(path))
        return path

    def read(self, name: str) -> bytes:
        """The contents of a file, hashed as they were read: what is checked is what is used. Raises as `file` does."""
        data = self._path(name).read_bytes()
        self._check(name, hashlib.sha256(data).hexdigest())
        return data

    def _path(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}", f"it holds: {', '.join(sorted(self.manifest.files)) or 'nothing'}")
        path = self.path / name
        folders = [self.path / parent for parent in PurePosixPath(name).parents if str(parent) != "."]
        if any(part.is_symlink() for part in (path, *folders)):
            raise BundleError(f"{path} is a symbolic link", "do not trust this bundle")
        if not path.is_file():
            raise BundleError(f"{path} is missing", self._cure(name))
        return path

    def _cure(self, name: str) -> str:
        """What brings a file back: engines and kits are made anew from what the bundle holds."""
        folder, _, file = name.partition("/")
        if folder != "engines":
            return "restore the bundle, or make it again"
        for ending in (".kit.zip", ".engine", ".golden.npz", ".layers.json", ".json"):
            file = file.removesuffix(ending)
        return f"make it again: edgekit build {self.path} --target {file}"

    def _check(self, name: str, digest: str) -> None:
        if digest != self.manifest.files[name]:
            raise BundleError(f"{self.path / name} is damaged: its sha256 is not the manifest's", self._cure(name))
        self._checked.add(name)

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
        import shutil  # these two cost milliseconds, and the device only reads
        import tempfile

        target = new_path(out)
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
            draft.write(MANIFEST, checked_encoding(msgspec.structs.replace(draft.manifest, files=files), target))
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

    def extend(self, files: Mapping[str, bytes], entry: History | None = None, *, drop: Iterable[str] = ()) -> Bundle:
        """Add or replace derived files, and a history entry; returns the bundle as it is now.

        ``drop``: derived files that those take the place of; they go once the manifest no longer names them.

        The entry takes the place of an earlier one of the same stage and config (a repeated eval or bench), so that a
        bundle which is measured every day does not grow.

        All new contents are on disk before anything changes, so a full disk changes nothing. A replaced file leaves the
        manifest before it changes on disk and comes back after, so that a crash between the steps costs the derived
        file, never the bundle.
        """
        from .progress import say  # the device only reads

        gone = [name for name in drop if name in self.manifest.files]
        if bad := [name for name in (*files, *gone) if not is_safe_name(name) or name in (*IDENTITY, MANIFEST)]:
            raise ValueError(f"not a derived file: {bad[0]}")
        with locked(self.path, told=say):
            manifest = _read_manifest(self.path)
            for name in (*files, *gone):
                if (self.path / name).parent.is_symlink():
                    raise BundleError(f"{(self.path / name).parent} is a symbolic link", "do not trust this bundle")
            before = {name: digest for name, digest in manifest.files.items() if name not in (*files, *gone)}
            after = before | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            replaced = before.keys() != manifest.files.keys()
            without = msgspec.structs.replace(manifest, files=before)
            history = manifest.history
            if entry:
                kept = (e for e in history if (e.stage, e.config, e.parent) != (entry.stage, entry.config, entry.parent))
                history = (*kept, entry)
            manifest = msgspec.structs.replace(manifest, files=dict(sorted(after.items())), history=history)
            contents = {self.path / name: data for name, data in files.items()}
            index = self.path / MANIFEST
            with staged({**contents, index: checked_encoding(manifest, self.path)}) as names:
                if replaced:
                    atomic_write(index, encode_manifest(without))
                for path in contents:
                    os.replace(names[path], path)
                    sync_path(path.parent)
                os.replace(names[index], index)
            for name in gone:
                with contextlib.suppress(OSError):  # a file that no manifest names does no harm
                    (self.path / name).unlink()
            sync_path(self.path)
        return Bundle(self.path, manifest)


def new_path(out: str | os.PathLike[str]) -> Path:
    """``out`` as a path for a new bundle. Raises `OutputExists` where it is there, `UsageError` inside another bundle or where
    nothing can be written (a folder is made there and removed): better said before hours of work than after."""
    import tempfile  # costs milliseconds, and the device only reads

    target = Path(out)
    if os.path.lexists(target):
        raise OutputExists(target)
    refuse_inside_bundle(target)
    folder = next(parent for parent in Path(os.path.abspath(target)).parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "may not be written" if folder.is_dir() else "is no folder"
        raise UsageError(f"{out} cannot be made: {folder} {reason}", "name another --out")
    try:  # permissions do not tell all: names too long, file systems that take no folders
        os.rmdir(tempfile.mkdtemp(dir=folder, prefix=f".{target.name}."))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"{out} cannot be made in {folder}: {error.strerror}", "name another --out") from None
    return target


def refuse_inside_bundle(path: str | os.PathLike[str]) -> None:
    """Raise `UsageError` where ``path``, about to be written, lies inside a bundle: only `Bundle.extend` writes there."""
    target = Path(os.path.abspath(path))
    for folder in target.parents:
        if (folder == target.parent or folder.suffix == ".edge") and (folder / MANIFEST).is_file():
            raise UsageError(f"{path} lies inside the bundle {folder}", "write it beside that bundle")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if path.is_symlink():
        raise BundleError(f"{path} is a symbolic link", "do not trust this bundle")
    with path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB", "do not trust this bundle")
    return decode_manifest(data, folder)
