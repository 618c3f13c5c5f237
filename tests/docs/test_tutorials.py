"""The tutorials, run as they are printed: blocks in order, in a folder of their own; what a page shows was printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
_BLOCK = re.compile(r"(<!-- board -->\n+)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_FILE = re.compile(r"# ([\w.]+\.(?:py|toml))\n")


class Block(NamedTuple):
    """``board``: only a device can run it; the options in it are held to the commands by `test_documents`."""

    kind: str
    text: str
    board: bool


def blocks(page: Path) -> Iterator[Block]:
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Block(match[2], match[3], match[1] is not None)


def shows(expected: str, printed: str) -> bool:
    """Whether all of ``expected`` was printed in this order; ``...`` stands for anything, spaces count as one."""
    parts = [re.escape(" ".join(part.split())) for part in expected.split("...")]
    return re.search(".*?".join(parts), " ".join(printed.split())) is not None


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment whose ``edgekit`` and ``python3`` are the ones under test."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, arguments in (("edgekit", "-m edgekit"), ("python3", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "EDGEKIT": "edgekit"}


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page: Path, tmp_path: Path, shell: dict[str, str]) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("calibration", "deploy"):  # the pages that start in the repository's root
        (folder / name).symlink_to(ROOT / name)
    printed, ran = "", 0
    for block in blocks(page):
        if block.kind == "text":
            assert shows(block.text, printed), f"{page.name} shows\n{block.text}\nbut this was printed:\n{printed}"
        elif file := _FILE.match(block.text):
            (folder / file[1]).write_text(block.text, encoding="utf-8")
        elif not block.board:
            command = ["bash", "-eu", "-c", block.text] if block.kind == "sh" else [sys.executable, "-c", block.text]
            done = subprocess.run(
                command, cwd=folder, env=shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
            )
            printed, ran = done.stdout, ran + 1
            assert done.returncode == 0, f"{page.name}:\n{block.text}\n{printed}"
            assert "Traceback" not in printed
    assert ran


@pytest.mark.slow
def test_the_readme_leads_to_a_running_scanner(tmp_path: Path, shell: dict[str, str]) -> None:
    """Its block behind ``make demo``, on what the demo leaves: the shipped int8 model stands for the one that it trains."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From there to a running scanner")[2]
    commands = text.split("```")[1].replace("source .venv/bin/activate\n", "")
    shipped = f"{ROOT}/calibration/digits-depthwise"
    prepare = f"""
edgekit quantize {shipped}/float.edge --calib {shipped}/calibration.json --out runs/digits/depthwise-int8.edge
python3 -c "
from pathlib import Path
from PIL import Image
from edgekit.data import load
Path('runs/digits/images').mkdir()
for i in (0, 500): Image.fromarray(load('digits').test.read(i)).save(f'runs/digits/images/{{i}}.png')"
"""
    (tmp_path / "runs/digits").mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-eu", "-c", prepare + commands], cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert '"label":"0"' in done.stdout
    assert ", whole" in done.stdout
    assert (tmp_path / "events.db").exists()
    assert "[[source]]" in (tmp_path / "dock.toml").read_text(encoding="utf-8")
