"""A layer between a program and its disk: it counts every call that changes files below a folder, dies at one, or keeps a
list of them, from which the states are made that a disk may show after a power cut."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pathlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Op(NamedTuple):
    """``kind``: create, write, truncate, fsync, mkdir, rmdir, unlink, symlink, rename or chmod; paths relative to the root."""

    kind: str
    path: str
    more: Any = None


class Layer:
    """Calls of the block below ``root`` are kept in ``ops``; the process is killed by itself at number ``last``, in the middle
    of it where it is a write."""

    def __init__(self, root: Path, last: int | None = None) -> None:
        self.root, self.last = os.path.realpath(root), last
        self.ops: list[Op] = []
        self._real: dict[str, Any] = {}

    def relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """None for what lies elsewhere. The last part is not followed: a link is renamed as a link."""
        if isinstance(path, int):
            full = self._real["readlink"](f"/proc/self/fd/{path}")
        else:
            base = self._real["readlink"](f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            full = os.path.join(base, os.fspath(path))
            full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        if full == self.root:
            return ""
        return full[len(self.root) + 1 :] if full.startswith(self.root + "/") else None

    def note(self, op: Op, half: Callable[[], object] | None = None) -> None:
        if self.last is not None and len(self.ops) == self.last:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.ops.append(op)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Layer]:
        names = ("open", "write", "fsync", "mkdir", "rmdir", "unlink", "remove", "symlink", "rename", "replace", "chmod")
        self._real = {name: getattr(os, name) for name in (*names, "readlink")} | {"io.open": io.open}
        fresh: dict[str, Any] = {name: self._renaming(name) for name in ("rename", "replace")}
        fresh |= {name: getattr(self, f"_{name}") for name in names if name not in fresh}
        accessor = getattr(pathlib, "_normal_accessor", None)  # Python 3.10 keeps the functions themselves
        before = {name: getattr(accessor, name) for name in (*names, "touch") if hasattr(accessor, name)}
        try:
            for name, function in fresh.items():
                setattr(os, name, function)
                if name in before:
                    setattr(accessor, name, staticmethod(self._io_open) if name == "open" else function)
            io.open = builtins.open = self._io_open  # type: ignore[assignment]
            yield self
        finally:
            for name in names:
                setattr(os, name, self._real[name])
            for name, function in before.items():
                setattr(accessor, name, function)
            io.open = builtins.open = self._real["io.open"]

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & CHANGING and (name := self.relative(path, dir_fd)) is not None:
            self._opening(name, os.path.join(self.root, name), truncate=bool(flags & os.O_TRUNC))
        return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))

    def _opening(self, name: str, full: str, truncate: bool) -> None:
        if not os.path.lexists(full):
            self.note(Op("create", name))
        elif truncate:
            self.note(Op("truncate", name))

    def _io_open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        name = self.relative(file) if set(mode) & set("wxa+") else None
        if name is None:
            return self._real["io.open"](file, mode, buffering, *args, **kwargs)
        if not isinstance(file, int):
            full = os.path.join(self.root, name)
            if not ("x" in mode and os.path.lexists(full)):
                self._opening(name, full, truncate="w" in mode)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def _write(self, fd: int, data: Any) -> int:
        if (name := self.relative(fd)) is not None:
            self.writing(name, os.lseek(fd, 0, os.SEEK_CUR), data, lambda part: self._real["write"](fd, part))
        return int(self._real["write"](fd, data))

    def writing(self, name: str, offset: int, data: Any, write: Callable[[bytes], object]) -> None:
        content = bytes(data)
        self.note(Op("write", name, (offset, content)), lambda: write(content[: len(content) // 2]))

    def _fsync(self, fd: int) -> None:
        if (name := self.relative(fd)) is not None:
            self.note(Op("fsync", name))
        else:
            self._real["fsync"](fd)
        # Below the root nothing is flushed for real: the walk is over what is asked for, and must be quick.

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._simple("mkdir", path, dir_fd, wanted=False)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._simple("rmdir", path, dir_fd)
        self._real["rmdir"](path, dir_fd=dir_fd)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._simple("unlink", path, dir_fd)
        self._real["unlink"](path, dir_fd=dir_fd)

    _remove = _unlink

    def _chmod(self, path: Any, mode: int, *args: Any, **kwargs: Any) -> None:
        self._simple("chmod", path, None)
        self._real["chmod"](path, mode, *args, **kwargs)

    def _symlink(self, target: Any, path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
        self._simple("symlink", path, dir_fd, os.fspath(target), wanted=False)
        self._real["symlink"](target, path, *args, dir_fd=dir_fd, **kwargs)

    def _simple(self, kind: str, path: Any, dir_fd: int | None, more: Any = None, wanted: bool = True) -> None:
        """What will fail changes nothing, and is no step."""
        name = self.relative(path, dir_fd)
        if name is not None and os.path.lexists(os.path.join(self.root, name)) is wanted:
            self.note(Op(kind, name, more))

    def _renaming(self, which: str) -> Callable[..., None]:
        def rename(src: Any, dst: Any, **kwargs: Any) -> None:
            old, new = self.relative(src), self.relative(dst)
            if old is not None and new is not None and os.path.lexists(os.path.join(self.root, old)):
                self.note(Op("rename", old, new))
            self._real[which](src, dst, **kwargs)

        return rename


class _Raw(io.FileIO):
    def __init__(self, layer: Layer, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._layer = layer

    def write(self, data: Any) -> int:
        name = self._layer.relative(self.fileno())
        if name is not None:
            self._layer.writing(name, self.tell(), data, super().write)
        return super().write(data)


# After a power cut


class Node:
    """A file (``data``), a link (``target``) or a folder (``names``). ``safe``: a file's bytes at its last fsync."""

    def __init__(self, kind: str, data: bytes = b"", target: str = "") -> None:
        self.kind, self.data, self.target = kind, data, target
        self.safe = data
        self.names: dict[str, int] = {}


def read_tree(root: Path) -> dict[int, Node]:
    """What lies below a folder, which counts as safe on disk; number 0 is the folder."""
    nodes = {0: Node("dir")}

    def walk(folder: Path, number: int) -> None:
        for path in sorted(folder.iterdir()):
            kind = "link" if path.is_symlink() else "dir" if path.is_dir() else "file"
            node = Node(kind, path.read_bytes() if kind == "file" else b"", os.readlink(path) if kind == "link" else "")
            key = len(nodes)
            nodes[key] = node
            nodes[number].names[path.name] = key
            if kind == "dir":
                walk(path, key)

    walk(root, 0)
    return nodes


class Change(NamedTuple):
    """An entry of folder ``of`` named ``name`` becomes node ``to`` (None: goes); a rename takes it from ``(folder, name)``."""

    of: int
    name: str
    to: int | None
    source: tuple[int, str] | None = None


class Disk:
    """Calls in their order, and what of them is sure to be on the disk: a folder's entries once it was synced, a file's bytes
    once it was. All else may be there or not, each for itself, as POSIX has it."""

    def __init__(self, tree: dict[int, Node]) -> None:
        self.nodes = tree
        self._begin = {number: dict(node.names) for number, node in tree.items()}
        self._changes: list[tuple[Change, bool]] = []

    def apply(self, op: Op) -> None:
        folder, name = self._folder(op.path)
        here = self.nodes[folder].names
        if op.kind in ("create", "mkdir", "symlink"):
            kind = {"create": "file", "mkdir": "dir", "symlink": "link"}[op.kind]
            self.nodes[len(self.nodes)] = Node(kind, target=op.more or "")
            self._change(Change(folder, name, len(self.nodes) - 1))
        elif op.kind in ("unlink", "rmdir"):
            self._change(Change(folder, name, None))
        elif op.kind == "rename":
            to, as_name = self._folder(op.more)
            self._change(Change(to, as_name, here[name], (folder, name)))
        elif op.kind == "write":
            node, (offset, data) = self.nodes[here[name]], op.more
            node.data = node.data[:offset].ljust(offset, b"\0") + data + node.data[offset + len(data) :]
        elif op.kind == "truncate":
            self.nodes[here[name]].data = b""
        elif op.kind == "fsync":
            number = here[name] if op.path else 0
            node = self.nodes[number]
            node.safe = node.data
            if node.kind == "dir":
                self._changes = [(c, sure or number in (c.of, (c.source or (None,))[0])) for c, sure in self._changes]

    def states(self) -> Iterator[dict[str, tuple[str, bytes]]]:
        """Those that a cut may leave now: path -> kind and content. All that is not sure gone; all there, with the bytes that
        were not synced gone, cut or whole; each single change missing, and each alone there."""
        unsure = [number for number, (_, sure) in enumerate(self._changes) if not sure]
        everything = frozenset(unsure)
        yield from (self._state(everything, kept) for kept in ("none", "half", "all"))
        for wanted in (frozenset(), *(frozenset({n}) for n in unsure), *(everything - {n} for n in unsure)):
            yield self._state(wanted, "none")

    def _state(self, wanted: frozenset[int], kept: str) -> dict[str, tuple[str, bytes]]:
        names = {number: dict(found) for number, found in self._begin.items()}
        for number, (change, sure) in enumerate(self._changes):
            if not sure and number not in wanted:
                continue
            if change.source:
                place = names.setdefault(change.source[0], {})
                if place.get(change.source[1]) == change.to:
                    del place[change.source[1]]
                elif not sure:  # what it was renamed from never came to be
                    continue
            here = names.setdefault(change.of, {})
            if change.to is None:
                here.pop(change.name, None)
            else:
                here[change.name] = change.to
        found: dict[str, tuple[str, bytes]] = {}

        def walk(number: int, prefix: str) -> None:
            for name, key in names.get(number, {}).items():
                node = self.nodes[key]
                if node.kind == "file":
                    content = {"none": node.safe, "half": node.data[: len(node.data) // 2], "all": node.data}[kept]
                    found[prefix + name] = ("file", node.safe if node.safe == node.data else content)
                else:
                    found[prefix + name] = (node.kind, node.target.encode())
                if node.kind == "dir":
                    walk(key, f"{prefix}{name}/")

        walk(0, "")
        return found

    def _change(self, change: Change) -> None:
        if change.source:
            del self.nodes[change.source[0]].names[change.source[1]]
        names = self.nodes[change.of].names
        names.pop(change.name, None)
        if change.to is not None:
            names[change.name] = change.to
        self._changes.append((change, False))

    def _folder(self, path: str) -> tuple[int, str]:
        *parents, name = path.split("/")
        number = 0
        for part in parents:
            number = self.nodes[number].names[part]
        return number, name


def write_tree(root: Path, state: dict[str, tuple[str, bytes]]) -> None:
    """Make a folder that holds just this."""
    root.mkdir()
    for path, (kind, content) in state.items():
        if kind == "dir":
            (root / path).mkdir()
        elif kind == "link":
            (root / path).symlink_to(content.decode())
        else:
            (root / path).write_bytes(content)
