"""What watches a scan: shadow, drift, self-test, incidents and their replay, harvest."""

from __future__ import annotations

import contextlib
import csv
import itertools
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgekit.bundle import CALIBRATION, GOLDEN, Bundle
from edgekit.data import load
from edgekit.errors import DataError
from edgekit.manifest import Tolerance
from edgekit.runtime import Model
from edgekit.runtime.golden import load_golden, save_golden
from edgekit.runtime.onnxruntime import OnnxRuntimeRunner
from edgekit.scanner import Captured, Pipeline, Scanner, Step
from edgekit.scanner.png import decode_png, encode_png
from edgekit.scanner.reading import Reading
from edgekit.scanner.steps.drift import Drift, DriftOptions
from edgekit.scanner.steps.harvest import Harvest, HarvestOptions
from edgekit.scanner.steps.incident import IncidentOptions, Incidents
from edgekit.scanner.steps.selftest import SelfTest, SelfTestOptions
from edgekit.scanner.steps.shadow import Shadow, ShadowedModel, ShadowOptions


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray[Any, Any]]:
    split = load("digits").test
    return [split.read(i) for i in range(len(split))]


def frames(digits: list[Any], count: int, begin: int = 0) -> Iterator[Captured]:
    for seq in range(begin, begin + count):
        yield Captured(digits[seq % len(digits)], "cam", seq, 1e9 + seq / 10, "", 100 + seq / 10)


SIDE = st.integers(1, 12)


@given(arrays.arrays(np.uint8, st.one_of(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE, st.just(3)))))
def test_frames_are_packed_without_loss(frame: Any) -> None:
    assert np.array_equal(decode_png(encode_png(frame), "f"), frame)


@given(st.binary(max_size=80), st.integers(0, 60))
def test_a_damaged_frame_is_refused(noise: bytes, place: int) -> None:
    good = encode_png(np.arange(30, dtype=np.uint8).reshape(5, 6))
    bad = good[:place] + noise + good[place + len(noise) :]
    with contextlib.suppress(DataError):
        assert decode_png(bad, "f").size <= 64_000_000


# Shadow


def wait_for(condition: Any, model: ShadowedModel, step: Shadow, digits: list[Any]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    end = time.monotonic() + 30
    seq = 0
    while not condition(events):
        assert time.monotonic() < end, events
        captured = next(frames(digits, 1, seq))
        prediction = model(captured.frame)
        events += step.frame(captured, {"label": prediction.label})[1:] + step.due(0.0, 0.0)
        seq += 1
        time.sleep(0.001)
    return events


def ended(events: list[dict[str, Any]]) -> bool:
    return any(event["state"] in ("promoted", "refused") for event in events)


def renamed(bundle: Bundle, path: Path, labels: tuple[str, ...] | None = None, wrong: bool = False, **manifest: Any) -> Path:
    """The same model, another digest. ``wrong``: its golden outputs are others."""
    with Bundle.create(path) as draft:
        for name in bundle.manifest.files:
            draft.write(name, bundle.read(name))
        inputs, outputs = load_golden(bundle)
        draft.write(GOLDEN, save_golden({"x": inputs["x"][:4]}, {"y": outputs["y"][:4] + wrong}))
        draft.manifest = msgspec.structs.replace(bundle.manifest, labels=labels or bundle.manifest.labels, **manifest)
    return path


def test_a_like_bundle_is_promoted_and_every_model_closed(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"open": 0, "closed": 0}
    enter, leave = OnnxRuntimeRunner.__enter__, OnnxRuntimeRunner.__exit__

    def counted_enter(self: Any) -> Any:
        counts["open"] += 1
        return enter(self)

    def counted_leave(self: Any, *args: Any) -> None:
        counts["closed"] += 1
        leave(self, *args)

    monkeypatch.setattr(OnnxRuntimeRunner, "__enter__", counted_enter)
    monkeypatch.setattr(OnnxRuntimeRunner, "__exit__", counted_leave)
    options = ShadowOptions(frames=20, p99_share=50, busy_share=1.0)
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), options)
    step = Shadow(model)
    new = renamed(digits_bundle, tmp_path / "new.edge")
    model.offer(new)
    events = wait_for(ended, model, step, digits)
    assert [event["state"] for event in events] == ["offered", "promoted"]
    assert events[-1]["agreement"] == 1
    assert events[-1]["frames"] == 20
    assert model.bundle.digest == Bundle.open(new).digest == events[-1]["digest"]
    model.close()
    assert counts["open"] == counts["closed"] == 4


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "otherwise": ({"labels": tuple("9876543210")}, {}, "answers otherwise"),
    "labels": ({"labels": tuple("0123456789a")}, {}, "other labels than the model that runs: only one of them has a"),
    "task": ({"task": "tensor"}, {}, "is for tensor"),
    "input": ({"preprocessing": None}, {}, "takes raw tensors"),
    "golden": ({"wrong": True}, {}, "misses the golden outputs"),
    "untested": ({"golden": {}}, {}, "states no tolerance"),
    "slow": ({}, {"p99_share": 0.001}, "its p99 is"),
    "corrupt": ({}, {}, "damaged"),
    "missing": ({}, {}, "no bundle"),
    "crash": ({}, {}, "crashed (SIGSEGV)"),
    "hang": ({}, {"open_s": 0.3}, "was not open within 0.3 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_bundle_changes_nothing(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, how, words = FAULTS[fault]
    path = renamed(digits_bundle, tmp_path / "new.edge", **changes)
    if fault == "corrupt":
        graph = path / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    elif fault in ("crash", "hang"):
        what = "os.kill(os.getpid(), 11)" if fault == "crash" else "time.sleep(60)"
        monkeypatch.setattr("edgekit.scanner.probe._CHILD", f"import os, time; {what}")
    elif fault in ("otherwise", "slow"):  # it passes that
        monkeypatch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
    report = tmp_path / "report.json"
    options = ShadowOptions(**{"frames": 20, "busy_share": 1.0, "report": str(report), **how})
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), options)
    step = Shadow(model)
    model.offer(tmp_path / "none.edge" if fault == "missing" else path)
    events = wait_for(ended, model, step, digits)
    assert events[-1]["state"] == "refused"
    assert words in events[-1]["reason"]
    assert model.bundle.digest == digits_bundle.digest
    assert model(digits[0]).label is not None
    assert ('"seq"' in report.read_text()) == (fault == "otherwise")
    model.close()


def test_a_bundle_that_hangs_on_a_frame_is_given_up(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
    with monkeypatch.context() as patch:
        patch.setattr("edgekit.scanner.trial.Trial.run", lambda self, shown: stuck.wait(20))
        options = ShadowOptions(frames=5, busy_share=1.0, open_s=0.2, p99_share=50)
        model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), options)
        step = Shadow(model)
        model.offer(renamed(digits_bundle, tmp_path / "new.edge"))
        events = wait_for(ended, model, step, digits)
    assert "no answer to a frame for 0.2 s" in events[-1]["reason"]
    stuck.set()
    model.options = msgspec.structs.replace(options, open_s=60.0)
    model.offer(tmp_path / "new.edge")  # the next one is tried as if nothing had been
    assert wait_for(ended, model, step, digits)[-1]["state"] == "promoted"
    assert model.take_events() == []
    model.close()


def test_a_candidate_that_appears_takes_over_without_a_frame_lost_and_stays(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, capsys: Any
) -> None:
    candidate, current = tmp_path / "releases", tmp_path / "current"
    candidate.mkdir()
    new = renamed(digits_bundle, candidate / "new.edge")
    options = {"candidate": str(current), "frames": 20, "p99_share": 50, "busy_share": 1.0, "poll_s": 0.02}
    tables = {"model": {"bundle": str(digits_bundle.path)}, "shadow": options}
    seen: list[dict[str, Any]] = []

    def passing() -> Iterator[Any]:
        end, more = time.monotonic() + 60, 10
        for number in itertools.count():
            if number == 5:
                current.symlink_to(new)
            if any(event.get("state") in ("promoted", "refused") for event in seen):
                more -= 1
            if not more or time.monotonic() > end:
                return
            yield digits[number % len(digits)]

    scanner = Scanner(tables, frames=passing(), on_event=seen.append)
    summary = scanner.run()
    assert [event["state"] for event in seen if event.get("event") == "model"] == ["offered", "promoted"]
    assert [event["seq"] for event in seen if "label" in event] == list(range(summary.captured))
    digest = Bundle.open(new).digest
    assert summary.model["digest"] == digest

    current.unlink()
    again = Scanner(tables, frames=digits[:2]).run()
    assert again.model["digest"] == digest
    (new / "model.onnx").write_bytes(b"torn")
    third = Scanner(tables, frames=digits[:2]).run()
    assert (third.model["digest"], third.inferred) == (digits_bundle.digest, 2)
    assert "the bundle that was promoted cannot run" in capsys.readouterr().err


def test_several_cameras_in_batches_miss_nothing_at_the_switch(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), ShadowOptions(frames=20, p99_share=50, busy_share=1.0))
    new = renamed(digits_bundle, tmp_path / "new.edge")
    model.offer(new)

    class Cameras:
        seq, left = 0, 10

        def __iter__(self) -> Iterator[Captured]:
            end = time.monotonic() + 30
            while self.left and time.monotonic() < end:
                self.left -= bool(model.promoted or model.refused)
                yield self.more(1)[0]

        def more(self, count: int) -> list[Captured]:
            self.seq += count
            return [Captured(digits[i % 1000], f"cam {i % 3}", i, 1e9, "", 0.0) for i in range(self.seq - count, self.seq)]

    source, events = Cameras(), []  # type: ignore[var-annotated]
    summary = Pipeline(source=source, model=model, steps=[Shadow(model)], batch=4, on_event=events.append).run()
    assert [event["seq"] for event in events if "label" in event] == list(range(source.seq))
    assert summary.captured == summary.inferred == source.seq
    assert (model.promoted, model.bundle.digest) == (1, Bundle.open(new).digest)
    model.close()


# Drift


def drifted(step: Drift, stream: Iterator[Captured]) -> list[dict[str, Any]]:
    return [event for captured in stream for event in step.frame(captured, {})[1:]]


def calibrated(bundle: Bundle, digits: list[Any], path: Path) -> Bundle:
    """With the histogram of the input, as `edgekit quantize` leaves it: counts of |x| in 64 bins up to the largest."""
    with Model.open(bundle.path) as model:
        x = np.concatenate([model.preprocess(frame) for frame in digits[::4]]).astype(np.float64)
    top = float(np.abs(x).max())
    counts = np.histogram(np.abs(x[x != 0]), 64, (0, top))[0].tolist()
    tensor = {"mean": float(x.mean()), "rms": float(np.sqrt((x**2).mean())), "count": x.size, "zeros": int((x == 0).sum())}
    about = {"tensors": {"x": {**tensor, "top": top, "histogram": counts}}, "samples": {"ids": [str(i) for i in range(250)]}}
    with Bundle.create(path) as draft:
        for name in bundle.manifest.files:
            draft.write(name, bundle.read(name))
        draft.write(CALIBRATION, msgspec.json.encode(about))
        draft.manifest = bundle.manifest
    return Bundle.open(path)


def blurred(frame: Any) -> Any:
    wide = np.pad(frame.astype(np.float32), 1, mode="edge")
    views = [wide[y : y + frame.shape[0], x : x + frame.shape[1]] for y in range(3) for x in range(3)]
    return np.mean(views, axis=0).astype(np.uint8)


def test_drift_is_found_once_explained_and_comes_back(digits_bundle: Bundle, digits: list[Any], tmp_path: Path) -> None:
    """10,000 frames of the model's own kind are no drift; what becomes of them is one within the frames of two windows."""
    random = np.random.default_rng(0)
    plain = [digits[i] for i in random.integers(0, len(digits), 10_000)]
    options = DriftOptions(every_frames=4, window_frames=100, learn_frames=300)
    kinds = {
        "brightness": lambda frame: (frame * 0.6).astype(np.uint8),
        "sharpness": blurred,
        "input": lambda frame: np.clip(frame + random.normal(0, 40, frame.shape), 0, 255).astype(np.uint8),
    }
    with Model.open(calibrated(digits_bundle, digits, tmp_path / "calibrated.edge").path) as model:
        step = Drift(model, options)
        assert drifted(step, frames(plain, 10_000)) == []
        assert not step.status()["drifted"]
        assert all(0 <= value <= 14 for value in step.status()["psi"].values())
        for part, change in kinds.items():
            found = drifted(step, frames([change(frame) for frame in plain[:800]], 800))
            assert part in {event["part"] for event in found}, (part, found, step.status())
            assert len(found) == len({event["part"] for event in found if event["state"] == "drifted"})
            event = next(event for event in found if event["part"] == part)
            key = "rms" if part == "input" else "mean"
            assert f"{event['before'][key]:.4g} before, {event['now'][key]:.4g} in" in event["reason"]
            assert event["baseline"] == (
                "calibration.json, 250 samples" if part == "input" else "the first 300 frames measured"
            )
            assert event["psi"] >= event["level"] >= 0.25
            back = drifted(step, frames(plain, 800))
            assert {e["part"] for e in back if e["state"] == "back"} == {e["part"] for e in found}
            assert not step.status()["drifted"]


# Self-test


def test_the_self_test_runs_at_load_by_the_clock_and_when_hot(digits_bundle: Bundle, tmp_path: Path) -> None:
    zone = tmp_path / "thermal_zone0"
    zone.mkdir()
    (zone / "temp").write_text("40000\n")
    with Model.open(digits_bundle.path) as model:
        step = SelfTest(model, SelfTestOptions(zones=str(tmp_path)))
        (event,) = step.due(0.0, 1e9)
        assert (event["why"], event["ok"]) == ("load", True)
        assert event["error"] < 1e-4
        assert step.due(3599.0, 1e9) == []
        assert step.due(3600.0, 1e9)[0]["why"] == "hourly"
        (zone / "temp").write_text("90500\n")
        (event,) = step.due(4000.0, 1e9)
        assert (event["why"], event["celsius"]) == ("hot", 90.5)
        assert step.due(4010.0, 1e9) == []
        assert step.healthy


def test_a_failed_self_test_is_unhealthy(digits_bundle: Bundle) -> None:
    wrong = msgspec.structs.replace(digits_bundle.manifest, golden={"model.onnx": Tolerance("relative", -1.0)})
    with Model.open(Bundle(digits_bundle.path, wrong)) as model:
        step = SelfTest(model)
        (event,) = step.due(0.0, 1e9)
        assert not event["ok"]
        assert "misses the golden outputs" in event["reason"]
        assert step.status()["healthy"] is False


# Incidents


class Sometimes:
    """A step that makes an incident of each tenth frame."""

    name = "votes"

    def wants(self, captured: Captured) -> str:
        return "skipped" if captured.seq % 7 == 3 else ""

    def frame(self, captured: Captured, event: dict[str, Any]) -> list[dict[str, Any]]:
        return [event, {**event, "event": "no_read"}] if captured.seq == 55 else [event]

    def due(self, monotonic: float, wall: float) -> list[dict[str, Any]]:
        return []

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def record(bundle: Bundle, digits: list[Any], folder: Path, **options: Any) -> list[Path]:
    incidents = Incidents(IncidentOptions(folder=str(folder), **options))
    with Model.open(bundle.path) as model:
        reading = Reading(model)
        steps: list[Step] = [incidents, Sometimes()]
        incidents.watch(reading, steps, {"sink": "mqtt://me:pw@host/x", "password": "pw"})
        Pipeline(source=frames(digits, 60), reading=reading, steps=steps, sinks=[incidents]).run()
        incidents.close()
    return sorted(folder.glob("*.edgekit-incident"))


def test_an_incident_is_replayed_byte_for_byte(digits_bundle: Bundle, digits: list[Any], tmp_path: Path) -> None:
    from edgekit.scanner.replay import replay

    (path,) = record(digits_bundle, digits, tmp_path / "incidents")
    found = replay(path, steps=lambda records: [Sometimes()])
    assert found.difference is None
    assert found.events >= 48
    assert found.frames == 56  # up to the incident
    assert found.fresh == ["votes"]  # it cannot tell its state
    assert b"pw" not in zipfile.ZipFile(path).read("incident.json")


def test_replay_shows_what_differs(digits_bundle: Bundle, digits: list[Any], tmp_path: Path, cli: Any) -> None:
    (path,) = record(digits_bundle, digits, tmp_path / "incidents", on=("no_read",))
    other = renamed(digits_bundle, tmp_path / "other.edge", tuple("abcdefghij"))
    done = cli("replay", path, "--bundle", other, "--json")
    assert done.code == 3
    assert done.json["difference"]["recorded"]["label"] != done.json["difference"]["replayed"]["label"]
    path.write_bytes(path.read_bytes()[:-200])
    done = cli("replay", path)
    assert done.code == 1
    assert "no recording of an incident" in done.err


# Harvest


def test_harvest_becomes_a_data_set(digits_bundle: Bundle, digits: list[Any], tmp_path: Path, cli: Any) -> None:
    options = HarvestOptions(folder=str(tmp_path / "kept"), most_frames=12, score=1.0, near_bits=2)
    harvest = Harvest(options)
    with Model.open(digits_bundle.path) as model:
        for captured in frames(digits, 40):
            event = {"source": "cam", "seq": captured.seq, "time": "t", "score": model(captured.frame).score, "label": "3/.."}
            harvest.frame(captured, event)
            harvest.flush()
    harvest.close()
    assert harvest.status()["kept"] == 12 == len(list((tmp_path / "kept").glob("*.png")))
    done = cli("harvest", tmp_path / "kept", "--out", tmp_path / "set", "--json")
    assert done.code == 0
    assert done.json["frames"] == 12
    assert [p.name for p in (tmp_path / "set").iterdir() if p.is_dir()] == ["3%2F.."]
    rows = list(csv.DictReader((tmp_path / "set/review.csv").read_text().splitlines()))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    assert cli("harvest", tmp_path / "kept", "--out", tmp_path / "set").code == 2


def test_a_harvest_is_trained_on_once_what_has_no_label_lies_beside(digits: list[Any], tmp_path: Path, cli: Any) -> None:
    harvest = Harvest(
        HarvestOptions(folder=str(tmp_path / "kept"), score=0.5, random_share=0, near_bits=0, on=("no_read", "conflict"))
    )
    for captured in frames(digits, 24):
        about = {"source": "cam", "seq": captured.seq, "time": "t"}
        read = {"label": "=box" if captured.seq % 2 else "bag", "score": 0.4} if captured.seq < 20 else {"codes": []}
        harvest.frame(captured, {**about, **read})
        harvest.send({**about, **read, **({"event": "no_read"} if captured.seq == 21 else {})})
        harvest.send({**about, **read, **({"conflict": [{}]} if captured.seq == 22 else {})})
        harvest.flush()
    harvest.close()
    made = cli("harvest", tmp_path / "kept", "--out", tmp_path / "set", "--json").json
    kept = made["frames"]
    assert (made["unlabelled"], sorted(made["labels"]), made["damaged"]) == (2, ["=box", "bag"], 0)
    dataset = load(f"folder:{tmp_path / 'set'}")
    assert dataset.labels == ("=box", "bag")
    assert len(dataset.all) == kept - 2 == sum(made["labels"].values())
    rows = list(csv.DictReader((tmp_path / "set/review.csv").read_text().splitlines()))
    assert all((tmp_path / "set" / row["file"]).is_file() for row in rows)
    assert {row["label"] for row in rows} == {"'=box", "bag", ""}
    assert [row["why"] for row in rows if not row["label"]] == ["no_read", "conflict"]
    again = cli("harvest", tmp_path / "kept", "--out", tmp_path / "set")
    assert (again.code, "exists" in again.err) == (2, True)


def test_a_harvest_without_a_place_says_so_once_and_goes_on(digits: list[Any], tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "kept"
    folder.write_text("in the way")
    options = HarvestOptions(folder=str(folder), score=1.0, near_bits=0, most_megabytes=0.003)
    harvest = Harvest(options)

    def take(count: int, begin: int) -> None:
        for captured in frames(digits, count, begin):
            harvest.frame(captured, {"source": "cam", "seq": captured.seq, "time": "t", "score": 0.1, "label": "3"})
            harvest.flush()

    take(3, 0)
    assert (harvest.status()["failed"], harvest.status()["kept"]) == (3, 0)
    assert capsys.readouterr().err.count("no frame can be kept") == 1
    folder.unlink()
    take(30, 3)
    harvest.close()
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert 1000 < sum(sizes) <= 3000
    assert len(sizes) == 2 * harvest.status()["kept"]
    other = Harvest(options)  # a restart knows what is there
    other.frame(next(frames(digits, 1, 40)), {"source": "cam", "seq": 40, "time": "t", "score": 0.0, "label": "3"})
    other.close()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3000
