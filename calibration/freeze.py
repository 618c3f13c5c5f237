#!/usr/bin/env python3
"""Freeze the calibration of a trained bundle, so that CI rebuilds its int8 graph and engine without training data.

    python calibration/freeze.py runs/digits/depthwise.edge calibration/digits-depthwise

The folder gets ``float.edge`` (the trained bundle without its PyTorch weights), ``calibration.json`` (which samples, and
the ranges they gave), ``model.int8.onnx.sha256`` (what the rebuilt graph must be) and ``README.md`` (which samples, and
why that many: measured here). ``tests/quantization/test_calibration_folders.py`` rebuilds every folder.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, GOLDEN, INT8_GRAPH, TOKENIZER, Bundle
from edgekit.errors import EdgekitError, OutputExists, UsageError
from edgekit.quantization import Calibration, quantize, read_calibration, rebuild
from edgekit.quantization.samples import training_data

SAMPLES = 256
COUNTS = (16, 64, 256)
SEEDS = (0, 1)

TEMPLATE = """\
# {name}

Frozen calibration of the preset `{model}`, trained on `{drawn.source}`. With it, CI rebuilds the same int8 graph,
bit for bit, and its engine, without training data:

```
edgekit quantize calibration/{name}/float.edge --out int8.edge --calib calibration/{name}/calibration.json
(cd int8.edge && sha256sum -c ../calibration/{name}/{graph}.sha256)
edgekit build int8.edge --target rtx-ada
```

## Which samples calibrate it

{count} samples of the **{drawn.split}** split, none of the test split, drawn with seed {drawn.seed}: each class is
shuffled, then the {classes} classes take turns, so that each has the same weight. `calibration.json` names every sample
with the sha256 of the tensor that the model saw. They gave the ranges, the weights and the method (`{calibration.method}` for
ranges, recovery `{calibration.recovery}`); the figures below are from other samples.

## Why that many

Measured by `calibration/freeze.py`: {draws} draws each, the SNR at the output on held-out train samples, and the lowest
top-1 of the draws on the test split (float: {top1_float:.2%}).

| samples | SNR dB, mean | from .. to | top-1 |
|---|---|---|---|
{sweep}

From {fewest} to {count} samples the mean changes by {gained:+.1f} dB.

## Figures of the frozen graph

- SNR {snr_db:.1f} dB on {measured_on}; {share:.1%} of the multiply-accumulates{outside} in int8
- top-1 on the test split {top1:.2%}, float {top1_float:.2%}
- {size_bytes} bytes, sha256 `{calibration.int8_graph}`
- most sensitive layer `{culprit[layer]}`: {culprit[why]}

Made by `python calibration/freeze.py BUNDLE calibration/{name}`.
"""


def freeze(source: Path, folder: Path, replace: bool) -> None:
    """Write the folder; on any error what was there stays."""
    if folder.exists() and not replace:
        raise OutputExists(folder)
    trained = Bundle.open(source)
    spec = training_data(trained)
    if spec is None:
        raise UsageError(f"{source} was not trained on a data set", "freeze what edgekit train or prune wrote")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        int8 = quantize(trained, out=work / "int8.edge", calib=spec, samples=SAMPLES)
        sweep = measure(trained, spec, work)
        float_bundle(trained, work / "float.edge", folder.name)
        shutil.copyfile(int8.file(CALIBRATION), work / CALIBRATION)
        calibration = read_calibration(work / CALIBRATION)
        rebuild((work / "float.edge" / FLOAT_GRAPH).read_bytes(), calibration)  # raises where the bytes differ
        (work / f"{INT8_GRAPH}.sha256").write_text(f"{calibration.int8_graph}  {INT8_GRAPH}\n")
        (work / "README.md").write_text(readme(folder, trained, int8, calibration, sweep))
        shutil.rmtree(int8.path)
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def float_bundle(trained: Bundle, out: Path, name: str) -> None:
    """The bundle without PyTorch weights; of its history's figures only plain numbers, no curves."""
    history = tuple(
        msgspec.structs.replace(
            entry, figures={k: v for k, v in entry.figures.items() if isinstance(v, int | float) and k != "seconds"}
        )
        for entry in trained.manifest.history
    )
    with Bundle.create(out) as draft:
        for file in (FLOAT_GRAPH, GOLDEN, TOKENIZER):
            if trained.has(file):
                shutil.copyfile(trained.file(file), draft.path / file)
        golden = {file: limit for file, limit in trained.manifest.golden.items() if file == FLOAT_GRAPH}
        draft.manifest = msgspec.structs.replace(trained.manifest, name=name, golden=golden, history=history)


def measure(trained: Bundle, spec: str, work: Path) -> list[dict[str, Any]]:
    """SNR on held-out samples and top-1 for several numbers of calibration samples and several draws."""
    rows = []
    for count in COUNTS:
        figures = []
        for seed in SEEDS:
            out = work / "trial.edge"
            entry = quantize(trained, out=out, calib=spec, samples=count, seed=seed).last("quantize")
            assert entry is not None
            figures.append(entry.figures)
            shutil.rmtree(out)
        snr = [row["snr_db"] for row in figures]
        row = {"samples": count, "snr": statistics.mean(snr), "low": min(snr), "high": max(snr)}
        rows.append(row | {"top1": min(row["top1"] for row in figures)})
    return rows


def readme(folder: Path, trained: Bundle, int8: Bundle, calibration: Calibration, sweep: list[dict[str, Any]]) -> str:
    entry = int8.last("quantize")
    assert entry is not None
    figures, drawn = entry.figures, calibration.samples
    usual = next(row for row in sweep if row["samples"] == SAMPLES)
    return TEMPLATE.format(
        name=folder.name,
        model=trained.manifest.model.name if trained.manifest.model else trained.manifest.name,
        drawn=drawn,
        count=len(drawn.ids),
        classes=len(trained.manifest.labels),
        calibration=calibration,
        graph=INT8_GRAPH,
        draws=len(SEEDS),
        sweep="\n".join("| {samples} | {snr:.1f} | {low:.1f} .. {high:.1f} | {top1:.2%} |".format(**row) for row in sweep),
        fewest=sweep[0]["samples"],
        outside=" outside of LSTM, GRU and RNN" if figures["recurrent"] else "",
        gained=usual["snr"] - sweep[0]["snr"],
        **{"top1": float("nan"), "top1_float": float("nan"), **figures},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a trained bundle")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--replace", action="store_true", help="replace a folder that is there")
    options = parser.parse_args()
    try:
        freeze(options.bundle, options.folder, options.replace)
    except EdgekitError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
