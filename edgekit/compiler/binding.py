"""Binding what a user states of inputs: shapes, exactly those and the symbols they stand for, and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from edgekit.errors import GraphError, UsageError
from edgekit.graphs.editing import free_name

from .passes import dims
from .shapes import Axis, Constant, shape_text

__all__ = ["Binding", "bind_constants", "bind_inputs"]

Stated = Mapping[str, tuple[Axis, ...]]


class Binding(NamedTuple):
    """What was bound. ``fixed`` and ``dynamic``: by the graph's own input names. ``ranges``: by axis symbol."""

    fixed: dict[str, tuple[Axis, ...]]
    dynamic: dict[str, tuple[Axis, ...]]
    ranges: dict[str, Axis]
    notes: list[str]
    changed: bool


def bind_constants(model: onnx.ModelProto, values: Mapping[str, Constant]) -> None:
    """Turn inputs into constants, in place: axes, shapes and pads that a graph asks for at run time, TensorRT at build time.

    Raises `UsageError` for a name that is no input, values that its shape or type cannot hold, and where no input is left.
    """
    known = {value.name: value for value in model.graph.input}
    for name, stated in values.items():
        if name not in known:
            raise UsageError(f"the graph has no input {name!r}", f"its inputs: {', '.join(known)}")
        model.graph.initializer.append(numpy_helper.from_array(_constant(known[name], stated), name))
        model.graph.input.remove(known[name])
    if values and not model.graph.input:
        raise UsageError("every input was made a constant", "leave one for the runtime to feed")


def _constant(value: onnx.ValueInfoProto, stated: Constant) -> np.ndarray[Any, Any]:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    known = value.type.tensor_type.HasField("shape")
    own = [axis if isinstance(axis, int) else -1 for axis in dims(value)] if known else [-1]
    shape = own if stated.shape is None else stated.shape
    try:
        if own.count(-1) > 1 and stated.shape is None:
            raise ValueError("several open axes")
        if known and (len(shape) != len(own) or any(a not in (-1, b) for a, b in zip(own, shape, strict=True))):
            raise ValueError("another shape")
        array = np.array(stated.values, np.float64 if any(isinstance(n, float) for n in stated.values) else None)
        return _exactly(array.reshape(shape), dtype)
    except (ValueError, OverflowError):
        have = f"{dtype.name} {shape_text('?' if axis == -1 else axis for axis in own) or 'scalar'}"
        what = f"{len(stated.values)} numbers" if stated.shape is None else f"shape {shape_text(stated.shape) or 'scalar'}"
        raise UsageError(
            f"input {value.name} is {have}; {what} were stated: {', '.join(map(str, stated.values[:8]))}",
            f"state what it can hold: --constant {value.name}:VALUES, or give an array of its shape in Python",
        ) from None


def _exactly(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """``array`` as ``dtype``; `ValueError` where that would change an integer, or makes a number infinite."""
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
    if dtype.kind == "f":
        if not np.array_equal(np.isfinite(cast), np.isfinite(array.astype(np.float64))):
            raise ValueError("not a number of this type")
    elif [int(n) for n in cast.ravel()] != array.ravel().tolist():
        raise ValueError("not a number of this type")
    return cast


def bind_inputs(model: onnx.ModelProto, fixed: Stated, dynamic: Stated) -> Binding:
    """Write the stated axes into the graph's inputs, in place. A symbol that gets a number gets it everywhere.

    A name that the graph does not have goes to the only input that fits, with a note. Axes without a name get one:
    ``batch`` for a first axis. Raises `UsageError` where a shape does not fit.
    """
    before = [i.SerializeToString() for i in (*model.graph.input, *model.graph.output)]
    notes: list[str] = []
    names = _resolve(model, {**fixed, **dynamic}, notes)
    values = {i.name: i for i in model.graph.input}
    symbols: dict[str, int] = {}
    ranges: dict[str, Axis] = {}
    _part_batches(values, {names[asked]: axes for asked, axes in {**fixed, **dynamic}.items()})
    for asked, axes in {**fixed, **dynamic}.items():
        _bind(values[names[asked]], axes, symbols, ranges)
    if clash := sorted(set(symbols) & set(ranges)):
        raise UsageError(f"the axis {clash[0]!r} is fixed in one input and has a range in another", "state it alike in both")
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.HasField("shape"):
            _name_axes(value, symbols, value.name in values)
        elif value.name in values:
            raise GraphError(f"the shape of input {value.name} is unknown", f"state it: --shape {value.name}:1x3x224x224")
    untouched = [i.name for i in model.graph.input if i.name not in names.values() and set(dims(i)) & set(symbols.values())]
    changed = before != [i.SerializeToString() for i in (*model.graph.input, *model.graph.output)]
    if symbols and untouched:
        notes.append(f"{', '.join(f'{k}={v}' for k, v in symbols.items())} holds for {', '.join(untouched)} as well")
    if changed:
        del model.graph.value_info[:]  # stated for the old symbols; inferred anew
    return Binding({names[k]: v for k, v in fixed.items()}, {names[k]: v for k, v in dynamic.items()}, ranges, notes, changed)


def _fits(value: onnx.ValueInfoProto, axes: tuple[Axis, ...]) -> bool:
    if not value.type.tensor_type.HasField("shape"):
        return True
    own = dims(value)
    return len(own) == len(axes) and all(
        not isinstance(d, int) or (axis.fixed and axis.low == d) for d, axis in zip(own, axes, strict=True)
    )


def _resolve(model: onnx.ModelProto, stated: Stated, notes: list[str]) -> dict[str, str]:
    """Stated name -> the graph's input name."""
    known = {i.name: i for i in model.graph.input}
    names = {name: name for name in stated if name in known}
    for name, axes in stated.items():
        if name in known:
            continue
        free = [n for n, value in known.items() if n not in names.values() and _fits(value, axes)]
        if len(free) != 1:
            have = ", ".join(f"{n} ({shape_text('?' if d is None else d for d in dims(v))})" for n, v in known.items())
            raise UsageError(
                f"the graph has no input {name!r}, and {len(free)} of its inputs fit {shape_text(axes)}", f"its inputs: {have}"
            )
        names[name] = free[0]
        notes.append(f"the graph has no input {name!r}: {shape_text(axes)} went to {free[0]!r}, the only one that fits")
    return names


def _bind(value: onnx.ValueInfoProto, axes: tuple[Axis, ...], symbols: dict[str, int], ranges: dict[str, Axis]) -> None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        tensor.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in axes)
    own = dims(value)
    if len(own) != len(axes):
        have = shape_text("?" if d is None else d for d in own)
        raise UsageError(
            f"input {value.name} has {len(own)} axes ({have}), {len(axes)} were stated",
            f"state {len(own)} axes for {value.name}",
        )
    for index, (axis, found) in enumerate(zip(axes, own, strict=True)):
        if isinstance(found, int):
            if not (axis.fixed and axis.low == found):
                raise UsageError(
                    f"input {value.name}: axis {index} is fixed at {found} in the file, {axis} was stated",
                    "export the model with that axis dynamic, or state the file's size",
                )
            continue
        symbol = found or ("batch" if index == 0 else f"{value.name}_{index}")
        store: dict[str, Any] = symbols if axis.fixed else ranges
        wanted = axis.low if axis.fixed else axis
        if store.setdefault(symbol, wanted) != wanted:
            raise UsageError(f"the axis {symbol!r} was stated as {store[symbol]} and as {wanted}", "state one size for it")
        tensor.shape.dim[index].dim_param = symbol


def _part_batches(values: Mapping[str, onnx.ValueInfoProto], stated: Stated) -> None:
    """Nameless first axes are one batch, unless different sizes are stated for them: then each has a name of its own."""
    nameless = [
        name
        for name, axes in stated.items()
        if values[name].type.tensor_type.shape.dim and axes and dims(values[name])[0] is None
    ]
    taken = {axis for value in values.values() for axis in dims(value) if isinstance(axis, str)}
    if len({stated[name][0] for name in nameless}) > 1:
        for name in nameless:
            values[name].type.tensor_type.shape.dim[0].dim_param = free_name(taken, f"{name}_0")


def _name_axes(value: onnx.ValueInfoProto, symbols: Mapping[str, int], is_input: bool) -> None:
    """Numbers for bound symbols, names for nameless axes of inputs (those of outputs are left to inference)."""
    for index, dim in enumerate(value.type.tensor_type.shape.dim):
        found = dims(value)[index]
        if found is None and is_input:
            found = "batch" if index == 0 else f"{value.name}_{index}"
        if found is None:
            dim.Clear()
        elif isinstance(found, str):
            bound = symbols.get(found)
            dim.dim_param = found
            if bound is not None:
                dim.dim_value = bound  # replaces the symbol: a dimension holds one of the two
