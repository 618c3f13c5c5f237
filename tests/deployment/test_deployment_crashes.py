"""Killed at every call that changes the disk, and after a power cut behind each: one whole bundle runs, and the next install
succeeds."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.deployment import install, rollback, starting, status
from edgekit.deployment import installing as module

from .disk_layer import Disk, Layer, Op, read_tree, write_tree

Act = Callable[[Path], object]


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden and latency checks change nothing below the root (`test_what_an_install_asks_of_the_disk`)."""
    monkeypatch.setattr(module, "_tried", lambda *args: {})


@pytest.fixture
def roots(tmp_path: Path, versions: list[Path], keys: Any, untried: None) -> dict[str, Path]:
    """``old``: v0, then v1 which runs, confirmed. ``failed``: v1 has had all its starts and never worked."""
    old, failed = tmp_path / "old", tmp_path / "failed"
    for version in versions[:2]:
        install(version, root=old, pub=keys.pub)
    shutil.copytree(old, failed, symlinks=True)
    starting(old).confirm()
    for _ in range(3):
        starting(failed).fail("no camera takes this")
    return {"old": old, "failed": failed}


def recorded(root: Path, act: Act) -> list[Op]:
    with Layer(root)() as layer:
        act(root)
    return layer.ops


def killed(root: Path, act: Act, last: int) -> bool:
    """Whether the process was killed at that call; else it has come to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with Layer(root, last)():
                act(root)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def runs(root: Path) -> str:
    found = status(root)
    assert found["healthy"], found
    return str(found["name"])


def walk(template: Path, act: Act, after: Act) -> tuple[int, list[str]]:
    """Kill ``act`` at its first change of the disk, its second, ...; each time on a fresh copy of ``template``. ``after`` has
    to succeed on what is left. Returns the number of changes, and what ran after each kill."""
    root, seen = template.parent / "walk", []
    for last in range(400):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root, symlinks=True)
        if not killed(root, act, last):
            return last, seen
        seen.append(runs(root))
        after(root)
        assert not list(root.glob(".incoming*"))
    raise AssertionError("it never ends")


def cuts(template: Path, ops: list[Op]) -> Iterator[tuple[int, Path]]:
    """Every state after a power cut behind each call, once."""
    disk, seen, root = Disk(read_tree(template)), set(), template.parent / "cut"
    for number in range(len(ops) + 1):
        if number:
            disk.apply(ops[number - 1])
        for state in disk.states():
            key = (number == len(ops), *sorted(state.items()))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(root, ignore_errors=True)
            write_tree(root, state)
            yield number, root


def test_what_an_install_asks_of_the_disk(
    tmp_path: Path, versions: list[Path], keys: Any, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walks leave out the golden and the latency checks: with them it is the same list of calls."""
    copies = [shutil.copytree(roots["old"], tmp_path / name, symlinks=True) for name in ("left_out", "whole")]
    short = recorded(copies[0], lambda root: install(versions[2], root=root, pub=keys.pub))
    monkeypatch.undo()
    whole = recorded(copies[1], lambda root: install(versions[2], root=root, pub=keys.pub))
    named = [[(op.kind, re.sub(r"^\.incoming-\w+", ".incoming", op.path)) for op in ops] for ops in (short, whole)]
    assert named[0] == named[1]
    kinds = {op.kind for op in whole}
    assert kinds >= {"create", "write", "fsync", "mkdir", "rename", "symlink", "unlink", "rmdir"}


def test_an_install_killed_at_every_change(versions: list[Path], keys: Any, roots: dict[str, Path]) -> None:
    def act(root: Path) -> None:
        install(versions[2], root=root, pub=keys.pub)

    changes, seen = walk(roots["old"], act, act)
    assert changes > 30
    assert sorted(set(seen)) == ["v1", "v2"]
    assert seen == sorted(seen)  # one moment before which the old one runs, and after which the new one does


def test_a_rollback_and_a_return_killed_at_every_change(versions: list[Path], keys: Any, roots: dict[str, Path]) -> None:
    def after(root: Path) -> None:
        install(versions[2], root=root, pub=keys.pub)
        assert runs(root) == "v2"

    changes, seen = walk(roots["old"], rollback, after)
    assert changes > 5
    assert sorted(set(seen)) == ["v0", "v1"]

    def again(root: Path) -> None:
        assert starting(root).bundle.name == "a"
        assert runs(root) == "v0"
        after(root)

    changes, seen = walk(roots["failed"], starting, again)
    assert changes > 5
    assert sorted(set(seen)) == ["v0", "v1"]


def test_an_install_and_a_power_cut(versions: list[Path], keys: Any, roots: dict[str, Path]) -> None:
    def act(root: Path) -> None:
        install(versions[2], root=root, pub=keys.pub)

    work = shutil.copytree(roots["old"], roots["old"].parent / "work", symlinks=True)
    ops = recorded(work, act)
    seen = set()
    for count, (number, root) in enumerate(cuts(roots["old"], ops)):
        name = runs(root)
        seen.add(name)
        assert name == "v2" if number == len(ops) else name in ("v1", "v2")
        if count % 8 == 0:
            act(root)
            assert runs(root) == "v2"
    assert count > 100
    assert seen == {"v1", "v2"}


def test_a_first_install_and_a_power_cut(tmp_path: Path, versions: list[Path], keys: Any, untried: None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "work").mkdir()
    ops = recorded(tmp_path / "work", lambda root: install(versions[0], root=root, pub=keys.pub))
    for count, (number, root) in enumerate(cuts(tmp_path / "empty", ops)):
        found = status(root)
        assert found["healthy"] if number == len(ops) else found["healthy"] or found["slot"] is None, found
        if count % 8 == 0:
            install(versions[0], root=root, pub=keys.pub)
            assert runs(root) == "v0"


def test_the_ends_of_a_start_and_a_power_cut(roots: dict[str, Path], versions: list[Path], keys: Any) -> None:
    """A start that was noted stays noted, a return is made in the end, a confirmation holds."""
    base = roots["old"].parent
    ops = recorded(shutil.copytree(roots["failed"], base / "returning", symlinks=True), starting)
    for number, root in cuts(roots["failed"], ops):
        assert runs(root) == "v0" if number == len(ops) else runs(root) in ("v0", "v1")
        starting(root)
        assert runs(root) == "v0"
        assert status(root)["returned"]["left"]["name"] == "v1"

    ops = recorded(shutil.copytree(roots["old"], base / "back", symlinks=True), rollback)
    for number, root in cuts(roots["old"], ops):
        assert runs(root) == "v0" if number == len(ops) else runs(root) in ("v0", "v1")

    fresh = shutil.copytree(roots["old"], base / "fresh", symlinks=True)
    install(versions[2], root=fresh, pub=keys.pub)
    work = shutil.copytree(fresh, base / "starts", symlinks=True)
    ops = recorded(work, starting)
    for number, root in cuts(fresh, ops):
        assert runs(root) == "v2"
        assert status(root)["trial"]["start"] == 1 if number == len(ops) else status(root)["trial"]["start"] in (0, 1)

    start = starting(fresh)
    before = shutil.copytree(fresh, base / "before", symlinks=True)
    ops = recorded(fresh, lambda root: start.confirm())
    for number, root in cuts(before, ops):
        assert runs(root) == "v2"
        assert status(root)["confirmed"] if number == len(ops) else True
