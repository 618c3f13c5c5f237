"""What must be refused: packs with a flipped bit, of another key, without a signature; bundles with a flipped bit."""

from __future__ import annotations

from pathlib import Path

from edgekit.bundle import Bundle
from edgekit.deployment import keygen, verify
from edgekit.errors import BundleError, SignatureError
from edgekit.runtime import Model

from .case import Bench, Broken, NotHere
from .stage import bundle_of
from .updates import Site

__all__ = ["bundle_damaged", "pack_damaged", "pack_foreign"]


def _signed(bench: Bench) -> Site:
    site = Site(bench)
    if site.pub is None:
        raise NotHere("cryptography is not installed: pip install 'edgekit[sign]'")
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
    site = _signed(bench)
    sound = site.packs["chaos-a"]
    data, path = sound.read_bytes(), bench.folder / "damaged.zip"
    for number in bench.each():
        if number % 10 == 8:
            path.write_bytes(data[: bench.rng.randrange(len(data))])
            what = "a pack that is cut short"
        elif number % 10 == 9:
            path.write_bytes(data + bench.rng.randbytes(bench.rng.randrange(1, 200)))
            what = "a pack with bytes added"
        else:
            at, bit = bench.rng.randrange(len(data)), bench.rng.randrange(8)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            what = f"a pack with bit {bit} of byte {at} flipped"
        _refused(bench, site, path, what)
    verify(sound, pub=site.pub)  # type: ignore[arg-type]  # the sound one is still taken


def pack_foreign(bench: Bench) -> None:
    site = _signed(bench)
    foreign = Path(keygen(bench.folder / "foreign")["key"])
    unsigned = site.packed(bundle_of(bench, "chaos-unsigned"), None)
    other = site.packed(bundle_of(bench, "chaos-foreign"), foreign)
    for _ in bench.each():
        _refused(bench, site, unsigned, "a pack without a signature")
        _refused(bench, site, other, "a pack of another key")


def bundle_damaged(bench: Bench) -> None:
    path = bundle_of(bench, "offered")
    names = [*sorted(Bundle.open(path).manifest.files), "manifest.json"]
    for _ in bench.each():
        file = path / bench.rng.choice(names)
        data = file.read_bytes()
        at, bit = bench.rng.randrange(len(data)), bench.rng.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            with Model.open(path):
                raise Broken(f"a bundle with bit {bit} of byte {at} of {file.name} flipped was opened")
        except BundleError:
            bench.count("refused")
        file.write_bytes(data)
    with Model.open(path):  # the sound one is still taken
        pass
