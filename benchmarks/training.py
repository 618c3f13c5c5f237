"""What the presets reach: top-1, or the character error rate of readers, on splits that training never saw.

    python benchmarks/training.py [--rows digits-vit watch-gru ...] [--seeds 7] [--out runs/training] [--groceries FOLDER]

A row trains with the defaults of its preset (minutes each; `groceries` half an hour and more) and is judged through the
runtime on the held-out split. Nothing is chosen by that split: no early stopping, the last epoch's weights. Rows that are
done are kept in `results/training.json`; name a row to run it again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from _machine import RESULTS, machine

import edgekit
from edgekit.files import atomic_write

#: row -> (data, options of train, data to judge on, key, goal, highest number of parameters)
ROWS: dict[str, tuple[str, dict[str, Any], list[str], str, float, int | None]] = {
    "digits-depthwise": ("digits", {}, ["digits"], "top1", 0.990, 60_000),
    "digits-vit": ("digits", {"model": "vit"}, ["digits"], "top1", 0.975, 300_000),
    "digits-gru-rows": ("digits", {"model": "gru-rows"}, ["digits"], "top1", 0.980, 100_000),
    "digits-lstm-rows": ("digits", {"model": "lstm-rows"}, ["digits"], "top1", 0.980, 100_000),
    "groceries": ("folder:{groceries}", {}, ["folder:{groceries}"], "top1", 0.78, 500_000),
    "spam-lstm": ("spam", {"model": "lstm-text"}, ["spam"], "top1", 0.985, None),
    "spam-transformer": ("spam", {"model": "transformer-text"}, ["spam"], "top1", 0.985, None),
    "spam-minilm": ("spam", {"model": "hf:{minilm}"}, ["spam"], "top1", 0.990, None),
    "watch-gru": ("watch", {}, ["watch"], "top1", 0.85, None),
    "labels-clean": ("labels", {}, ["labels:lines,clean"], "cer", 0.01, 2_000_000),
    "labels-degraded": ("labels", {}, ["labels:lines,degraded"], "cer", 0.04, 2_000_000),
}
FILE = RESULTS / "training.json"


def one(row: str, seed: int, out: Path, places: dict[str, str], trained: set[Path]) -> dict[str, Any]:
    """Train (or take what an earlier row of this run trained) and judge."""
    data, options, judged_on, key, goal, most = ROWS[row]
    options = {k: v.format(**places) if isinstance(v, str) else v for k, v in options.items()}
    target = out / f"{row.removesuffix('-clean').removesuffix('-degraded')}-{seed}.edge"
    if target not in trained:
        shutil.rmtree(target, ignore_errors=True)
        edgekit.train(data=data.format(**places), out=target, seed=seed, **options)
        trained.add(target)
    entry = edgekit.Bundle.open(target).last("train")
    assert entry is not None
    found = edgekit.evaluate(target, judged_on[0].format(**places))
    value, parameters = found[key], entry.figures["parameters"]
    met = (value <= goal if key == "cer" else value >= goal) and (most is None or parameters <= most)
    return {
        "seed": seed,
        key: value,
        **({"macro_f1": found["macro_f1"]} if "macro_f1" in found else {"lines_right": found["top1"]}),
        "goal": goal,
        "met": met,
        "samples": found["samples"],
        "parameters": parameters,
        "macs": entry.figures["macs"],
        "epochs": entry.config["epochs"],
        "seconds": entry.figures["seconds"],
        "edgekit": entry.edgekit,
        "date": entry.time[:10],
        "load": machine()["load_1min"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    parser.add_argument("--groceries", default="../shared/data/groceries", help="Folder with train/ and val/.")
    parser.add_argument("--minilm", default="", help="Folder of a Hugging Face checkpoint of MiniLM.")
    options = parser.parse_args()
    known = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
    trained: set[Path] = set()
    places = {"groceries": options.groceries, "minilm": options.minilm}
    for row in options.rows or [row for row in ROWS if row not in known]:
        for seed in options.seeds:
            found = one(row, seed, options.out, places, trained)
            known[row] = [r for r in known.get(row, []) if r["seed"] != seed] + [found]
            key = ROWS[row][3]
            print(
                f"{row}, seed {seed}: {key} {found[key]:.2%}, goal {found['goal']:.1%}: {'met' if found['met'] else 'missed'}"
            )
            text = json.dumps({"rows": known, "machine": machine()}, indent=1, allow_nan=False)
            atomic_write(FILE, text.encode() + b"\n")


if __name__ == "__main__":
    main()
