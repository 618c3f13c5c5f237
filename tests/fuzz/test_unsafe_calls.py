"""What turns data into code, or a name into another file, is called nowhere in the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "edgekit"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "xml", "telnetlib"}
#: The watch data set is a pickle inside of a wheel; `_Reader` there builds stand-ins only (tests/data/test_data_watch.py).
#: svg.py takes the function that escapes text, and reads no XML.
ALLOWED = {("data/watch.py", "pickle"), ("svg.py", "xml.sax")}
#: function -> the keyword and the value that it has to be called with
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}


def _name(node: ast.expr) -> str:
    """``os.system`` of a call; empty for what is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    before = _name(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if isinstance(node, ast.Attribute) and before else ""


def unsafe(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            name, keywords = _name(node.func), {each.arg: each.value for each in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"):
                yield name
            if name in SAFE:
                keyword, value = SAFE[name]
                given = keywords.get(keyword)
                if not (isinstance(given, ast.Constant) and given.value is value):
                    yield f"{name} without {keyword}={value}"
            shell = keywords.get("shell")
            if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
                yield f"{name} with a shell"


def test_no_data_becomes_code() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        found |= {(name, what) for what in unsafe(ast.parse(path.read_text("utf-8")))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "pickle"),
        ("from xml.etree import ElementTree", "xml.etree"),
        ("np.load(f)", "np.load without allow_pickle=False"),
        ("torch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("subprocess.run(c, shell=True)", "subprocess.run with a shell"),
        ("eval(x)", "eval"),
    ],
)
def test_it_would_be_noticed(code: str, what: str) -> None:
    assert list(unsafe(ast.parse(code))) == [what]
