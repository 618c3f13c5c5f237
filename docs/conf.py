"""The documentation site: `make docs` writes it to build/docs. It needs no network to be built, and none to be read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from reference_pages import PAGES  # noqa: E402

from edgekit.version import __version__  # noqa: E402

project = "edgekit"
author = "the edgekit maintainers"
copyright = "the edgekit maintainers, Apache-2.0"
version = release = __version__

extensions = ["myst_parser"]
exclude_patterns = ["images"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["toc.empty_glob"]
highlight_language = "sh"
smartquotes = False  # --json is no dash
pygments_style, pygments_dark_style = "friendly", "github-dark"

html_theme = "furo"
html_title = f"edgekit {release}"
html_copy_source = html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": False}

#: Files of the repository's root and of other folders that are pages here as well: page -> file.
FROM_ELSEWHERE = {
    "project/architecture": "ARCHITECTURE.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/security": "SECURITY.md",
    "project/benchmarks": "benchmarks/README.md",
    "project/deploy-folder": "deploy/README.md",
    "project/scanner-service": "deploy/scanner/README.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)\s#]*)(#[^)\s]*)?(?=\))")
_PAGE_OF = {(ROOT / file).resolve(): page for page, file in FROM_ELSEWHERE.items()}


def linked(text: str, folder: Path, page_folder: Path) -> str:
    """Markdown of ``folder`` as a page in ``page_folder``: links to files that are pages lead to the page."""

    def new(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = (folder / path).resolve()
        if target.is_dir():
            target /= "README.md"
        if target == ROOT / "README.md":  # the start page says the same, and has other headings
            target, anchor = HERE / "index.md", ""
        if target in _PAGE_OF:
            target = HERE / f"{_PAGE_OF[target]}.md"
        return relative(target, page_folder) + anchor

    return _LINK.sub(new, text)


def relative(target: Path, folder: Path) -> str:
    """The way from a page's folder to a file."""
    ups = 0
    while not target.is_relative_to(folder):
        folder, ups = folder.parent, ups + 1
    return "../" * ups + target.relative_to(folder).as_posix()


def read(app: Any, page: str, source: list[str]) -> None:
    """A page as it is read: generated, taken from elsewhere, or as it lies here with its links turned."""
    folder = (HERE / f"{page}.md").parent
    if page in PAGES:
        source[0] += "\n" + PAGES[page]()
    elif page in FROM_ELSEWHERE:
        file = ROOT / FROM_ELSEWHERE[page]
        source[0] = linked(file.read_text(encoding="utf-8"), file.parent, folder)
    else:
        source[0] = linked(source[0], folder, folder)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
