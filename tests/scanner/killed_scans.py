"""Forks writers and kills each at a random moment: killed_scans.py FOLDER KILLS. Prints what was acknowledged, as JSON."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from edgekit.scanner import Outbox, open_sink
from edgekit.scanner.sinks.forward import ForwardSink


class Receiver:
    """In the network's place: a file that outlives the writer."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "received", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def deliver(self, event_id: str, event: bytes) -> None:
        os.write(self._file, f"{event_id} {len(event)}\n".encode())

    def close(self) -> None:
        os.close(self._file)


def write(folder: Path, life: int, acknowledged: int, count: int) -> None:
    """Three kinds of sinks as a scan has them. An id is acknowledged once all of them have taken the event."""
    outbox = Outbox(folder / "o.sqlite")
    sinks: list[Any] = [ForwardSink("s", Receiver(folder), outbox)]
    sinks.append(open_sink(f"jsonl:{folder}/events.jsonl?rotate=2K&keep=9999", lambda: outbox))
    sinks.append(open_sink(f"sqlite:{folder}/events.db", lambda: outbox))
    for i in range(count):
        event = {"schema": 1, "id": f"{life}-{i}", "source": "s", "seq": i, "time": "t", "text": "x" * random.randrange(300)}
        for sink in sinks:
            sink.send(event)
        os.write(acknowledged, f"{life}-{i}\n".encode())
    for sink in sinks:
        sink.flush()
        sink.close()
    outbox.close()


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(7)
    acknowledged: list[str] = []
    for life in range(kills + 1):
        last = life == kills  # lives to its end, and brings out what waits
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            write(folder, life, writing, 3 if last else 10**9)
            os._exit(0)
        os.close(writing)
        if not last:
            if life % 8:
                select.select([reading], [], [], 10.0)
            time.sleep(random.uniform(0.0, 0.02))
            os.kill(child, signal.SIGKILL)
        text = b""
        while block := os.read(reading, 1 << 16):
            text += block
        os.close(reading)
        os.waitpid(child, 0)
        acknowledged += text.decode().split()
    print(json.dumps({"kills": kills, "acknowledged": acknowledged}))  # noqa: T201


if __name__ == "__main__":
    main()
