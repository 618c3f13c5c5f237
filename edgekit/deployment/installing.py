"""An install: a pack is fetched, checked, unpacked beside the slots, tried on this very device, then switched to.

Killed anywhere, it leaves ``current`` on a complete bundle: the old one until the rename, the new one after.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError, EdgekitError, SignatureError, TurnedDown, UsageError
from edgekit.files import given_path
from edgekit.installed import (
    CURRENT,
    PATIENCE_S,
    SLOTS,
    STARTS,
    Record,
    State,
    current_slot,
    fault,
    hold,
    leads_to,
    read_state,
)
from edgekit.manifest import Manifest
from edgekit.progress import say
from edgekit.trust import is_trusted, state_folders, trust_engine

from .apart import Apart
from .archive import Archive, make_readable, open_archive
from .checks import Steps, check_links, check_room, explained, room_for
from .fetching import OtherName, copy_of, fetch, fetch_beside, fetch_end, from_folder, is_url, located, readable
from .packing import checked, open_pack
from .revoking import MAX_BYTES, REVOKED
from .signing import TRAILER_BYTES, Checked, PathOrPaths
from .slots import answer, incoming, place, renew, same
from .trusted import Trust, admit, believe, remember

__all__ = ["install"]


def install(
    pack: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str],
    pub: PathOrPaths | None = None,
    unsigned: bool = False,
    revoked: PathOrPaths | None = None,
    allow_older: bool = False,
    again: bool = False,
    rename: bool = False,
    backend: str = "auto",
    max_latency_ms: float | None = None,
    starts: int = STARTS,
) -> dict[str, Any]:
    """Put a packed bundle into the free slot under ``root``, test it there, then switch ``current`` to it.

    ``pack``: a file, a folder of packs (a stick), the http(s) address of one, or of a folder (``https://host/packs/``); of
    several the newest. From a folder or an address only a bundle of the name that runs is taken (``rename``: any), since others
    choose what lies there; a file that is named may be another one.

    In order: signature by ``pub`` (or, with ``unsigned``, hashes only), expiry, lists of what is ``revoked`` (as `verify`),
    releases accepted before (``allow_older``: take an older one all the same), bundles that a way back has led away from
    (``again``: take such a one all the same), disk space, a private copy that is checked again (a stick may answer otherwise
    the second time), extraction, the golden outputs on ``backend`` on this very device, the time that an answer takes there,
    and only then the switch. Installing what runs already changes nothing (``"unchanged": True``). The new bundle is on trial
    for ``starts`` starts (`edgekit.installed`).

    Returns ``bundle`` (path of ``current``), ``slot``, ``name``, ``digest``, ``sequence``, ``installed`` and ``confirmed``
    (times, None where it is on trial), ``key_id`` (of the first signature), ``key_ids``, ``pack_digest``, ``release``,
    ``unchanged`` (whether it ran already, and was not tried again), ``golden`` (how far off),
    ``latency_ms`` and ``latency_before_ms`` (p50 and p99 of single answers, of the new and of what ran), ``pack`` (where it
    came from), ``seconds`` (by step). Raises `SignatureError` for an untrusted pack, `BundleError` for a damaged one,
    `GoldenError` where this device answers otherwise than training did, `BudgetNotMet` where p99 is above
    ``max_latency_ms``, `TurnedDown` for a bundle that was left here; the running slot then stays as it is.
    """
    folder, steps = Path(root), Steps()
    _refuse_odd(pack, folder, max_latency_ms, starts)
    if pub is None and not unsigned:
        raise SignatureError(
            "no public key was given to check the pack with", "add --pub edgekit.pub, or --unsigned for a pack of your own"
        )
    if pub is None and revoked:
        raise UsageError("a list of revocations needs the public key of its signer", "add --pub edgekit.pub to --revoked")
    trust = None if pub is None else _trust(pack, pub, folder, revoked)
    others_choose = is_url(pack) or _holds_packs(Path(pack))
    order = _Order(folder, trust, allow_older, again, rename or not others_choose, backend, max_latency_ms, starts)
    local = None if is_url(pack) else _looked_at(pack, order, steps)  # before anything is written
    where = os.fspath(local.path) if local else located(os.fspath(pack), unsigned, "" if rename else _running_name(folder))
    if not local and (known := _known_by_its_end(where, order)):
        return {**known, "pack": where, "seconds": steps.seconds}
    with explained(folder), incoming(folder) as work:
        check_links(folder, work)
        copy = work / "pack.zip"
        _copied(local, copy, order, steps) if local else _fetched(where, copy, order, steps)
        with hold(folder, PATIENCE_S):
            if trust is not None:  # another install may have been told more meanwhile
                order = replace(order, trust=trust.under(folder))
            with open_pack(copy) as file, order.checked(file, where) as (archive, signed):
                done = _put(archive, signed, work, order, steps)
    return {**done, "pack": where, "seconds": steps.seconds}


@dataclass(frozen=True)
class _Order:
    """What was asked for, and what a pack is held against."""

    root: Path
    trust: Trust | None
    allow_older: bool
    again: bool
    rename: bool
    backend: str
    max_latency_ms: float | None
    starts: int

    @contextlib.contextmanager
    def checked(self, file: Any, where: str) -> Iterator[tuple[Archive, Checked | None]]:
        """The archive in an open file and who signed it, all checked before any parsing; without ``trust`` nobody is asked."""
        signed: Checked | None = None
        with contextlib.ExitStack() as stack:
            if self.trust is None:
                archive = stack.enter_context(open_archive(file, where))
            else:
                archive, signed = stack.enter_context(checked(file, where, self.trust))
                admit(self.root, signed, archive.manifest.name, allow_older=self.allow_older)
            self.refuse_left(archive.manifest.name, Bundle(Path(where), archive.manifest).digest)
            yield archive, signed

    def named(self, archive: Archive) -> None:
        """Whether a pack that others have chosen is of the bundle that runs. Raises `BundleError`."""
        runs = _running_name(self.root)
        if Bundle(Path(archive.where), archive.manifest).digest in _known(self.root).left:
            return  # that is the better reason
        if runs and archive.manifest.name != runs and not self.rename:
            raise OtherName(
                f"it holds {archive.manifest.name}, and {self.root} runs {runs}",
                f"is it another product? To let it take the place of {runs}, add --rename, or name the file itself",
            )

    def refuse_left(self, name: str, digest: str) -> None:
        """What did not work here, or an operator went back from, is not taken a second time by whoever updates."""
        state, slot = _known(self.root), current_slot(self.root)
        running = state.slots.get(slot) if slot else None
        if not self.again and digest in state.left and not (running and running.digest == digest):  # a way back was cut off
            raise TurnedDown(
                f"{name} ({digest[:12]}) was installed here before, and left by a way back",
                "install a newer one (an engine that was built anew makes none); to try it once more add --again "
                f"(edgekit status --root {self.root} says what was left)",
            )


def _put(archive: Archive, signed: Checked | None, work: Path, order: _Order, steps: Steps) -> dict[str, Any]:
    """From the private copy to the switch; the root's lock is held."""
    root, manifest = order.root, archive.manifest
    order.named(archive)
    running = current_slot(root)
    known = _known(root).slots.get(running) if running else None
    if known and running and same(root / CURRENT, archive.manifest_bytes):
        times = _timed(root / CURRENT, order, steps) if order.max_latency_ms is not None else {}
        _remember(order, signed, manifest.name)
        known = renew(root, running, known, _told(signed))
        _trust_engines(_engines(manifest))  # whose notes may have been lost
        return {**answer(root, running, known), **times, "unchanged": True}
    check_room(root, *_needed(archive, root, 0))
    with steps("extract"):
        fresh = work / "bundle"
        make_readable(fresh)
        archive.extract(fresh)
    # Of what was signed, not of what lies there now: the root may be another user's.
    engines = _engines(manifest)
    tried = _tried(fresh, engines, order, steps)
    if (runs := _running_name(root)) and runs != manifest.name:
        say(f"{manifest.name} takes the place of {runs}", level="warning")
    with steps("switch"):
        record = msgspec.structs.replace(Record(manifest.name, Bundle(fresh, manifest).digest, 0, ""), **_told(signed))
        reason = fault(fresh, record)
        if reason or (fresh / MANIFEST).read_bytes() != archive.manifest_bytes:
            raise BundleError(
                f"{fresh} was changed during the install: {reason or 'it has another manifest'}", f"who else writes in {root}?"
            )
        _trust_engines(engines)
        # Before the switch: killed between, the device asks for no less.
        _remember(order, signed, manifest.name)
        slot, record = place(root, fresh, work, record, order.starts)
    return {**answer(root, slot, record), **tried, "unchanged": False}


def _engines(manifest: Manifest) -> list[str]:
    """sha256 of each engine."""
    return [digest for name, digest in manifest.files.items() if name.endswith(".engine")]


def _trust_engines(engines: Sequence[str]) -> None:
    for digest in engines:
        trust_engine(digest)
        if not is_trusted(digest):
            say(
                f"the engine {digest[:12]} cannot be noted as trusted in {state_folders()[0]}, so it will not be loaded: make "
                "that folder writable for this user, or name another (XDG_STATE_HOME), and install again",
                level="warning",
            )


def _told(signed: Checked | None) -> dict[str, Any]:
    """What a record says of the pack."""
    if signed is None:
        return {}
    whose = {"key_id": signed.key_ids[0], "key_ids": signed.key_ids}
    return {**whose, "pack_digest": signed.digest, "release": signed.statement.release}


def _trust(pack: str | os.PathLike[str], pub: PathOrPaths, folder: Path, revoked: PathOrPaths | None) -> Trust:
    """Whom this device believes, after a look at the list of revocations that lies where the pack does."""
    with tempfile.TemporaryDirectory() as near:
        if is_url(pack):
            fetch_beside(os.fspath(pack), Path(near) / REVOKED, MAX_BYTES + 1)
            return believe(pub, root=folder, revoked=revoked, pack=Path(near) / "F.zip")
        return believe(pub, root=folder, revoked=revoked, pack=Path(pack) / "F.zip" if Path(pack).is_dir() else pack)


def _known_by_its_end(url: str, order: _Order) -> dict[str, Any] | None:
    """The answer where a pack on a server is the one that runs, or the one that was left last: a device that asks every hour
    fetches `TRAILER_BYTES` for that, where the server gives parts. None where it has to be fetched."""
    if order.trust is None or current_slot(order.root) is None or not (end := fetch_end(url, TRAILER_BYTES)):
        return None
    with explained(order.root), hold(order.root, PATIENCE_S):
        trust = order.trust.under(order.root)
        order = replace(order, trust=trust)
        slot, state = current_slot(order.root), _known(order.root)
        runs, left = (state.slots.get(slot) if slot else None), state.returned.left if state.returned else None
        if left and left.pack_digest and left.digest in state.left and trust.check_end(end, left.pack_digest):
            order.refuse_left(left.name, left.digest)
        signed = trust.check_end(end, runs.pack_digest) if runs and runs.pack_digest else None
        if slot is None or runs is None or signed is None or order.max_latency_ms is not None:
            return None
        if fault(order.root / CURRENT, runs):
            return None
        _trust_engines(_engines(Bundle.open(order.root / CURRENT, verify=False).manifest))
        trust.check_digest(runs.digest)
        admit(order.root, signed, runs.name, allow_older=order.allow_older)
        _remember(order, signed, runs.name)
        return {**answer(order.root, slot, renew(order.root, slot, runs, _told(signed))), "unchanged": True}


def _fetched(url: str, copy: Path, order: _Order, steps: Steps) -> None:
    with steps("fetch"):
        fetch(url, copy, check_room(order.root, 0, 1))
        with open_pack(copy) as file, order.checked(file, url) as (archive, _):
            order.named(archive)


class _Found(NamedTuple):
    """A pack on a disk: its bytes, and what an install needs there (`_needed`)."""

    path: Path
    size: int
    needed: tuple[int, int]


def _copied(found: _Found, copy: Path, order: _Order, steps: Steps) -> None:
    """A copy that nobody else writes, where there is room for it and the rest."""
    check_room(order.root, *found.needed)
    with steps("copy"), open_pack(found.path) as file, copy.open("xb") as target:
        copy_of(file, found.size, target, found.path)


def _refuse_odd(pack: str | os.PathLike[str], folder: Path, max_latency_ms: float | None, starts: int) -> None:
    given_path(pack, "pack")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "name a folder: --root DIR")
    if os.geteuid() == 0 and folder.exists() and (owner := folder.stat().st_uid) != 0:  # who could not note a start then
        raise EdgekitError(
            f"{folder} belongs to user {owner}, and this is root", f"run it as that user: sudo -u '#{owner}' edgekit"
        )
    if folder.is_symlink() and not folder.exists():
        raise UsageError(f"{folder} is a link that leads nowhere", "name a folder: --root DIR")
    inside = folder.resolve()
    for above in inside.parents:
        if leads_to(above) and inside.is_relative_to(above / SLOTS):
            raise UsageError(f"{folder} lies inside of what is installed in {above}", f"did you mean --root {above}")
    if (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is a bundle, and a root is a folder of its own", "name another folder: --root DIR")
    for name, kind in ((CURRENT, stat.S_ISLNK), (SLOTS, stat.S_ISDIR)):
        path = folder / name
        if os.path.lexists(path) and not kind(path.lstat().st_mode):
            what = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
            raise EdgekitError(
                f"{path} is a {what} that no install has made, and in its way",
                f"look what it is, and move it away: mv {path} {folder.parent}; or choose another --root",
            )
    if not 1 <= starts <= 1000:
        raise UsageError(f"{starts} starts", "a trial has 1 to 1000 starts: --starts 3")
    if max_latency_ms is not None and not 0 < max_latency_ms < 1e9:
        raise UsageError(f"a latency of {max_latency_ms} ms", "give milliseconds above 0: --max-latency-ms 20")


def _looked_at(pack: str | os.PathLike[str], order: _Order, steps: Steps) -> _Found:
    """The pack's file, checked where it lies, and the room that it needs."""

    def release(path: Path) -> int:  # one that was left is the newest all the same: no older one takes its place
        with open_pack(path) as file, replace(order, again=True).checked(file, os.fspath(path)) as (archive, signed):
            order.named(archive)
            return signed.statement.release if signed else 0  # without a statement names decide

    with steps("check"), readable(pack):
        found = from_folder(Path(pack), release) if _holds_packs(Path(pack)) else Path(pack)
        with open_pack(found) as file, order.checked(file, os.fspath(found)) as (archive, _):
            archive.check()
            size = os.fstat(file.fileno()).st_size
            return _Found(found, size, _needed(archive, order.root, size))


def _holds_packs(pack: Path) -> bool:
    """A stick, or another folder that is no bundle."""
    return pack.is_dir() and not (pack / MANIFEST).is_file()


def _needed(archive: Archive, folder: Path, copy_bytes: int) -> tuple[int, int]:
    """Bytes and files that an install writes: a private copy, the bundle's files, its folders, links and notes."""
    folders = {entry.name.rpartition("/")[0] for entry in archive.entries}
    sizes = [copy_bytes, len(archive.manifest_bytes), *(entry.size_bytes for entry in archive.entries)]
    extra = len(folders) + 8
    return room_for(folder, sizes + [1] * extra), len(sizes) + extra


def _tried(fresh: Path, engines: Sequence[str], order: _Order, steps: Steps) -> dict[str, Any]:
    """What an unpacked bundle answers here, and how fast; raises where it may not run. Its engines are loaded there alone."""
    with Apart() as ask:
        with steps("golden"):
            golden = ask("self_test", fresh, order.backend, list(engines))
        running = current_slot(order.root)
        before = order.root / SLOTS / running if running else None
        with steps("latency"):
            times = ask("check_latency", fresh, before, order.backend, order.max_latency_ms)
    return {"golden": golden, **times}


def _timed(current: Path, order: _Order, steps: Steps) -> dict[str, Any]:
    """How fast what runs already answers. Raises `BudgetNotMet`."""
    with steps("latency"), Apart() as ask:
        return ask("check_latency", current, None, order.backend, order.max_latency_ms)


def _running_name(root: Path) -> str:
    """The name of the bundle that ``current`` leads to; empty where there is none, or nothing that can be read knows it."""
    slot = current_slot(root)
    if slot and (record := _known(root).slots.get(slot)):
        return record.name
    try:
        return Bundle.open(root / CURRENT, verify=False).manifest.name if slot else ""
    except BundleError:
        return ""


def _known(root: Path) -> State:
    """What ``state.json`` says; a damaged one says nothing, and is replaced with the switch."""
    try:
        return read_state(root)
    except BundleError:
        return State()


def _remember(order: _Order, signed: Checked | None, name: str) -> None:
    if order.trust is not None and signed is not None:
        remember(order.root, order.trust, signed, name)
