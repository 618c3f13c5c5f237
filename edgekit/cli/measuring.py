"""bench, compare, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgekit.errors import BudgetNotMet
from edgekit.progress import short

from .common import Answer, answers, bundle_argument, table

__all__ = ["bench", "compare", "doctor"]

WORST_LAYERS = 12


@click.command("bench")
@bundle_argument()
@click.argument("other", metavar="[B2]", required=False, type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Backend; auto takes the first that works.")
@click.option(
    "--scenario",
    default="single-stream",
    show_default=True,
    metavar="NAME",
    help="single-stream (one after the other), multi-stream (several samples a query), offline (throughput in batches),"
    " server (Poisson arrivals).",
)
@click.option("--precision", default="auto", show_default=True, metavar="NAME", help="auto, float or int8.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0, 1024), help="CPU cores, 0 for all.")
@click.option("--seconds", default=2.0, show_default=True, type=float, help="Length of the measurement after the warm-up.")
@click.option("--batch", type=int, help="offline: the batch; default: the fastest of 1, 4, 16, 64.")
@click.option("--streams", type=int, help="multi-stream: samples a query, as of so many cameras; default: 8.")
@click.option("--rate", type=float, help="server: arrivals a second; default: 70% of what the model can serve.")
@click.option(
    "--against",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="An earlier result, a benched bundle, or a folder of --history: the middle of the last five like it.",
)
@click.option("--fail-over", metavar="SHARE", help="With --against: exit 3 if it takes longer by more, for example 5%.")
@click.option("--force", is_flag=True, help="Compare with a result of another device or version all the same.")
@click.option("--layers", is_flag=True, help="Also time every layer (onnxruntime, tensorrt, tensorrt-rtx).")
@click.option("--plot", metavar="FILE.svg", type=click.Path(path_type=Path), help="Draw the layers' times; implies --layers.")
@click.option(
    "--history",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Add the result to this folder, and draw history.svg there.",
)
@click.option("--save/--no-save", default=True, show_default=True, help="Write the result into the bundle.")
@answers
def bench(bundle: Path, other: Path | None, **options: Any) -> Answer:
    """Measure latency or throughput of a bundle, and say whether the figure can be trusted.

    The result is written into the bundle as bench/BACKEND-PRECISION-SCENARIO.json. With B2, both are timed in turns, and the
    answer is how much slower B2 is; nothing is written.

    \b
    Examples:
      edgekit bench digits.edge
      edgekit bench digits.edge --scenario multi-stream --streams 4
      edgekit bench digits.edge --scenario server --rate 200
      edgekit bench digits.edge --plot layers.svg
      edgekit bench digits.edge --against baseline.json --fail-over 5%
      edgekit bench digits.edge --against results/ --fail-over 5% --history results
      edgekit bench digits.edge digits8.edge --fail-over 0
    \f
    Returns ``bundle``, ``model``, ``digest``, ``graph``, ``precision``, ``scenario``, ``batch``, ``time``, ``device``,
    ``backend`` with ``version``, ``provider`` and ``threads``, ``int8`` and ``passed_over`` (as of eval), ``latency_ms``
    (p50 to p99, min, mean, max), ``throughput`` (inferences a second), ``key`` (the figure that is compared), ``iterations``,
    ``seconds``, ``cv``, ``drift``, ``jitter_ms``, ``trustworthy`` and the ``reasons`` why not, ``histogram``, ``samples_ms``,
    ``warm_up``, ``cold_start_ms`` and ``process_start_ms`` (to the first answer), ``end_to_end`` (a frame to its answer),
    ``memory``, ``energy`` (None without power rails), ``temperatures`` and ``clocks_mhz`` (before and after), ``load`` (what
    else ran), ``yardstick`` (how fast this machine was just then), ``inputs``, ``protocol``, ``file`` and ``history`` (where
    it was written), ``passed`` and ``against`` (the gate; None without one) and, with ``--layers``, ``profile``; of more than
    one stream ``streams``, offline ``tried`` (the batches), of a server ``rate``, ``queue``, ``service_ms`` and
    ``utilisation``. Of two bundles ``bundles`` (a result each), ``ratio`` with ``low`` and ``high`` (its 99% interval),
    ``verdict``, ``rounds`` and ``limit`` as well.
    """
    import edgekit

    if other is not None:
        return _in_turns(bundle, other, options)
    try:
        result, missed = edgekit.bench(bundle, **options), None
    except BudgetNotMet as error:
        result, missed = dict(error.result), error
    return Answer(result, _bench_text(result), missed=missed)


@click.command("compare")
@bundle_argument()
@click.option("--backends", default="onnxruntime", show_default=True, metavar="NAMES", help="Backends, comma-separated.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0, 1024), help="CPU cores, 0 for all.")
@click.option(
    "--with",
    "other",
    metavar="B",
    type=click.Path(path_type=Path),
    help="Hold this bundle's graphs against the first's answers.",
)
@click.option(
    "--data",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A folder of .npz, one array an input name, instead of the golden inputs (noise, where the model was imported).",
)
@click.option("--layers", is_flag=True, help="Also compare the int8 graph with the float graph layer by layer.")
@click.option("--diverge", default=20.0, show_default=True, metavar="DB", type=float, help="A layer diverges below this SNR.")
@click.option("--plot", metavar="FILE.svg", type=click.Path(path_type=Path), help="Draw the layers' SNR; implies --layers.")
@answers
def compare(bundle: Path, **options: Any) -> Answer:
    """Run the same inputs through every graph and backend and show each output's error against the golden outputs.

    Exits 3 where an output misses the tolerance that the bundle states for its graph.

    \b
    Examples:
      edgekit compare digits8.edge --backends onnxruntime
      edgekit compare digits8.edge --layers --plot layers.svg
      edgekit compare model8.edge --layers --data npz-folder/
      edgekit compare digits.edge --with pruned8.edge
    """
    import edgekit

    try:
        result = edgekit.compare(bundle, **options)
    except BudgetNotMet as error:
        if not click.get_current_context().params["as_json"]:
            click.echo(_compare_text(error.result))  # where it went wrong is what one asks next
        raise
    return Answer(result, _compare_text(result))


@click.command("doctor")
@click.argument("bundle", metavar="[B]", required=False, type=click.Path(path_type=Path))
@click.option("--selftest", metavar="FILE", type=click.Path(path_type=Path), help="Also write all of it to this JSON file.")
@click.option("--chaos", is_flag=True, help="Break things on purpose, and write a report of what still held.")
@click.option("--quick", is_flag=True, help="Of --chaos: few rounds, one to two minutes.")
@click.option("--minutes", type=float, metavar="M", help="Of --chaos: go on for about so long, instead of set rounds.")
@click.option("--only", multiple=True, metavar="NAME", help="Of --chaos: this case or group (scan, update); may be repeated.")
@click.option("--list", "listing", is_flag=True, help="Of --chaos: show the cases, run none.")
@click.option("--root", metavar="DIR", type=click.Path(path_type=Path), help="Of --chaos: try updates on a copy of this root.")
@click.option(
    "--work", metavar="DIR", type=click.Path(path_type=Path), help="Of --chaos: the disk to try; else the state folder's."
)
@click.option(
    "--out", metavar="FILE|DIR", type=click.Path(path_type=Path), help="Of --chaos: the report; else chaos-TIME.json here."
)
@click.option("--key", metavar="K", type=click.Path(path_type=Path), help="Of --chaos: sign the report with this private key.")
@click.option("--require-all", is_flag=True, help="Of --chaos: exit with 3 where a case could not run here.")
@answers
def doctor(bundle: Path | None, selftest: Path | None, chaos: bool, listing: bool, **options: Any) -> Answer:
    """Show what works on this machine, what is missing, and the command that installs it.

    Each backend runs a tiny model, on a GPU an engine compiled on the spot, and is held to its golden output.

    --chaos kills scans and installs, takes receivers, cameras and disk space away, and offers damaged packs, all in a
    folder of its own: nothing that runs is touched. With B it uses copies of your bundle.

    \b
    Examples:
      edgekit doctor
      edgekit doctor --selftest machine.json
      edgekit doctor parcel.edge --chaos --out report.json --key device.key
    \f
    Returns, where nothing is broken on purpose, what stands before ``started``; with ``--chaos`` the rest, ``edgekit``,
    ``format``, ``version``, ``machine``, ``report``, ``page`` and ``key_id`` (of the signature, or None):
    """
    if chaos:
        from .chaos import chaos as run
        from .chaos import listed

        return listed(options["only"]) if listing else run(bundle, **options)
    if bundle is not None or listing or any(options.values()):
        raise click.UsageError("these options belong to --chaos: edgekit doctor [B] --chaos")
    from edgekit.benchmarking import doctor as look_over

    result = look_over()
    if selftest is not None:
        from edgekit.files import atomic_write

        atomic_write(selftest, json.dumps(result, indent=1).encode() + b"\n")
    lines = [f"edgekit {result['edgekit']}"]
    width = max(len(check["check"]) for check in result["checks"])
    for check in result["checks"]:
        hint = f"  ({check['hint']})" if check["hint"] else ""
        lines.append(f"  {'ok' if check['ok'] else '--'}  {check['check'].ljust(width)}  {check['found']}{hint}")
    return Answer(result, "\n".join(lines))


def _compare_text(result: dict[str, Any]) -> str:
    columns = [
        "backend",
        "graph",
        "output",
        "snr_db",
        "relative",
        "max_abs",
        "cosine",
        "agree",
        "tolerance",
        "within_tolerance",
    ]
    text = table(result["outputs"], columns)
    return f"{text}\n\n{_layers_text(result)}" if "layers" in result else text


def _layers_text(result: dict[str, Any]) -> str:
    def level(row: dict[str, Any]) -> float:
        snr = row["snr_db"] if row["fitted_db"] is None else row["fitted_db"]
        return -200.0 if snr is None else float(snr)

    rows, first, fall = result["layers"], result["first_diverging"], result["largest_fall"]
    worst = sorted(rows, key=level)[:WORST_LAYERS]
    lines = [f"the worst {len(worst)} of {len(rows)} layers"]
    if result["unmatched"]:
        lines[0] += f" ({result['unmatched']} more have no tensor in the float graph)"
    lines += [table(worst, ["layer", "op", "tensor", "type", "snr_db", "cosine", "max_abs", "relative", "note"]), ""]
    if first:
        found = "not finite" if first["snr_db"] is None else f"{first['snr_db']:.1f} dB"
        lines.append(f"first below {result['diverge_db']:g} dB: {first['layer']} ({first['op']}), {found}")
    else:
        lines.append(f"no layer falls below {result['diverge_db']:g} dB")
    if fall:
        before = "exact" if fall["from_db"] >= 200 else f"{fall['from_db']:.1f}"
        lines.append(f"largest fall: {fall['layer']} ({fall['op']}), from {before} to {fall['to_db']:.1f} dB")
    else:
        lines.append("largest fall: none beyond what rounding to int8 costs")
    return "\n".join([*lines, *([f"drawn in {result['plot']}"] if "plot" in result else [])])


def _in_turns(bundle: Path, other: Path, options: dict[str, Any]) -> Answer:
    """B2 against B."""
    from edgekit.benchmarking import bench_pair

    taken = ("backend", "precision", "threads", "seconds", "fail_over")
    context = click.get_current_context()
    for name in options.keys() - {*taken}:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} has no meaning with two bundles, which are timed in turns")
    try:
        result, missed = bench_pair(bundle, other, **{name: options[name] for name in taken}), None
    except BudgetNotMet as error:
        result, missed = dict(error.result), error
    rows = [
        {"": name, **{k: one[k] for k in ("bundle", "graph", "backend")}, **_percentiles(one)}
        for name, one in zip("AB", result["bundles"], strict=True)
    ]
    lines = [
        table(rows),
        "",
        f"B takes {result['ratio']:.3f} times as long as A (99% interval {result['low']:.3f} to {result['high']:.3f}, "
        f"{result['rounds']} rounds in turns): {result['verdict']}",
        *(f"not to be trusted: {reason}" for reason in result["reasons"]),
    ]
    return Answer(result, "\n".join(lines), missed=missed)


def _percentiles(one: dict[str, Any]) -> dict[str, float]:
    return {f"{key} ms": one["latency_ms"][key] for key in ("p50", "p90", "p99")}


def _bench_text(result: dict[str, Any]) -> str:
    shown = ("p50", "p90", "p95", "p99", "p999", "mean")
    latency = {key: value for key, value in result["latency_ms"].items() if key in shown}
    device = result["device"]
    lines = [
        f"{result['model']}  {result['graph']} on {result['backend']} {result['version']}, {result['threads']} thread(s)",
        f"{result['scenario']}, batch {result['batch']} (MLPerf compares {result['key']}), "
        f"{result['iterations']} runs in {result['seconds']:.1f} s on {device['cpu']}, {device['cores']} cores",
        "latency ms   " + "  ".join(f"{key} {short(value)}" for key, value in latency.items()),
        f"throughput   {short(result['throughput'])} inferences/s",
        f"jitter       {result['jitter_ms']:.2g} ms from one call to the next",
        f"cold start   {short(result['cold_start_ms'])} ms to open and answer"
        + (f", {short(result['process_start_ms'])} ms from the start of Python" if result["process_start_ms"] else ""),
    ]
    lines += _sensed(result)
    if result.get("int8") == "float":
        lines.append("int8         computed in float: ONNX Runtime's int8 kernels overflow on a CPU without VNNI")
    if "queue" in result:
        wait, queue = result["queue"]["wait_ms"], result["queue"]
        lines.append(
            f"queue        {short(result['rate'])} arrivals/s, busy {result['utilisation']:.0%}, "
            f"wait p50 {short(wait['p50'])} p99 {short(wait['p99'])} ms, longest {queue['longest']}"
        )
    if result["end_to_end"]:
        whole = result["end_to_end"]
        frame = "x".join(map(str, whole["frame"]))
        lines.append(
            f"with frame   p50 {short(whole['latency_ms']['p50'])}  p99 {short(whole['latency_ms']['p99'])} ms, "
            f"{frame} uint8 to label"
        )
        lines += [f"             not to be trusted: {reason}" for reason in whole["reasons"]]
    if profile := result.get("profile"):
        rows = [{**row, "us": f"{row['us']:.1f}", "share": f"{row['share']:.1%}"} for row in profile["layers"][:WORST_LAYERS]]
        lines += ["", table(rows, ["layer", "op", "us", "share", "output"])]
        lines.append(
            f"{len(profile['layers'])} layers; a run takes {short(profile['run_us'])} us while they are timed, "
            f"{short(profile['between_us'], 3)} us of it between them"
        )
        lines.append("")
    if result["against"]:
        lines += _against(result["against"])
    lines.append("trustworthy  " + ("yes" if result["trustworthy"] else "no"))
    lines += [f"             {reason}" for reason in result["reasons"]]
    written = [result[kind] for kind in ("file", "history") if result.get(kind)]
    return "\n".join([*lines, *(f"written to   {path}" for path in written)])


def _sensed(result: dict[str, Any]) -> list[str]:
    """Memory, energy and heat, or that there is no sensor of them."""
    memory = result["memory"]
    parts = [("in all", memory["rss_mb"]), ("by the model", memory["model_mb"]), ("on the GPU", memory["gpu_mb"])]
    told = [f"{value:.1f} MB {what}" for what, value in parts if value is not None]
    lines = [f"memory       {', '.join(told)}"] if told else []
    seen = {"energy": result["energy"], "heat": result["temperatures"]["after"]}
    if silent := [name for name, found in seen.items() if not found]:
        lines.append(f"no sensor    of {' and '.join(silent)} that this user may read")
    if energy := result["energy"]:
        rails = [energy["whole"]] if energy["whole"] else list(energy["watts"])
        each = (
            f"{rail} {short(energy['watts'][rail], 3)} W, {short(energy['mj_per_inference'][rail], 3)} mJ an inference"
            for rail in rails
        )
        lines.append(f"energy       {'; '.join(each)}")
    if heat := result["temperatures"]["after"]:
        warmest = max(heat, key=lambda zone: heat[zone])
        before = result["temperatures"]["before"].get(warmest)
        lines.append(f"heat         {warmest} {'?' if before is None else f'{before:.0f}'} -> {heat[warmest]:.0f} degrees")
    return lines


def _against(gate: dict[str, Any]) -> list[str]:
    from edgekit.benchmarking.gate import verdict_words

    lines = [
        f"against      p50 {short(gate['old_p50_ms'])} -> {short(gate['new_p50_ms'])} ms, "
        f"{verdict_words(gate)}: {gate['verdict']}"
    ]
    if not gate["earlier_trustworthy"]:
        lines.append("             the earlier run was not to be trusted")
    if gate["caution"]:
        lines.append(f"             {gate['caution']}")
    return lines + [f"             differs: {difference}" for difference in gate["differs"]]
