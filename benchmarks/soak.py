"""Two million frames through a scan: does it grow? soak.py [--frames N]

A camera process gives 64x48 frames as fast as they are taken (`pattern:64x48@0`, queue ``wait``), so that shared memory,
sockets and their bookkeeping are in it.

1. ``frames``: model, codes, region, votes, duplicates, drift, self-test, harvest and incidents, into rotated JSON lines.
2. ``events``, a hundredth as many: also the ring, which writes every frame, and the outbox, which syncs every event, before
   an HTTP server in another process: what a frame costs here is the disk's time.

Twenty times a run: resident memory, threads, open files and children of this process, and the memory of the camera's.
Target: after the first twentieth memory grows by no more than 5 MB, threads and children do not, and files by the one that
is being written at the moment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import save
from model_overhead import DIGITS, write_bundle

from edgekit.scanner import Scanner

MOST_MB = 5.0
_SERVER = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
    def log_message(self, *args):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def resident_mb(pid: int | str = "self") -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def config(folder: Path, bundle: Path, frames: int, port: int = 0) -> dict[str, Any]:
    """With a ``port``, the ring and the sink behind the outbox too."""
    found: dict[str, Any] = {
        "model": {"bundle": str(bundle)},
        "codes": {"budget_ms": 0, "formats": ["Code 128"]},
        "region": {"top": 0.1},
        "source": [{"address": f"pattern:64x48@0,{frames}", "name": "dock", "queue": "wait"}],
        "votes": {},
        "duplicates": {},
        "drift": {},
        "selftest": {"every_s": 10},
        "harvest": {"folder": str(folder / "harvest"), "most_frames": 50},
        "incidents": {"folder": str(folder / "incidents"), "seconds": 1, "most_megabytes": 4, "most_files": 3, "on": ["drift"]},
        "sink": [{"address": f"jsonl:{folder}/events.jsonl?rotate=1M&keep=2"}],
    }
    if port:
        found["ring"] = {"folder": str(folder / "ring"), "keep": "both", "most_frames": 50}
        found["outbox"] = {"path": str(folder / "outbox.db")}
        found["sink"].append({"address": f"http://127.0.0.1:{port}/"})
    return found


def soak(scanner: Scanner, every: int) -> list[dict[str, float]]:
    """A row each ``every`` frames, as the model has read them."""
    rows: list[dict[str, float]] = []
    begun = time.monotonic()
    for event in scanner:
        if event.get("seq", 0) >= (len(rows) + 1) * every:
            cameras = children()
            rows.append(
                {
                    "frames": event["seq"],
                    "seconds": round(time.monotonic() - begun, 1),
                    "rss_mb": round(resident_mb(), 2),
                    "camera_rss_mb": round(max(map(resident_mb, cameras), default=0.0), 2),
                    "threads": len(os.listdir("/proc/self/task")),
                    "files": len(os.listdir("/proc/self/fd")),
                    "children": len(cameras),
                }
            )
            print(rows[-1], flush=True)
    return rows


def run(bundle: Path, folder: Path, frames: int, port: int = 0) -> dict[str, Any]:
    folder.mkdir()
    scanner = Scanner(config(folder, bundle, frames, port))
    rows = soak(scanner, frames // 20)
    summary = scanner.summary
    assert summary is not None
    first, last = rows[0], rows[-1]
    grown = {key: round(last[key] - first[key], 2) for key in ("rss_mb", "camera_rss_mb", "threads", "files", "children")}
    exact = summary.captured == frames == summary.inferred + sum(summary.dropped.values()) + summary.in_flight
    memory_met = max(grown["rss_mb"], grown["camera_rss_mb"]) <= MOST_MB
    met = memory_met and not grown["threads"] and not grown["children"] and grown["files"] <= 1
    return {"frames": frames, "grown": grown, "exact": exact, "met": met and exact, "events": summary.events, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2_000_000)
    frames: int = parser.parse_args().frames
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_bundle(folder / "digits.edge", DIGITS).path
        server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            runs = {
                "events": run(bundle, folder / "events", frames // 100, int(server.stdout.readline())),
                "frames": run(bundle, folder / "frames", frames),
            }
        finally:
            server.terminate()
    for what, row in runs.items():
        print(
            f"{what}: {row['frames']:,} frames, grown {row['grown']}, accounting exact {row['exact']}, target met {row['met']}"
        )
    print(f"written to {save('soak', runs)}")


if __name__ == "__main__":
    main()
