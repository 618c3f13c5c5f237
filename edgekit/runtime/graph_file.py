"""The one door from a bundle's graph to a backend: hashed, and looked at, before anything else parses it."""

from __future__ import annotations

from edgekit.bundle import Bundle
from edgekit.errors import BundleError

from .onnx_wire import Survey, survey
from .operators import LISTED

__all__ = ["read_graph", "unlisted"]

_ANEW = "import the model anew, which turns graphs into listed operators: edgekit import MODEL.onnx --out B"
_DOMAINS = {domain for domain, _ in LISTED}
_passed: set[str] = set()  # sha256 of the graphs that this process has looked at: each once


def read_graph(bundle: Bundle, graph: str) -> bytes:
    """The bytes of an ONNX file of a bundle, which holds listed operators and all its weights.

    Raises `BundleError` for a damaged or truncated file, and for one that asks for more than `LISTED`: it names the node, its
    operator and the command that mends it.
    """
    data = bundle.read(graph)
    digest = bundle.manifest.files[graph]
    if digest not in _passed:
        _look(data, str(bundle.path / graph))
        _passed.add(digest)
    return data


def unlisted(found: Survey) -> dict[tuple[str, str], str]:
    """(domain, operator) -> its first node, of what is not on the list. Calls of functions that the file defines in a domain of
    its own are no operators: what they stand for is."""
    own = {key for key in found.functions if key[0] not in _DOMAINS}
    return {key: node for key, node in found.operators.items() if key not in LISTED and key not in own}


def _look(data: bytes, path: str) -> None:
    try:
        found = survey(data)
    except ValueError as error:
        raise BundleError(f"{path} is no whole ONNX file: {error}", _ANEW) from None
    for (domain, op_type), node in unlisted(found).items():
        name = f"{domain}.{op_type}" if domain else op_type
        why = ", which carries a compiled engine" if op_type == "EPContext" else ""
        raise BundleError(f"{path}: node {node} is {name}{why}, not on the list of operators that a device runs", _ANEW)
    for tensor, file, node in found.outside:
        reader = f", read by node {node}," if node else ""
        raise BundleError(f"{path} keeps the weights {tensor!r}{reader} in another file, {file!r}, not in itself", _ANEW)
