"""Whether `cause` names rightly why a picture of `_code_scenes.unread` gives no read: no_reads.py [--each N] [--held-out]

A table of confusion over N pictures a cause that plain zxing-cpp does not read. "unclear" is never wrong: it names nothing.
``--held-out`` takes other seeds, for the end.
"""

from __future__ import annotations

import argparse
from collections import Counter

import zxingcpp
from _code_scenes import UNREAD, unread
from _machine import save

from edgekit.progress import track
from edgekit.scanner.steps.noread import cause


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=30)
    parser.add_argument("--held-out", action="store_true")
    options = parser.parse_args()
    first = 100_000 if options.held_out else 0
    table: dict[str, Counter[str]] = {}
    for why in track(list(UNREAD), "causes"):
        named = table.setdefault(why, Counter())
        for i in range(options.each):
            picture = unread(first + i, why)
            if not any(code.valid for code in zxingcpp.read_barcodes(picture)):
                named[cause(picture).cause] += 1
    for why, named in table.items():
        print(f"{why:16s} {sum(named.values()):3d} ", ", ".join(f"{each} {count}" for each, count in named.most_common()))
    known = {why: named for why, named in table.items() if why != "damaged"}
    total = sum(sum(named.values()) for named in known.values())
    right = sum(named[why] for why, named in known.items())
    wrong = sum(count for why, named in known.items() for each, count in named.items() if each not in (why, "unclear"))
    print(f"right {right / total:.0%}, wrong {wrong / total:.0%} of {total} with a cause that has a name")
    figures = {"right": right / total, "wrong": wrong / total, "held_out": options.held_out, "rows": table}
    print(f"written to {save('no_reads_held_out' if options.held_out else 'no_reads', figures)}")


if __name__ == "__main__":
    main()
