"""Every error edgekit raises on purpose: exit codes, one line each, and the tree as its docstring draws it."""

from __future__ import annotations

import inspect
import re
import sys
import traceback

import pytest

from edgekit import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}


def test_all_errors_are_public() -> None:
    assert sorted([*CLASSES, "first_line"]) == errors.__all__


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_tree_in_the_docstring_is_the_tree(name: str) -> None:
    """Indentation says the parent, the number the exit code."""
    stack: list[tuple[int, str]] = []
    drawn: dict[str, tuple[str, int]] = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^([ │├└─]+)(\w+) +exit (\d)", line):
            depth = len(match[1])
            stack = [entry for entry in stack if entry[0] < depth]
            drawn[match[2]] = (stack[-1][1] if stack else "Exception", int(match[3]))
            stack.append((depth, match[2]))
    kind = CLASSES[name]
    assert drawn[name] == (kind.__bases__[0].__name__, kind.exit_code)


@pytest.mark.parametrize(
    "error",
    [
        errors.EdgekitError("cause", "cure"),
        errors.OutputExists("a.edge"),
        errors.MissingExtra("rtx", "tensorrt_rtx"),
        errors.BudgetNotMet("not met", "relax it", {"share": 0.5}),
    ],
)
def test_cause_and_cure_are_one_line_each(error: errors.EdgekitError) -> None:
    assert str(error) == error.message
    assert error.message
    assert error.hint
    assert "\n" not in error.message + error.hint


def test_a_missing_extra_names_the_command() -> None:
    assert errors.MissingExtra("rtx", "tensorrt_rtx").hint == "pip install 'edgekit[rtx]'"


def test_the_result_of_a_missed_budget_is_a_copy() -> None:
    result = {"share": 0.5}
    error = errors.BudgetNotMet("not met", result=result)
    result["share"] = 0.0
    assert error.result == {"share": 0.5}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_a_traceback_ends_with_the_cure() -> None:
    lines = traceback.format_exception(errors.MissingExtra("runtime", "onnxruntime"))
    assert lines[-1] == "hint: pip install 'edgekit[runtime]'\n"
