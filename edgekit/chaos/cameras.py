"""Cameras that hang, go, crawl or send damage; a wall clock that jumps; a model that never answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgekit.errors import MissingExtra

from .case import Bench, Broken
from .stage import Receiver, cameras_of, check_arrivals, check_summary, forked, free_port, ids_in, scan_bundle

__all__ = ["camera_damage", "camera_hangs", "camera_slow", "camera_unplugged", "clock_jumps", "model_hangs"]

#: Seconds after which a case stops waiting for what should have come.
_PATIENCE_S = 60.0


class _Watched:
    """A scan of one camera, ``hurt``, whose events are looked at as they come."""

    def __init__(self, bench: Bench, source: dict[str, Any], **more: Any) -> None:
        from edgekit.scanner import Scanner

        self.bench = bench
        self.lines = bench.folder / "events.jsonl"
        self.lines.unlink(missing_ok=True)  # of the round before
        config = {
            "model": {"bundle": str(scan_bundle(bench))},
            "source": [{"name": "hurt", **source}],
            "sink": [{"address": f"jsonl:{self.lines}"}],
            **more,
        }
        self.scanner = Scanner(config)
        self.last: dict[str, int] = {}

    def events(self) -> Generator[dict[str, Any], None, None]:
        """Raises `Broken` where a frame's number does not grow, and where nothing is waited for any longer."""
        end = time.monotonic() + _PATIENCE_S + self.bench.seconds
        for event in self.scanner:
            if "seq" in event and "event" not in event:
                source, seq = str(event["source"]), int(event["seq"])
                if seq <= self.last.get(source, -1):
                    raise Broken(f"frame {seq} of {source} came after frame {self.last[source]}")
                self.last[source] = seq
            yield event
            if time.monotonic() > end:
                raise Broken("what the case waits for did not come")

    def finish(self) -> None:
        assert self.scanner.summary is not None
        check_summary(self.bench, self.scanner.summary.figures())
        ids_in(self.bench, self.lines)


def _is_frame(event: dict[str, Any], source: str) -> bool:
    return "seq" in event and "event" not in event and event["source"] == source


def camera_hangs(bench: Bench) -> None:
    _hurt(bench, signal.SIGSTOP)


def camera_unplugged(bench: Bench) -> None:
    _hurt(bench, signal.SIGKILL)


def _hurt(bench: Bench, number: signal.Signals) -> None:
    """A scan a round: a camera that goes again and again is tried again less and less often, as it should be.

    The camera that is hurt has its first frame before the other is added: so its process is known.
    """
    quick = {"stall_s": 0.5, "retry_s": 0.1} if bench.quick else {}
    for _ in bench.each():
        watched = _Watched(bench, {"address": "pattern:64x48@50", **quick})
        events = watched.events()
        next(event for event in events if _is_frame(event, "hurt"))
        (victim,) = cameras_of(os.getpid())
        watched.scanner.add({"address": "pattern:64x48@50", "name": "well", "stall_s": 30})
        next(event for event in events if _is_frame(event, "well"))
        os.kill(victim, number)
        hit, down, others = time.monotonic(), False, 0
        for event in events:
            if event.get("event") == "camera" and event["source"] == "well":
                raise Broken(f"the other camera was disturbed: {event}")
            others += _is_frame(event, "well")
            if event.get("event") == "camera" and event["source"] == "hurt" and event["state"] == "down" and not down:
                down = True
                bench.longest("noticed_s", time.monotonic() - hit)
            if down and _is_frame(event, "hurt"):
                break
        bench.longest("recovery_s", time.monotonic() - hit)
        bench.check(others, "the other camera gave no frame meanwhile")
        bench.check(not Path(f"/proc/{victim}").exists(), "the process that was hurt is still there")
        bench.count("frames_of_the_other_meanwhile", others)
        events.close()
        watched.finish()


def camera_slow(bench: Bench) -> None:
    seconds = 2.3 if bench.quick else 12.0
    watched = _Watched(bench, {"address": "pattern:64x48@1"})
    for _ in bench.each():
        begun, quick = 0.0, 0  # the time counts from the quick one's first frame: a process takes its time to start
        events, added = watched.events(), False
        for event in events:
            if not added:
                watched.scanner.add({"address": "pattern:64x48@50", "name": "quick"})
                added = True
            if event.get("event") in ("camera", "gap") and event.get("state") != "up":
                raise Broken(f"a camera was taken for dead: {event}")
            quick += _is_frame(event, "quick")
            begun = begun or (time.monotonic() if quick else 0.0)
            if begun and time.monotonic() - begun > seconds:
                break
        events.close()
        watched.finish()
        slow = watched.last.get("hurt", -1) + 1
        bench.figures |= {"slow_frames": slow, "quick_frames": quick}
        bench.check(slow >= int(seconds) - 1, f"{slow} frames of the slow camera came in {seconds:g} s")
        bench.check(quick > slow, "the quick camera was held up by the slow one")
        assert watched.scanner.summary is not None
        rows = {row["source"]: row for row in watched.scanner.summary.sources}
        lost = {
            reason: count for reason, count in rows["hurt"]["dropped"].items() if reason != "stopped"
        }  # the last one, by us
        bench.check(not lost, f"frames of the slow camera were dropped: {lost}")


def _jpegs(bench: Bench, damaged: bool) -> bytes:
    """60 pictures, the latter half of another size; where ``damaged``, with flipped bits and wiped headers."""
    from PIL import Image

    out = bytearray()
    for number in range(60):
        size = (96, 64) if number < 30 else (128, 80)
        noise = Image.effect_noise(size, 60).convert("RGB")
        one = io.BytesIO()
        noise.save(one, "JPEG", quality=90)
        data = bytearray(one.getvalue())
        if damaged and number % 5 == 4:
            for _ in range(8):
                data[bench.rng.randrange(300, len(data) - 2)] ^= 1 << bench.rng.randrange(8)
            if number % 10 == 9:  # of flipped bits a decoder may make something
                data[20:300] = bytes(280)
        out += data
    return bytes(out)


def camera_damage(bench: Bench) -> None:
    """A file of motion JPEG stands for the stream: the same decoder in the same process of its own."""
    try:
        import av  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtra.of(error) from None
    for number in bench.each():
        path = bench.folder / f"stream{number}.mjpeg"
        path.write_bytes(_jpegs(bench, damaged=number % 2 == 0))
        watched = _Watched(bench, {"address": str(path), "damaged": ("drop", "keep")[number // 2 % 2]})
        sizes = {(e["width"], e["height"]) for e in watched.events() if e.get("event") == "camera" and "width" in e}
        watched.finish()
        assert watched.scanner.summary is not None
        bench.check((128, 80) in sizes, f"the change of size was not told; seen: {sorted(sizes)}")
        (source,) = watched.scanner.summary.sources
        damage = source["refused_packets"] + source["dropped"].get("damaged", 0)
        bench.count("damaged", damage)
        if number % 2:
            bench.check(watched.scanner.summary.inferred == 60, "frames of a sound stream were lost")
        else:
            bench.check(damage, "no damage was noticed in a stream that was damaged")
        path.unlink()


def clock_jumps(bench: Bench) -> None:
    true, offset = time.time, [0.0]
    setattr(time, "time", lambda: true() + offset[0])  # noqa: B010  before the scanner is imported
    receiver = Receiver()
    jumps, each = (3600.0, -3600.0, -86400.0, 86400.0), 20 if bench.quick else 40  # frames between two
    for number in bench.each():
        lines = bench.folder / "events.jsonl"
        address = f"pattern:64x48@100,{len(jumps) * each}"
        sinks = {"sink": [{"address": receiver.address}, {"address": f"jsonl:{lines}"}]}
        outbox = {"path": str(bench.folder / f"outbox{number}.sqlite")}
        watched = _Watched(bench, {"address": address, "queue": "wait", "stall_s": 30}, outbox=outbox, **sinks)
        frames, walls = 0, []
        for event in watched.events():
            if event.get("event") == "gap" or event.get("state") == "down":
                raise Broken(f"the clock jumped, and the scan took it for a fault of the camera: {event}")
            if _is_frame(event, "hurt"):
                walls.append(datetime.fromisoformat(str(event["time"]).replace("Z", "+00:00")).timestamp())
                bench.check(event["latency_ms"] >= 0, "a latency is negative")
                if frames % each == each // 2:
                    offset[0] += jumps[frames // each]
                    bench.count("jumps")
                frames += 1
        steps = [abs(after - before) for before, after in pairwise(walls)]
        bench.check(sum(step > 1800 for step in steps) == len(jumps), "the jumps are not in the events' times: not met")
        bench.check(frames == len(jumps) * each, f"{frames} of {len(jumps) * each} frames came")
        watched.finish()
        ids = ids_in(bench, lines)
        bench.wait_for(partial(receiver.has, ids[-1]), "the last event is not delivered")
    check_arrivals(bench, receiver.ids)
    receiver.close()


def model_hangs(bench: Bench) -> None:
    """The loop is taken for hung after 10 s; in quick form after 1 s."""
    bundle = scan_bundle(bench)
    for number in bench.each():
        folder, port = bench.folder / f"round{number}", free_port()
        folder.mkdir()
        with forked(partial(_hanging_scan, folder, bundle, port, bench.quick)) as pid:
            bench.wait_for(lambda: _healthy(port) is True, "the scan does not start")  # noqa: B023  called at once
            begun = time.monotonic()
            bench.wait_for(lambda: _healthy(port) is False, "/healthz does not say that the scan hangs")  # noqa: B023
            bench.longest("noticed_s", time.monotonic() - begun)
            os.kill(pid, signal.SIGTERM)
            begun = time.monotonic()
            bench.wait_for(lambda: os.waitpid(pid, os.WNOHANG) != (0, 0), "SIGTERM does not end it", 10)
            bench.longest("end_after_sigterm_s", time.monotonic() - begun)
        bench.check(bench.figures["end_after_sigterm_s"] <= 3.0, "SIGTERM did not end the scan within 3 s")
        _nothing_lost(bench, folder, ids_in(bench, folder / "events.jsonl"))


def _hanging_scan(folder: Path, bundle: Path, port: int, quick: bool) -> None:
    """A scan whose 21st frame is never answered."""
    from edgekit.scanner import Reading, Scanner, board, stop_on_signals

    answer, frames = Reading.answer, iter(range(20))

    def hangs(reading: Reading, frame: Any) -> Any:
        while next(frames, None) is None:
            time.sleep(1)
        return answer(reading, frame)

    setattr(Reading, "answer", hangs)  # noqa: B010  mypy allows no assignment to a method
    if quick:
        board.HANG_S = 0.5
    config = {
        "model": {"bundle": str(bundle)},
        "source": [{"address": "pattern:64x48@100", "name": "camera"}],
        "sink": [{"address": f"http://127.0.0.1:{free_port()}/"}, {"address": f"jsonl:{folder}/events.jsonl?fsync=always"}],
        "outbox": {"path": str(folder / "outbox.sqlite")},
        "server": {"address": f"127.0.0.1:{port}", "preview": False},
    }
    with stop_on_signals() as stop:
        Scanner(config, stop=stop).run()


def _healthy(port: int) -> bool | None:
    """None where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return None


def _nothing_lost(bench: Bench, folder: Path, acknowledged: list[str]) -> None:
    """The outbox of the scan that was ended holds all that its JSON lines hold."""
    from edgekit.scanner import Outbox

    with contextlib.closing(Outbox(folder / "outbox.sqlite")) as outbox:
        (name,) = outbox.others(())
        waiting = [json.loads(each.event)["id"] for each in outbox.head(name, 10**6)]
    check_arrivals(bench, waiting, acknowledged)
