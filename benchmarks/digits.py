"""The digits from training to int8, by the built-in recipe: top-1, multiply-accumulates, parameters, size.

    python benchmarks/digits.py [--seeds 7 8 9] [--out runs]

Each seed trains, prunes, fine-tunes and quantizes anew (minutes); finished stages of an earlier run are kept. The recipe
itself uses seed 7. Targets: depthwise float >= 98.8% on the 1,000 held-out digits; after pruning to <= 50% of the
multiply-accumulates and int8 a drop of <= 0.5 points.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from _machine import save

from edgekit.bundle import Bundle
from edgekit.pipeline import BUILT_IN, pipeline


def one(seed: int, out: Path) -> dict[str, object]:
    """Run the recipe with ``seed``; figures of its bundles."""
    folder = out / ("digits" if seed == 7 else f"digits-seed{seed}")
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / f"digits-seed{seed}.toml"
    recipe.write_text(re.sub(r"(?m)^seed = .*$", f"seed = {seed}", BUILT_IN.read_text()))
    answer = pipeline(recipe, out=folder)
    top1 = {row["stage"].split()[-1]: row["top1"] for row in answer["table"]}
    entry = Bundle.open(folder / "depthwise-half.edge").last("prune")
    assert entry is not None
    pruned = entry.figures
    return {
        "seed": seed,
        "top1": top1,
        "drop_points": (top1["depthwise"] - top1["depthwise-int8"]) * 100,
        "macs_share": pruned["macs_share"],
        "speedup_float": pruned["speedup"],
        "table": answer["table"],
        "seconds": {row["stage"]: row["seconds"] for row in answer["stages"] if row["how"] == "run"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    rows = [one(seed, options.out) for seed in options.seeds]
    for row in rows:
        print(f"seed {row['seed']}: {row['top1']}, drop {row['drop_points']:.2f}, {row['macs_share']:.1%} of the MACs")
    met = all(
        row["top1"]["depthwise"] >= 0.988 and row["macs_share"] <= 0.5 and row["drop_points"] <= 0.5 + 1e-9  # type: ignore[index,operator]
        for row in rows
    )
    print("targets met" if met else "targets missed")
    save("digits", {"targets_met": met, "runs": rows})


if __name__ == "__main__":
    main()
