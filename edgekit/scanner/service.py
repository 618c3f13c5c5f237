"""`scan`: a scanner put together by name, from the bundle to the last flush."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.runtime import Model

from .codes import BUDGET_MS, CodeReader
from .outbox import Outbox, default_outbox
from .pipeline import Pipeline, Summary
from .sinks import Sink, open_sink
from .sources import open_source
from .stop import Stop

__all__ = ["scan"]


def scan(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    *,
    source: str,
    sinks: Sequence[str] = (),
    codes: bool = False,
    watch: bool = False,
    outbox: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int = 1,
    code_budget_ms: float = BUDGET_MS,
    stop: Stop | None = None,
) -> Summary:
    """Read every frame of ``source`` with the bundle's model, with ``codes``, or both; send the events to ``sinks``.

    ``source`` and ``sinks`` as in `SOURCES` and `SINKS`. ``outbox``: the file in which events wait for a network sink
    (`default_outbox`). ``watch`` goes on until ``stop`` is set. Raises `UsageError` for unknown names or nothing to
    read with, `BundleError`, `DataError` for a missing source, `OSError` where a sink cannot be written.
    """
    if bundle is None and not codes:
        raise UsageError("there is nothing to read with", "name a bundle, or add --codes")
    stop = stop or Stop()
    with contextlib.ExitStack() as stack:
        frames = open_source(source, watch=watch, stop=stop)
        reader = CodeReader(code_budget_ms) if codes else None
        model = None
        if bundle is not None:
            model = stack.enter_context(
                Model.open(bundle.path if isinstance(bundle, Bundle) else bundle, backend, threads=threads)
            )
        opened: list[Outbox] = []

        def the_outbox() -> Outbox:
            if not opened:
                opened.append(Outbox(outbox or default_outbox()))
                stack.callback(opened[0].close)
            return opened[0]

        targets: list[Sink] = []
        for spec in sinks:
            sink = open_sink(spec, the_outbox)
            stack.callback(sink.close)
            if any(_place(sink) == _place(other) for other in targets):
                raise UsageError(f"the sink {sink.name} is named twice", "name each sink once")
            targets.append(sink)
        return Pipeline(source=frames, model=model, codes=reader, sinks=targets, stop=stop).run()


def _place(sink: Sink) -> str:
    """Where a sink writes, whichever way its path was spelled."""
    kind, _, path = sink.name.partition(":")
    return f"{kind}:{os.path.abspath(path)}" if kind in ("jsonl", "sqlite") and path != "-" else sink.name
