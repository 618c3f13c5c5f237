"""The provisioning script as root of a device: this system's own tree behind an overlay, which is gone when the tests end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import pack, status

ROOT = Path(__file__).parents[2]
PROVISION = ROOT / "deploy" / "jetson" / "provision.sh"
ENVIRONMENT = "/opt/edgekit/venv"

# Kept open by its stdin: the mounts end with it. What Python and the packages of these tests lie in is for all to enter there.
TREE = """
set -e
mount -t tmpfs none "$1"
mkdir "$1/up" "$1/work" "$1/tree"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/tree"
for part in proc dev sys; do mount --rbind "/$part" "$1/tree/$part"; done
mount -t tmpfs none "$1/tree/run"
rm -rf "$1/tree/opt/edgekit" "$1/tree/etc/edgekit" "$1/tree/var/lib/edgekit"
echo ready
read -r _ || :
"""

# Environments without a download: they see the packages of these tests, pip among them. All else is Python's.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    for place; do :; done
    {python} -m venv --without-pip "$place"
    echo {packages} >"$(echo "$place"/lib/python3*/site-packages)/tests.pth"
    [ "$CUT" != environment ] || kill -9 $PPID
else
    exec {python} "$@"
fi
"""

# No systemd runs here: what it is asked is noted; FAIL makes one request fail, CUT ends the script in the middle of one.
SYSTEMD = """#!/bin/sh
name=$(basename "$0")
echo "$name $*" >>/run/asked
case "$name $*" in
*${CUT:-none}*) kill -9 $PPID ;;
*${FAIL:-none}*) exit 1 ;;
*is-active*) [ -e /run/active ] ;;
*"enable --now"*) touch /run/active; exec /usr/bin/systemctl --root=/ enable "$4" ;;
systemctl*is-enabled*) exec /usr/bin/"$name" "$@" ;;
systemd-*) exec /usr/bin/"$name" "$@" ;;
esac
"""


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env={**os.environ, **environment})


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{program} is not installed")


class Device(NamedTuple):
    pid: int
    root: Path
    words: tuple[str, ...]

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in the device's tree, with no more of this process's environment than the path."""
        command = [
            "nsenter",
            "--mount",
            "--target",
            str(self.pid),
            "chroot",
            self.root,
            "env",
            "-i",
            "LC_ALL=C.UTF-8",
            "HOME=/root",
        ]
        command += ["PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "PIP_NO_COMPILE=1", "PIP_ROOT_USER_ACTION=ignore"]
        command += [f"{name}={value}" for name, value in environment.items()]
        return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=120)

    def provision(self, *more: object, umask: str = "022", **environment: str) -> subprocess.CompletedProcess[str]:
        self.run("rm", "-f", "/run/asked")
        return self.run("sh", "-c", f'umask {umask} && exec sh "$@"', "sh", PROVISION, *self.words, *more, **environment)

    def text(self, command: str) -> str:
        return self.run("sh", "-c", command).stdout

    def asked(self) -> str:
        """What systemd and udev were asked to do in the last run."""
        return self.text("cat /run/asked")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, wheel: Path, keys: Any) -> Iterator[Device]:
    needs("systemd-sysusers", "systemd-tmpfiles", "systemctl", "nsenter", "unshare")
    place = tmp_path_factory.mktemp("device")
    packed = pack(ROOT / "calibration/digits-depthwise/float.edge", out=place / "digits.edge.zip", key=keys.key)
    (tree := place / "tree").mkdir()
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", TREE, "sh", tree], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdin
        assert keeper.stdout
        if keeper.stdout.readline() != "ready\n":
            pytest.skip("no overlay may be mounted here")
        words = ("--pub", str(keys.pub), "--pack", str(packed), "--wheel", str(wheel), "--no-jetson")
        made = Device(keeper.pid, tree / "tree", words)
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        python = PYTHON.format(python=sys.executable, packages=packages)
        for name, text in {"python3": python, **dict.fromkeys(("systemctl", "udevadm", "systemd-tmpfiles"), SYSTEMD)}.items():
            made.run("sh", "-c", f'printf %s "$0" >/usr/local/sbin/{name} && chmod 0755 /usr/local/sbin/{name}', text)
        made.run("sh", "-c", "printf '#!/bin/sh\\n' >/usr/local/sbin/apt-get && chmod 0755 /usr/local/sbin/apt-get")
        for path in (Path(sys.executable).resolve(), Path(packages), PROVISION):
            made.run("chmod", "o+x", *path.parents)
        yield made
        keeper.stdin.close()


@pytest.mark.slow
def test_a_run_that_was_cut_off_or_failed_is_completed_by_the_next(device: Device) -> None:
    """Under a umask that lets nobody else read: what the scan's user needs is for him to read all the same."""
    for step in ("systemd-tmpfiles", "environment"):
        assert device.provision(umask="077", CUT=step).returncode in (-9, 137), step
    refused = device.provision(umask="077", FAIL="control --reload")
    assert refused.returncode == 1
    assert "stopped at the step units" in refused.stderr
    assert "Run the same line again" in refused.stderr
    done = device.provision(umask="077")
    assert done.returncode == 0, done.stdout + done.stderr
    for request in ("systemctl daemon-reload\n", "udevadm control --reload\n", "enable --now edgekit-scan.service\n"):
        assert request in device.asked()
    assert device.text("find /opt/edgekit ! -type l ! -perm -044 -o -type d ! -perm -055") == ""
    assert device.run("runuser", "-u", "edgekit", "--", ENVIRONMENT + "/bin/edgekit", "--version").returncode == 0
    assert device.text("ls /opt/edgekit | grep -v venv") == ""  # nothing is owed


@pytest.mark.slow
def test_a_newer_wheel_restarts_the_scan_also_after_a_run_that_was_cut_off(device: Device, wheel: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copy(wheel, tmp_path))
    with zipfile.ZipFile(newer, "a") as archive:
        archive.comment = b"newer"
    device.provision("--wheel", newer, CUT="try-restart")
    before = device.text(f"readlink {ENVIRONMENT}")
    assert "try-restart" in device.asked()
    done = device.provision("--wheel", newer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "try-restart edgekit-scan.service" in device.asked()
    assert device.text(f"readlink {ENVIRONMENT}; ls -d /opt/edgekit/venv-*") == f"{before}/opt/edgekit/{before}"


@pytest.mark.slow
def test_settings_that_are_there_are_kept_and_what_was_asked_for_is_said_or_done(device: Device) -> None:
    assert device.provision("--source", "https://one.example/").returncode == 0
    ours = '[codes]\n[[source]]\naddress = "/srv/edgekit/inbox"\nwatch = true\n[[sink]]\naddress = "jsonl:/tmp/events.jsonl"\n'
    device.run("sh", "-c", 'printf %s "$0" >/etc/edgekit/scan.toml', ours)
    device.text("echo https_proxy=http://proxy.example >>/etc/edgekit/update-site.env")
    words = ("--source", r"https://two.example/?a=1&b=\1|2")
    dry = device.provision(*words, "--dry-run")
    assert "settings: would write /etc/edgekit/update-site.env" in dry.stdout
    assert "wrote" not in dry.stdout
    assert "one.example" in device.text("cat /etc/edgekit/update-site.env")
    done = device.provision(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert device.text("cat /etc/edgekit/scan.toml") == ours
    last = done.stdout.partition("steps changed something")[2]
    assert "does not name /var/lib/edgekit/models/parcel/current" in last
    assert "what it was is kept as /etc/edgekit/update-site.env." in last
    kept = device.text("cat /etc/edgekit/update-site.env.*")
    assert "SOURCE=https://one.example/\n" in kept
    assert device.text("cat /etc/edgekit/update-site.env") == kept.replace("https://one.example/", words[1])


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Every file's time and size: what a second run must leave as it is."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in root.rglob("*")
        if not path.is_dir() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_provisioning_twice_changes_nothing_the_second_time(
    tmp_path: Path, wheel: Path, digits_bundle: Bundle, keys: Any
) -> None:
    needs("systemd-sysusers", "systemd-tmpfiles", "systemctl")
    packed = pack(digits_bundle, out=tmp_path / "digits.edge.zip", key=keys.key)
    (root := tmp_path / "device").mkdir()
    (root / "etc").mkdir()
    words = ["sh", PROVISION, "--root", root, "--pub", keys.pub, "--pack", packed, "--wheel", wheel, "--model", "digits"]
    words += ["--source", "https://updates.example/digits/"]
    dry = run(*words, "--dry-run", PIP_NO_COMPILE="1", PYTHONPATH="")
    assert dry.returncode == 0, dry.stderr
    assert list(root.rglob("*")) == [root / "etc"]
    assert "key: would write /etc/edgekit/keys/edgekit.pub" in dry.stdout
    assert not re.search(r"\b(wrote|made|installed)\b", dry.stdout)
    first = run(*words, PIP_NO_COMPILE="1", PYTHONPATH="")
    assert first.returncode == 0, first.stderr
    assert "steps changed something" in first.stdout
    assert status(root / "var/lib/edgekit/models/digits")["healthy"]
    assert "models/digits/current" in (root / "etc/edgekit/scan.toml").read_text()
    assert (root / "etc/systemd/system/multi-user.target.wants/edgekit-scan.service").is_symlink()
    assert (root / "etc/systemd/system/timers.target.wants/edgekit-update@site.timer").is_symlink()
    assert re.search(r"^edgekit:", (root / "etc/passwd").read_text(), re.M)
    names = (root / "opt/edgekit/venv/lib").glob("python3*/site-packages/*.dist-info")
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for name, version in (path.name.removesuffix(".dist-info").lower().rsplit("-", 1) for path in names):
        assert name in ("edgekit", "pip", "setuptools") or f"\n{name.replace('_', '-')}=={version}" in pins, name
    before = files(root)
    second = run(*words, PYTHONPATH="")
    assert (second.returncode, second.stdout.splitlines()[-1]) == (0, "all was done already"), second.stderr
    assert files(root) == before
    (other := tmp_path / "other.pub").write_text("another")
    third = run(*words, "--pub", other)
    assert (third.returncode, "is another key than" in third.stderr) == (1, True)


def test_provisioning_says_what_it_lacks(tmp_path: Path) -> None:
    for words, lacks in (
        ([], "--pub edgekit.pub"),
        (["--pub", PROVISION], "--pack F.zip"),
        (["--pub", tmp_path / "none"], "there is no key"),
        (["--pub", PROVISION, "--pack", "p"], "--wheel F.whl"),
        (["--pub", PROVISION, "--pack", "p", "--wheel", PROVISION, "--model", "../x"], "a folder's name"),
        (["--fast"], "there is no option --fast"),
        (["--pub"], "--pub needs a value"),
    ):
        done = run("sh", PROVISION, "--root", tmp_path, *words)
        assert (done.returncode, lacks in done.stderr) == (1, True), done.stderr
    assert "--dry-run" in run("sh", PROVISION, "--help").stdout
