"""Whom a device believes: the keys it was given, what has been revoked since, and what it has accepted before.

    ROOT/trust.json     the highest release accepted of each bundle name and by whose word, all that was ever revoked, the
                        latest time seen

Time: a clock may be set back, or start in 1970 where there is no battery. So what counts is the later of the clock and the
latest time seen at an install before. Where neither can be right (before `BUILT`), a pack that expires is not accepted.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from edgekit.errors import SignatureError, first_line
from edgekit.files import replace_note
from edgekit.installed import PATIENCE_S, hold
from edgekit.progress import say

from .revoking import REVOKED, Revoked, read_list
from .signing import NEVER, Checked, PathOrPaths, as_paths, check_end, check_signature, public_keys

__all__ = ["TRUST", "State", "Trust", "admit", "believe", "memory", "remember"]

TRUST = "trust.json"
#: No clock that shows less is right: this was written later.
BUILT = "2026-01-01T00:00:00Z"
_MAX_TRUST_BYTES = 16 << 20


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``trust.json``. ``releases``: bundle name -> the highest accepted of those that the same keys signed, by their ids joined
    with "+"; a bare number is of a time when signers were not noted. ``seal``: sha256 over the rest, so that a damaged file is
    noticed and not believed."""

    version: Literal[1] = 1
    releases: dict[str, int | dict[str, int]] = {}
    revoked: Revoked = Revoked()
    time: str = ""
    seal: str = ""

    def accepted(self, name: str) -> dict[str, int]:
        """Keys -> release; an unknown signer's keys are empty text, which no list revokes."""
        found = self.releases.get(name, {})
        return {"": found} if isinstance(found, int) else found

    def highest(self, name: str) -> int:
        """The highest release of ``name`` that a key in force has vouched for, -1 where there was none.

        What a stolen key has signed does not keep a device from its makers' packs once that key is revoked.
        """
        accepted = self.accepted(name).items()
        return max((release for keys, release in accepted if not set(keys.split("+")) <= self.revoked.keys), default=-1)


@dataclass(frozen=True)
class Trust:
    """What packs are held against: keys by id, what is revoked, and the time in UTC (empty where nobody knows it)."""

    keys: Mapping[str, Any]
    revoked: Revoked
    now: str

    def under(self, root: Path) -> Trust:
        """With what was revoked and seen there since. The caller holds the root's lock."""
        state = memory(root)
        return replace(self, revoked=self.revoked | state.revoked, now=max(self.now, state.time) if self.now else "")

    def check(self, file: IO[bytes]) -> Checked:
        """Check an open pack: signature, revocation, expiry; nothing is parsed. Raises `SignatureError` as said there."""
        return self._in_force(check_signature(file, self.keys, self.revoked.keys))

    def check_end(self, end: bytes, digest: str) -> Checked | None:
        """The same of a pack of which only the end is here, where it is the one with this digest; None where it is another."""
        signed = check_end(end, digest, self.keys, self.revoked.keys)
        return self._in_force(signed) if signed else None

    def _in_force(self, signed: Checked) -> Checked:
        """Raise `SignatureError` for what is revoked or has expired."""
        self.check_digest(signed.digest)
        expires = signed.statement.expires
        if expires != NEVER and not self.now:
            raise SignatureError(
                f"the pack expires at {expires}, and this device's clock shows {_clock()}: nobody can tell whether it has",
                "set the clock (timedatectl, date -s), then try again",
            )
        if expires < self.now:
            seen = f", though its clock shows {_clock()}" if _clock() < self.now else ""
            raise SignatureError(
                f"the pack expired at {expires}; this device has seen {self.now}{seen}",
                f"get a newer pack; where a clock was wrong, set it (after an install in the future: remove ROOT/{TRUST})",
            )
        return signed

    def check_digest(self, digest: str) -> None:
        """Raise `SignatureError` where this pack, or this bundle, is revoked."""
        if digest in self.revoked.digests:
            raise SignatureError(f"{digest} is revoked by its makers", "do not use it; get a newer pack")


def believe(
    pub: PathOrPaths,
    *,
    root: Path | None = None,
    revoked: PathOrPaths | None = None,
    pack: str | os.PathLike[str] | None = None,
) -> Trust:
    """Read keys, the state under ``root`` and lists of revocations, each once.

    Lists are ``revoked`` and, if it is there, ``revoked.txt`` beside ``pack``. What they add is on disk under ``root``, if that
    is there, before this returns, so that it holds even where the pack is then refused. Takes the root's lock for that moment.

    Raises `SignatureError` for keys that are none, for a list of ``revoked`` that no trusted key signed, for any list that a
    trusted key signed and somebody changed, and where ``trust.json`` is damaged.
    """
    keys = public_keys(pub)
    state = memory(root) if root else State()
    found = Revoked()
    for path in as_paths(revoked):
        listed = _believed(path, keys, state.revoked | found)
        if listed is None:
            raise SignatureError(f"no trusted key has signed {path}", "fetch it again, or give the public key of its signer")
        found |= listed
    if pack is not None and (beside := Path(pack).with_name(REVOKED)).is_file():
        listed = _believed(beside, keys, state.revoked | found)
        if listed is None:
            say(f"{beside} is not believed: no trusted key has signed it")
        found |= listed or Revoked()
    if root is not None and root.is_dir() and state.revoked | found != state.revoked:
        with hold(root, PATIENCE_S):
            state = memory(root)
            state = msgspec.structs.replace(state, revoked=state.revoked | found)
            _write_state(root, state)
    clock = _clock()
    now = max(state.time, clock)
    return Trust(keys, state.revoked | found, now if now >= BUILT else "")


def _believed(path: Path, keys: Mapping[str, Any], known: Revoked) -> Revoked | None:
    """What a list says; None where no trusted key signed it, or one that is revoked and now revokes more."""
    read = read_list(path, keys)
    if read is None:
        return None
    listed, signer = read
    if signer not in known.keys:
        return listed
    return Revoked() if listed.keys <= known.keys and listed.digests <= known.digests else None


def admit(root: Path, signed: Checked, name: str, *, allow_older: bool = False) -> None:
    """Whether a pack of the bundle ``name`` may follow what was accepted under ``root``; the same release again may.

    Raises `SignatureError` where it is older, unless ``allow_older``, and where ``trust.json`` is damaged.
    """
    highest = memory(root).highest(name)
    if signed.statement.release < highest and not allow_older:
        raise SignatureError(
            f"release {signed.statement.release} of {name} is older than {highest}, which this device has accepted: "
            "an old pack may have known faults, and its signature is as good as ever",
            "get the newest; if this one is what you want, add --allow-older",
        )


def remember(root: Path, trust: Trust, signed: Checked, name: str) -> None:
    """Note in ``root/trust.json`` that a pack was accepted. The caller holds the root's lock.

    To be called just before the switch: killed between the two, the device knows of a release that it does not run yet, which
    it takes when it comes again. The other way round an older pack would be accepted.
    """
    (root / f".{TRUST}.new").unlink(missing_ok=True)  # left by a crash
    before = memory(root)
    signers = "+".join(sorted(signed.key_ids))
    known = before.accepted(name)
    known = {**known, signers: max(known.get(signers, 0), signed.statement.release)}
    releases = {**before.releases, name: known}
    seen = max(before.time, trust.now)
    state = State(releases=releases, revoked=before.revoked | trust.revoked, time=seen)
    if state != msgspec.structs.replace(before, seal=""):
        _write_state(root, state)


def _clock() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# trust.json


def memory(root: Path) -> State:
    """What ``trust.json`` under a root says; empty where there is none.

    Raises `SignatureError` where it is damaged: nothing is guessed.
    """
    path = root / TRUST
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TRUST_BYTES)
        state = msgspec.json.decode(data, type=State)
    except IsADirectoryError:
        raise _damaged(path, "it is a folder") from None
    except (FileNotFoundError, NotADirectoryError):
        return State()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, first_line(error)) from None
    if state.seal != _seal(state):
        raise _damaged(path, "it does not fit its seal")
    return state


def _damaged(path: Path, reason: str) -> SignatureError:
    return SignatureError(
        f"{path} is damaged: {reason}; what this device has accepted before is not known",
        "what is installed runs on; to forget it all, and accept any release that is signed, remove the file",
    )


def _seal(state: State) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(state, seal=""), order="sorted")).hexdigest()


def _write_state(root: Path, state: State) -> None:
    data = msgspec.json.encode(msgspec.structs.replace(state, seal=_seal(state)), order="sorted")
    replace_note(root / TRUST, msgspec.json.format(data, indent=1) + b"\n")
