"""A scan from one TOML: every mistake named with its line, and the scan that it describes."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.scanner import Scanner, read_config
from edgekit.scanner.config import parse_config

Cli = Callable[..., Any]


def test_all_mistakes_are_named_at_once_with_their_lines(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "scan.toml"
    file.write_text(
        '[model]\nbundel = "x"\nthreads = "two"\n[[source]]\naddress = "camera:0"\ndepth = 100\n'
        '[[source]]\nadress = "in"\n[log]\nformat = "jsn"\n[sourse]\n[text]\nbundle = "none.edge"\n'
        '[codes]\nformats = ["QR Cod"]\n[[sink]]\naddress = "ftp://x"\n[harvest]\nfolder = "/proc/x"\non = ["no-read"]\n'
    )
    done = cli("scan", "--check", file, "--json")
    assert done.code == 2
    found = {problem["where"].rpartition(":")[2]: problem["hint"] for problem in done.json["problems"]}
    assert found["11"] == "did you mean `source`?"
    assert found["2"] == "did you mean `bundle`?"
    assert found["8"] == "did you mean `address`?"
    assert found["10"] == "did you mean `json`?"
    assert {"3", "4"} <= set(found)
    # In the same round: a bundle that is not there, a format, a sink, and an event that no type knows.
    assert {"13", "15", "17", "20"} <= set(found)
    assert "QR Code" in found["15"]
    assert found["20"] == "did you mean `no_read`?"
    with pytest.raises(UsageError, match="more: edgekit scan --check"):
        read_config(file)


def test_a_config_runs_with_paths_from_its_folder(
    kit: Any, cli: Cli, digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scan.toml"
    file.write_text(
        f'[model]\nbundle = "{digits_bundle.path}"\n[[source]]\naddress = "pictures"\n'
        '[[sink]]\naddress = "jsonl:events.jsonl"\n[duplicates]\n[log]\nformat = "json"\n'
    )
    assert cli("scan", "--check", file).code == 0
    done = cli("scan", file, "--json")
    assert (done.code, done.json["inferred"]) == (0, 3)
    assert len(kit.read_events(tmp_path / "events.jsonl")) == 4
    for option in (["--codes"], ["--threads", "1"], ["--sink", "jsonl:-"]):
        refused = cli("scan", file, *option)
        assert (refused.code, option[0] in refused.err) == (2, True)


def test_an_application_takes_events_as_they_come(digits_bundle: Bundle, pictures: Path) -> None:
    tables = {"model": {"bundle": str(digits_bundle.path)}, "source": [{"address": str(pictures)}]}
    heard: list[Any] = []
    scanner = Scanner(tables, on_event=heard.append)
    assert [event["seq"] for event in scanner] == [0, 1, 2, 3]
    assert len(heard) == 4
    assert scanner.summary is not None
    assert scanner.summary.captured == scanner.summary.inferred + sum(scanner.summary.dropped.values())

    async def first() -> Any:
        async for event in Scanner(tables):
            return event
        return None

    assert asyncio.run(first())["seq"] == 0


def test_what_a_config_names_is_held_against_this_machine(
    cli: Cli, digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    """Nothing is written, not even by a sink that would make its file."""
    file = tmp_path / "scan.toml"
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        file.write_text(
            f'[model]\nbundle = "{digits_bundle.path}"\n[[source]]\naddress = "pictures"\n'
            f'[[sink]]\naddress = "jsonl:sub/events.jsonl"\n[[sink]]\naddress = "http://127.0.0.1:1/x"\n'
            f'[outbox]\npath = "outbox.sqlite"\n[ring]\nfolder = "ring"\n[server]\naddress = "127.0.0.1:{port}"\n'
        )
        sound = cli("scan", "--check", file, "--json")
    assert (sound.code, sound.json["problems"]) == (0, [])
    lines = {warning["where"].rpartition(":")[2]: warning["error"] for warning in sound.json["warnings"]}
    assert lines.keys() == {"8", "14"}
    assert "does not answer" in lines["8"]
    assert str(port) in lines["14"]
    assert {path.name for path in tmp_path.iterdir()} == {digits_bundle.path.name, pictures.name, file.name}

    file.write_text(
        '[model]\nbundle = "none.edge"\n[codes]\nformats = ["QR Cod"]\n'
        '[[source]]\nname = "a"\naddress = "pattern:8x8"\n[[source]]\naddress = "pictures"\n'
        '[[sink]]\naddress = "jsonl:/proc/x/e.jsonl"\n[[sink]]\naddress = "jsonl:/proc/x/e.jsonl"\n'
        '[[sink]]\naddress = "ftp://user:secret@x"\n[harvest]\nfolder = "/proc/x"\n'
        '[trigger]\nmode = "external"\ninputs = ["udp://x"]\n'
    )
    wrong = cli("scan", "--check", file, "--json")
    assert wrong.code == 2
    found = [problem["where"].rpartition(":")[2] for problem in wrong.json["problems"]]
    assert set(found) == {"2", "4", "7", "9", "11", "13", "15", "17", "20"}
    assert "secret" not in wrong.out + wrong.err
    assert not list(tmp_path.glob("*.sqlite"))


def test_the_sound_entries_of_an_array_are_looked_at_beside_a_wrong_one(cli: Cli, tmp_path: Path) -> None:
    (file := tmp_path / "scan.toml").write_text(
        '[codes]\n[[source]]\nname = "a"\nadress = "x"\n[[source]]\nname = "b"\naddress = "nofilm.mp4"\n'
        '[[sink]]\naddres = "x"\n[[sink]]\naddress = "ftp://x"\n'
    )
    found = {each["where"].rpartition(":")[2] for each in cli("scan", "--check", file, "--json").json["problems"]}
    assert {"4", "7", "9", "11"} <= found


def test_tables_are_held_against_each_other_beside_a_wrong_one(cli: Cli, tmp_path: Path) -> None:
    """What a wrong or misspelt table may have been meant to say is held against nothing."""
    (file := tmp_path / "scan.toml").write_text(
        '[model]\nbundel = "x"\n[drift]\nframes = 9\n[codes]\n[crosscheck]\n[trigger]\nmode = "external"\n'
        '[harvest]\nfolder = "h"\non = ["no_raed"]\n[[source]]\nadress = "x"\n'
        '[[source]]\naddress = "pattern:8x8@1"\ncertificate = "any"\n'
    )
    found = cli("scan", "--check", file, "--json").json
    lines = {each["where"].rpartition(":")[2] for each in found["problems"]}
    assert "11" in lines  # there is no such event
    assert {each["where"].rpartition(":")[2] for each in found["warnings"]} == {"7", "16"}  # the trigger, the certificate

    file.write_text('[code]\n[votes]\n[[source]]\naddress = "pattern:8x8@1"\n')
    found = cli("scan", "--check", file, "--json").json
    assert ["unknown key `code`" in each["error"] for each in found["problems"]] == [True, False]
    assert found["warnings"] == []


def test_a_model_is_asked_for_by_what_watches_it(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "scan.toml"
    file.write_text('[codes]\n[drift]\n[[source]]\naddress = "pattern:8x8@1"\n')
    refused = cli("scan", "--check", file, "--json")
    assert (refused.code, refused.json["problems"][0]["error"]) == (2, "[drift] wants a model")


def test_a_folder_may_have_a_name_and_cameras_without_one_show_no_password(
    cli: Cli, digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scan.toml"
    model = f'[model]\nbundle = "{digits_bundle.path}"\n'
    file.write_text(f'{model}[[source]]\nname = "inbox"\naddress = "pictures"\n')
    assert cli("scan", "--check", file).code == 0
    assert cli("scan", file, "--json").json["captured"] == 4
    with file.open("a") as text:
        text.write('[shadow]\ncandidate = "new.edge"\nkept = "promoted.json"\n')
    assert read_config(file).shadow.kept == str(tmp_path / "promoted.json")  # type: ignore[union-attr]

    file.write_text(model + "".join(f'[[source]]\naddress = "tcp://me:geheim@127.0.0.1:{port}"\n' for port in (1, 2)))
    scanner = Scanner(str(file))
    first = next(iter(scanner))
    assert first["event"] == "camera"
    assert first["source"] in ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    assert "geheim" not in str(first) + str(scanner.status())


def test_the_example_says_every_key_and_its_default(cli: Any, tmp_path: Path) -> None:
    text = cli("scan", "--example").out
    (file := tmp_path / "scan.toml").write_text(text)
    plain = read_config(file)
    assert [source.address for source in plain.source] == ["camera:0"]
    assert plain == read_config(file)
    file.write_text(re.sub(r"(?m)^#(?=\[|\w+ = )", "", text).replace('candidate = ""', 'candidate = "next.edge"'))
    config, problems, *_ = parse_config(file)
    assert config is not None, problems
    for name in config.__struct_fields__:
        table = getattr(config, name)
        for struct in table if isinstance(table, tuple) else [table]:
            for field in msgspec.structs.fields(struct):
                assert f"{field.name} = " in text
                found = getattr(struct, field.name)
                paths = field.name in ("folder", "candidate", "report", "kept", "baseline", "path")
                if not field.required and not paths and field.default not in (None, msgspec.NODEFAULT):
                    assert found == field.default, (name, field.name)


@pytest.mark.parametrize("data", [b"", b"no database at all, but some bytes of text"])
def test_a_check_writes_nothing_into_a_sinks_file(cli: Cli, pictures: Path, tmp_path: Path, data: bytes) -> None:
    (events := tmp_path / "events.db").write_bytes(data)
    (file := tmp_path / "scan.toml").write_text(
        f'[codes]\n[[source]]\naddress = "{pictures}"\n[[sink]]\naddress = "sqlite:{events}"\n'
    )
    outcome = cli("scan", "--check", file)
    assert outcome.code == (2 if data else 0)
    assert events.read_bytes() == data
    assert sorted(each.name for each in tmp_path.glob("events*")) == ["events.db"]


@pytest.mark.parametrize("address", ["tcp://a..b:9000", "http://a..b/x", "mqtt://a..b/x", f"http://{'x' * 70}.com/x"])
def test_a_name_that_no_host_can_have_is_told_at_once(cli: Cli, pictures: Path, tmp_path: Path, address: str) -> None:
    (file := tmp_path / "scan.toml").write_text(
        f'[codes]\n[[source]]\naddress = "{pictures}"\n[[sink]]\naddress = "{address}"\n'
    )
    for words in (("--check", file), (file,)):
        outcome = cli("scan", *words)
        assert outcome.code == 2
        assert "is no address" in outcome.err
        assert "defect" not in outcome.err
