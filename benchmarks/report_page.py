"""How large a report is and how soon Chromium shows it. report_page.py [B ...]

Twelve bundles: those named, copied until there are twelve; without a name, digits trained for two epochs, pruned and
quantized, each evaluated (with samples of its confusions), benched with its layers, with an engine (without TensorRT-RTX a
kit); and 24 explanations of the quantized one. One page of all, opened many times in one headless Chromium, which is new at
the first:

- ``size_bytes`` of the file; ``written_s``: from the bundles, hashes checked, to the file.
- ``load_ms``: navigation to the end of the load event, by when all that is in sight is drawn; ``drawn_ms``: to the last chart
  of the page, which are drawn one by one; ``paint_ms``: first contentful paint.

Targets: 5 MB, 1 s, which the first opening has to reach. Writes ``results/report_page.json``.

Needs Chromium and the development environment (`pip install -e '.[dev]'`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from _machine import save
from PIL import Image

import edgekit
from edgekit.data import load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reporting"))
from conftest import Browser  # the tests' own: Chromium over a pipe

BUNDLES, OPENED, EXPLAINED = 12, 9, 24
MAX_BYTES, MAX_MS = 5_000_000, 1000
TIMES = """(() => {
  const [load] = performance.getEntriesByType("navigation"), [paint] = performance.getEntriesByName("first-contentful-paint");
  return [load.loadEventEnd, paint ? paint.startTime : null, performance.getEntriesByName("drawn")[0].startTime,
    document.querySelectorAll("canvas").length];
})()"""


def made(folder: Path) -> tuple[list[Path], Path]:
    """A float, a pruned and an int8 bundle with all that a report shows of them, and explanations of the last."""
    trained = edgekit.train(data="digits", out=folder / "float.edge", epochs=2)
    pruned = edgekit.prune(trained, out=folder / "pruned.edge", keep=0.5, epochs=1)
    small = edgekit.quantize(pruned, out=folder / "int8.edge")
    for bundle in (trained, pruned, small):
        edgekit.evaluate(bundle, "digits", save=True)
        edgekit.bench(bundle.path, layers=True)
        edgekit.build(bundle.path, target="rtx-ada" if find_spec("tensorrt_rtx") else "jetson-orin-nano", verbose=True)
    digits = load("digits").test
    (folder / "digits").mkdir()
    for i in range(EXPLAINED):
        Image.fromarray(digits.read(i)).save(folder / "digits" / f"{i}.png")
    edgekit.explain(small, folder / "digits", out=folder / "why")
    return [trained.path, pruned.path, small.path], folder / "why"


def opened(page: Path, folder: Path) -> list[list[Any]]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise SystemExit("this needs Chromium: apt-get install chromium")
    browser = Browser(executable, folder / "profile")
    try:
        found = []
        for _ in range(OPENED):
            browser.open(page)
            browser.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
            found.append(browser.evaluate(TIMES))
        return found
    finally:
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--explanations", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, explanations = (asked.bundles, asked.explanations) if asked.bundles else made(folder)
        copies = [folder / f"{sources[i % len(sources)].stem}-{i:02}.edge" for i in range(BUNDLES)]
        for i, copy in enumerate(copies):
            shutil.copytree(sources[i % len(sources)], copy)
        started = perf_counter()
        size = edgekit.report(copies, out=folder / "report.html", explanations=explanations)["size_bytes"]
        written = perf_counter() - started
        times = opened(folder / "report.html", folder)
    loads, paints, drawn = ([row[i] for row in times if row[i] is not None] for i in (0, 1, 2))
    figures: dict[str, Any] = {
        "bundles": BUNDLES,
        "of": [source.stem for source in sources],
        "size_bytes": size,
        "written_s": round(written, 2),
        "charts": times[0][3],
        "load_ms": {"first": round(loads[0]), "median": round(median(loads)), "slowest": round(max(loads))},
        "drawn_ms": round(median(drawn)),
        "paint_ms": round(median(paints)) if paints else None,
        "met": size <= MAX_BYTES and loads[0] <= MAX_MS,
    }
    print(figures)
    print(save("report_page", figures))


if __name__ == "__main__":
    main()
