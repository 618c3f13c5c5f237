"""From `nn.Module` to ONNX, with recurrences as one operator each."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from edgekit.errors import GraphError, MissingExtra, first_line

from .tidy import tidy

try:
    import onnx
    import torch
    from torch import Tensor, nn
    from torch.overrides import TorchFunctionMode
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

__all__ = ["export_onnx", "trace"]

OPSET = 18  # what the exporter writes
OLDEST_OPSET = 17


def export_onnx(module: nn.Module, example: Tensor) -> bytes:
    """ONNX bytes with input ``x`` and output ``y``, batch axis dynamic, batch norms folded.

    The exporter's notes on where each node came from are dropped: they hold paths of this machine.
    Raises `GraphError` where torch cannot export the module.
    """
    module = module.eval()
    try:
        with _quiet(), _WholeRecurrences():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                opset_version=OPSET,
                custom_translation_table=_translations(),
                verbose=False,
            )
        assert program is not None
    except Exception as error:  # noqa: BLE001  the exporter raises many types of its own
        trace(module, example)  # where it stops at tracing, which says at which module
        reason = first_line(error)
        raise GraphError(
            f"torch cannot export this model to ONNX: {reason}", "avoid data-dependent shapes and branches"
        ) from None
    model: onnx.ModelProto = program.model_proto
    _forget_origins(model)
    tidy(model)
    _lower_opset(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch prints the graphs that it gives up on, and says of each step what it thinks; errors come as exceptions."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("onnx", "export", "fx.experimental.symbolic_shapes")]
    loggers += [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The operators that ``module`` runs on ``example``, in eval mode. Raises `GraphError` with where tracing stopped."""
    with _quiet():
        try:
            return torch.export.export(module.eval(), (example,), strict=False)
        except Exception as error:  # noqa: BLE001  tracing runs the user's code
            lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
            reason = lines[0].removeprefix("Caught ").strip()
            raise GraphError(
                f"the model cannot be traced{_place(error, module)}: {reason}",
                "avoid branches and shapes that depend on data in forward()",
            ) from None


def _place(error: BaseException, module: nn.Module) -> str:
    """`` in NAME`` of the innermost module whose forward raised ``error``."""
    names = {id(layer): name or type(layer).__name__ for name, layer in module.named_modules()}
    found = ""
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        owner = at.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None  # self, by whatever name
        if id(owner) in names and code.co_name == "forward":
            found = f" in {names[id(owner)]} ({type(owner).__name__}, line {at.tb_lineno})"
        at = at.tb_next
    return found


def _lower_opset(model: onnx.ModelProto) -> None:
    """Declare the opset that TensorRT 8.6 reads where every operator of the graph means the same there."""
    newest = max(onnx.defs.get_schema(node.op_type, OPSET).since_version for node in model.graph.node)
    if newest <= OLDEST_OPSET:
        model.opset_import[0].version, model.ir_version = OLDEST_OPSET, 8


def _forget_origins(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    graph = model.graph
    for item in [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.value_info[:]


@torch.library.custom_op("edgekit::lstm", mutates_args=())
def _lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `torch.lstm` does, (T, N, C) or (N, T, C) -> (T, N, D H) or (N, T, D H), in the same order of arguments."""
    y, h, c = torch.ops.aten.lstm.input(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return y, h, c


@_lstm.register_fake
def _(x: Tensor, hx: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _answer(x, hx[0], bidirectional=rest[5]), torch.empty_like(hx[0]), torch.empty_like(hx[1])


@torch.library.custom_op("edgekit::gru", mutates_args=())
def _gru(
    x: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """What `torch.gru` does; see `_lstm`."""
    y, h = torch.ops.aten.gru.input(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return y, h


@_gru.register_fake
def _(x: Tensor, hx: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _answer(x, hx, bidirectional=rest[5]), torch.empty_like(hx)


def _answer(x: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], state.shape[-1] * (2 if bidirectional else 1))


def _translations() -> dict[Any, Any]:
    from onnxscript.function_libs.torch_lib.ops import core  # as slow to import as the exporter, which needs it as well

    return {torch.ops.edgekit.lstm.default: core.aten_lstm, torch.ops.edgekit.gru.default: core.aten_gru}


class _WholeRecurrences(TorchFunctionMode):
    """Lets the exporter see an LSTM or GRU as an operator without inside.

    Torch computes the shapes of `torch.lstm` by running each of its steps in Python, three times an export: 13 s for a GRU of
    20 steps and two layers, over a minute for 128 steps; the graph it writes is the same.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Of packed sequences, whose third argument is the state, the exporter knows no operator; nor of projections.
        if len(args) == 9 and isinstance(args[2], list | tuple):
            if func is torch.lstm and args[1][0].shape == args[1][1].shape:
                func = torch.ops.edgekit.lstm.default
            elif func is torch.gru:
                func = torch.ops.edgekit.gru.default
        return func(*args, **(kwargs or {}))
