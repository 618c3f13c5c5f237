"""What must be refused: packs with a flipped bit, of another key, without a signature; bundles with a flipped bit."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from edgekit.bundle import MANIFEST, Bundle
from edgekit.deployment import keygen, pack, rollback, verify
from edgekit.errors import BundleError, SignatureError
from edgekit.runtime import Model

from .case import Bench, Broken
from .stage import bundle_of
from .updates import Site, flip

__all__ = ["bundle_damaged", "pack_damaged", "pack_expired", "pack_foreign", "pack_older"]


def _signed(bench: Bench) -> Site:
    site = Site(bench)
    site.public()
    return site


def _refused(bench: Bench, site: Site, path: Path, what: str) -> None:
    before = site.print_of()
    try:
        site.install_pack(path)
    except SignatureError:
        bench.count("refused")
    except Exception as error:  # noqa: BLE001  a parser that saw it first
        raise Broken(f"{what} was not refused by its signature but by {type(error).__name__}: {error}") from None
    else:
        raise Broken(f"{what} was installed")
    bench.check(site.print_of() == before, f"{what} was refused and has changed the root")


def pack_damaged(bench: Bench) -> None:
    """The pack is damaged in place and mended again: a thousand copies of a large one would wear a flash disk."""
    site = _signed(bench)
    path = bench.folder / "damaged.zip"
    shutil.copy(site.packs["chaos-a"], path)
    size = path.stat().st_size
    for number in bench.each():
        if number % 10 == 8:
            keep = max(bench.rng.randrange(size), size - (1 << 16))
            tail = path.read_bytes()[keep:]
            os.truncate(path, keep)
            _refused(bench, site, path, f"a pack that is cut short by {size - keep} bytes")
            _append(path, tail)
        elif number % 10 == 9:
            _append(path, bench.rng.randbytes(bench.rng.randrange(1, 200)))
            _refused(bench, site, path, "a pack with bytes added")
            os.truncate(path, size)
        else:
            at, bit = bench.rng.randrange(size), bench.rng.randrange(8)
            flip(path, at, bit)
            _refused(bench, site, path, f"a pack with bit {bit} of byte {at} flipped")
            flip(path, at, bit)
    verify(path, pub=site.public())  # mended, it is taken


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def pack_foreign(bench: Bench) -> None:
    site = _signed(bench)
    foreign = Path(keygen(bench.folder / "foreign")["key"])
    unsigned = site.packed(bundle_of(bench, "chaos-unsigned"), None)
    other = site.packed(bundle_of(bench, "chaos-foreign"), foreign)
    for _ in bench.each():
        _refused(bench, site, unsigned, "a pack without a signature")
        _refused(bench, site, other, "a pack of another key")


def _packed(bench: Bench, site: Site, version: str, **stated: Any) -> Path:
    """A signed pack of the version, and what it states."""
    bundle = bundle_of(bench, "chaos-c", version=version)
    return pack(bundle, out=bundle.with_suffix(".zip"), key=site.key, **stated)


def pack_older(bench: Bench) -> None:
    site = _signed(bench)
    old, new = (_packed(bench, site, f"{release}", release=release) for release in (4, 5))
    site.apart(partial(site.install_pack, new))
    for _ in bench.each():
        _refused(bench, site, old, "an older release")
    rollback(site.root)
    _refused(bench, site, old, "an older release after a rollback")


def pack_expired(bench: Bench) -> None:
    site = _signed(bench)
    path = _packed(bench, site, "1", expires="2020-01-01")
    for _ in bench.each():
        _refused(bench, site, path, "a pack whose last day is over")


def bundle_damaged(bench: Bench) -> None:
    path = bundle_of(bench, "offered")
    names = [*sorted(Bundle.open(path).manifest.files), MANIFEST]
    for _ in bench.each():
        file = path / bench.rng.choice(names)
        at, bit = bench.rng.randrange(file.stat().st_size), bench.rng.randrange(8)
        flip(file, at, bit)
        try:
            with Model.open(path):
                raise Broken(f"a bundle with bit {bit} of byte {at} of {file.name} flipped was opened")
        except BundleError:
            bench.count("refused")
        flip(file, at, bit)
    with Model.open(path):  # mended, it is taken
        pass
