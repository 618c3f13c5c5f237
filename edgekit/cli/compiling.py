"""``edgekit import``, ``build``, ``inspect``, ``targets`` and ``estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import Answer, answers, bundle_argument, lines, out_option, table, targets_option

__all__ = ["build", "estimate", "import_", "inspect", "targets"]

target_option = click.option("--target", required=True, metavar="NAME", help="A name from: edgekit targets.")


@click.command("import")
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@out_option("The bundle to write.")
@click.option("--shape", multiple=True, metavar="NAME:AxBxC", help="Fix an input's shape; once for each input.")
@click.option("--dynamic", multiple=True, metavar="NAME:A..BxC", help="Keep axes dynamic, each with its range.")
@click.option("--constant", "constants", multiple=True, metavar="NAME:V,V", help="Give an input its values for good: axes:0,2.")
@click.option("--name", help="The model's name; the file's if not given.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=600, show_default=True, help="Seconds at most.")
@answers
def import_(model: Path, **options: Any) -> Answer:
    """Take a foreign ONNX file into a bundle.

    Reads it safely, binds shapes, raises old opsets, folds constants, and keeps the result only where ONNX Runtime gives
    the same outputs as for the original.

    \b
    Examples:
      edgekit import ocr.onnx --out ocr.edge --shape x:1x3x48x320
      edgekit import ocr.onnx --out ocr.edge --dynamic x:1..8x3x48x320
      edgekit import pool.onnx --out pool.edge --constant axes:2,3
    \f
    Returns ``bundle``, ``inputs`` (name to type and shape), ``opset``, ``nodes`` and ``nodes_before`` the import,
    ``parameters``, ``relative_error`` (of the outputs, to the largest one) and ``notes``.
    """
    from edgekit.compiler import import_onnx

    bundle = import_onnx(model, **options)
    entry = bundle.manifest.history[-1]
    inputs = {spec.name: f"{spec.dtype} {'x'.join(map(str, spec.shape))}" for spec in bundle.manifest.inputs}
    return Answer({"bundle": str(bundle.path), "inputs": inputs, **entry.figures})


@click.command("build")
@bundle_argument()
@target_option
@click.option("--precision", default="best", show_default=True, metavar="P", help="fp32, fp16, int8 or best.")
@click.option("--batch", metavar="N|A..B", help="Samples at once, or a range; for graphs with a dynamic first axis.")
@click.option("--workspace-mb", type=click.IntRange(1), metavar="N", help="MiB of scratch memory that one kernel may use.")
@click.option(
    "--compatible",
    type=click.Choice(["hardware", "version"]),
    help="hardware: for other GPUs from Ampere on as well, slower. version: for later TensorRT as well (devices only); can be "
    "slower, larger, and loading it runs code out of the file.",
)
@click.option(
    "--dla",
    type=click.IntRange(0),
    is_flag=False,
    flag_value=0,
    metavar="[CORE]",
    help="Run on the deep learning accelerator what it can (fp16 or int8, one shape), the rest on the GPU. Core 0 by default.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Put this timing cache into the kit, so that the device builds faster; for RTX it does nothing.",
)
@click.option(
    "--uint8-input",
    is_flag=True,
    help="The engine takes the resized frame's bytes, a quarter of the floats', and normalises by itself; models of pictures.",
)
@click.option("--verbose", is_flag=True, help="Report the layers, in engines/TARGET.layers.json; a device reports its own.")
@click.option("--again", is_flag=True, help="Build although nothing changed, and say whether the bytes are the same.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=1800, show_default=True, help="Seconds at most.")
@targets_option
@answers
def build(bundle: Path, target: str, **options: Any) -> Answer:
    """Compile a bundle: an engine for RTX targets, a build kit for Jetson.

    best is int8 where the bundle is quantized (float16 outside its Q/DQ, or float32 where that loses too much), else fp16
    where the golden outputs hold, else fp32. RTX engines are compiled here, without a GPU. A Jetson compiles its kit once,
    by the script inside. With nothing changed, a second build answers from the cache.

    \b
    Examples:
      edgekit build digits.edge --target rtx-ada
      edgekit build digits.edge --target jetson-orin-nano --precision fp16 --batch 1..8 --workspace-mb 512
      edgekit build digits.edge --target jetson-agx-orin --dla 1 --timing-cache timings
      edgekit build digits.edge --target rtx-ada --uint8-input
    \f
    Returns ``bundle``, ``engine`` and ``kit`` (a path, or None), ``cached`` (whether an earlier one answers), ``target``,
    ``precision``, ``tensorrt`` (the version used, or expected on a device), ``seconds``, ``size_bytes``, ``sparse_layers``
    (with 2:4 weights), ``layers`` (the report of ``--verbose``) and ``layer_summary``, ``changed`` (what differs from the
    build before), ``reproduced`` (whether the bytes are the same; None where inputs differ), ``usable`` (False for a kit that
    no TensorRT of its device builds) and ``note``.
    """
    from edgekit.compiler import build as build_bundle

    result = build_bundle(bundle, target=target, **options)
    return Answer(result.figures())


@click.command("inspect")
@click.argument("path", metavar="B|ONNX|ENGINE", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Every layer with its shapes, not the heaviest alone.")
@click.option("--shape", multiple=True, metavar="NAME:AxBxC", help="Of an ONNX file's input with dynamic axes.")
@targets_option
@answers
def inspect(path: Path, layers: bool, shape: tuple[str, ...]) -> Answer:
    """Say what a bundle, an ONNX file or an engine holds, what it costs, and which targets take it.

    MACs, parameters and bytes moved by operator and layer (dynamic axes of an ONNX file count as 1); and for every target
    whether it builds, by which TensorRT, and what stands against it. Nothing is built or written for that.

    \b
    Examples:
      edgekit inspect digits.edge
      edgekit inspect digits.edge --layers --json
      edgekit inspect model.onnx --shape x:1x3x224x224
      edgekit inspect digits.edge/engines/rtx-ada.engine
    \f
    Returns ``name``, ``inputs``, ``outputs``, ``graphs`` (name to its cost) and ``targets`` (whether each builds it), of a
    bundle ``bundle``, ``task``, ``digest``, ``labels`` (how many), ``files`` (name to bytes) and ``history`` (a line each),
    of an ONNX file ``file``, ``size_bytes``, ``sha256``, ``made_by`` and ``notes``; of an engine or a kit its record.
    """
    from edgekit.compiler import summarise

    data = summarise(path, layers=layers, shape=shape)
    return Answer(data, _with_lists(data, ("history", "notes")))


def _with_lists(data: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Figures as usual, then the lists of ``keys`` one line an item."""
    rest = {key: value for key, value in data.items() if key not in keys}
    lists = [line for key in keys if data.get(key) for line in (key, *(f"  {item}" for item in data[key]))]
    return "\n".join([lines(rest), *lists])


@click.command("targets")
@targets_option
@answers
def targets() -> Answer:
    """List what edgekit compiles for, each figure with its source (--json).

    A file of your own adds targets, or replaces shipped ones, which is said below the table; docs/targets.md has one to copy.

    \b
    Examples:
      edgekit targets
      edgekit targets --json
      edgekit targets --targets my-boards.toml
    \f
    Returns ``targets`` (rows: ``name``, ``kind``, ``sm``, ``precisions``, ``tensorrt``, ``dla``, and figures of ``value`` and
    ``source``).
    """
    from edgekit.targets import target_rows

    rows = target_rows()
    notes = ["* unconfirmed: --json states the derivation"]
    notes += [
        f"{row['name']}: figures of {row['figures_of']}; --targets FILE for another card" for row in rows if row["figures_of"]
    ]
    notes += [
        f"{row['name']}: {'in place of the shipped table, ' if row['replaces'] else ''}from {row['file']}"
        for row in rows
        if row["file"]
    ]
    return Answer({"targets": rows}, "\n".join([table([_target_row(row) for row in rows]), *notes]))


def _target_row(row: dict[str, Any]) -> dict[str, Any]:
    def figure(key: str) -> str | None:
        found = row.get(key)
        return found and f"{found['value']:g}{'*' if found['source'].startswith('unconfirmed') else ''}"

    return {
        "target": row["name"],
        "builds": {"rtx": "engine", "device": "kit", "cpu": None}[row["kind"]],
        "SM": row["sm"] or None,
        "GB": figure("memory_gb"),
        "GB/s": figure("bandwidth_gbs"),
        "int8 TOPS": figure("int8_tops"),
        "fp16 TFLOPS": figure("fp16_tflops"),
        "DLA": row["dla"],
        "precisions": " ".join(row["precisions"]),
        "TensorRT": ", ".join(entry["tensorrt"] for entry in row["tensorrt"]) or ("RTX" if row["kind"] == "rtx" else None),
    }


@click.command("estimate")
@bundle_argument()
@target_option
@click.option("--precision", default="best", show_default=True, metavar="P", help="fp32, fp16, int8 or best.")
@click.option("--batch", type=click.IntRange(1), help="Samples at once; 1, or the fewest that the graph takes, if not given.")
@targets_option
@answers
def estimate(bundle: Path, target: str, precision: str, batch: int | None) -> Answer:
    """Predict the latency on a device by the roofline model. A prediction, not a measurement.

    latency_ms is fitted to published latencies, bound_ms is what the peaks alone would give. int8 of a bundle that is not
    quantized counts its layers as if they were.

    \b
    Examples:
      edgekit estimate digits.edge --target jetson-orin-nano
      edgekit estimate digits.edge --target jetson-orin-nano --precision int8
    """
    from edgekit.compiler import estimate as estimate_bundle

    data = estimate_bundle(bundle, target=target, precision=precision, batch=batch)
    return Answer(data, _with_lists(data, ("caveats",)))
