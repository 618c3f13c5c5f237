"""pack, sign, verify, keygen, revoke, install, rollback, status."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgekit.cli.common import Answer, answers, bundle_argument, out_option
from edgekit.errors import EdgekitError
from edgekit.progress import say

if TYPE_CHECKING:
    from edgekit.installed import Start

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
    Examples:
      edgekit pack parcel.edge --out parcel.edge.zip --key keys/edgekit.key
      edgekit pack parcel.edge --out parcel.edge.zip --key keys/edgekit.key --release 12 --expires 2027-12-31
    \f
    Returns ``bundle`` (the path of the pack) and what it holds:
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
    Examples:
      edgekit sign parcel.edge.zip --key keys/2027/edgekit.key
    \f
    Returns ``bundle`` (the path of the pack) and what it holds:
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
    """Check a packed bundle's signature, then all names, sizes and hashes in it; or that of a report of doctor --chaos.

    \b
    Examples:
      edgekit verify parcel.edge.zip --pub keys/edgekit.pub
      edgekit verify parcel.edge.zip --pub keys/ --revoked revoked.txt --sbom parcel.cdx.json
    \f
    Returns ``sbom`` (the path, or None) and of a pack:
    """
    from edgekit.chaos.report import check_report, is_report
    from edgekit.errors import UsageError

    if pack.is_file() and is_report(pack):  # a pipe would be waited for
        if sbom is not None:
            raise UsageError(f"{pack} is a report: there is nothing to list in it", "leave --sbom out")
        report = check_report(pack, pub, revoked or None)
        counts = ", ".join(
            f"{sum(case.get('outcome') == outcome for case in report['cases'])} {outcome}"
            for outcome in ("passed", "failed", "not run")
        )
        counts = f"{len(report['cases'])} cases: {counts}" + ("" if report.get("complete") else _partial(report))
        return Answer(report, f"{pack}: report of {report['ended']}, {counts}, signed by key {report['key_id']}")
    from edgekit.deployment import verify as run

    data = run(pack, pub=pub, revoked=revoked, sbom=sbom)
    return Answer({**data, "sbom": sbom}, f"{pack}: {len(data['files'])} files, {_stated(data)}")


def _partial(report: dict[str, Any]) -> str:
    missing = [str(case.get("name")) for case in report["cases"] if case.get("outcome") == "not run"]
    return f"; it is partial, cut off by {report.get('cut_off_by') or 'a signal'}; not run: {', '.join(missing)}"


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
    Examples:
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
    Examples:
      edgekit keygen --out keys
    """
    from edgekit.deployment import keygen as run

    return Answer(run(out))


@click.command("install")
@click.argument("pack", metavar="F.zip|DIR|URL", type=str)
@_root
@click.option("--pub", multiple=True, metavar="P", type=_FILE, help=f"{_pub_help} Required unless --unsigned.")
@click.option("--unsigned", is_flag=True, help="Accept a pack without a signature: for your own desk, not for a fleet.")
@_revoked
@click.option("--allow-older", is_flag=True, help="Take a release older than one that this device has accepted.")
@click.option(
    "--again", is_flag=True, help="Take a bundle that was left here (rollback, failed starts), too; else exit code 3."
)
@click.option("--rename", is_flag=True, help="From a folder or an address, take a bundle of another name than runs.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Backend of the self-test.")
@click.option(
    "--max-latency-ms",
    metavar="MS",
    type=click.FloatRange(0, min_open=True),
    help="Refuse a bundle whose answers take longer here (p99, one golden input at a time); exit code 3.",
)
@click.option(
    "--starts",
    default=3,
    show_default=True,
    metavar="N",
    type=click.IntRange(1, 1000),
    help="Starts that may fail before the scan goes back to the older bundle by itself.",
)
@answers
def install(
    pack: str,
    root: Path,
    pub: tuple[Path, ...],
    unsigned: bool,
    revoked: tuple[Path, ...],
    allow_older: bool,
    again: bool,
    rename: bool,
    backend: str,
    max_latency_ms: float | None,
    starts: int,
) -> Answer:
    """Install a packed bundle on this device: verify, extract, test, then switch DIR/current to it.

    A folder (a USB stick), or the address of one, gives its newest pack. The slot that runs is not touched before the
    switch; rollback leads back to it. A running scan takes the new bundle when it is restarted, and then has to show that it
    works.

    \b
    Examples:
      edgekit install parcel.edge.zip --root /opt/models/parcel --pub edgekit.pub
      edgekit install /media/stick --root /opt/models/parcel --pub edgekit.pub --max-latency-ms 20
      edgekit install https://updates.example/parcel/ --root /opt/models/parcel --pub edgekit.pub
      edgekit scan /opt/models/parcel/current --source images/ --sink jsonl:events.jsonl
    """
    from edgekit.deployment import install as run

    trust: dict[str, Any] = {"pub": pub or None, "unsigned": unsigned, "revoked": revoked}
    asked: dict[str, Any] = {"allow_older": allow_older, "again": again, "rename": rename}
    data = run(pack, root=root, backend=backend, max_latency_ms=max_latency_ms, starts=starts, **trust, **asked)
    return Answer(data, _installed(data, starts))


def _installed(data: dict[str, Any], starts: int) -> str:
    verb = "runs already" if data["unchanged"] else "now runs"
    release = f", release {data['release']}" if data["release"] is not None else ""
    rows = [f"{data['name']} ({data['digest'][:12]}{release}) {verb} from {data['bundle']}, slot {data['slot']}"]
    rows.append(f"  pack      {data['pack']}")
    golden, new, old = data.get("golden"), data.get("latency_ms"), data.get("latency_before_ms")
    if golden:
        rows.append(f"  golden    off by {golden['relative']:.2g} at most, {golden['snr_db']:.1f} dB")
    if new:
        before = f"; before: {old['p50']:.3g} ms, p99 {old['p99']:.3g} ms" if old else ""
        rows.append(f"  latency   {new['p50']:.3g} ms, p99 {new['p99']:.3g} ms" + before)
    if data["unchanged"]:
        return "\n".join(rows)
    rows.append("  took      " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in data["seconds"].items()))
    rows.append(f"  on trial  for {starts} start{'s' if starts > 1 else ''}; restart the scan to take it")
    return "\n".join(rows)


@click.command("rollback")
@_root
@answers
def rollback(root: Path) -> Answer:
    """Go back to the bundle that was installed before.

    \b
    Examples:
      edgekit rollback --root /opt/models/parcel
    """
    from edgekit.deployment import rollback as run

    data = run(root)
    return Answer(data, f"{data['name']} ({data['digest'][:12]}) runs again from {data['bundle']}, slot {data['slot']}")


@click.command("status")
@_root
@click.option(
    "--mark",
    type=click.Choice(["start", "healthy", "stopped"]),
    help="First note what an application of your own does: it starts (before it loads DIR/current), it has worked, or it was "
    "stopped in order. edgekit scan does so by itself.",
)
@answers
def status(root: Path, mark: Literal["start", "healthy", "stopped"] | None) -> Answer:
    """Say what is installed under DIR, whether its files are whole and whether it has proved itself. Exit 1 where they are not.

    \b
    Examples:
      edgekit status --root /opt/models/parcel
      edgekit status --root /opt/models/parcel --mark start && my-application /opt/models/parcel/current
    """
    from edgekit.deployment import mark as note
    from edgekit.deployment import status as run

    start = note(root, mark) if mark else None
    if start and start.doubt:
        say(f"the trial of {root}: {start.doubt}", level="warning")
    if mark == "start" and start:  # the application starts, whatever is wrong with the notes
        with contextlib.suppress(EdgekitError):
            data = run(root)
            if not data["healthy"]:
                say(f"{root}: {data['reason']}", level="warning")
            return Answer(data, _told(data, root, start))
        return Answer({"bundle": str(start.bundle), "doubt": start.doubt}, f"{start.bundle} starts, and nothing is noted")
    data = run(root)
    if data["slot"] is None and data["reason"] == "nothing is installed":
        return Answer(data, f"nothing is installed in {root}")
    text = _told(data, root, start)
    if data["healthy"]:
        return Answer(data, text)
    hint = f"edgekit rollback --root {root}" if data["previous"] else f"edgekit install F.zip --root {root}"
    click.echo(f"error: {data['reason']}", err=True)
    click.echo(f"hint: {hint}", err=True)
    return Answer({**data, "error": data["reason"], "hint": hint}, text, 1)


def _told(data: dict[str, Any], root: Path, start: Start | None) -> str:
    text = _shown(data, root)
    return f"went back by itself: {start.returned.reason}\n{text}" if start and start.returned else text


def _shown(data: dict[str, Any], root: Path) -> str:
    """What runs, its trial, the way back, the last return and the space, a line each."""
    if data["slot"] is None:
        return f"{root}: nothing runs"

    def of(row: dict[str, Any]) -> str:
        key = f", release {row['release']}, signed by key {row['key_id']}" if row["key_id"] else ", no signature known"
        return f"{row['name']} ({row['digest'][:12]}), install {row['sequence']} of {row['installed']}{key}"

    known = of(data) if data["name"] else "unknown"
    how = "whole" if data["healthy"] else "damaged" if data["name"] else "whether it is whole is not known"
    rows = [("running", f"{known}, slot {data['slot']}, {how}")]
    trial = data["trial"]
    if trial:
        words = (
            f"start {trial['start']} of {trial['allowed']}" if trial["start"] else f"no start yet, {trial['allowed']} allowed"
        )
        words += f", {trial['failed']} failed" if trial["failed"] else ""
        words += {True: ", running now", None: ", running as far as is known", False: ""}[trial["running"]]
        rows.append(("on trial", words + (f"; the last said: {trial['error']}" if trial["error"] else "")))
    elif data["confirmed"]:
        rows.append(("confirmed", data["confirmed"]))
    rows.append(("previous", of(data["previous"]) if data["previous"] else "none to go back to"))
    if gone := data["returned"]:
        rows.append(
            ("returned", f"{gone['time']} from {gone['left']['name']} ({gone['left']['digest'][:12]}): {gone['reason']}")
        )
    if left := data["left"]:
        shown = ", ".join(digest[:12] for digest in left[:-4:-1]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        rows.append(("left", f"{shown}: install takes them only with --again"))
    rows.append(("free", f"{data['free_bytes'] / 1e9:.1f} GB"))
    return "\n".join(f"{name:<10} {words}" for name, words in rows)
