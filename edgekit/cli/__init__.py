"""The command line. It adds nothing but words: open, call one function, print."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from edgekit.version import __version__

from .common import Terminated, ending_in_order, fail

__all__ = ["COMMANDS", "cli", "main"]

#: command -> the module of this package that holds it (function names are the commands', ``import_`` for import).
COMMANDS = {
    "pipeline": "pipeline",
    "train": "training",
    "search": "search",
    "eval": "training",
    "data": "data",
    "augment": "data",
    "prune": "pruning",
    "quantize": "quantization",
    "import": "compiling",
    "build": "compiling",
    "inspect": "compiling",
    "targets": "compiling",
    "estimate": "compiling",
    "bench": "measuring",
    "compare": "measuring",
    "explain": "reporting",
    "report": "reporting",
    "doctor": "measuring",
    "scan": "scanning",
    "replay": "watching",
    "harvest": "watching",
    "pack": "deployment",
    "sign": "deployment",
    "verify": "deployment",
    "keygen": "deployment",
    "revoke": "deployment",
    "install": "deployment",
    "rollback": "deployment",
    "status": "deployment",
}


class LazyGroup(click.Group):
    """Loads a command's module when the command is used, so that ``edgekit --help`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name]}", __name__)
        command = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole first sentences, wrapped, where click would cut them off."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=200)) for name, command in commands if command])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgekit")
def cli() -> None:
    """edgekit takes a compact neural network from training to an NVIDIA device at the edge.

    \b
    Start here:
      edgekit pipeline                                    the whole way, on built-in digits
      edgekit train --data digits --out digits.edge       a first model
      edgekit scan digits.edge --source images/           run it

    Every command takes --json: one JSON object on stdout, all else on stderr. Exit codes: 0 done, 1 failed,
    2 wrong usage, 3 a stated budget or gate is not met.
    """


def main(args: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every failure into a cause, a cure and an exit code."""
    arguments = sys.argv[1:] if args is None else args
    code: Any
    try:
        with ending_in_order():
            code = cli.main(args=arguments, prog_name="edgekit", standalone_mode=False)
    except Terminated as error:
        code = fail(error, as_json="--json" in arguments)
    except SystemExit:  # shell completion and closed pipes end this way
        raise
    except BaseException as error:  # noqa: BLE001  the one place where errors become words
        code = fail(error, as_json="--json" in arguments)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a closed pipe or a full disk; what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code if isinstance(code, int) else 0)
