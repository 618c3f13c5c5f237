"""pack, verify, keygen, install, rollback, status."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.common import Answer, answers, bundle_argument, out_option

__all__ = ["install", "keygen", "pack", "rollback", "status", "verify"]

_FILE = click.Path(path_type=Path)
_pack_argument = click.argument("pack", metavar="F.zip", type=_FILE)
_root = click.option("--root", required=True, metavar="DIR", type=_FILE, help="Where the slots lie on the device.")


@click.command("pack")
@bundle_argument()
@out_option("The packed bundle to write.", metavar="F.zip")
@click.option("--key", metavar="K", type=_FILE, help="Sign with this private key (from keygen).")
@answers
def pack(bundle: Path, out: Path, key: Path | None) -> Answer:
    """Pack bundle B into one file, signed where --key is given.

    The same bundle and key give the same bytes. Weights, report and bench files stay at home.

    \b
    Example:
      edgekit pack parcel.edge --out parcel.edge.zip --key keys/edgekit.key
    """
    from edgekit.deployment import contents
    from edgekit.deployment import pack as run

    packed = run(bundle, out=out, key=key)
    held = contents(packed)
    signed = f"signed by key {held['key_id']}" if held["key_id"] else "not signed"
    text = f"{packed}: {len(held['files'])} files, {held['size_bytes'] / 1e6:.2f} MB, {signed}"
    return Answer({"bundle": str(packed), **held}, text)


@click.command("verify")
@_pack_argument
@click.option("--pub", required=True, metavar="P", type=_FILE, help="The public key of who may sign (edgekit.pub).")
@answers
def verify(pack: Path, pub: Path) -> Answer:
    """Check a packed bundle's signature, then all names, sizes and hashes in it; or that of a report of doctor --chaos.

    \b
    Example:
      edgekit verify parcel.edge.zip --pub keys/edgekit.pub
    """
    from edgekit.chaos.report import check_report, is_report

    if is_report(pack):
        report = check_report(pack, pub)
        counts = f"{report['passed']} passed, {report['failed']} failed, {report['not_run']} not run"
        return Answer(report, f"{pack}: report of {report['ended']}, {counts}, signed by key {report['key_id']}")
    from edgekit.deployment import verify as run

    data = run(pack, pub=pub)
    return Answer(data, f"{pack}: {data['name']}, {len(data['files'])} files, signed by key {data['key_id']}")


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
@click.option("--pub", metavar="P", type=_FILE, help="The public key of who may sign; required unless --unsigned.")
@click.option("--unsigned", is_flag=True, help="Accept a pack without a signature: for your own desk, not for a fleet.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Backend of the self-test.")
@answers
def install(pack: Path, root: Path, pub: Path | None, unsigned: bool, backend: str) -> Answer:
    """Install a packed bundle on this device: verify, extract, test, then switch DIR/current to it.

    The slot that runs is not touched before the switch; rollback leads back to it.

    \b
    Example:
      edgekit install parcel.edge.zip --root /opt/models/parcel --pub edgekit.pub
      edgekit scan /opt/models/parcel/current --source images/ --sink jsonl:events.jsonl
    """
    from edgekit.deployment import install as run

    data = run(pack, root=root, pub=pub, unsigned=unsigned, backend=backend)
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
