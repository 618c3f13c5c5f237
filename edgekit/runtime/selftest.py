"""A tiny engine, compiled on the spot for the GPU at hand: what `doctor` runs to see whether a TensorRT backend works."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import BackendError
from edgekit.trust import trust_engine

from .cuda import open_cuda
from .tensorrt_engine import load_library, registered_logger

__all__ = ["add_tiny_engine", "tiny_plan"]


def tiny_plan(trt: Any, sm: str) -> bytes:
    """A serialized engine of y = x + x, float32 (2,), for compute capability ``sm``. Raises `BackendError`."""
    logger, log = registered_logger(trt)
    builder = trt.Builder(logger)
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)  # EXPLICIT_BATCH must be set in 8.6 and is gone in 11
    explicit = getattr(flags, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    x = network.add_input("x", trt.DataType.FLOAT, (2,))
    y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if hasattr(config, "set_compute_capability"):
        capability = getattr(trt.ComputeCapability, "SM" + sm.replace(".", ""), None)
        if capability is None:
            raise BackendError(
                f"TensorRT-RTX {trt.__version__} does not run on SM {sm}",
                "use a GPU of the RTX series, or --backend onnxruntime; edgekit targets lists what it compiles for",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT {trt.__version__} compiles nothing here: {log.take()}", "install it again")
    return bytes(plan)


def add_tiny_engine(bundle: Bundle, module: str) -> Bundle:
    """The bundle of y = x + x with an engine for this GPU by ``module``, trusted. Raises `BackendError`, `MissingExtra`."""
    cuda = open_cuda()
    with cuda.current():
        sm = cuda.device().sm
        trt = load_library(module)
        plan = tiny_plan(trt, sm)
    digest = hashlib.sha256(plan).hexdigest()
    record = {
        "target": "selftest",
        "kind": "rtx",
        "module": module,
        "tensorrt": trt.__version__,
        "compute_capability": sm,
        "precision": "fp32",
        "file": "engines/selftest.engine",
        "key": digest,
        "graph_sha256": bundle.manifest.files[FLOAT_GRAPH],
        "sources": {FLOAT_GRAPH: bundle.manifest.files[FLOAT_GRAPH]},
        "golden": {"kind": "relative", "limit": 1e-6},
        "engine_sha256": digest,
    }
    trust_engine(digest)
    return bundle.extend({"engines/selftest.engine": plan, "engines/selftest.json": msgspec.json.encode(record)})
