"""``edgekit scan`` as its users see it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgekit.bundle import Bundle

Cli = Callable[..., Any]

FIELDS = {"schema", "id", "source", "seq", "time", "label", "score", "latency_ms"}


def test_events_have_the_stated_fields_and_a_broken_picture_has_no_label(
    kit: Any, cli: Cli, digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "events.jsonl"
    outcome = cli("scan", digits_bundle.path, "--source", pictures, "--sink", f"jsonl:{out}")
    assert outcome.code == 0
    events = kit.read_events(out)
    labelled = [event for event in events if "label" in event]
    assert [set(event) for event in labelled] == [FIELDS] * 3
    assert [event["seq"] for event in events] == [0, 1, 2, 3]
    assert len({event["id"] for event in events}) == 4
    for event in labelled:
        assert event["schema"] == 1
        assert 0 <= event["score"] <= 1
        assert event["latency_ms"] > 0
        assert event["label"] in digits_bundle.manifest.labels
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
        assert Path(event["source"]).parent == pictures
    (damaged,) = [event for event in events if "label" not in event]
    assert damaged["event"] == "damaged"
    assert "broken.png" in damaged["reason"]


def test_without_a_sink_stdout_is_one_json_line_an_event(cli: Cli, digits_bundle: Bundle, pictures: Path) -> None:
    outcome = cli("scan", digits_bundle.path, "--source", pictures)
    assert outcome.code == 0
    assert [json.loads(line)["seq"] for line in outcome.out.splitlines()] == [0, 1, 2, 3]
    assert "4 captured, 3 read" in outcome.err


def test_a_json_log_is_json_to_its_end(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    config = tmp_path / "scan.toml"
    tables = '[codes]\nbudget_ms = 0\n[log]\nformat = "json"\n[[source]]\naddress = "{}"\n'
    config.write_text(tables.format(pictures))
    done = cli("scan", config)
    assert done.code == 0
    assert [json.loads(line)["seq"] for line in done.out.splitlines()] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert [line["life"] for line in lines] == ["starting", "ready", "ended"]
    assert (lines[-1]["captured"], lines[-1]["kpis"]["triggers"]) == (4, 3)
    config.write_text(tables.format(tmp_path / "nowhere"))
    done = cli("scan", config)
    assert done.code == 1
    last = [json.loads(line) for line in done.err.splitlines()][-1]
    assert (last["life"], last["level"]) == ("failed", "error")
    assert "nowhere" in last["message"]
    assert "--source" in last["hint"]


def test_json_summary_is_the_only_thing_on_stdout(
    kit: Any, cli: Cli, digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "events.jsonl"
    summary = cli("scan", digits_bundle.path, "--codes", "--source", pictures, "--sink", f"jsonl:{out}", "--json").json
    assert summary["captured"] == 4
    assert summary["inferred"] == 3
    assert summary["dropped"] == {"damaged": 1}
    assert summary["events"] == len(kit.read_events(out)) == 4
    assert summary["codes"] == 0
    assert summary["sinks"] == [{"sink": f"jsonl:{out}", "sent": 4, "unsaved": 0, "dropped": {}}]
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p99"]
    clash = cli("scan", digits_bundle.path, "--source", pictures, "--sink", "jsonl:-", "--json")
    assert clash.code == 2


def test_only_damaged_pictures_exit_1_with_the_summary(cli: Cli, digits_bundle: Bundle, pictures: Path) -> None:
    outcome = cli("scan", digits_bundle.path, "--source", pictures / "broken.png", "--json")
    assert outcome.code == 1
    assert outcome.json["dropped"] == {"damaged": 1}
    assert "not one" in outcome.json["error"]
    assert "error: not one" in outcome.err
    assert cli("scan", digits_bundle.path, "--source", pictures / "broken.png").code == 1


def test_codes_without_a_bundle(kit: Any, cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "étikett ✓.png"
    Image.fromarray(kit.code_picture("ABC-123", "Code128")).save(picture)
    outcome = cli("scan", "--codes", "--source", picture)
    event = json.loads(outcome.out)
    assert event["source"] == str(picture)
    (code,) = event["codes"]
    assert len(code.pop("position")) == 4
    assert code == {"text": "ABC-123", "format": "Code 128"}
    assert "label" not in event
    assert "score" not in event


def test_odd_pictures_are_read_or_reported(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    (folder / "sub").mkdir(parents=True)
    Image.new("L", (1, 1)).save(folder / "1x1.png")
    Image.new("RGBA", (20000, 2)).save(folder / "sub" / "long.png")
    (folder / "empty.jpg").touch()
    (folder / "bomb.png").write_bytes(bomb(60_000, 60_000))
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    outcome = cli("scan", digits_bundle.path, "--codes", "--source", folder, "--json")
    assert outcome.json["inferred"] == 2
    assert outcome.json["dropped"] == {"damaged": 2}
    assert outcome.code == 0


def test_a_damaged_file_whose_name_is_no_utf8_is_an_event(kit: Any, cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    """It once ended the scan: the reason held bytes that JSON does not take."""
    folder = tmp_path / "odd"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(b"broken")
    Image.new("L", (28, 28)).save(folder / "good.png")
    out = tmp_path / "events.jsonl"
    assert cli("scan", digits_bundle.path, "--source", folder, "--sink", f"jsonl:{out}").code == 0
    (damaged,) = [event for event in kit.read_events(out) if "label" not in event]
    assert "\\xff.png" in damaged["reason"]
    assert damaged["source"].endswith("\\xff.png")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims ``width`` x ``height`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--source", "."], 2, "nothing to read with"),
        (["--codes"], 2, "--source"),
        (["--codes", "--source", "kafka://host/x"], 2, "no source kafka:"),
        (["--codes", "--source", ""], 2, "empty"),
        (["--codes", "--source", "nowhere"], 1, "nowhere"),
        (["--codes", "--source", "empty"], 1, "no images"),
        (["--codes", "--source", "film.mp4"], 1, "no video"),
        (["--codes", "--source", "fifo.png"], 1, "no regular file"),
        (["--codes", "--source", "a.png", "--watch"], 2, "--watch wants a folder"),
        (["--codes", "--source", "a.png", "--sink", "kafka:x"], 2, "jsonl:PATH"),
        (["--codes", "--source", "a.png", "--sink", "jsonl"], 2, "jsonl:PATH"),
        (["--codes", "--source", "a.png", "--sink", "jsonl:"], 2, "jsonl:PATH"),
        (["--codes", "--source", "a.png", "--sink", "mqtt://host"], 2, "topic"),
        (["--codes", "--source", "a.png", "--sink", "mqtt://host/a/#"], 2, "topic"),
        (["--codes", "--source", "a.png", "--sink", "mqtt://host:no/a"], 2, "no address"),
        (["--codes", "--source", "a.png", "--sink", "mqtt://host/a?protocol=4"], 2, "unknown option"),
        (["--codes", "--source", "a.png", "--sink", "http:///x"], 2, "no host"),
        (["--codes", "--source", "a.png", "--sink", "http://h:99999/x"], 2, "no address"),
        (["--codes", "--source", "a.png", "--sink", "jsonl:x", "--sink", "jsonl:x"], 2, "twice"),
        (["--codes", "--source", "a.png", "--sink", "jsonl:/dev/full"], 1, "disk is full"),
        (["--codes", "--source", "a.png", "--sink", "jsonl:empty"], 2, "a folder is in the way"),
        (["--codes", "--source", "a.png", "--sink", "jsonl:a.png/x"], 2, "a.png"),
        (["--codes", "--source", "a.png", "--sink", "sqlite:a.png"], 1, "no usable SQLite"),
        (["--codes", "--source", "a.png", "--sink", "sqlite:empty"], 2, "a folder is in the way"),
        (["--codes", "--source", "a.png", "--code-budget-ms", "nan"], 2, "budget"),
        (["nothing.edge", "--source", "a.png"], 1, "no bundle"),
    ],
)
def test_a_wrong_call_gets_a_cause_and_a_cure(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (30, 30)).save("a.png")
    Path("empty").mkdir()
    Path("film.mp4").touch()
    os.mkfifo("fifo.png")
    before = Path("a.png").read_bytes()
    outcome = cli("scan", *arguments)
    assert outcome.code == code
    assert word in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 4
    assert Path("a.png").read_bytes() == before


def test_a_raw_tensor_bundle_is_refused(cli: Cli, tiny_bundle: Bundle, pictures: Path) -> None:
    outcome = cli("scan", tiny_bundle.path, "--source", pictures)
    assert outcome.code == 2
    assert "raw tensors" in outcome.err


def test_a_missing_library_is_named(cli: Cli, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zxingcpp", None)
    outcome = cli("scan", "--codes", "--source", pictures)
    assert outcome.code == 1
    assert "pip install 'edgekit[scan]'" in outcome.err


def test_importing_the_room_is_light(kit: Any) -> None:
    code = """import sys, edgekit.scanner
heavy = {'PIL', 'zxingcpp', 'biip', 'paho', 'torch', 'onnx', 'urllib.request'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_watch_reads_new_and_rewritten_files_until_sigterm(
    kit: Any, digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "events.jsonl"
    process = kit.start_scan(digits_bundle.path, "--source", pictures, "--watch", "--sink", f"jsonl:{out}", "--json")
    try:
        kit.wait_for(lambda: kit.lines_of(out) == 4)
        Image.new("L", (28, 28)).save(pictures / "late.png")
        kit.wait_for(lambda: kit.lines_of(out) == 5)
        Image.new("L", (28, 28)).save(pictures / "broken.png")
        kit.wait_for(lambda: kit.lines_of(out) == 6)
    finally:
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert json.loads(stdout)["captured"] == 6
    events = kit.read_events(out)
    assert [Path(event["source"]).name for event in events[-2:]] == ["late.png", "broken.png"]
    assert "label" in events[-1]
    assert [event["seq"] for event in events] == list(range(6))


def test_ctrl_c_ends_a_watch_with_its_summary(kit: Any, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"
    process = kit.start_scan("--codes", "--source", pictures, "--watch", "--sink", f"jsonl:{out}", "--json")
    kit.wait_for(lambda: kit.lines_of(out) == 4)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["events"] == 4


def test_sigterm_ends_a_scan_whose_sink_hangs(kit: Any, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        environment = {**os.environ, "no_proxy": "*"}
        outbox = tmp_path / "outbox.sqlite"
        sinks = ["--sink", f"jsonl:{out}", "--sink", url, "--outbox", outbox, "--json"]
        process = kit.start_scan("--codes", "--source", pictures, "--watch", *sinks, env=environment)
        kit.wait_for(lambda: kit.lines_of(out) == 4)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["sinks"][1]["waiting"] == 4


def test_a_full_disk_leaves_whole_lines_only(kit: Any, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    process = kit.start_scan("--codes", "--source", pictures, "--sink", f"jsonl:{out}", preexec_fn=small_disk)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "the disk is full" in stderr
    assert "Traceback" not in stderr
    assert out.read_bytes().endswith(b"\n")
    assert len(kit.read_events(out)) >= 1
