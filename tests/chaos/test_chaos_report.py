"""`edgekit doctor --chaos`: the report, its signature, what it touches, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.chaos import check_report, report, run_cases, write_report
from edgekit.chaos import run as module
from edgekit.deployment import install, keygen, pack
from edgekit.errors import DataError, SignatureError, UsageError


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_signed_report_of_the_users_own_bundle_and_root(cli: Any, tmp_path: Path, tiny_bundle: Bundle) -> None:
    root, work = tmp_path / "root", tmp_path / "work"
    install(pack(tiny_bundle, out=tmp_path / "p.zip"), root=root, unsigned=True)
    before = contents(root) | contents(tiny_bundle.path)
    keys = keygen(tmp_path / "keys")
    out = tmp_path / "report.json"
    options = ["--chaos", "--quick", "--only", "golden-fails", "--only", "slot-damaged", "--root", root, "--work", work]
    done = cli("doctor", tiny_bundle.path, *options, "--out", out, "--key", keys["key"], "--json")
    assert done.code == 0, done.err
    assert done.json["key_id"] == keys["key_id"]
    assert [row["outcome"] for row in done.json["cases"]] == ["passed", "passed"]
    assert contents(root) | contents(tiny_bundle.path) == before
    assert list(work.iterdir()) == []
    checked = cli("verify", out, "--pub", keys["pub"], "--json")
    assert checked.code == 0
    assert checked.json["verified"] is True
    assert checked.json["bundle"]["digest"] == tiny_bundle.digest
    assert checked.json["machine"]["kernel"]
    assert checked.json["work"]["filesystem"] != "unknown"
    page = out.with_suffix(".html").read_text()
    assert hashlib.sha256(out.read_bytes()).hexdigest() in page
    assert "2 passed, 0 failed, 0 not run" in page
    again = cli("doctor", "--chaos", "--out", out)
    assert again.code == 2
    assert "not overwritten" in again.err


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    """What a run found that has nothing in it but words that try to leave their place."""
    row = {"name": "x", "group": "scan", "done": "d", "holds": "h", "rounds": 1, "seconds": 0.1, "figures": {"<b>": "<i>"}}
    bad = {**row, "outcome": "failed", "reason": "<script>alert(1)</script>"}
    counts = {"passed": 0, "failed": 1, "not_run": 0, "complete": True}
    about = {"started": "t", "ended": "t", "options": {}, "bundle": None, "root": None}
    return {**about, **counts, "work": {"folder": "<u>", "device": "d", "filesystem": "f", "free_bytes": 1}, "cases": [bad]}


def test_one_bit_of_a_signed_report_is_one_too_many(tmp_path: Path, found: dict[str, Any]) -> None:
    keys, other = keygen(tmp_path / "keys"), keygen(tmp_path / "other")
    path = tmp_path / "r.json"
    written = write_report(found, path, keys["key"])
    assert check_report(path, keys["pub"])["failed"] == 1
    assert written["key_id"] == keys["key_id"]
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(SignatureError):
            check_report(path, keys["pub"])
    path.write_bytes(data)
    with pytest.raises(SignatureError, match="report"):
        check_report(path, other["pub"])
    write_report(found, unsigned := tmp_path / "u.json")
    assert json.loads(unsigned.read_text())["failed"] == 1
    with pytest.raises(SignatureError, match="the report is not signed"):
        check_report(unsigned, keys["pub"])


def test_a_page_shows_words_and_runs_none(tmp_path: Path, found: dict[str, Any]) -> None:
    write_report(found, tmp_path / "r.json")
    page = (tmp_path / "r.html").read_text()
    for tag in ("<script", "<u>", "<i>"):
        assert tag not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page  # self-contained


def test_what_is_signed_and_no_report_is_said(tmp_path: Path) -> None:
    keys = keygen(tmp_path / "keys")
    signed = tmp_path / "s.json"
    forged, key_id = report._signed(b'{\n "format": "edgekit-chaos-report"}\n', keys["key"])
    assert key_id == keys["key_id"]
    signed.write_bytes(forged)
    with pytest.raises(DataError, match="no report"):
        check_report(signed, keys["pub"])


def test_a_case_that_does_not_end_and_one_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    """Without mosquitto in the path; and with no time at all for another one."""
    monkeypatch.setattr(module, "_GRACE_S", 0.3)
    found = run_cases(work=tmp_path, only=["camera-slow"], minutes=0.001)
    (row,) = found["cases"]
    assert row["outcome"] == "failed"
    assert "did not end within" in row["reason"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text("import shutil\nshutil.which = lambda *a, **b: None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")]))
    options = ["--chaos", "--quick", "--only", "broker-flaps", "--only", "pack-foreign", "--work", tmp_path / "work"]
    done = cli("doctor", *options, "--require-all", "--out", tmp_path / "r.json", "--json")
    assert (done.code, done.json["passed"], done.json["not_run"]) == (3, 1, 1)
    assert "mosquitto is not installed" in done.json["hint"]


def test_ctrl_c_ends_in_order_and_says_what_was_done(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from edgekit.cli import main; main()"
    options = ["--chaos", "--quick", "--only", "bundle-damaged", "--only", "camera-slow", "--out", tmp_path / "r.json"]
    command = [sys.executable, "-c", code, "doctor", *options, "--work", tmp_path / "work"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30
        while not list(tmp_path.glob("work/edgekit-chaos-*/case/events.jsonl")):  # the second case: that of the camera
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert "interrupted; 0 passed, 0 failed, 2 not run" in out or "interrupted; 1 passed, 0 failed, 1 not run" in out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["complete"] is False
    assert list((tmp_path / "work").iterdir()) == []


def test_wrong_words_are_said_before_anything_runs(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args, code, words in (
        (("--chaos", "--only", "nothing"), 2, "there is no case 'nothing'"),
        (("--chaos", "--minutes", "-1"), 2, "give minutes above 0"),
        (("--chaos", "--key", "none.key"), 1, "there is no key file"),
        (("--chaos", "--root", "none"), 2, "there is no folder"),
        (("none.edge", "--chaos"), 1, "there is no bundle"),
        (("--quick",), 2, "belong to --chaos"),
    ):
        done = cli("doctor", *args)
        assert (done.code, words in done.err) == (code, True), done.err
    assert [p.name for p in tmp_path.iterdir() if p.suffix] == []
    with pytest.raises(UsageError):
        run_cases(only=["nothing"])
    shown = cli("doctor", "--chaos", "--list", "--json").json["cases"]
    assert {row["group"] for row in shown} == {"scan", "update"}
    assert all(row["done"] and row["holds"] for row in shown)


def test_two_runs_that_chose_one_name_keep_both_reports(tmp_path: Path, found: dict[str, Any]) -> None:
    """Where the report goes is chosen before the run; another may have taken the name by its end."""
    path = report.report_place(tmp_path / "r.json")
    first = write_report(found, path)
    second = write_report({**found, "failed": 2}, path)
    assert [Path(each["report"]).name for each in (first, second)] == ["r.json", "r-2.json"]
    assert [json.loads(Path(each["report"]).read_text())["failed"] for each in (first, second)] == [1, 2]
    for each in (first, second):
        assert hashlib.sha256(Path(each["report"]).read_bytes()).hexdigest() in Path(each["page"]).read_text()


def test_sigterm_leaves_a_signed_report_that_says_it_is_partial(cli: Any, tmp_path: Path) -> None:
    keys = keygen(tmp_path / "keys")
    options = ["--chaos", "--quick", "--only", "camera-slow", "--only", "pack-foreign", "--out", tmp_path / "r.json"]
    code = "from edgekit.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", *options, "--key", keys["key"], "--work", tmp_path / "work"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30
        while not list(tmp_path.glob("work/edgekit-chaos-*/case/events.jsonl")):
            assert time.monotonic() < end
            time.sleep(0.02)
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    checked = cli("verify", tmp_path / "r.json", "--pub", keys["pub"])
    assert checked.code == 0, checked.err
    # The first may have ended by then: what a case has said counts.
    assert re.search("it is partial, cut off by SIGTERM; not run: (camera-slow, )?pack-foreign", checked.out)
    assert "partial: cut off by SIGTERM" in (tmp_path / "r.html").read_text()
    assert list((tmp_path / "work").iterdir()) == []


def test_without_a_backend_doctor_works_and_chaos_says_what_it_needs(tmp_path: Path) -> None:
    """A finder that knows no backend stands for an install without one."""
    code = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
true = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("onnxruntime", "tensorrt", "tensorrt_rtx") else true(name, *a)
from edgekit.cli import main; main()
"""
    command = [sys.executable, "-c", code, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install 'edgekit[runtime]'" in done.stdout
    done = subprocess.run([*command, "--chaos"], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert "no backend for one is installed" in done.stderr
    assert list(tmp_path.iterdir()) == []
