"""What the documents say is so: commands and options exist, links lead somewhere, the reference is whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

from edgekit.cli import COMMANDS
from edgekit.cli import cli as group

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md"), *ROOT.glob("benchmarks/*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
documents = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
_ENDS = ("|", "||", "&&", ";", "&", ">", ">>", "<")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each ``edgekit`` command in the page's blocks and in backticks, up to a pipe or redirection."""
    text = page.read_text(encoding="utf-8")
    for kind, block in _FENCE.findall(text):
        if kind in ("", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _calls(line)
    for code in re.findall(r"`(edgekit [^`]+)`", _FENCE.sub("", text)):
        yield from _calls(code.replace("\n", " "))


def _calls(line: str) -> Iterator[list[str]]:
    parts = shlex.shlex(line, posix=True, punctuation_chars=True)
    parts.commenters, parts.whitespace_split = "#", True
    try:
        words = list(parts)
    except ValueError:  # an apostrophe in prose: no command
        return
    while "edgekit" in words:
        words = words[words.index("edgekit") + 1 :]
        end = next((i for i, word in enumerate(words) if word in _ENDS), len(words))
        if words and re.fullmatch(r"[a-z]+", words[0]):  # not edgekit COMMAND, not edgekit --help
            yield words[:end]


@documents
def test_every_command_in_it_exists_with_its_options(page: Path) -> None:
    for name, *words in commands(page):
        assert name in COMMANDS, f"{page.name}: there is no edgekit {name}"
        command = group.get_command(click.Context(group), name)
        assert command is not None
        options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options
        assert not unknown, f"{page.name}: edgekit {name} has no {unknown}"


def test_commands_are_found() -> None:
    assert sum(1 for _ in commands(ROOT / "README.md")) > 15
    assert list(_calls("edgekit scan a.edge --codes | head && edgekit bench b --no-such")) == [
        ["scan", "a.edge", "--codes"],
        ["bench", "b", "--no-such"],
    ]


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)).lower().replace(" ", "-") for h in headings}


@documents
def test_every_link_in_it_leads_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/\S*)?", link), f"{page.name}: {link}"
            continue
        target = page.parent / unquote(parts.path) if parts.path else page
        assert target.exists(), f"{page.name}: there is no {link}"
        if parts.fragment:
            generated = ROOT / "docs/reference" in target.parents
            assert generated or parts.fragment in anchors(target), f"{page.name}: {link} names no heading"


# The site

needs_sphinx = pytest.mark.skipif(sys.version_info < (3, 11), reason="the site is built on Python 3.11 and later")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("sphinx") is None or find_spec("furo") is None or find_spec("myst_parser") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Sphinx, furo and myst-parser are missing: pip install '.[docs]'")
        pytest.skip("Sphinx, furo or myst-parser is missing: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "trees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(out / "html")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


class Page(HTMLParser):
    """Links, ids and loaded resources of one page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@needs_sphinx
@pytest.mark.slow
def test_the_site_is_whole_and_needs_no_network(site: Path) -> None:
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > 30
    for path, page in pages.items():
        for source in page.loaded:
            parts = urlsplit(source)
            assert not parts.scheme, f"{path.name} loads {source}"
            assert not parts.netloc, f"{path.name} loads {source}"
            assert (path.parent / unquote(parts.path)).exists(), f"{path.name}: {source}"
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name in ("genindex.html", "search.html"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


@needs_sphinx
@pytest.mark.slow
def test_the_reference_has_every_command_option_and_public_name(site: Path) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from reference_pages import public_names
    finally:
        sys.path.remove(str(ROOT / "docs"))
    words = " ".join(Page(site / "reference/commands.html").words)
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert f"edgekit {name}" in words
        assert {opt for p in command.params if isinstance(p, click.Option) for opt in p.opts if opt not in words} == set()
    python = Page(site / "reference/python.html")
    for module, names in public_names().items():
        for name in names:
            assert f"{module}.{name}" in " ".join(python.words), f"{module}.{name}"
    assert "[[source]]" in "".join(Page(site / "reference/config.html").words)
    assert {"frameevent", "incidentevent"} <= Page(site / "reference/events.html").ids
    assert "ModelConfig" in " ".join(Page(site / "reference/manifest.html").words)
    assert "BudgetNotMet" in " ".join(Page(site / "reference/errors.html").words)
