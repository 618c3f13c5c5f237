"""Bad pictures of codes: plain zxing-cpp beside `CodeReader`, 100 and 300 ms: codes.py [--each N] [--held-out] [--photographs]

Every format of `_code_scenes` N times under every condition, and pictures without a code, on which any read is wrong. The
plain column is `CodeReader(0)`: one call of zxing-cpp with its defaults. ``--held-out`` takes other seeds, for the end. The
budget is wall time: run it on an idle machine. It counts what follows the plain pass.
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import numpy as np
from _code_scenes import CONDITIONS, FORMATS, PLAIN, Scene, degraded, photograph, scene, without_code
from _machine import save

from edgekit.progress import track
from edgekit.scanner import CodeReader

BUDGETS = {"plain": 0.0, "100 ms": 100.0, "300 ms": 300.0}


def row(reader: CodeReader, scenes: list[Scene], pictures: list[Any]) -> dict[str, float]:
    read = wrong = 0
    taken = []
    for one, picture in zip(scenes, pictures, strict=True):
        start = perf_counter()
        found = {code.text for code in reader(picture)}
        taken.append((perf_counter() - start) * 1e3)
        read += bool(found & one.texts)
        wrong += bool(found - one.texts)
    p50, p99 = (round(float(np.percentile(taken, q)), 1) for q in (50, 99))
    return {"read": read, "wrong": wrong, "p50_ms": p50, "p99_ms": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--photographs", action="store_true", help="0.5 to 4 megapixels instead of 0.3")
    options = parser.parse_args()
    first = 100_000 if options.held_out else 0
    taken = photograph if options.photographs else scene
    scenes = [taken(first + i, kind) for i in range(options.each) for kind in FORMATS]
    readers = {name: CodeReader(budget) for name, budget in BUDGETS.items()}
    rows: dict[str, Any] = {}
    for condition in track(list(CONDITIONS), "conditions"):
        pictures = [degraded(one, condition, first + i) for i, one in enumerate(scenes)]
        rows[condition] = {name: row(reader, scenes, pictures) for name, reader in readers.items()}
    empty = [without_code(first + i) for i in range(10 * options.each)]
    rows["no code"] = {name: row(reader, empty, [one.picture for one in empty]) for name, reader in readers.items()}
    for condition, columns in rows.items():
        print(
            f"{condition:20s}",
            "  ".join(
                f"{n}: {c['read']:3d} ({c['wrong']} wrong) {c['p50_ms']:.0f}/{c['p99_ms']:.0f} ms" for n, c in columns.items()
            ),
        )
    name = "codes" + "_photographs" * options.photographs + "_held_out" * options.held_out
    count = {"pictures a condition": len(scenes), "named": list(PLAIN), "held_out": options.held_out}
    print(f"written to {save(name, {'rows': rows, **count})}")


if __name__ == "__main__":
    main()
