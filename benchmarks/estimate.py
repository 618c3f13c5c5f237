"""How far `edgekit estimate` is from published latencies: estimate.py

Eight figures are published for devices of which `targets.toml` has the peaks (`PUBLISHED`). The prediction is

    sum over kernels of max(arithmetic / peak, traffic / bandwidth) / share + kernels * launch

with two numbers in it, fitted on four figures by least squares of the logarithm and judged on the other four. All 70 ways
to halve eight figures are tried; `SHIPPED` is the half whose fit stands in `edgekit/targets.py`. Target: within 1.5x on
the half not used. Writes ``results/estimate.json``. A minute on two cores, no GPU: shapes are all that counts, so the nets
are made here with drawn weights (`_estimate_graphs.py`).

What cannot be taken from it: the figures come from two protocols (MLPerf's p90 of single-stream, Ultralytics' mean a picture
with Python around it), all from Orin. int8 counts as if every layer with weights were quantized, fp32 as TF32. Which layers
TensorRT joins was decided with all eight figures in sight; only the two numbers were not.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _estimate_graphs import PUBLISHED_COUNTS, resnet50, yolo11
from _machine import save

import edgekit
from edgekit.bundle import Bundle
from edgekit.models.module import export_onnx
from edgekit.targets import LAUNCH_US, PEAK_SHARE

LIMIT = 1.5
SIZES = {"resnet50": 224, "yolo11n": 640, "yolo11m": 640}
MLPERF = "MLPerf inference 3.1, edge, single-stream p90"
ULTRALYTICS = "Ultralytics' documentation, NVIDIA Jetson guide, Orin Nano Super, 640x640"


class Figure(NamedTuple):
    net: str
    target: str
    precision: str
    ms: float
    source: str


PUBLISHED = (
    Figure("resnet50", "jetson-agx-orin", "int8", 0.640, MLPERF),
    Figure("resnet50", "jetson-orin-nx", "int8", 1.082, MLPERF),
    Figure("yolo11n", "jetson-orin-nano", "fp32", 7.60, ULTRALYTICS),
    Figure("yolo11n", "jetson-orin-nano", "fp16", 4.91, ULTRALYTICS),
    Figure("yolo11n", "jetson-orin-nano", "int8", 3.91, ULTRALYTICS),
    Figure("yolo11m", "jetson-orin-nano", "fp32", 28.21, ULTRALYTICS),
    Figure("yolo11m", "jetson-orin-nano", "fp16", 13.99, ULTRALYTICS),
    Figure("yolo11m", "jetson-orin-nano", "int8", 9.58, ULTRALYTICS),
)
#: Every other figure: both nets of YOLO, all precisions and one of the two ResNet figures.
SHIPPED = (0, 2, 4, 6)


def bundles(folder: Path) -> dict[str, Bundle]:
    """The nets, imported as anybody's ONNX file is."""
    found = {}
    for name, size in SIZES.items():
        net = resnet50() if name == "resnet50" else yolo11(name[-1])
        (folder / f"{name}.onnx").write_bytes(export_onnx(net, torch.zeros(1, 3, size, size)))
        shape = f"x:1x3x{size}x{size}"
        found[name] = edgekit.import_onnx(folder / f"{name}.onnx", out=folder / f"{name}.edge", shape=(shape,))
    return found


def predicted(bound_ms: np.ndarray, kernels: np.ndarray, share: Any, launch_us: Any) -> Any:
    return bound_ms / share + kernels * launch_us / 1e3


def fit(bound_ms: np.ndarray, kernels: np.ndarray, ms: np.ndarray, half: tuple[int, ...]) -> tuple[float, float]:
    """(share of the peaks, microseconds a launch) by least squares of log(predicted / published) over a grid."""
    share, launch = np.meshgrid(np.arange(0.3, 1.001, 0.01), np.arange(0, 20.01, 0.1), indexing="ij")
    loss = sum(np.log(predicted(bound_ms[i], kernels[i], share, launch) / ms[i]) ** 2 for i in half)
    best = np.unravel_index(np.argmin(loss), loss.shape)
    return round(float(share[best]), 2), round(float(launch[best]), 1)


def factor(ratio: np.ndarray) -> float:
    """The worst ratio either way: 1.2 is a fifth too much, or the published a fifth more."""
    return math.exp(float(np.abs(np.log(ratio)).max()))


def judge(bound_ms: np.ndarray, kernels: np.ndarray, ms: np.ndarray, half: tuple[int, ...]) -> dict[str, Any]:
    share, launch = fit(bound_ms, kernels, ms, half)
    ratio = predicted(bound_ms, kernels, share, launch) / ms
    others = [i for i in range(len(ms)) if i not in half]
    return {
        "fitted_on": list(half),
        "peak_share": share,
        "launch_us": launch,
        "ratio": [round(float(r), 3) for r in ratio],
        "worst_fitted": round(factor(ratio[list(half)]), 3),
        "worst_unseen": round(factor(ratio[others]), 3),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        nets = bundles(Path(name))
        rows = [edgekit.estimate(nets[f.net], target=f.target, precision=f.precision) for f in PUBLISHED]
    counts = {
        f.net: {"parameters": row["parameters"], "macs": row["macs"], "published": PUBLISHED_COUNTS[f.net]}
        for f, row in zip(PUBLISHED, rows, strict=True)
    }
    bound_ms, kernels, ms = (
        np.array([row["bound_ms"] for row in rows]),
        np.array([row["kernels"] for row in rows], float),
        np.array([f.ms for f in PUBLISHED]),
    )
    halves = [judge(bound_ms, kernels, ms, half) for half in itertools.combinations(range(len(PUBLISHED)), 4)]
    shipped = judge(bound_ms, kernels, ms, SHIPPED)
    swapped = judge(bound_ms, kernels, ms, tuple(i for i in range(len(PUBLISHED)) if i not in SHIPPED))
    unseen = sorted(half["worst_unseen"] for half in halves)
    figures = {
        "published": [
            {**f._asdict(), "bound_ms": r["bound_ms"], "kernels": r["kernels"], "predicted_ms": r["latency_ms"]}
            for f, r in zip(PUBLISHED, rows, strict=True)
        ],
        "nets": counts,
        "shipped": shipped,
        "swapped": swapped,
        "all_halves": {
            "count": len(halves),
            "within": sum(worst <= LIMIT for worst in unseen),
            "limit": LIMIT,
            "median_worst": unseen[len(unseen) // 2],
            "worst": unseen[-1],
            "beyond": [half for half in halves if half["worst_unseen"] > LIMIT],
        },
    }
    report(figures)
    print(save("estimate", figures))


def report(figures: dict[str, Any]) -> None:
    for index, row in enumerate(figures["published"]):
        ratios = f"{figures['shipped']['ratio'][index]:.2f}x  swapped {figures['swapped']['ratio'][index]:.2f}x"
        fitted = "fitted" if index in SHIPPED else "unseen"
        print(f"{row['net']:9} {row['target']:17} {row['precision']:5} {row['ms']:7.3f} ms  {fitted} {ratios}")
    for name in ("shipped", "swapped"):
        half = figures[name]
        print(f"{name}: share {half['peak_share']}, launch {half['launch_us']} us, worst unseen {half['worst_unseen']}x")
    found = figures["all_halves"]
    print(f"{found['within']} of {found['count']} halves within {LIMIT}x; worst {found['worst']}x")
    stated = (PEAK_SHARE.value, LAUNCH_US.value)
    if stated != (figures["shipped"]["peak_share"], figures["shipped"]["launch_us"]):
        print(f"edgekit/targets.py states {stated}: put the shipped fit there and run this again")


if __name__ == "__main__":
    main()
