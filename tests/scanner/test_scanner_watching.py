"""What watches a scan: shadow, drift, self-test, incidents and their replay, harvest."""

from __future__ import annotations

import contextlib
import csv
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgekit.bundle import CALIBRATION, Bundle
from edgekit.data import load
from edgekit.errors import DataError
from edgekit.manifest import Tolerance
from edgekit.runtime import Model
from edgekit.scanner import Captured, Pipeline, Step
from edgekit.scanner.png import decode_png, encode_png
from edgekit.scanner.reading import Reading
from edgekit.scanner.steps.drift import Drift, DriftOptions
from edgekit.scanner.steps.harvest import Harvest, HarvestOptions
from edgekit.scanner.steps.incident import IncidentOptions, Incidents
from edgekit.scanner.steps.selftest import SelfTest, SelfTestOptions

from .digit_frames import frames, renamed

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


def test_of_frames_that_come_faster_than_they_are_kept_the_least_telling_go(
    digits: list[Any], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("edgekit.scanner.steps.harvest._BACKLOG", 8)
    harvest, go_on, keep = (
        Harvest(HarvestOptions(folder=str(tmp_path), score=1.0, near_bits=0)),
        threading.Event(),
        Harvest._keep,
    )
    monkeypatch.setattr(Harvest, "_keep", lambda self, *job: (go_on.wait(20), keep(self, *job)))
    for captured in frames(digits, 30):
        score = (captured.seq * 7 % 30) / 30
        harvest.frame(captured, {"source": "cam", "seq": captured.seq, "time": "t", "score": score, "label": "3"})
    go_on.set()
    harvest.close()
    kept = sorted(json.loads(file.read_bytes())["score"] for file in tmp_path.glob("*.json"))
    status = harvest.status()
    assert len(kept) + status["busy"] + status["near"] == 30
    assert kept[:7] == sorted(seq / 30 for seq in range(7))
    assert f"{status['busy']} frames came faster than they can be kept" in capsys.readouterr().err


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


def test_a_harvested_frame_whose_facts_are_damaged_stops_no_harvest(digits: list[Any], tmp_path: Path) -> None:
    facts = {"why": "score", "value": 1.0, "source": "s", "seq": 0, "time": "t", "hash": "0xyz"}
    (tmp_path / "00000000.json").write_text(json.dumps(facts))
    (tmp_path / "00000000.png").write_bytes(b"x")
    harvest = Harvest(HarvestOptions(folder=str(tmp_path)))
    for captured in frames(digits, 2):
        harvest.frame(captured, {"source": "c", "seq": captured.seq, "time": "t", "score": 0.1, "label": "a"})
        harvest.flush()
    assert harvest.status()["kept"] > 0
    harvest.close()


def test_a_harvest_that_was_waited_for_in_vain_is_not_waited_for_again(
    digits: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    go_on = threading.Event()
    harvest = Harvest(HarvestOptions(folder=str(tmp_path), score=1.0))
    monkeypatch.setattr(Harvest, "_keep", lambda self, *job: go_on.wait(20))
    for captured in frames(digits, 3):
        harvest.frame(captured, {"source": "cam", "seq": captured.seq, "time": "t", "score": 0.1, "label": "3"})
    start = time.monotonic()
    harvest.flush(0.1)
    harvest.close()
    assert time.monotonic() - start < 1.5  # it is 0.4 s
    go_on.set()
