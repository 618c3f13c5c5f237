"""What the terminal view shows, made of a scan's status: as much as fits into so many columns and lines.

Everything is text without markup, and a character that a terminal would obey is shown instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["picture"]

_WELL, _ILL, _DIM, _HEAD = "green", "bold red", "bright_black", "bold"
_STATES = {"up": _WELL, "ended": _DIM, "removed": _DIM, "connecting": "yellow"}
MOST_CHARACTERS = 300
#: Lines that events get at least, as long as there are so many.
LEAST_EVENTS = 3


class Section(NamedTuple):
    """``lines`` in height, its title included; a table of rows that do not wrap."""

    title: str
    table: Table
    lines: int


def picture(
    status: Mapping[str, Any], rates: Mapping[str, float], said: Sequence[str], seconds: float, width: int, height: int
) -> Any:
    """``status`` of a `Scanner`; frames a second by source; ``said``: lines for people, the latest last."""
    from rich.console import Group

    shown: list[Any] = _head(status, seconds)
    if "captured" not in status:
        return Group(*shown, *(_line(each) for each in said[-max(1, height - 2) :]))
    shown += _figures(status, rates, width)
    left = height - len(shown)
    fixed = []
    if left >= 4 and (cameras := _cameras(status, rates, width, max(4, left // 2))):
        fixed.append(cameras)
        left -= cameras.lines
    if left >= 3 and (sinks := _sinks(status, width, max(3, left // 3))):
        fixed.append(sinks)
        left -= sinks.lines
    if not status.get("sinks") and left > LEAST_EVENTS:
        shown.append(_line("no sink: events are only shown here", "yellow"))
        left -= 1
    for line in _health(status)[: max(0, left - LEAST_EVENTS - 1)]:
        shown.append(line)
        left -= 1
    for section in fixed:
        shown += [_title(section.title), section.table]
    recent = list(status.get("recent", ()))
    words = [_line(each) for each in said[-min(3, max(0, left - LEAST_EVENTS - 2)) :]] if left > LEAST_EVENTS + 2 else []
    if (room := left - 1 - (len(words) + 1 if words else 0)) > 0 and recent:
        shown += [_title("events"), _events(recent[-room:], width)]
    if words:
        shown += [_title("said"), *words]
    return Group(*shown)


def _head(status: Mapping[str, Any], seconds: float) -> list[Text]:
    state, ready = str(status.get("state", "starting")), bool(status.get("ready"))
    text = _line("edgekit scan  ", _HEAD)
    text.append(f"{timedelta(seconds=int(seconds))}  ", _DIM)
    if state != "running":
        text.append(state, "yellow")
        return [text]
    text.append("running, " + ("ready" if ready else "not ready"), _WELL if ready else _ILL)
    return [text] if ready else [text, *(_line(each, _ILL) for each in status["reasons"][:3])]


def _figures(status: Mapping[str, Any], rates: Mapping[str, float], width: int) -> list[Text]:
    lines = []
    if model := status.get("model"):
        bundle = str(model["bundle"]).rstrip("/").rpartition("/")[2]
        lines.append(_line(f"model {bundle} {str(model['digest'])[:12]} on {model['backend']}, batch {model.get('batch', 1)}"))
    dropped = status["dropped"]
    whole = status["captured"] == status["inferred"] + sum(dropped.values()) + status["in_flight"]
    text = _line(f"captured {status['captured']:,} = read {status['inferred']:,} + dropped {sum(dropped.values()):,}")
    text.append(f" + in flight {status['in_flight']:,}")
    if not whole:
        text.append("  the count is not exact", _ILL)
    if dropped:
        text.append(f"  ({_clean(_counted(dropped))})", "yellow")
    lines.append(text)
    found, latency = status.get("kpis") or {}, status["latency_ms"]
    parts = [f"{rates.get('', 0):.1f} frames/s"]
    if latency["p50"] is not None:
        parts.append(f"p50 {latency['p50']:.3g} ms, p99 {latency['p99']:.3g} ms")
    if found.get("read_rate") is not None:
        parts.append(f"read rate {found['read_rate']:.1%} ({found['good']:,} of {found['triggers']:,})")
    if found.get("codes_a_frame") is not None:
        parts.append(f"{status['codes']:,} codes, {found['codes_a_frame']:.3g} a frame")
    if any((misreads := found.get("misreads") or {}).values()):
        parts.append(f"misreads: {_counted(misreads)}")
    return [*lines, *_packed(parts, width)]


def _packed(parts: Sequence[str], width: int) -> list[Text]:
    """As many as fit on each line, two lines at most."""
    rows = [parts[0]]
    for part in parts[1:]:
        if len(rows[-1]) + 2 + len(part) <= width or len(rows) == 2:
            rows[-1] += f", {part}"
        else:
            rows.append(part)
    return [_line(row) for row in rows]


def _cameras(status: Mapping[str, Any], rates: Mapping[str, float], width: int, room: int) -> Section | None:
    """Those in trouble first."""
    read = {row["source"]: row for row in status.get("cameras", ())}
    rows = [dict(row) for row in status.get("sources", ())]
    known = {row["source"] for row in rows}
    rows += [{"source": name} for name in read if name not in known]
    if not rows:
        return None
    rows.sort(key=lambda row: row.get("state") in (None, "up", "ended", "removed"))
    columns = ["source", "state", "read/s", "p50 ms", "p99 ms", "queue", "dropped"]
    if width < 90:
        columns = ["source", "state", "read/s", "p99 ms", "dropped"]
    if width < 50:
        columns = ["source", "state", "read/s"]
    most = {"source": max(8, width // (4 if width >= 90 else 3)), "state": max(10, width // 3)}
    table = _table(columns, right=("read/s", "p50 ms", "p99 ms"), most=most, least={"queue": 8})
    many = max(1, room - 2)
    kept = rows if len(rows) <= many else rows[: max(1, many - 1)]
    for row in kept:
        name, state = row["source"], row.get("state", "")
        times = read.get(name, {}).get("latency_ms", {})
        reason = f"{state}: {row['reason']}" if row.get("reason") else state
        queue = f"{row['in_flight']} {row.get('queue', '')}" if "in_flight" in row else ""
        cells = {
            "source": _line(name),
            "state": _line(reason, _STATES.get(state, _ILL if state else _DIM)),
            "read/s": _line(f"{rates.get(name, 0):.1f}"),
            "p50 ms": _line(_ms(times.get("p50"))),
            "p99 ms": _line(_ms(times.get("p99"))),
            "queue": _line(queue),
            "dropped": _line(_counted(row.get("dropped") or {})),
        }
        table.add_row(*(cells[column] for column in columns))
    if len(kept) < len(rows):
        table.add_row(_line(f"and {len(rows) - len(kept)} more", _DIM))
    return Section("cameras", table, 2 + len(kept) + (len(kept) < len(rows)))


def _sinks(status: Mapping[str, Any], width: int, room: int) -> Section | None:
    rows = [dict(row) for row in status.get("sinks", ())]
    if not rows:
        return None
    rows.sort(key=lambda row: not row.get("down"))
    columns = ["sink", "sent", "waiting", "dropped", "state"] if width >= 70 else ["sink", "waiting", "state"]
    most = {"sink": max(10, width // 3), "state": max(12, width - width // 3 - 34)}  # a long reason takes no figure's place
    table = _table(columns, right=("sent", "waiting"), most=most)
    kept = rows[: max(1, room - 2)]
    for row in kept:
        problem = row.get("down") or (f"{row['refused']} refused" if row.get("refused") else "")
        waiting = row.get("waiting", row.get("unsaved"))
        cells = {
            "sink": _line(str(row["sink"])),
            "sent": _line(f"{row['sent']:,}"),
            "waiting": _line("" if waiting is None else f"{waiting:,}", "yellow" if waiting else ""),
            "dropped": _line(_counted(row.get("dropped") or {}), _ILL),
            "state": _line(f"{problem}" if problem else "up", _ILL if problem else _WELL),
        }
        table.add_row(*(cells[column] for column in columns))
    return Section("sinks", table, 2 + len(kept))


def _health(status: Mapping[str, Any]) -> list[Text]:
    """A line a watch that the config asks for."""
    steps = {row["step"]: row for row in status.get("steps", ())}
    lines = []
    if drift := steps.get("drift"):
        worst = max(drift["psi"].items(), key=lambda each: each[1], default=None)
        drifted = ", ".join(drift["drifted"])
        words = f"drifted: {drifted}" if drifted else "learning its baseline" if drift["learning"] else "none"
        score = f", highest PSI {worst[1]:.3g} ({worst[0]})" if worst else ""
        lines.append(_line(f"drift {words}{score}", _ILL if drifted else ""))
    if test := steps.get("selftest"):
        words = "failed: " + str(test.get("reason", "")) if not test["healthy"] else "passed" if test["runs"] else "not yet run"
        lines.append(_line(f"self-test {words} ({test['runs']} so far)", "" if test["healthy"] else _ILL))
    if shadow := steps.get("shadow"):
        words = f"shadow {shadow['state']}, {shadow['promoted']} promoted, {shadow['refused']} refused"
        compared = f", {shadow['compared']} frames compared" if "compared" in shadow else ""
        lines.append(_line(f"{words}{compared}" + (f": {shadow['reason']}" if shadow.get("reason") else "")))
    if trigger := steps.get("trigger"):
        causes = f", no read: {_counted(trigger['causes'])}" if trigger["causes"] else ""
        lines.append(_line(f"trigger {trigger['mode']}, {trigger['triggers']:,} triggers{causes}"))
    return lines


def _events(recent: Iterable[Mapping[str, Any]], width: int) -> Table:
    columns = ["time", "source", "frame", "what"] if width >= 60 else ["time", "what"]
    table = _table(columns, right=("frame",), most={"source": max(8, width // 4)}, least={"time": 12}, head=False)
    for event in recent:
        words, style = _said_of(event)
        number = event.get("seq", -1)
        cells = {
            "time": _line(str(event.get("time", ""))[11:23], _DIM),
            "source": _line(str(event.get("source", "")).rpartition("/")[2]),
            "frame": _line(str(number) if number >= 0 else "", _DIM),
            "what": _line(words, style),
        }
        table.add_row(*(cells[column] for column in columns))
    return table


def _said_of(event: Mapping[str, Any]) -> tuple[str, str]:
    if kind := event.get("event"):
        words = [event.get(name) for name in ("state", "cause", "reason", "part")]
        style = _WELL if event.get("state") in ("up", "back", "promoted") or event.get("ok") else "yellow"
        return " ".join(str(word) for word in (kind, *words) if word), style
    parts = [f"{event['label']} {event.get('score', 0):.0%}"] if "label" in event else []
    parts += [f"“{event['text']}”"] if event.get("text") else []
    parts += [f"{code['text']} ({code['format']})" for code in event.get("codes", ())]
    return (", ".join(parts), "") if parts else ("nothing found", _DIM)


def _table(
    columns: Sequence[str],
    right: Sequence[str] = (),
    most: Mapping[str, int] | None = None,
    least: Mapping[str, int] | None = None,
    head: bool = True,
) -> Table:
    """Columns as wide as what is in them, from ``least`` to ``most`` characters."""
    from rich.table import Table

    table = Table(box=None, show_header=head, header_style=_DIM, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        justify: Any = "right" if column in right else "left"
        low, high = (least or {}).get(column, 6 if column in right else None), (most or {}).get(column)
        table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis", min_width=low, max_width=high)
    return table


def _title(words: str) -> Text:
    return _line(words, _HEAD)


def _line(words: str, style: str = "") -> Text:
    """One line that is cut, not wrapped."""
    from rich.text import Text

    return Text(_clean(words), style=style, no_wrap=True, overflow="ellipsis")


def _clean(words: str) -> str:
    """Nothing that a terminal obeys: control characters as their pictures, what else cannot be seen as a question mark."""
    cut = words[:MOST_CHARACTERS]
    return "".join(c if c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else "?" for c in cut)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
