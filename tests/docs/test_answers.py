"""What ``--json`` answers is what the reference says: every key is named there, and every key named there comes."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.cli import COMMANDS
from edgekit.data import load

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "docs/reference_pages.py")
assert _spec is not None
assert _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

#: B: a bundle of digits, G: its graph, I: a picture, D: data with labels, R: a root with two installs. In order, in one folder.
RUNS = [
    "data --data D --out data.png",
    "augment --data D --show sheet.png",
    "eval B --data D",
    "targets",
    "estimate B --target jetson-orin-nano",
    "compare B",
    "explain B I --out why",
    "report B --out report.html",
    "doctor",
    "quantize B --calib D --method minmax --samples 16 --out Q.edge",
    "import G --out F.edge --shape x:1x1x28x28",
    "build Q.edge --target rtx-ada",
    "inspect Q.edge",
    "inspect G",
    "bench B --seconds 0.1 --no-save",
    "bench B --seconds 0.1 --no-save --scenario offline",
    "bench B --seconds 0.1 --no-save --scenario server",
    "bench B Q.edge --seconds 0.1",
    "scan B --source I.png",
    "scan --check S.toml",
    "keygen --out K",
    "keygen --out K2",
    "pack B --out P.zip --key K/edgekit.key --release 1",
    "pack B2 --out P2.zip --key K/edgekit.key --release 2",
    "sign P.zip --key K2/edgekit.key",
    "verify P.zip --pub K/edgekit.pub",
    "install P.zip --root R --pub K/edgekit.pub",
    "install P2.zip --root R --pub K/edgekit.pub --rename",
    "status --root R",
    "rollback --root R",
    "revoke 3b0c44298fc1c149 --key K/edgekit.key --out revoked.txt",
]
#: What takes seconds, or what a scan has kept.
SLOW = {"train", "search", "pipeline", "prune", "harvest", "replay"}
#: Keys that only other models or options bring.
SOMETIMES = {
    "quantize": {"drop", "qat", "format", "stored"},
    "bench": {"profile", "streams", "int8", "passed_over"},
    "eval": {"int8", "passed_over"},
    "explain": {"int8", "passed_over"},
    "doctor": {*json.loads((ROOT / "benchmarks/results/chaos.json").read_text()), "report", "page", "key_id"} - {"edgekit"},
}


def named(text: str) -> set[str]:
    """The keys of an answer: what stands in ``backticks``, but not in parentheses, which tell what a key holds."""
    while (shorter := re.sub(r"\([^()]*\)", "", text)) != text:
        text = shorter
    return set(re.findall(r"``(\w+)``", text))


def test_answers_have_the_keys_that_the_reference_names(
    cli: Callable[..., Any],
    digits_bundle: Bundle,
    pictures_bundle: Bundle,
    few_digits: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load("digits").test.read(0)).save("I.png")
    Path("S.toml").write_text('[model]\nbundle = "Q.edge"\n[[source]]\naddress = "I.png"\n')
    given = {
        "B": str(digits_bundle.path),
        "B2": str(pictures_bundle.path),
        "D": few_digits,
        "I": "I.png",
        "G": str(digits_bundle.file(FLOAT_GRAPH)),
    }
    seen: dict[str, set[str]] = {}
    for line in RUNS:
        done = cli(*(given.get(word, word) for word in line.split()), "--json")
        seen.setdefault(line.split()[0], set()).update(done.json)
        assert done.code == 0, (line, done)
    for command, keys in seen.items():
        assert named(reference.answer_of(command)) - SOMETIMES.get(command, set()) == keys, command


def test_every_command_is_accounted_for() -> None:
    assert {line.split()[0] for line in RUNS} | SLOW == set(reference.ANSWERS)
    assert set(reference.ANSWERS) == set(COMMANDS)
    assert all(reference.answer_of(command) for command in {*COMMANDS} - {"targets"})
    assert "Returns" not in reference.commands_page()  # said as "With --json", and nowhere beside
