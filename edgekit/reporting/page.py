"""From bundles to one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.bundle import REPORT, Bundle
from edgekit.errors import DataError, MissingExtra, OutputExists, UsageError
from edgekit.files import atomic_write, check_new, given_path
from edgekit.version import __version__

from . import charts
from .bench import Bench
from .collect import BundleView, Group, collect
from .contrast import inks
from .explanations import Picture, data_uri, read_pictures
from .figures import rounded
from .front import Front, front_file, read_front, row_words
from .tables import table_of

__all__ = ["Live", "numbered", "policy", "render", "report"]

GENERATOR = b'<meta name="generator" content="edgekit'
MAX_CLASSES = 24  # a larger confusion matrix is unreadable; its worst pairs are listed instead
MAX_PICTURES_TEXT = 2_000_000  # characters of all pictures together, so that the page stays mailable

Source = Bundle | str | os.PathLike[str]


class Live(NamedTuple):
    """Of a page that a server keeps up to date. ``skipped``: (folder, why it is not shown)."""

    version: str
    skipped: tuple[tuple[str, str], ...]


def report(
    bundles: Source | Sequence[Source],
    *,
    out: str | os.PathLike[str] = REPORT,
    explanations: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
) -> dict[str, Any]:
    """Write one self-contained HTML page about one or several bundles.

    A study of `edgekit.pareto` (or its ``STUDY.front.json``) among them stands for the bundles on its front, and is drawn.
    ``out`` is replaced atomically where it is an earlier report, and refused where it is any other file.
    ``explanations``: a folder that `edgekit.explain` wrote, or several. Returns ``bundle`` (the first), ``report`` (path),
    ``bundles``, ``size_bytes``.
    A damaged derived file counts as absent and is named on the page.
    Raises `BundleError` for a missing bundle or a damaged model, `OutputExists` for a foreign file at ``out``, `DataError` for
    a folder without explanations or a study without a front.
    """
    sources = list(bundles) if isinstance(bundles, Iterable) and not isinstance(bundles, str) else [bundles]
    if not sources:
        raise UsageError("no bundle was named", "edgekit report B... --out report.html")
    out = given_path(out, "out")
    sources, fronts = _with_fronts(sources)
    opened = [Bundle.open(source.path if isinstance(source, Bundle) else source, verify=False) for source in sources]
    home = _check_out(out, opened)
    names = _names(opened)
    known = {bundle.digest: name for bundle, name in zip(opened, names, strict=True)}
    folders = [] if explanations is None else explanations
    folders = list(folders) if isinstance(folders, Iterable) and not isinstance(folders, str) else [folders]
    pictures = [p for folder in folders for p in read_pictures(given_path(folder, "explanations"), known)]
    views = [collect(bundle, name) for bundle, name in zip(opened, names, strict=True)]
    data = render(views, pictures, fronts).encode()
    if home:
        home.extend({REPORT: data})
    else:
        atomic_write(out, data)
    return {
        "bundle": str(opened[0].path),
        "report": str(out),
        "bundles": [str(bundle.path) for bundle in opened],
        "size_bytes": len(data),
    }


def _with_fronts(sources: Sequence[Source]) -> tuple[list[Source], list[Front]]:
    """(bundles, each once; fronts): those on the front of a study stand where it was named.

    Raises `DataError` where nothing is left to report on.
    """
    found: dict[str, Source] = {}
    fronts = []
    for source in sources:
        path = source.path if isinstance(source, Bundle) else given_path(source, "bundle")
        file = front_file(path)
        if file is not None:
            fronts.append(read_front(file))
        for bundle in [source] if file is None else fronts[-1].bundles:
            found.setdefault(os.path.realpath(bundle.path if isinstance(bundle, Bundle) else bundle), bundle)
    if not found:
        raise DataError(f"the bundles on the front of {fronts[0].study} are gone", "name a bundle beside it, or search on")
    return list(found.values()), fronts


def _check_out(out: Path, opened: Sequence[Bundle]) -> Bundle | None:
    """Refuse a foreign file; return the bundle whose own report this is, if it is one's."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder", f"name a file: --out {out / REPORT}")
    check_new(out)
    if out.is_file() and out.stat().st_size:
        with out.open("rb") as file:
            if GENERATOR not in file.read(2048):
                raise OutputExists(out)
    home = next((b for b in opened if out.parent.resolve() == b.path.resolve()), None)
    if home and out.name != REPORT:
        raise UsageError(f"{out} lies inside a bundle", f"inside a bundle the report is named {REPORT}")
    return home


def _names(opened: Sequence[Bundle]) -> list[str]:
    """Short names that tell the bundles apart: the folder's."""
    return numbered([bundle.path.name.removesuffix(".edge") or bundle.manifest.name for bundle in opened])


def numbered(stems: Sequence[str]) -> list[str]:
    """Equal ones get a number each."""
    total, seen = Counter(stems), Counter[str]()
    names = []
    for stem in stems:
        seen[stem] += 1
        names.append(f"{stem} ({seen[stem]})" if total[stem] > 1 else stem)
    return names


def render(
    views: Sequence[BundleView],
    pictures: Sequence[Picture],
    fronts: Sequence[Front] = (),
    live: Live | None = None,
) -> str:
    """The page as text. Everything that came out of a bundle is escaped by Jinja2 or encoded as JSON."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("report", "jinja2") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        count=_count, size=_size, ms=_ms, percent=_percent, micro=_micro, rounded=rounded, short=lambda text: str(text)[:12]
    )
    key = charts.protocol(views)
    rows = [{"view": view, "bench": charts.headline(view, key), "differs": charts.differs(view, key)} for view in views]
    groups = _groups(views)
    drawn = _charts(views, rows)
    stored = [(view.name, name, data_uri(png)) for view in views for name, png in view.pictures]
    embedded = [*pictures, *(Picture(uri, name, of=bundle) for bundle, name, uri in stored if uri)]
    total = itertools.accumulate(len(picture.uri) for picture in embedded)
    shown = sum(size <= MAX_PICTURES_TEXT for size in total)
    style = _asset("report.css")
    scripts = _scripts(live is not None)
    page = environment.from_string(_asset("report.html")).render(
        live=live,
        cards=_cards(rows, groups),
        groups=groups,
        views=views,
        rows=rows,
        protocol=str(key) if key else None,
        charts=drawn,
        fronts=fronts,
        confusions=[_confusion(view) for view in views if view.confusion],
        unjudged=[view.name for view in views if not view.confusion],
        pictures=embedded[:shown],
        left_out=len(embedded) - shown,
        style=style,
        ink=inks(style),
        table_of=table_of,
        scripts=scripts,
        policy=policy(live is not None),
        version=__version__,
        now=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        plain=_plain,
        row_words=row_words,
    )
    return page.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is a letter of JSON, and none of UTF-8


def policy(live: bool) -> str:
    """The page's Content-Security-Policy: its own scripts by their hashes, and nothing from anywhere else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _scripts(live)]
    rules = ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"]
    rules += ["connect-src 'self'"] * live + [" ".join(["script-src", *(f"'sha256-{each}'" for each in hashes)])]
    return "; ".join(rules)


def _scripts(live: bool) -> list[str]:
    return [_asset(name) for name in ("chart.umd.min.js", "report.js", *(["live.js"] if live else []))]


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _charts(views: Sequence[BundleView], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    judged: list[tuple[BundleView, Bench | None]] = [(row["view"], row["bench"]) for row in rows]
    sized = [charts.Point(v.name, v.group, v.graph_bytes / 1e3, v.top1) for v, _ in judged if v.top1 is not None]
    timed = [
        charts.Point(v.name, v.group, b.p50, v.top1, b.trustworthy is False)
        for v, b in judged
        if v.top1 is not None and b is not None and b.p50 is not None
    ]
    return {
        "latency": charts.tradeoff(timed, "Latency p50 (ms)"),
        "doubtful": [point.name for point in timed if point.doubtful],
        "size": charts.tradeoff(sized, "Graph size (kB)"),
        "absent": _absent(rows),
        "curves": charts.curves(views),
        "uncurved": charts.uncurved(views),
        "histograms": [{"bundle": v.name, "bench": b, "chart": charts.histogram(b)} for v in views for b in v.bench],
        "times": [{"bundle": v.name, "bench": b, "rows": charts.times(b)} for v in views for b in v.bench if b.layers],
        "untimed": [v.name for v in views if not any(b.layers for b in v.bench)],
        "prunings": charts.prunings(views),
        "quantization": [
            {"view": v, "sensitivity": charts.sensitivity(v), "ranges": charts.ranges(v)} for v in views if v.quantized
        ],
    }


def _absent(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(bundle, why it has no point, the command that gives it one) for each that a chart of several bundles lacks."""
    found: list[tuple[str, str, str]] = []
    for view, bench in ((row["view"], row["bench"]) for row in rows):
        if view.top1 is None:
            found.append((view.name, "no accuracy was measured on these weights", "edgekit eval B --data SPEC"))
        elif bench is None and view.timed:
            found.append((view.name, "its latency was measured under other conditions", "edgekit bench B"))
        elif bench is None:
            found.append((view.name, "no latency was measured", "edgekit bench B"))
    return found


def _groups(views: Sequence[BundleView]) -> list[tuple[Group, list[str]]]:
    """Those of the page with their bundles, the largest first."""
    counts = Counter(view.group for view in views)
    return [(group, [view.name for view in views if view.group == group]) for group, _ in counts.most_common()]


def _cards(rows: Sequence[Mapping[str, Any]], groups: Sequence[tuple[Group, list[str]]]) -> list[dict[str, Any]]:
    """The four answers that a reader looks for first, of the largest group; an unmeasured one says what measures it."""
    first = groups[0][0] if groups else None
    views: list[BundleView] = [row["view"] for row in rows if row["view"].group == first]
    timed: list[tuple[BundleView, Bench]] = [
        (row["view"], row["bench"]) for row in rows if row["bench"] and row["view"] in views
    ]
    best = max((v for v in views if v.top1 is not None), key=lambda v: v.top1 or 0.0, default=None)
    small = min((v for v in views if v.graph_bytes), key=lambda v: v.graph_bytes, default=None)
    fast = min(timed, key=lambda pair: pair[1].p50 or 0.0, default=None)
    swift = f"{fast[0].name}{' · unsteady' if fast[1].trustworthy is False else ''}" if fast else None
    if fast and len(timed) < len(views):
        swift = f"{swift} · of {len(timed)} measured"
    engines = sorted(((row["view"], e) for row in rows for e in row["view"].engines), key=lambda pair: not pair[1].built)
    title, value, note = "Engine", None, None
    if engines:
        view, engine = engines[0]
        title, value = "Engine" if engine.built else "Build kit", engine.target
        note = f"{view.name} · {_size(engine.size_bytes)}" + (f" · {len(engines) - 1} more" if len(engines) > 1 else "")
    return [
        _card(
            "Best accuracy", _percent(best.top1) if best else None, best.name if best else None, "edgekit eval B --data SPEC"
        ),
        _card("Smallest", _size(small.graph_bytes) if small else None, small.name if small else None, "edgekit quantize B"),
        _card("Fastest (p50)", _ms(fast[1].p50) if fast else None, swift, "edgekit bench B"),
        _card(title, value, note, "edgekit build B --target rtx-ada"),
    ]


def _card(title: str, value: str | None, note: str | None, cure: str) -> dict[str, Any]:
    return {"title": title, "value": value, "note": note, "cure": cure}


def _confusion(view: BundleView) -> dict[str, Any]:
    """Cells with their share of the row (recall), and the pairs that are confused most."""
    matrix = view.confusion or []
    labels = view.labels or tuple(str(i) for i in range(len(matrix)))
    sums = [sum(row) or 1 for row in matrix]
    wrong = [(i, j, n) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    pairs = [(n, labels[i], labels[j], n / sums[i], f"{i}/{j}") for i, j, n in wrong]
    worst = sorted(pairs, key=lambda p: (-p[0], -p[3]))[:8]
    return {
        "name": view.name,
        "labels": labels,
        "first": next((key for *_, key in worst if key in view.examples), next(iter(view.examples), "")),
        "unnamed": not view.labels,
        "examples": view.examples,
        "rows": [[(n, n / sums[i]) for n in row] for i, row in enumerate(matrix)] if len(matrix) <= MAX_CLASSES else None,
        "classes": len(matrix),
        "samples": sum(map(sum, matrix)),
        "right": sum(row[i] for i, row in enumerate(matrix)),
        "worst": worst,
    }


def _plain(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The scalars of a configuration or of figures; long lists are shown elsewhere or stay in the manifest."""
    for key, value in values.items():
        if isinstance(value, float):
            yield key, f"{value:.5g}"
        elif isinstance(value, str | int) or value is None:
            yield key, "-" if value is None else str(value)[:160]
        elif isinstance(value, list) and len(value) <= 6 and all(isinstance(v, str | int | float) for v in value):
            yield key, ", ".join(map(str, value))[:160]


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}".replace(",", "\u202f")


def _size(value: float) -> str:
    if value < 1000:
        return f"{value:.0f} B"
    return f"{value / 1e3:.3g} kB" if value < 999_500 else f"{rounded(value / 1e6)} MB"


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{rounded(value)} ms"


def _micro(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f} %"
