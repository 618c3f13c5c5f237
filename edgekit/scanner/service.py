"""`scan`: a scan in one call, by names, as ``edgekit scan`` without a config file."""

from __future__ import annotations

import os
from collections.abc import Sequence

from edgekit.bundle import Bundle
from edgekit.errors import UsageError

from .config import CodeOptions, ModelOptions, OutboxFile, ScanConfig, SinkOptions, SourceOptions
from .pipeline import Summary
from .scanner import Scanner
from .sources.address import shown
from .stop import Stop

__all__ = ["named_config", "scan"]


def named_config(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    *,
    source: str | Sequence[str],
    sinks: Sequence[str] = (),
    codes: bool = False,
    watch: bool = False,
    outbox: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int = 1,
    code_budget_ms: float | None = None,
) -> ScanConfig:
    """The config of a scan from names; several sources are cameras. Raises `UsageError` where there is nothing to read with."""
    if bundle is None and not codes:
        raise UsageError("there is nothing to read with", "name a bundle, or add --codes")
    sources = (source,) if isinstance(source, str) else tuple(source)
    if doubles := [each for number, each in enumerate(sources) if each in sources[:number]]:
        raise UsageError(f"the source {shown(doubles[0])} is named twice", "name each source once")
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    return ScanConfig(
        model=None if path is None else ModelOptions(os.fspath(path), backend, threads=threads),
        codes=CodeOptions(budget_ms=code_budget_ms) if codes else None,
        source=tuple(SourceOptions(address=each, watch=watch) for each in sources),
        sink=tuple(SinkOptions(each) for each in sinks),
        outbox=OutboxFile(path="" if outbox is None else os.fspath(outbox)),
    )


def scan(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    *,
    source: str | Sequence[str],
    sinks: Sequence[str] = (),
    codes: bool = False,
    watch: bool = False,
    outbox: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int = 1,
    code_budget_ms: float | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Read every frame of ``source`` with the bundle's model, with ``codes``, or both; send the events to ``sinks``.

    ``source`` and ``sinks`` as in `SOURCES` and `SINKS`; several sources are cameras. ``outbox``: the file in which events wait
    for a network sink (`default_outbox`). ``watch`` goes on until ``stop`` is set. `Scanner` takes all else that a scan can be
    told. Raises `UsageError` for unknown names or nothing to read with, `BundleError`, `DataError` for a missing source,
    `OSError` where a sink cannot be written.
    """
    config = named_config(
        bundle,
        source=source,
        sinks=sinks,
        codes=codes,
        watch=watch,
        outbox=outbox,
        backend=backend,
        threads=threads,
        code_budget_ms=code_budget_ms,
    )
    return Scanner(config, stop=stop).run()
