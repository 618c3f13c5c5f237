"""pack, sign, verify, keygen, revoke, install, rollback, status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.cli.common import Answer, answers, bundle_argument, out_option

__all__ = ["install", "keygen", "pack", "revoke", "rollback", "sign", "status", "verify"]

_FILE = click.Path(path_type=Path)
_pack_argument = click.argument("pack", metavar="F.zip", type=_FILE)
_pub_help = "Who may sign: a public key (edgekit.pub), a file of several, or a folder of .pub files; may be repeated."
_revoked = click.option(
    "--revoked", multiple=True, metavar="FILE", type=_FILE, help="A list from revoke; revoked.txt beside F.zip is read anyway."
)
_root = click.option("--root", required=True, metavar="DIR", type=_FILE, help="Where the slots lie on the device.")


@click.command("pack")
@bundle_argument()
@out_option("The packed bundle to write.", metavar="F.zip")
@click.option("--key", multiple=True, metavar="K", type=_FILE, help="Sign with this private key; may be repeated.")
@click.option("--release", type=int, metavar="N", help="Devices take no lower one again. [default: time of the last change]")
@click.option("--expires", metavar="WHEN", help="Last day to install it: 2027-12-31, or 90d after the bundle's last change.")
@answers
def pack(bundle: Path, out: Path, key: tuple[Path, ...], release: int | None, expires: str | None) -> Answer:
    """Pack bundle B into one file, signed where --key is given.

    The same bundle and keys give the same bytes. Weights, report and bench files stay at home.

    \b
    Example:
      edgekit pack parcel.edge --out parcel.edge.zip --key keys/edgekit.key
      edgekit pack parcel.edge --out parcel.edge.zip --key keys/edgekit.key --release 12 --expires 2027-12-31
    """
    from edgekit.deployment import contents
    from edgekit.deployment import pack as run

    packed = run(bundle, out=out, key=key, release=release, expires=expires)
    held = contents(packed)
    return Answer({"bundle": str(packed), **held}, f"{packed}: {len(held['files'])} files, {_sizes(held)}, {_stated(held)}")


@click.command("sign")
@_pack_argument
@click.option("--key", required=True, multiple=True, metavar="K", type=_FILE, help="The private key; may be repeated.")
@answers
def sign(pack: Path, key: tuple[Path, ...]) -> Answer:
    """Add a signature to a packed bundle, for devices that know another key.

    \b
    Example:
      edgekit sign parcel.edge.zip --key keys/2027/edgekit.key
    """
    from edgekit.deployment import sign as run

    held = run(pack, key=key)
    return Answer({"bundle": str(pack), **held}, f"{pack}: {_stated(held)}")


def _sizes(held: dict[str, Any]) -> str:
    return f"{held['size_bytes'] / 1e6:.2f} MB"


def _stated(held: dict[str, Any]) -> str:
    """Who signed what, in words."""
    signed = f"signed by key {', '.join(held['key_ids'])}" if held["key_ids"] else "not signed"
    until = f", to be installed until {held['expires']}" if held["expires"] else ""
    return f"release {held['release']} of {held['name']}{until}, {signed}"


@click.command("verify")
@_pack_argument
@click.option("--pub", required=True, multiple=True, metavar="P", type=_FILE, help=_pub_help)
@_revoked
@click.option("--sbom", metavar="F.json", type=_FILE, help="Write the list of what is inside here (CycloneDX 1.6).")
@answers
def verify(pack: Path, pub: tuple[Path, ...], revoked: tuple[Path, ...], sbom: Path | None) -> Answer:
    """Check a packed bundle's signature, then all names, sizes and hashes in it.

    \b
    Example:
      edgekit verify parcel.edge.zip --pub keys/edgekit.pub
      edgekit verify parcel.edge.zip --pub keys/ --revoked revoked.txt --sbom parcel.cdx.json
    """
    from edgekit.deployment import verify as run

    data = run(pack, pub=pub, revoked=revoked, sbom=sbom)
    return Answer({**data, "sbom": sbom}, f"{pack}: {len(data['files'])} files, {_stated(data)}")


@click.command("revoke")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@out_option("The list to write; one that is there, signed by the same key, is added to.", metavar="FILE")
@click.option("--key", required=True, metavar="K", type=_FILE, help="Sign with this private key, which devices trust.")
@answers
def revoke(ids: tuple[str, ...], out: Path, key: Path) -> Answer:
    """List keys and packs that devices must no longer believe.

    ID is a key id (16 hex digits, from keygen) or the digest of a pack or a bundle (64, from verify --json). What a device has
    once read in such a list stays revoked there.

    \b
    Example:
      edgekit revoke 3b0c44298fc1c149 --out revoked.txt --key keys/2027/edgekit.key
    """
    from edgekit.deployment import revoke as run

    data = run(ids, out=out, key=key)
    return Answer(data, f"{out}: {len(data['keys'])} keys and {len(data['digests'])} digests, number {data['number']}")


@click.command("keygen")
@click.option("--out", required=True, metavar="DIR", type=_FILE, help="Folder for edgekit.key and edgekit.pub.")
@answers
def keygen(out: Path) -> Answer:
    """Make a key pair for signing packs: DIR/edgekit.key stays secret, DIR/edgekit.pub goes to the devices.

    \b
    Example:
      edgekit keygen --out keys
    """
    from edgekit.deployment import keygen as run

    return Answer(run(out))


@click.command("install")
@_pack_argument
@_root
@click.option("--pub", multiple=True, metavar="P", type=_FILE, help=f"{_pub_help} Required unless --unsigned.")
@click.option("--unsigned", is_flag=True, help="Accept a pack without a signature: for your own desk, not for a fleet.")
@_revoked
@click.option("--allow-older", is_flag=True, help="Take a release older than one that this device has accepted.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Backend of the self-test.")
@answers
def install(
    pack: Path, root: Path, pub: tuple[Path, ...], unsigned: bool, revoked: tuple[Path, ...], allow_older: bool, backend: str
) -> Answer:
    """Install a packed bundle on this device: verify, extract, test, then switch DIR/current to it.

    The slot that runs is not touched before the switch; rollback leads back to it.

    \b
    Example:
      edgekit install parcel.edge.zip --root /opt/models/parcel --pub edgekit.pub
      edgekit scan /opt/models/parcel/current --source images/ --sink jsonl:events.jsonl
    """
    from edgekit.deployment import install as run

    data = run(pack, root=root, pub=pub or None, unsigned=unsigned, revoked=revoked, allow_older=allow_older, backend=backend)
    verb = "runs already" if data["unchanged"] else "now runs"
    return Answer(data, f"{data['name']} ({data['digest'][:12]}) {verb} from {data['bundle']}, slot {data['slot']}")


@click.command("rollback")
@_root
@answers
def rollback(root: Path) -> Answer:
    """Go back to the bundle that was installed before.

    \b
    Example:
      edgekit rollback --root /opt/models/parcel
    """
    from edgekit.deployment import rollback as run

    data = run(root)
    return Answer(data, f"{data['name']} ({data['digest'][:12]}) runs again from {data['bundle']}, slot {data['slot']}")


@click.command("status")
@_root
@answers
def status(root: Path) -> Answer:
    """Say what is installed under DIR and whether its files are whole. Exit 1 where they are not.

    \b
    Example:
      edgekit status --root /opt/models/parcel
    """
    from edgekit.deployment import status as run

    data = run(root)
    if data["slot"] is None and data["reason"] == "nothing is installed":
        return Answer(data, f"nothing is installed in {root}")
    if data["healthy"]:
        back = f"rollback leads to {data['previous']['name']}" if data["previous"] else "no older bundle"
        return Answer(data, f"{data['name']} ({data['digest'][:12]}), slot {data['slot']}, healthy; {back}")
    hint = f"edgekit rollback --root {root}" if data["previous"] else f"edgekit install F.zip --root {root}"
    click.echo(f"error: {data['reason']}", err=True)
    click.echo(f"hint: {hint}", err=True)
    return Answer({**data, "error": data["reason"], "hint": hint}, f"slot {data['slot']}: not healthy", 1)
