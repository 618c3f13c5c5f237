"""The terminal view of a running scan (``edgekit scan --tui``), drawn by Rich in a thread of its own.

It asks the scan for its figures once a second and draws what fits; the scan never waits for it, and a terminal that takes
nothing holds up only the view.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from edgekit.errors import MissingExtra
from edgekit.progress import spoken_by

if TYPE_CHECKING:
    from rich.console import Console

    from edgekit.scanner import Scanner, Stop

__all__ = ["ScanView", "can_draw", "viewed"]

EVERY_S = 1.0
KEPT = 50
SAID_AFTER = 5
#: The cursor again, the screen of before.
_RESTORE = b"\x1b[?25h\x1b[?1049l"


def can_draw() -> bool:
    """Whether stdout is a terminal that can be drawn on. Raises `MissingExtra` without Rich."""
    try:
        from rich.console import Console
    except ImportError:
        raise MissingExtra("tui", "rich") from None
    console = Console(file=sys.stdout)
    return console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty()


@contextlib.contextmanager
def viewed(scanner: Scanner, stop: Stop) -> Iterator[ScanView]:
    """In the block stdout shows the scan. What would have gone to stderr is shown, and said at the end as far as it matters."""
    from rich.console import Console

    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # a terminal that is not UTF-8 shows question marks
    view = ScanView(scanner.status, Console(file=sys.stdout))
    stop.at_force.append(_restore)
    try:
        with spoken_by(view.hear), view:
            yield view
    finally:
        stop.at_force.remove(_restore)
        if sys.stderr.isatty():
            for line in list(view.said)[-SAID_AFTER:]:
                click.echo(line, err=True)


def _restore() -> None:
    """Once, where the terminal takes it at once: one that was stopped (Ctrl-S) must not hold up the end of the process."""
    number = sys.stdout.fileno()
    if select.select([], [number], [], 0)[1]:
        os.write(number, _RESTORE)


class ScanView:
    """Draws ``status()`` on ``console`` while the block runs. ``said`` keeps the latest lines that `hear` was told."""

    def __init__(self, status: Callable[[], dict[str, Any]], console: Console, every_s: float = EVERY_S) -> None:
        self._status, self._console, self._every_s = status, console, every_s
        self.said: deque[str] = deque(maxlen=KEPT)
        self.problem = ""
        self._closing = threading.Event()
        self._begun = time.monotonic()
        self._rates = Rates()
        self._thread = threading.Thread(target=self._run, name="scan view", daemon=True)

    def hear(self, message: str, level: str = "info", **about: Any) -> None:
        """A line that is said in any thread; a log that is no terminal has it too."""
        line = " ".join(message.split())
        self.said.append(line)
        if not sys.stderr.isatty():
            click.echo(line, err=True)

    def __enter__(self) -> ScanView:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._closing.set()
        self._thread.join(1.0)
        if self.problem:
            click.echo(f"the view ended: {self.problem}", err=True)

    def draw(self) -> Any:
        """What the screen shows now, a renderable of Rich."""
        from .scan_picture import picture

        status = self._status()
        now = time.monotonic()
        rates = self._rates.of(status, now)
        width, height = self._console.size
        return picture(status, rates, list(self.said), now - self._begun, width, height)

    def _run(self) -> None:
        from rich.live import Live
        from rich.text import Text

        try:
            with Live(
                Text("edgekit scan"),
                console=self._console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live:
                while not self._closing.is_set():
                    live.update(self.draw(), refresh=True)
                    self._closing.wait(self._every_s)
        except Exception as error:  # noqa: BLE001  whatever the terminal does, the scan goes on
            self.problem = str(error) or type(error).__name__


class Rates:
    """Frames a second that were read, of all and by camera, over the last seconds."""

    def __init__(self, over_s: float = 3.0) -> None:
        self._over_s = over_s
        self._seen: deque[tuple[float, dict[str, int]]] = deque()

    def of(self, status: dict[str, Any], now: float) -> dict[str, float]:
        """By source, all together as ""."""
        counts = {row["source"]: row["inferred"] for row in status.get("cameras", ())}
        counts[""] = status.get("inferred", 0)
        self._seen.append((now, counts))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._over_s:
            self._seen.popleft()
        then, before = self._seen[0]
        span = now - then
        return {name: (count - before.get(name, 0)) / span for name, count in counts.items()} if span > 0 else {}
