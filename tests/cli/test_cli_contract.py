"""What every command promises: help with an example, --json, exit codes, short errors and never a traceback."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import onnx.parser
import pytest
from click.testing import CliRunner
from PIL import Image

import edgekit.cli as package
from edgekit.bundle import Bundle
from edgekit.cli import COMMANDS
from edgekit.cli import cli as group
from edgekit.cli.common import Answer, answers, fail, table
from edgekit.data import SOURCES
from edgekit.errors import BudgetNotMet, BundleError
from edgekit.models import PRESETS
from edgekit.pipeline.stages import Backend
from edgekit.runtime.backends import BACKENDS

CLI = Path(package.__file__).parent
#: Commands whose module lies in the package; `test_no_command_is_missing` holds the list to be complete.
THERE = [name for name, module in COMMANDS.items() if importlib.util.find_spec(f"edgekit.cli.{module}")]


def test_no_command_is_missing() -> None:
    assert list(COMMANDS) == THERE


@pytest.mark.parametrize("name", THERE)
def test_every_command_has_help_with_an_example(cli, name: str) -> None:
    for flag in ("--help", "-h"):
        done = cli(name, flag)
        assert (done.code, done.err) == (0, "")
        assert f"edgekit {name}" in done.out.split("Usage:")[1].split("\n", 1)[1]
    assert "--json" in done.out


@pytest.mark.parametrize("name", THERE)
def test_every_option_is_explained(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.name == name
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


@pytest.mark.parametrize("name", THERE)
def test_wrong_usage_exits_2(cli, name: str) -> None:
    done = cli(name, "--no-such-option")
    assert (done.code, done.out) == (2, "")
    assert 0 < len(done.err.strip().splitlines()) <= 4
    as_json = cli(name, "--no-such-option", "--json")
    assert as_json.code == 2
    assert "--no-such-option" in as_json.json["error"]
    assert as_json.json["hint"]


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_command_modules_import_only_click_at_the_top(path: Path) -> None:
    """So that ``edgekit --help`` stays fast: all else is imported in the command's body."""
    allowed = ("__future__", "click", "edgekit.cli", "edgekit.errors", "edgekit.version", "edgekit.progress")
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if not node.level else []
        for name in names:
            own = any(name == a or name.startswith(a + ".") for a in allowed)
            assert own or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_unknown_commands_exit_2(cli) -> None:
    done = cli("no-such-command")
    assert done.code == 2
    assert "no-such-command" in done.err
    assert cli("no-such-command", "--json").json["error"]


def test_the_group_lists_every_command_and_its_version(cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.out
    assert cli("--version").out.startswith("edgekit, version ")


def test_a_missing_bundle_is_one_error_on_both_channels(cli, tmp_path: Path) -> None:
    done = cli("pack", tmp_path / "none.edge", "--out", tmp_path / "x.zip")
    assert (done.code, done.out) == (1, "")
    error, hint = done.err.splitlines()
    assert error.startswith("error: there is no bundle at")
    assert hint.startswith("hint: make one with edgekit")
    as_json = cli("pack", tmp_path / "none.edge", "--out", tmp_path / "x.zip", "--json")
    assert as_json.json == {"error": error.removeprefix("error: "), "hint": hint.removeprefix("hint: ")}


# One failing command of each kind, through the same door


def run(error: BaseException, capfd: pytest.CaptureFixture[str], as_json: bool = False) -> tuple[int, str, str]:
    capfd.readouterr()
    code = fail(error, as_json)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BundleError("cause", "cure"), 1, "error: cause\nhint: cure\n"),
        (BudgetNotMet("too slow", "relax it"), 3, "error: too slow"),
        (KeyboardInterrupt(), 1, "error: interrupted"),
        (click.Abort(), 1, "error: interrupted"),
        (OSError(28, "No space left on device", "/x"), 1, "the disk is full (/x)"),
        (PermissionError(13, "Permission denied", "/x"), 1, "no permission (/x)"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "No such file or directory (/x)"),
        (ModuleNotFoundError("No module named 'abc'", name="abc"), 1, "pip install"),
        (ZeroDivisionError("division by zero"), 1, "defect of edgekit"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_every_failure_becomes_words(capfd: pytest.CaptureFixture[str], error: BaseException, code: int, words: str) -> None:
    found, out, err = run(error, capfd)
    assert (found, out) == (code, "")
    assert words in err
    assert len(err.splitlines()) <= 2
    found, out, err = run(error, capfd, as_json=True)
    assert found == code
    assert set(json.loads(out)) >= {"error", "hint"}


def test_a_missed_budget_still_answers(capfd: pytest.CaptureFixture[str]) -> None:
    """What was reached stands beside the error, and stays JSON where a figure is not finite."""
    reached = {"bundle": "b.edge", "snr_db": float("-inf"), "share": np.float32(0.5), "rows": np.arange(2)}
    code, out, _ = run(BudgetNotMet("below", "relax it", reached), capfd, as_json=True)
    assert code == 3
    answer = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (answer["bundle"], answer["snr_db"], answer["share"], answer["rows"]) == ("b.edge", None, 0.5, [0, 1])


def test_messages_and_hints_are_one_line_each(capfd: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(BundleError("first\n  second", "do\nthis"), capfd)
    assert err == "error: first second\nhint: do this\n"


def test_debug_shows_where(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_DEBUG", "1")
    fail(BundleError("cause"), as_json=False)
    assert "BundleError: cause" in capfd.readouterr().err


def answer_of(data: dict[str, Any], *args: str) -> str:
    command = click.command()(answers(lambda: Answer(data)))
    result = CliRunner().invoke(command, args, standalone_mode=False)
    assert result.exception is None, result.exception
    return result.output


def test_answers_are_json_whatever_the_figures() -> None:
    data = {
        "path": Path("a"),
        "x": np.float64(1.5),
        "nan": float("nan"),
        "deep": [{"inf": np.float32("inf")}],
        "n": np.int64(3),
    }
    answer = json.loads(answer_of(data, "--json"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert answer == {"path": "a", "x": 1.5, "nan": None, "deep": [{"inf": None}], "n": 3}


def test_answers_read_as_text() -> None:
    text = answer_of({"top1": 0.98765, "rows": [{"a": 1, "b": None}], "nested": {"k": "v"}, "list": [1, 2]})
    assert "top1    0.9877" in text
    assert "k  v" in text
    assert "1, 2" in text
    assert table([]) == ""
    assert table([{"name": "x", "ms": 1.0}, {"name": "long", "ms": None}]).splitlines()[-1] == "long   -"


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        ("train", "--model", [*PRESETS, "hf", "package.module"]),
        ("train", "--data", list(SOURCES)),
        ("eval", "--data", list(SOURCES)),
        ("eval", "--backend", ["auto", *BACKENDS]),
    ],
)
def test_help_lists_what_there_is(command: str, option: str, names: list[str]) -> None:
    """A new model, data set or backend is a line in its dict; help that is written by hand must not lag behind."""
    parameters = group.get_command(click.Context(group), command).params
    (found,) = [p for p in parameters if option in p.opts]
    assert [part.strip().partition(":")[0] for part in found.help.split("|")] == names


def test_recipes_know_every_backend() -> None:
    assert get_args(Backend) == ("auto", *BACKENDS)


# Processes: the shell's view


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgekit.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'pandas', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    script = f"'{sys.executable}' -c 'from edgekit.cli import main; main()' --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stdout.strip() in ("0", "1")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("targets --json >/dev/full", 1),
        ("no-such-command --json >/dev/full", 2),
        ("targets --json | true", None),
        ("no-such-command --json | true", 2),
        ("train --data digits --out . --json | true", 2),
        ("targets >&-", None),
    ],
)
def test_a_stdout_that_cannot_be_written_is_no_traceback(command: str, code: int | None, tmp_path: Path) -> None:
    """Whether a pipe is closed before the answer comes is chance, so its code is 0 or 1; a wrong usage stays 2."""
    script = f"'{sys.executable}' -c 'from edgekit.cli import main; main()' {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in ((0, 1) if code is None else (code,))


def test_scan_says_that_stdout_is_closed(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    script = f"'{sys.executable}' -c 'from edgekit.cli import main; main()' scan --codes --source a.png >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: stdout is closed" in done.stderr
    assert "defect" not in done.stderr


BUILD = "import edgekit, sys; from edgekit.cli import main; main(['build', sys.argv[1], '--target', 'rtx-ada'])"


def test_ctrl_c_in_a_build_is_one_line_and_ends_the_child(tiny_bundle: Bundle) -> None:
    """The parser runs in a child; the terminal sends Ctrl-C to the whole group, and the child once told its own story."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tiny_bundle.path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None, "it ended without a child"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-2:] == ["error: interrupted", "hint: run the same command again; finished work is kept"]
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
    Bundle.open(tiny_bundle.path)


def _endless(path: Path) -> Path:
    """A graph whose loop never ends: whatever reads it is still at work when a signal comes."""
    body = onnx.parser.parse_graph(
        "body (int64 i, bool go, float[4] v) => (bool again, float[4] w) { again = Identity(go) w = Relu(v) }"
    )
    loop = onnx.helper.make_node("Loop", ["", "go", "x"], ["y"], name="forever", body=body)
    sizes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy"]
    go = onnx.numpy_helper.from_array(np.array(True), "go")
    graph = onnx.helper.make_graph([loop], "endless", sizes[:1], sizes[1:], [go])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_kill_leaves_neither_folders_nor_children(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "edgekit", "import", str(_endless(tmp_path / "m.onnx")), "--out", str(tmp_path / "m.edge")]
    process = subprocess.Popen(
        [*command, "--json"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None, "it ended without a child"
        time.sleep(0.005)
    process.send_signal(sent)
    process.send_signal(sent)  # as `timeout` does: to the process, then to its group
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.splitlines()[-2:] == [f"error: ended by {sent.name}", "hint: run the same command again; finished work is kept"]
    assert json.loads(out)["error"] == f"ended by {sent.name}"
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
    assert not [path for path in tmp_path.iterdir() if "edge" in path.name]  # edgekit-import-*, .m.edge.*


def test_signals_are_as_before_after_a_command(cli: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert cli("targets").code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_file_in_the_way_is_wrong_usage(cli: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for command in (["report", tiny_bundle.path], ["pack", tiny_bundle.path], ["keygen"]):
        outcome = cli(*command, "--out", tmp_path / "file" / "x")
        assert outcome.code == 2, command
        assert "a file is in the way" in outcome.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_way_is_wrong_usage(cli: Any, tmp_path: Path) -> None:
    outcome = cli("doctor", "--selftest", tmp_path)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-2:] == [f"error: a folder is in the way ({tmp_path})", "hint: name a file"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


def test_a_full_disk_in_a_build_is_named(tiny_bundle: Bundle) -> None:
    limited = f"ulimit -f 8; exec '{sys.executable}' -c \"{BUILD}\" {tiny_bundle.path}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "defect" not in done.stderr
    assert not list((tiny_bundle.path / "engines").glob("*"))
    Bundle.open(tiny_bundle.path)
