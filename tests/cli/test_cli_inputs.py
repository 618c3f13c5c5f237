"""What a command is given in place of the file it wants: a folder, a pipe, a socket, a device, a page. One line, at once."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import keygen, pack

#: Arguments of a command; X stands for what is no file of the wanted kind, B for a bundle, P for its pack, K for a key.
#: One form of each reader meets every kind,
READERS = [
    "pipeline X",
    "data --data csv:X --out new.png",
    "data --data npz:X --out new.png",
    "data --data folder:X --out new.png",
    "quantize B --calib X --out new",
    "build B --target rtx-ada --timing-cache X",
    "targets --targets X",
    "compare X",
    "explain B X --out new",
    "report B --explanations X --out new.html",
    "scan X.toml",
    "replay X",
    "pack B --key X --out new.zip",
    "verify X --pub K/edgekit.pub",
    "verify P --pub X",
    "verify P --pub K/edgekit.pub --revoked X",
    "revoke 3b0c44298fc1c149 --key K/edgekit.key --out X",
    "keygen --out X",
    "install P --root X --pub K/edgekit.pub",
    "status --root X",
]
#: every other form, and what starts a process, the kinds that could hang.
FORMS = [
    "eval X --data digits",
    "import X --out new",
    "quantize X --out new",
    "build X --target rtx-ada",
    "inspect X",
    "estimate X --target rtx-ada",
    "bench X",
    "bench B --against X --seconds 0.01",
    "compare B --with X",
    "compare B --data X",
    "explain X B --out new",
    "report X --out new.html",
    "scan X --source B",
    "scan --check X.toml",
    "pack X --out new.zip",
    "sign X --key K/edgekit.key",
    "sign P --key X",
    "revoke 3b0c44298fc1c149 --key X --out new.txt",
    "install X --root new --pub K/edgekit.pub",
    "install P --root new --pub X",
    "rollback --root X",
]
HANG = ("pipe", "endless device")
KINDS = (*HANG, "folder", "socket", "empty device", "empty", "page")
#: What some of them take: an empty folder, a file without tables, a timing cache for a target that has no use for one.
TAKEN = {
    "keygen --out X": {"folder"},
    "install P --root X --pub K/edgekit.pub": {"folder"},
    "status --root X": {"folder"},
    "targets --targets X": {"empty"},
    "build B --target rtx-ada --timing-cache X": {"page"},
}


@pytest.fixture
def at_once() -> Iterator[None]:
    """A command that waits for somebody to write into a pipe would wait for ever."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def made(kind: str, at: Path) -> Path:
    if kind == "folder":
        at.mkdir()
    elif kind == "pipe":
        os.mkfifo(at)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(at.name)  # a socket's path may have 107 bytes
    elif kind == "endless device":
        at.symlink_to("/dev/zero")
    elif kind == "empty device":
        at.symlink_to("/dev/null")
    else:
        at.write_bytes(b"" if kind == "empty" else b"<!doctype html>\n<title>edgekit</title>\n")
    return at


@pytest.mark.parametrize("command", [*READERS, *FORMS])
def test_what_is_no_file_of_the_kind_is_one_line(
    cli: Any, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    keygen("K")
    pack(tiny_bundle, out="P.zip", key="K/edgekit.key")
    for kind in KINDS if command in READERS else HANG:
        if kind in TAKEN.get(command, ()):
            continue
        odd = made(kind, tmp_path / (f"{kind}.toml" if "X.toml" in command else kind))
        names = {"X": str(odd), "X.toml": str(odd), "B": str(tiny_bundle.path), "P": "P.zip"}
        done = cli(*(names.get(word, word.replace(":X", f":{odd}")) for word in command.split()))
        assert done.code in (1, 2), (kind, done)
        assert "defect" not in done.err
        assert re.findall(r"^[eE]rror: .", done.err, re.M), (kind, done)
        odd.rmdir() if odd.is_dir() else odd.unlink()


# What verify says of what is no pack


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (".", 1, "there is no packed bundle at .: it is a folder"),
        ("/", 1, "there is no packed bundle at /: it is a folder"),
        ("tiny.edge", 1, "it is a bundle that is not packed"),
        ("pipe", 1, "it is a pipe, a socket or a device"),
        ("/dev/zero", 1, "it is a pipe, a socket or a device"),
        ("none.zip", 1, "there is no packed bundle at none.zip"),
        ("empty", 1, "empty is empty"),
        ("page", 1, "a page carries no signature: verify what it shows, F.zip"),
        ("text", 1, "is no packed bundle, and no report of doctor --chaos"),
        ("unsigned.zip", 1, "the pack is not signed"),
    ],
)
def test_verify_says_what_it_was_given(
    cli: Any, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pub = keygen("K")["pub"]
    pack(tiny_bundle, out="unsigned.zip")
    made("pipe", tmp_path / "pipe"), made("empty", tmp_path / "empty"), made("page", tmp_path / "page")
    (tmp_path / "text").write_text("a pack\n")
    done = cli("verify", given, "--pub", pub)
    assert (done.code, done.out) == (code, "")
    error, hint = done.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert words in done.err


def test_verify_names_the_option_of_a_list_that_is_there(cli: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    keys = keygen(tmp_path / "K")
    packed = pack(tiny_bundle, out=tmp_path / "P.zip", key=keys["key"])
    there = made("page", tmp_path / "there.json")
    done = cli("verify", packed, "--pub", keys["pub"], "--sbom", there)
    assert done.code == 2
    assert "--sbom" in done.err
    assert "--out" not in done.err
