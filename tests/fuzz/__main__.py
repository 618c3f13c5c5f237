"""``python -m tests.fuzz TARGET --minutes 10 --seed 0``: run one target for long; ``--input FILE`` runs one input again.

The fuzzing happens in a process below, which a crash of native code or a hang may end: the input that it had is then kept, and
it is started again. Coverage guides it where atheris is installed; without, mutations are drawn from the corpus alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
MOST = 1 << 20  # bytes of an input that a lost process leaves behind
HUNG_S = 90.0


class Shared:
    """What the process below was at: a file that both map, so that it outlives a crash."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(MOST + 16))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)

    def begin(self, data: bytes) -> None:
        self.map[8 : 16 + len(data[:MOST])] = len(data[:MOST]).to_bytes(8, "little") + data[:MOST]
        self.map[:8] = (self.count + 1).to_bytes(8, "little")

    @property
    def count(self) -> int:
        return int.from_bytes(self.map[:8], "little")

    @property
    def data(self) -> bytes:
        return self.map[16 : 16 + int.from_bytes(self.map[8:16], "little")]


def _command(name: str, path: Path) -> str:
    return f"python -m tests.fuzz {name} --input {shlex.quote(str(path))}"


def _keep(folder: Path, name: str, data: bytes, what: str, trace: str = "") -> None:
    """An input that broke a rule; one file for each way."""
    import hashlib

    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "findings.json"
    known: dict[str, dict[str, Any]] = json.loads(said.read_text()) if said.exists() else {}
    way = what.split(": ")[0] + what[what.rfind("(") :]
    if way in known:
        known[way]["times"] += 1
    else:
        path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        known[way] = {"what": what, "file": path.name, "times": 1, "command": _command(name, path), "trace": trace[-2500:]}
        print(f"{name}: {what}\n  {_command(name, path)}", flush=True)
    said.write_text(json.dumps(known, indent=1))


def _worker(name: str, seconds: float, seed: int, folder: Path, engine: str) -> None:
    """Run inputs until the time is over."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["edgekit"]):
            from tests.fuzz import targets  # noqa: F401
    from tests.fuzz import harness, mutate
    from tests.fuzz import targets as _targets  # noqa: F401

    one, shared = harness.TARGETS[name], Shared(folder / "shared")
    corpus = harness.corpus_of(name)
    for data in corpus:  # what is loaded on first use is loaded
        harness.run_one(one, data)
    if not one.programs:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + harness.MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  what the product says of each

    def run(data: bytes) -> None:
        shared.begin(data)
        if found := harness.run_one(one, data):
            _keep(folder, name, data, found.what, found.trace)

    if engine == "atheris":
        units = folder / "units"
        units.mkdir(exist_ok=True)
        for number, data in enumerate(corpus):
            (units / f"seed-{number}").write_bytes(data)

        def custom(data: bytes, most: int, number: int) -> bytes:
            rng = random.Random(number)
            if rng.random() < 0.3:
                return bytes(atheris.Mutate(data, most))
            return mutate.mutated(one.kind, rng, data, corpus, one.words)[:most]

        options = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", f"-max_len={mutate.MOST_BYTES}"]
        options += ["-timeout=0", "-rss_limit_mb=0", "-detect_leaks=0", "-print_final_stats=1", "-reload=0"]
        options += [f"-handle_{each}=0" for each in ("segv", "bus", "abrt", "ill", "fpe", "int", "term")]
        atheris.Setup([sys.argv[0], *options, str(units)], run, custom_mutator=custom)
        atheris.Fuzz()
        return
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        run(mutate.mutated(one.kind, rng, rng.choice(corpus), corpus, one.words))


def _fuzz(name: str, minutes: float, seed: int, engine: str, folder: Path) -> dict[str, Any]:
    begun, lost = time.monotonic(), 0
    shared = Shared(folder / "shared")
    while (left := minutes * 60 - (time.monotonic() - begun)) > 1:
        words = [sys.executable, "-m", "tests.fuzz", name, "--worker", str(left), "--seed", str(seed + lost)]
        process = subprocess.Popen(
            [*words, "--engine", engine, "--out", str(folder)], cwd=ROOT, stdout=None, stderr=subprocess.DEVNULL
        )
        count, since = shared.count, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if shared.count != count:
                count, since = shared.count, time.monotonic()
            elif time.monotonic() - since > HUNG_S:
                _keep(folder, name, shared.data, f"Hang: {HUNG_S:g} s in native code (killed)")
                process.kill()
                process.wait()
        if process.returncode and minutes * 60 - (time.monotonic() - begun) > 1:
            _keep(folder, name, shared.data, f"Lost: the process ended with {process.returncode} (native)")
            lost += 1
            if lost > 200:
                break
    wall = time.monotonic() - begun
    said = folder / "findings.json"
    found = json.loads(said.read_text()) if said.exists() else {}
    return {
        "minutes": round(wall / 60, 2),
        "executions": shared.count,
        "executions_per_s": round(shared.count / wall, 1),
        "engine": engine,
        "seed": seed,
        "findings": [{key: each[key] for key in ("what", "file", "times")} for each in found.values()],
    }


def _save(file: Path, name: str, figures: dict[str, Any]) -> None:
    """Beside those of the other targets, with the machine."""
    from edgekit.benchmarking.device import fingerprint
    from edgekit.files import atomic_write, locked

    versions = {
        each: getattr(importlib.import_module(each), "__version__", "") for each in ("numpy", "onnx", "PIL", "tokenizers")
    }
    if figures["engine"] == "atheris":
        versions["atheris"] = importlib.import_module("importlib.metadata").version("atheris")
    with locked(file.parent):
        known = json.loads(file.read_text()) if file.exists() else {"targets": {}}
        known["targets"][name] = {**figures, "date": time.strftime("%Y-%m-%d", time.gmtime())}
        known["targets"] = dict(sorted(known["targets"].items()))
        known["versions"], known["machine"] = versions, fingerprint()
        atomic_write(file, json.dumps(known, indent=1).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("atheris", "seeded"))
    parser.add_argument("--input", type=Path, help="run this file once, with a traceback")
    parser.add_argument("--out", type=Path, help="where findings go; by default a new folder of /tmp")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=RESULTS, help="note the figures, by default in benchmarks/results/fuzz.json"
    )
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    engine = asked.engine or ("atheris" if importlib.util.find_spec("atheris") else "seeded")
    if asked.worker:
        return _worker(asked.target, asked.worker, asked.seed, asked.out, engine)
    from tests.fuzz import targets  # noqa: F401
    from tests.fuzz.harness import TARGETS, run_one

    if asked.target not in TARGETS:
        parser.error(f"targets are: {', '.join(TARGETS)}")
    if asked.input:
        found = run_one(TARGETS[asked.target], asked.input.read_bytes())
        sys.exit(f"{found.trace}\n{found.what}" if found else None)
    folder = asked.out or Path(tempfile.mkdtemp(prefix=f"edgekit-fuzz-{asked.target}-"))
    folder.mkdir(parents=True, exist_ok=True)
    figures = _fuzz(asked.target, asked.minutes, asked.seed, engine, folder)
    if asked.save:
        _save(asked.save, asked.target, figures)
    print(json.dumps({asked.target: figures}), flush=True)
    sys.exit(1 if figures["findings"] else 0)


if __name__ == "__main__":
    main()
