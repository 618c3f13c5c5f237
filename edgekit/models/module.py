"""From bundle to `nn.Module` and back: create a preset, give it the stored weights' shapes, export, write.

Pruned widths are stored nowhere but in the weights: `adopt_shapes` makes a fresh preset as narrow as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, TOKENIZER, WEIGHTS, Bundle
from edgekit.data.tensors import Rows
from edgekit.errors import BundleError, GoldenError, GraphError, MissingExtra, UsageError, first_line
from edgekit.manifest import History, Manifest, ModelConfig, ModelEdits, TensorSpec, Tolerance
from edgekit.runtime import compare_arrays
from edgekit.runtime.golden import save_golden
from edgekit.runtime.onnxruntime import session

from . import is_custom, preset_named
from .export import export_onnx

try:
    import safetensors.torch
    import torch
    from torch import Tensor, nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.utils import parametrize
    from torch.utils.flop_counter import FlopCounterMode
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

__all__ = [
    "COMPUTED",
    "FLOAT_TOLERANCE",
    "Skip",
    "adopt_shapes",
    "attribute",
    "computes_weights",
    "create",
    "edit",
    "load",
    "macs",
    "parameters",
    "write_model",
]

#: How far ONNX Runtime may be from torch on the same weights: rounding of reordered sums, no more.
FLOAT_TOLERANCE = Tolerance("relative", 1e-4)
GOLDEN_SAMPLES = 8
COMPUTED = "its weight is computed at each call (weight or spectral norm)"


def create(config: ModelConfig) -> nn.Module:
    """A preset, or the user's own module, with fresh weights.

    A user's factory gets those of ``config.args`` that it has parameters for. Raises `UsageError` for an unknown name or
    argument, or a factory that does not make an `nn.Module`.
    """
    module, _, name = preset_named(config.name).home.partition(":")
    if is_custom(config.name):
        return _create_custom(config, module, name)
    try:
        preset: nn.Module = getattr(importlib.import_module(module), name)(**config.args)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UsageError(
            f"the model {config.name} does not take {dict(config.args)}: {reason}", "try another model or image size"
        ) from None
    return preset


def _create_custom(config: ModelConfig, module: str, name: str) -> nn.Module:
    """What the user's factory makes. Its code raises anything; what is said tells apart the name, the call and the code."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's code lies where the command is given
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except Exception as error:  # noqa: BLE001
        raise UsageError(
            f"the model {config.name} cannot be imported: {_reason(error)}", "mind the name: package.module:factory"
        ) from None
    try:
        args = _fitting(factory, config.args)
    except (TypeError, ValueError) as error:
        known = ", ".join(config.args)
        raise UsageError(f"{config.name} cannot be called: {_reason(error)}", f"its parameters may be: {known}") from None
    try:
        built: nn.Module = factory(**args)
    except Exception as error:  # noqa: BLE001
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise UsageError(f"{config.name}({given}) failed: {_reason(error)}", "mend the factory") from None
    if not isinstance(built, nn.Module):
        raise UsageError(f"{config.name} made a {type(built).__name__}", "the factory must return a torch.nn.Module")
    return built


def _reason(error: Exception) -> str:
    """The kind of the user's error and its first line."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _fitting(factory: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``args`` that the factory has parameters for; all where it takes ``**kwargs``. Raises TypeError where it wants
    others as well, or is not callable."""
    signature = inspect.signature(factory)
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        fitting = dict(args)
    else:
        fitting = {key: value for key, value in args.items() if key in signature.parameters}
    signature.bind(**fitting)
    return fitting


def load(bundle: Bundle) -> nn.Module:
    """The trained module of a bundle, in eval mode. Raises `BundleError` where the bundle holds no fitting weights."""
    if bundle.manifest.model is None or not bundle.has(WEIGHTS):
        raise BundleError(
            f"{bundle.path} has no PyTorch weights", "use a bundle made by edgekit train, not an imported or packed one"
        )
    module = create(bundle.manifest.model)
    try:
        state = safetensors.torch.load_file(bundle.file(WEIGHTS))
        edit(module, bundle.manifest.model.edits or ModelEdits())
        adopt_shapes(module, state)
        module.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        reason = first_line(error)
        raise BundleError(f"the weights in {bundle.path} do not fit its model: {reason}", "train the bundle again") from None
    return module.eval()


class Skip(nn.Module):
    """Stands where a block was: its first input goes on."""

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        return given[0] if given else next(iter(named.values()))


def edit(module: nn.Module, edits: ModelEdits) -> None:
    """Change in place what pruning changed. Raises `AttributeError` for what the module does not have."""
    for name in edits.skipped:
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(name)
        setattr(module.get_submodule(parent), leaf, Skip())
    for name, value in edits.attributes.items():
        attribute(module, name)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, value)


def attribute(module: nn.Module, name: str) -> int:
    """The integer ``MODULE.NAME``. Raises `AttributeError` where there is none."""
    parent, _, leaf = name.rpartition(".")
    value = vars(module.get_submodule(parent)).get(leaf)
    if type(value) is not int:
        raise AttributeError(f"{name} is no integer of the model")
    return value


def adopt_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Resize layers in place to the shapes of ``state``: convolutions, linear layers, norms, embeddings, recurrences, and
    parameters of any module; values come after. Raises `GraphError` where a weight that is computed (spectral or weight
    norm) would change."""
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        if computes_weights(layer):
            _check_unchanged(layer, prefix, state)
            continue
        _resize(layer, {key.removeprefix(prefix): tuple(value.shape) for key, value in state.items() if key.startswith(prefix)})
        for key, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.shape != state[prefix + key].shape:
                setattr(layer, key, nn.Parameter(torch.empty_like(state[prefix + key]), parameter.requires_grad))
        for key, buffer in list(layer.named_buffers(recurse=False)):
            if buffer is not None and prefix + key in state and buffer.shape != state[prefix + key].shape:
                setattr(layer, key, torch.empty_like(state[prefix + key]))


def computes_weights(layer: nn.Module) -> bool:
    """Whether its weight is made of others at each call (`torch.nn.utils.parametrizations`, or the older `weight_norm`)."""
    return parametrize.is_parametrized(layer) or hasattr(layer, "weight_g") or hasattr(layer, "weight_orig")


def _check_unchanged(layer: nn.Module, prefix: str, state: Mapping[str, Tensor]) -> None:
    for key, value in layer.state_dict().items():
        if value.shape != state[prefix + key].shape:
            raise GraphError(f"{prefix.rstrip('.')}: {COMPUTED}", "torch.nn.utils.parametrize.remove_parametrizations")


def _resize(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Set the sizes that ``layer`` keeps beside its weights."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        first, second = shapes["weight"][:2]
        if layer.transposed:
            if layer.groups == layer.in_channels:  # depthwise
                layer.groups = first
            layer.in_channels, layer.out_channels = first, second * layer.groups
        elif layer.groups > 1 and layer.groups == layer.in_channels:  # depthwise
            layer.groups = first * layer.groups // layer.out_channels
            layer.out_channels, layer.in_channels = first, layer.groups
        else:
            layer.out_channels, layer.in_channels = first, second * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shapes["weight"]
    elif isinstance(layer, nn.modules.batchnorm._NormBase) and "weight" in shapes:
        layer.num_features = shapes["weight"][0]
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm) and "weight" in shapes:
        layer.normalized_shape = shapes["weight"]
    elif isinstance(layer, nn.GroupNorm) and "weight" in shapes:
        layer.num_channels = shapes["weight"][0]
    elif isinstance(layer, nn.PReLU):
        (layer.num_parameters,) = shapes["weight"]
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = shapes["weight"]
    elif isinstance(layer, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)  # with projections weight_hh has the width of those
        layer.hidden_size, layer.input_size = shapes["weight_hh_l0"][0] // gates, shapes["weight_ih_l0"][1]


def parameters(module: nn.Module) -> int:
    """How many trained numbers the module has."""
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one sample in convolutions, linear layers, recurrences and matrix products.

    ``example`` (N, ...) is what the module takes.
    """
    # oneDNN runs an LSTM, and a CPU attention, as one operator that the counter does not know; without them, they are the
    # products that they are made of. A convolution is counted either way, and slow without.
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
    fast = torch.backends.mha.get_fastpath_enabled()  # of a whole encoder layer, one operator as well
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # the switch speaks of Intel GPUs
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        # The counter's tracker of modules asks what wants a gradient for how it was made, which is not kept here.
        wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
        stack.callback(lambda: [parameter.requires_grad_() for parameter in wanting])
        module.requires_grad_(False)
        counter = stack.enter_context(FlopCounterMode(display=False))
        module.eval()(example[:1])
    return int(counter.get_total_flops()) // 2


def write_model(
    out: str | os.PathLike[str],
    module: nn.Module,
    samples: Rows,
    manifest: Manifest,
    entry: History,
    tokenizer: bytes | None = None,
    graph: bytes | None = None,
) -> Bundle:
    """Write a module as a new bundle; its graph must answer as torch does on real inputs (`FLOAT_TOLERANCE`).

    ``samples`` (N, ...), what the module takes: `GOLDEN_SAMPLES` become the golden inputs. ``manifest`` gives name, model,
    task, labels, preprocessing and earlier history; the rest is filled in here. ``graph``: the module's, where it has been
    exported before. Raises `GoldenError` where ONNX Runtime
    differs from torch; nothing is written then.
    """
    chosen = np.linspace(0, len(samples) - 1, min(GOLDEN_SAMPLES, len(samples))).astype(int)
    inputs = np.ascontiguousarray(samples[chosen])
    with torch.no_grad():
        outputs = module.eval()(torch.from_numpy(inputs)).numpy()
    if graph is None:
        graph = export_onnx(module, torch.from_numpy(np.repeat(inputs[:1], 2, 0)))
    golden = compare_arrays(outputs, session(graph).run(None, {"x": inputs})[0])
    if not golden.within(FLOAT_TOLERANCE):
        raise GoldenError(
            f"the exported graph differs from torch by {golden.relative:.2g} relative, allowed {FLOAT_TOLERANCE.limit:g}",
            "report this with the model: the exporter mistranslates it",
        )
    figures = {**entry.figures, "golden_relative": golden.relative, "golden_tolerance": FLOAT_TOLERANCE.limit}
    with Bundle.create(out) as draft:
        draft.write(FLOAT_GRAPH, graph)
        draft.write(GOLDEN, save_golden({"x": inputs}, {"y": outputs}))
        draft.write(WEIGHTS, safetensors.torch.save({k: v.contiguous() for k, v in module.state_dict().items()}))
        if tokenizer is not None:
            draft.write(TOKENIZER, tokenizer)
        draft.manifest = msgspec.structs.replace(
            manifest,
            inputs=(TensorSpec("x", str(inputs.dtype), ("n", *inputs.shape[1:])),),
            outputs=(TensorSpec("y", "float32", ("n", *outputs.shape[1:])),),
            golden={FLOAT_GRAPH: FLOAT_TOLERANCE},
            history=(*manifest.history, msgspec.structs.replace(entry, figures=figures)),
        )
    return Bundle.open(out)
