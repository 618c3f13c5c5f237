"""Units, rules and the provisioning script: accepted by systemd's own tools, and run below a folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import pack, status
from edgekit.errors import TurnedDown

DEPLOY = Path(__file__).parents[2] / "deploy"
SCANNER, PROVISION = DEPLOY / "scanner", DEPLOY / "jetson" / "provision.sh"
PROGRAM = "/opt/edgekit/venv/bin/edgekit"


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{program} is not installed")


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env={**os.environ, **environment})


def test_systemd_accepts_the_update_units_together(tmp_path: Path) -> None:
    needs("systemd-analyze")
    for name, place in (
        ("edgekit-update@.service", "edgekit-update@usb.service"),
        ("edgekit-update@.timer", "edgekit-update@usb.timer"),
        ("media-edgekit.mount", "media-edgekit.mount"),
        ("edgekit-scan.service", "edgekit-scan.service"),
        ("usb-mount.conf", "edgekit-update@usb.service.d/usb-mount.conf"),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text((SCANNER / name).read_text().replace(PROGRAM, "/bin/true"))
    units = [path for path in tmp_path.iterdir() if path.is_file()]
    done = run("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stderr) == (0, "")
    for unit in tmp_path.glob("*.service"):
        exposed = run("systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", unit)
        assert exposed.returncode == 0, exposed.stdout


def test_the_scan_has_room_for_the_starts_of_an_update_that_fails() -> None:
    text = (SCANNER / "edgekit-scan.service").read_text()
    found = re.search(r"^StartLimitBurst=(\d+)$", text, re.M)
    assert found
    assert int(found[1]) >= 2 * (3 + 1)  # three that fail and the return, for two updates
    assert "\nExecStartPre=-" in text  # a start that a check forbids is none, and would never lead back


@pytest.mark.parametrize("change", ["", "other slot", "same slot", "first"])
def test_the_scan_is_restarted_only_where_another_bundle_runs(tmp_path: Path, change: str) -> None:
    """The update unit's own shell lines, around an install that switches or does not; one that replaces a bundle on trial lies
    in the same slot."""
    root = tmp_path / "models" / "parcel"
    for slot in "abc":
        (root / "slots" / slot).mkdir(parents=True)
        (root / "slots" / slot / "manifest.json").write_text("{}")
    if change != "first":
        (root / "current").symlink_to("slots/a")
    (calls := tmp_path / "bin").mkdir()
    (calls / "systemctl").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    (calls / "systemctl").chmod(0o755)
    lines = re.findall(
        r"^Exec(StartPre|StartPost)=\+?/bin/sh -c '(.*)'$", (SCANNER / "edgekit-update@.service").read_text(), re.M
    )
    assert [name for name, _ in lines] == ["StartPre", "StartPost"]
    for name, line in lines:
        ours = line.replace("$$", "$").replace("%%", "%").replace("/var/lib/edgekit/models", str(tmp_path / "models"))
        path = f"{calls}{os.pathsep}{os.environ['PATH']}"
        done = run("sh", "-c", ours, MODEL="parcel", RUNTIME_DIRECTORY=str(tmp_path), PATH=path)
        assert (done.returncode, done.stderr) == (0, "")
        if name == "StartPre" and change in ("other slot", "first"):
            (root / "current").unlink(missing_ok=True)
            (root / "current").symlink_to("slots/b")
        elif name == "StartPre" and change:
            (root / "slots" / "a").rename(root / "old")
            (root / "slots" / "c").rename(root / "slots" / "a")
            shutil.rmtree(root / "old")
    called = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert ("restart edgekit-scan.service" in called) == bool(change)


def test_a_bundle_that_was_left_is_no_failure_of_the_update_unit() -> None:
    assert f"\nSuccessExitStatus={TurnedDown.exit_code}\n" in (SCANNER / "edgekit-update@.service").read_text()


def test_udev_rules_name_what_is_there() -> None:
    """Each line: conditions and assignments as udev writes them, a unit that exists, the label that the mount waits for."""
    text = (SCANNER / "70-edgekit.rules").read_text()
    rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(rules) == 3
    token = re.compile(r'(ACTION|SUBSYSTEM|ENV\{\w+\}|ATTR\{\w+\}|SYMLINK|GROUP|MODE|TAG)(==|\+=|=)"[^"]*"')
    for rule in rules:
        assert all(token.fullmatch(part) for part in rule.split(", ")), rule
    assert 'ENV{SYSTEMD_WANTS}+="edgekit-update@usb.service"' in rules[2]
    label = re.search(r'ID_FS_LABEL}=="(\w+)"', rules[2])
    assert label
    assert f"What=/dev/disk/by-label/{label[1]}\n" in (SCANNER / "media-edgekit.mount").read_text()


def test_udev_accepts_the_rules() -> None:
    """`udevadm test` reads every rule there is; in a mount namespace of its own /run/udev is empty but for ours."""
    needs("udevadm")
    if run("unshare", "--mount", "true").returncode:
        pytest.skip("no mount namespace may be made here")
    alone = "mkdir -p /run/udev && mount -t tmpfs none /run/udev && mkdir /run/udev/rules.d && cp $RULES /run/udev/rules.d/"
    words = "udevadm test --action=add /sys/class/net/lo 2>&1 | grep 70-edgekit.rules"
    done = run("unshare", "--mount", "sh", "-c", f"{alone} && {words}", RULES=str(SCANNER / "70-edgekit.rules"))
    assert done.stdout == "Reading rules file: /run/udev/rules.d/70-edgekit.rules\n", done.stdout + done.stderr


@pytest.mark.parametrize("script", [*sorted(DEPLOY.rglob("*.sh")), DEPLOY.parent / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    needs("shellcheck")
    done = run("shellcheck", script)
    assert (done.returncode, done.stdout) == (0, "")


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
    first = run(*words, PIP_NO_COMPILE="1", PYTHONPATH="")
    assert first.returncode == 0, first.stderr
    assert "steps changed something" in first.stdout
    assert status(root / "var/lib/edgekit/models/digits")["healthy"]
    assert "models/digits/current" in (root / "etc/edgekit/scan.toml").read_text()
    assert (root / "etc/systemd/system/multi-user.target.wants/edgekit-scan.service").is_symlink()
    assert (root / "etc/systemd/system/timers.target.wants/edgekit-update@site.timer").is_symlink()
    assert re.search(r"^edgekit:", (root / "etc/passwd").read_text(), re.M)
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
        (["--pub", PROVISION, "--pack", "p", "--model", "../x"], "a folder's name"),
        (["--fast"], "there is no option --fast"),
        (["--pub"], "--pub needs a value"),
    ):
        done = run("sh", PROVISION, "--root", tmp_path, *words)
        assert (done.returncode, lacks in done.stderr) == (1, True), done.stderr
    assert "--dry-run" in run("sh", PROVISION, "--help").stdout
