"""Pictures whose decoder crashes, hangs or takes all memory: each costs itself, and the next one is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.errors import DataError
from edgekit.preprocess import read_image
from edgekit.scanner import Captured, open_source
from edgekit.scanner.sources import stills

#: What happens in the decoder's process, by the name of the file.
SABOTAGE = """
import os, sys, time
sys.path[:] = sys.argv[3:]
import edgekit.scanner.sources.stills as stills
decode = stills.decode_image
def decode_image(file, name, pixels):
    if name == "crash.png": os.abort()
    if name == "hang.png": time.sleep(600)
    if name == "grow.png": bytearray(1 << 50)
    if name == "killed.png": os.kill(os.getpid(), 9)
    if name == "odd.png": stills.Link.send = lambda *_: os.write(int(sys.argv[1]), b"{}")
    return decode(file, name, pixels)
stills.decode_image = decode_image
stills.main(int(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stills._DECODER.close()
    monkeypatch.setattr(stills, "_CHILD", SABOTAGE)
    yield stills._DECODER
    stills._DECODER.close()


def _picture(path: Path) -> Path:
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash.png", "crash.png: the process that decoded it crashed (signal 6)"),
        ("killed.png", "killed.png: the process that decoded it was killed (SIGKILL), as systems do where memory is short"),
        ("grow.png", "grow.png does not fit into memory; scale it down"),
        ("odd.png", "odd.png: the process that decodes it broke down"),
    ],
)
def test_a_picture_that_takes_its_decoder_with_it_costs_itself(tmp_path: Path, decoder: Any, name: str, reason: str) -> None:
    for each in ("a.png", name, "z.png"):
        _picture(tmp_path / each)
    found = {Path(item.source).name: item for item in open_source(str(tmp_path)) if isinstance(item, Captured)}
    assert len(found) == 3
    assert found[name].frame is None
    assert found[name].error.startswith(reason)
    for each in ("a.png", "z.png"):
        assert np.array_equal(found[each].frame, read_image(tmp_path / each)), found[each].error


def test_a_decoder_that_hangs_is_ended(tmp_path: Path, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stills.read_apart(_picture(tmp_path / "a.png"))  # the process is there
    process = decoder._process
    monkeypatch.setattr(stills, "LIMIT_S", 0.2)
    with pytest.raises(DataError, match=r"hang.png: it was not decoded within 0.2 s"):
        stills.read_apart(_picture(tmp_path / "hang.png"))
    assert process.returncode == -9
    monkeypatch.setattr(stills, "LIMIT_S", 30.0)
    assert stills.read_apart(tmp_path / "a.png").shape == (6, 10)


def test_a_decoder_goes_with_a_scan_that_is_killed(tmp_path: Path) -> None:
    path = _picture(tmp_path / "a.png")
    code = (
        "import sys, time; from pathlib import Path; from edgekit.scanner.sources import stills\n"
        "stills.read_apart(Path(sys.argv[1])); print(stills._DECODER._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as scan:
        assert scan.stdout is not None
        child = int(scan.stdout.readline())
        scan.kill()
    end = time.monotonic() + 5
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_after_a_fork_each_process_has_its_own(tmp_path: Path) -> None:
    path = _picture(tmp_path / "a.png")
    before = stills.read_apart(path)
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if np.array_equal(stills.read_apart(path), before) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(stills.read_apart(path), before)  # the child's end left ours alone


def test_a_fork_while_another_thread_decodes_does_not_wait_for_it(tmp_path: Path) -> None:
    path = _picture(tmp_path / "a.png")
    stills._LOCK.acquire()  # as that thread does
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        try:
            os._exit(0 if stills.read_apart(path).shape == (6, 10) else 1)
        finally:
            os._exit(2)
    stills._LOCK.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_decoder_that_went_between_two_pictures_costs_none(tmp_path: Path) -> None:
    """Where memory is short it is the first to go."""
    path = _picture(tmp_path / "a.png")
    before = stills.read_apart(path)
    process = stills._DECODER._process
    assert process is not None
    process.kill()
    process.wait()
    assert np.array_equal(stills.read_apart(path), before)


def test_no_process_stays_behind_a_scan(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    other = open_source(str(tmp_path))
    assert isinstance(next(source), Captured)
    assert isinstance(next(other), Captured)
    process = stills._DECODER._process
    assert process is not None
    assert list(source) == []
    assert process.poll() is None  # the other one may go on
    assert list(other) == []
    assert process.returncode is not None
    assert stills._DECODER._process is None
