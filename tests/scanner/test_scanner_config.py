"""A scan from one TOML: every mistake named with its line, and the scan that it describes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.scanner import Scanner, read_config

Cli = Callable[..., Any]


def test_all_mistakes_are_named_at_once_with_their_lines(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "scan.toml"
    file.write_text(
        '[model]\nbundel = "x"\nthreads = "two"\n[[source]]\naddress = "camera:0"\ndepth = 100\n'
        '[[source]]\nadress = "in"\n[log]\nformat = "jsn"\n[sourse]\n'
    )
    done = cli("scan", "--check", file, "--json")
    assert done.code == 2
    found = {problem["where"].rpartition(":")[2]: problem["hint"] for problem in done.json["problems"]}
    assert found["11"] == "did you mean `source`?"
    assert found["2"] == "did you mean `bundle`?"
    assert found["8"] == "did you mean `address`?"
    assert found["10"] == "did you mean `json`?"
    assert {"3", "4"} <= set(found)
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
