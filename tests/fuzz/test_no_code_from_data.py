"""Nothing in the package runs what a file says: no pickle, no eval, no shell, no parser that follows what it reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgekit

ROOT = Path(edgekit.__file__).parent
#: Modules that turn bytes into code or objects of any type, or XML's parsers, which follow entities.
MODULES = (
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "xml",
    "lxml",
    "plistlib",
    "code",
    "pty",
)
#: Calls that do, by their last name or in full.
CALLS = (
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
)
#: A file without one of these words has none of them: most need not be parsed.
WORDS = re.compile(
    "|".join((rf"\b({'|'.join(MODULES[:-2])}|read_pickle|allow_pickle)\b", r"import (code|pty)",
    r"(?<![.\w])(eval|exec|compile)\(",
    r"os\.(system|popen)", "mktemp", "getoutput", "getstatusoutput", r"\.load\(", r"shell\s*=", "trust_remote"))
)  # fmt: skip
#: (file, what) -> why it may.
EXCEPTIONS = {
    (
        "data/watch.py",
        "pickle",
    ): "the packaged data set is a pickle; its steps are checked first, and its names reach stand-ins only",
    ("svg.py", "xml"): "xml.sax.saxutils escapes text; it parses nothing",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    return next((each.value.value for each in call.keywords if each.arg == name and isinstance(each.value, ast.Constant)), None)


def wrong(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            if not getattr(node, "level", 0):
                yield from (name.partition(".")[0] for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS:
                yield name
            if name == "torch.load" and keyword(node, "weights_only") is not True:
                yield "torch.load without weights_only=True"
            if name in ("np.load", "numpy.load") and keyword(node, "allow_pickle") is not False:
                yield "numpy.load without allow_pickle=False"
            if name.endswith("read_pickle"):
                yield name
            if any(
                each.arg == "shell" and not (isinstance(each.value, ast.Constant) and each.value.value is False)
                for each in node.keywords
            ):
                yield "shell=True"
            if keyword(node, "trust_remote_code") is True or keyword(node, "allow_pickle") is True:
                yield "code of a model's maker"


def test_no_file_becomes_code() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for path in ROOT.rglob("*.py")
        if WORDS.search(text := path.read_text(encoding="utf-8"))
        for what in wrong(ast.parse(text))
    }
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from marshal import loads", "import xml.dom", "eval('1')", "os.system('x')", "torch.load(f)",
        "np.load(f)",
        "torch.load(f, weights_only=False)", "numpy.load(f, allow_pickle=True)", "subprocess.run('x', shell=True)",
        "tempfile.mktemp()",
        "subprocess.run('x', shell=asked)", "AutoModel.from_pretrained(n, trust_remote_code=True)", "pd.read_pickle(f)",
    ],
)  # fmt: skip
def test_what_is_looked_for_is_found(text: str) -> None:
    assert list(wrong(ast.parse(text)))


def test_module_eval_of_a_network_is_none() -> None:
    assert not list(wrong(ast.parse("module.eval()(x); torch.load(f, weights_only=True)")))
