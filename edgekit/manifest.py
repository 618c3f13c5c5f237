"""`manifest.json`: the schema of what a bundle is, and reading and writing it. Validated by msgspec, unknown keys refused."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from .errors import BundleError
from .version import __version__

__all__ = [
    "FORMAT",
    "MAX_MANIFEST_BYTES",
    "History",
    "ImagePreprocessing",
    "Manifest",
    "ModelConfig",
    "Preprocessing",
    "SeriesPreprocessing",
    "Task",
    "TensorSpec",
    "TextPreprocessing",
    "Tolerance",
    "batch_axes",
    "batch_symbol",
    "checked_encoding",
    "decode_manifest",
    "encode_manifest",
    "history_entry",
    "is_safe_name",
]

FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
_TOOLS = ("onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "torch")
_COMMIT = re.compile(rb"([0-9a-f]{40,64}(?:-dirty)?)\n")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph input or output; a string in ``shape`` names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def batch_symbol(inputs: Sequence[TensorSpec]) -> str | None:
    """The name of the batch: that of the first open first axis."""
    return next((spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)), None)


def batch_axes(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, int]:
    """Tensor name -> which of its axes is the batch; a tensor without one is left out.

    The batch is the axis with the `batch_symbol`. Where all is of one size it is the first axis, if the inputs agree on that,
    and of outputs whose first axis is as long.
    """
    symbol = batch_symbol(inputs)
    if symbol is not None:
        return {spec.name: spec.shape.index(symbol) for spec in (*inputs, *outputs) if symbol in spec.shape}
    sizes = {spec.shape[0] for spec in inputs if spec.shape}
    return {spec.name: 0 for spec in (*inputs, *outputs) if len(sizes) == 1 and spec.shape and spec.shape[0] in sizes}


class ImagePreprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image", tag_field="kind"):
    """uint8 (H, W, 3) RGB -> float32 (1, channels, height, width): resize, then ``(x / 255 - mean) / std``.

    ``fit`` says what happens to another aspect ratio: ``stretch`` ignores it, ``crop`` cuts the centre,
    ``letterbox`` pads with black, ``line`` (of text) scales to the height, starts at the left and pads with black at the
    right; a longer line is squeezed.
    """

    width: int
    height: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["stretch", "crop", "letterbox", "line"] = "stretch"

    def __post_init__(self) -> None:
        if not (0 < self.width <= 8192 and 0 < self.height <= 8192):
            raise ValueError(f"width and height must lie in 1..8192, not {self.width} x {self.height}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")


class TextPreprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text", tag_field="kind"):
    """str -> int64 (1, length) token ids, by the bundle's ``tokenizer.json``; cut, or padded at the end with ``pad``."""

    length: int
    pad: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.length <= 8192 or self.pad < 0:
            raise ValueError(f"length must lie in 1..8192 and pad not be negative, not {self.length} and {self.pad}")


class SeriesPreprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="series", tag_field="kind"):
    """float (T, channels) -> float32 (1, length, channels + 1): ``(x - mean) / std``; cut, or padded at the end with zeros.

    The last channel is 1 where there is a sample and 0 where there is padding, so that a model can tell them apart.
    """

    length: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (0 < self.length <= 65536 and 0 < self.channels <= 1024):
            raise ValueError(f"length must lie in 1..65536 and channels in 1..1024, not {self.length} and {self.channels}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")


Preprocessing = ImagePreprocessing | TextPreprocessing | SeriesPreprocessing
Task = Literal["image-classification", "text-classification", "series-classification", "text-recognition", "tensor"]


class ModelEdits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What pruning changed of a model besides its weights' shapes.

    ``attributes``: ``MODULE.NAME`` -> integer, counts that the model's code divides by (heads). ``skipped``: modules that are
    left out; their input goes on.
    """

    attributes: dict[str, int] = {}
    skipped: tuple[str, ...] = ()

    def less(self, counts: Mapping[str, int]) -> ModelEdits:
        """With new ``counts`` of some attributes."""
        return ModelEdits({**self.attributes, **counts}, self.skipped)

    def without(self, module: str) -> ModelEdits:
        """With one more module left out; what was changed inside of it counts no more."""
        inside = f"{module}."
        return ModelEdits(
            {key: value for key, value in self.attributes.items() if not key.startswith(inside)},
            (*(other for other in self.skipped if not other.startswith(inside)), module),
        )


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A preset's name and its arguments. Pruned widths need no entry: the weights' shapes say them."""

    name: str
    args: dict[str, Any] = {}
    edits: ModelEdits | msgspec.UnsetType = msgspec.UNSET


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a graph may be from the golden outputs.

    ``relative``: max |out - golden| <= limit * max |golden|. ``snr_db``: signal-to-noise ratio >= limit.
    """

    kind: Literal["relative", "snr_db"]
    limit: float


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished stage: what ran, on which parent (bundle digest), and what it measured.

    ``commit``: of the git repository in whose folder it ran, with ``-dirty`` where tracked files differed from it; absent
    outside of one. ``tools``: versions of the libraries that it had loaded.
    """

    stage: str
    time: str
    edgekit: str
    config: dict[str, Any] = {}
    parent: str | None = None
    figures: dict[str, Any] = {}
    commit: str | msgspec.UnsetType = msgspec.UNSET
    tools: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``manifest.json``. ``labels`` are the classes; of a text reader the alphabet, the first of them CTC's blank, "".

    ``golden`` maps a graph file to the tolerance it is held to; ``files`` maps names to sha256.

    ``seal`` is the sha256 of all the rest, so that a damaged label or mean is noticed as a damaged file is. It is set
    when the manifest is encoded and checked when it is decoded. Whoever can write the file can renew it: against
    forgery packs are signed.
    """

    format: int
    name: str
    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model: ModelConfig | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    golden: dict[str, Tolerance] = {}
    files: dict[str, str] = {}
    history: tuple[History, ...] = ()
    seal: str = ""


class _Format(msgspec.Struct):
    format: int


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
    if manifest.seal != _seal(manifest):
        raise BundleError(
            f"{where}: the manifest is damaged or was edited: it does not fit its seal", "restore the bundle, or make it again"
        )
    return msgspec.structs.replace(manifest, seal="")


def encode_manifest(manifest: Manifest) -> bytes:
    """Manifest, sealed, as indented JSON with one trailing newline."""
    sealed = msgspec.structs.replace(manifest, seal=_seal(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def _seal(manifest: Manifest) -> str:
    """sha256 over the compact JSON of everything but the seal, in the order of the fields and of the keys as they stand."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, seal=""))).hexdigest()


def checked_encoding(manifest: Manifest, where: str | os.PathLike[str]) -> bytes:
    """`encode_manifest`, proved to be readable: a NaN or a file name that no reader takes fails here, not on the device."""
    try:
        data = encode_manifest(manifest)
    except UnicodeEncodeError as error:  # a path of undecodable bytes in a history entry
        raise BundleError(f"the manifest of {where} cannot be written: {error.reason}", "use names in UTF-8") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest of {where} would exceed {MAX_MANIFEST_BYTES >> 20} MiB", "record fewer figures")
    decode_manifest(data, where)
    return data


def history_entry(stage: str, config: Mapping[str, Any], figures: Mapping[str, Any], parent: str | None = None) -> History:
    """An entry for what has just been done here, with the time, the commit and the tools' versions."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return History(stage, now, __version__, dict(config), parent, dict(figures), _commit() or msgspec.UNSET, _tools())


def _tools() -> dict[str, str] | msgspec.UnsetType:
    """Versions of the heavy libraries that this process has loaded; none is loaded for it."""
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in _TOOLS}
    return {name: str(version) for name, version in found.items() if version} or msgspec.UNSET


def _commit() -> str | None:
    """The commit of the working directory. None without git, outside a repository, or where git takes too long."""
    import subprocess  # the device only reads

    # No file system monitor: it would be a program that the repository names. No locks: another git may be at work.
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = _COMMIT.fullmatch(done.stdout)
    return match[1].decode() if match and done.returncode == 0 else None
