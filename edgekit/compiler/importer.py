"""`import_onnx`: a foreign ONNX file becomes a bundle. The file is read in a child process (`foreign`); this half is light."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.errors import GraphError, UsageError
from edgekit.files import sha256_file
from edgekit.manifest import FORMAT, Manifest, TensorSpec, Tolerance, history_entry
from edgekit.progress import say

from . import child
from .shapes import Constant, parse_constants, parse_shapes, shape_text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["import_onnx"]

MAX_CONSTANT = 4096  # elements; they are kept in the history
MAX_BYTES = 2 << 30  # what one protobuf message can hold
TOLERANCE = Tolerance("relative", 1e-4)


def import_onnx(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    shape: Mapping[str, Iterable[int | str]] | Iterable[str] | str = (),
    dynamic: Mapping[str, Iterable[int | str]] | Iterable[str] | str = (),
    constants: Mapping[str, ArrayLike] | Iterable[str] | str = (),
    name: str | None = None,
    timeout_s: float = 600,
) -> Bundle:
    """Read ``model`` (ONNX, with external data only inside its folder) into a new bundle of task ``tensor``.

    ``shape``: texts as ``x:1x3x48x320`` or ``{"x": (1, 3, 48, 320)}``, which fix an input's axes. ``dynamic``:
    ``x:1..8x3x48x320`` or ``{"x": ("1..8", 3, 48, 320)}``, which keeps axes dynamic with the range that `build` compiles for.
    Inputs that neither names keep the axes of the file. ``constants``: name -> values (or texts as ``axes:0,2``) of inputs that
    are parameters; they stop being inputs.

    The graph is raised to opset 13 or later, shapes are inferred, constants folded; a file that needs none of it is kept
    byte for byte. ONNX Runtime must give the original's outputs on seeded random inputs within 1e-4 (relative to the
    largest output); the first of them become ``golden.npz``.

    A quantized file (QLinear and integer operators, Q/DQ that is not symmetric int8, ONNX Runtime's own operators) is brought
    back to float, with the distance from the original in the notes: that graph is then the reference, and `quantize` makes it
    int8 again. Explicit symmetric Q/DQ, which TensorRT takes, stays.

    Raises `UsageError` for shapes that do not fit, `GraphError` for what cannot be read or run (naming nodes and
    operators), `OutputExists`. A failed import leaves nothing behind.
    """
    path = Path(model)
    fixed = parse_shapes(_texts(shape, "shape"))
    ranges = parse_shapes(_texts(dynamic, "dynamic"), "--dynamic", ranges=True)
    _check_name(name)
    values = _constants(constants)
    _check_once(fixed, ranges, values)
    with Bundle.create(out) as draft, tempfile.TemporaryDirectory(prefix="edgekit-import-") as work:
        digest = _checked_file(path)
        say(f"importing {path.name}")
        request = {"model": os.path.abspath(path), "shape": fixed, "dynamic": ranges, "constants": values}
        answer = child.call("foreign:import_graph", request, Path(work), timeout_s)
        for file in (FLOAT_GRAPH, GOLDEN):
            shutil.move(Path(work) / file, draft.path / file)
        config = {
            "model": path.name,
            "sha256": digest,
            "shape": {k: shape_text(v) for k, v in answer["shape"].items()},
            "dynamic": answer["dynamic"],
            **({"constants": {name: stated.values for name, stated in values.items()}} if values else {}),
        }
        for note in answer["notes"]:
            say(f"note: {note}")
        draft.manifest = Manifest(
            format=FORMAT,
            name=name or path.stem,
            task="tensor",
            inputs=msgspec.convert(answer["inputs"], tuple[TensorSpec, ...]),
            outputs=msgspec.convert(answer["outputs"], tuple[TensorSpec, ...]),
            golden={FLOAT_GRAPH: TOLERANCE},
            history=(history_entry("import", config, {**answer["figures"], "notes": answer["notes"]}),),
        )
    return Bundle.open(out, verify=False)


def _check_name(name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name.isprintable()):
        raise UsageError(f"a bundle is not called {name!r}", "give letters, digits and signs on one line")


def _texts(stated: Mapping[str, Iterable[int | str]] | Iterable[str] | str, what: str) -> list[str]:
    """What is stated, as the command line has it."""
    if isinstance(stated, str):
        return [stated]
    try:
        if isinstance(stated, Mapping):
            return [f"{name}:{axes if isinstance(axes, str) else shape_text(axes)}" for name, axes in stated.items()]
        texts = list(stated)
    except TypeError:
        texts = [stated]  # type: ignore[list-item]
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(
                f"{what}: {text!r} is no text", f'write {what}="x:1x3x224x224", or {what}={{"x": (1, 3, 224, 224)}}'
            )
    return texts


def _check_once(fixed: Iterable[str], ranges: Iterable[str], values: Iterable[str]) -> None:
    """Raises `UsageError` for an input of which two things are stated."""
    if both := sorted(set(fixed) & set(ranges)):
        raise UsageError(f"{both[0]} is in --shape and in --dynamic", "state an input once")
    if both := sorted(set(values) & (set(fixed) | set(ranges))):
        raise UsageError(f"{both[0]} is a constant and has a shape stated", "leave its --shape or --dynamic out")


def _constants(stated: Mapping[str, ArrayLike] | Iterable[str] | str) -> dict[str, Constant]:
    """Raises `UsageError` for what is no array of numbers, and for one that is large: a parameter is not."""
    if not isinstance(stated, Mapping):
        return parse_constants(_texts(stated, "constants"))
    import numpy as np

    found = {}
    for name, value in stated.items():
        try:
            array = np.asarray(value)
        except ValueError:  # of rows of several lengths
            array = np.array(None)
        if array.dtype.kind not in "fiub" or array.size > MAX_CONSTANT:
            raise UsageError(
                f"constant {name}: {array.size} elements of {array.dtype}; a parameter has at most {MAX_CONSTANT} numbers",
                "make larger ones part of the graph before the export",
            )
        found[name] = Constant(array.ravel().tolist(), list(array.shape))
    return found


def _checked_file(path: Path) -> str:
    """sha256 of an ONNX file of acceptable size."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "give the path of an .onnx file")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise GraphError(
            f"{path.name} has {size} bytes; a graph has 1 to {MAX_BYTES}", "keep large weights as external data beside the file"
        )
    return sha256_file(path)
