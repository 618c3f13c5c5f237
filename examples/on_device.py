"""edgekit inside an application: reads codes, opens a gate for those it knows. python on_device.py [SOURCE] [CODE...]"""

import sys

from edgekit.scanner import Scanner, stop_on_signals

source, known = (sys.argv[1:2] or ["pattern:320x240@30,90"])[0], set(sys.argv[2:])
config = {
    "codes": {"budget_ms": 50},
    "source": [{"address": source}],
    "duplicates": {"window_ms": 2000},
    "sink": [{"address": "jsonl:gate.jsonl"}],  # what is sent is on disk before the gate opens
}

with stop_on_signals() as stop:  # SIGTERM and Ctrl-C end the loop in order
    scanner = Scanner(config, stop=stop)
    for event in scanner:
        for code in event.get("codes", ()):
            print("open" if code["text"] in known else "keep shut", code["text"], flush=True)
    print(scanner.summary.line())
