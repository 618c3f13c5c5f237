"""Incidents recorded and replayed: byte for byte with all that has state, with another model, and files that are none."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.data import load
from edgekit.errors import DataError, EdgekitError
from edgekit.runtime import Model
from edgekit.scanner import Captured, CodeReader, Notice, Pipeline
from edgekit.scanner.reading import Reading, Region
from edgekit.scanner.recording import open_recording
from edgekit.scanner.replay import replay
from edgekit.scanner.steps.crosscheck import CrossCheck
from edgekit.scanner.steps.duplicates import ONCE, DuplicateOptions, Duplicates
from edgekit.scanner.steps.incident import IncidentOptions, Incidents
from edgekit.scanner.steps.ring import Ring, RingOptions
from edgekit.scanner.steps.triggers import Trigger, TriggerOptions
from edgekit.scanner.steps.votes import VoteOptions, Votes

Cli = Callable[..., Any]
Frames = list[np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest) -> Frames:
    """What passes the cameras, uint8 (150, 400): an empty place, digits, codes strong, weak and not to be read plainly."""
    split, empty = load("digits").test, np.full((150, 400), 200, np.uint8)
    frames = [empty]
    for i, (kind, text) in enumerate([("EAN13", "4006381333931"), ("ITF", "123456"), ("Code128", "BOX 1"), ("ITF", "654321")]):
        frame = empty.copy()
        code = CODES(text, kind)[:150, :300]
        frame[: code.shape[0], : code.shape[1]] = code
        frame[20:48, 340:368] = split.read(i)
        frames.append(frame)
    return [*frames, np.rot90(frames[3], 2).copy(), (frames[2] // 8 + 120).astype(np.uint8)]


def CODES(text: str, kind: str) -> np.ndarray[Any, Any]:  # noqa: N802
    import zxingcpp

    code = zxingcpp.create_barcode(text, getattr(zxingcpp.BarcodeFormat, kind))
    return np.pad(np.asarray(code.to_image(scale=2)), 20, constant_values=255)


class Passing:
    """A source of two cameras whose frames come in turns, with gaps and triggers between; the scan's clock is theirs."""

    def __init__(self, shown: Frames, seed: int, trigger: Trigger, jump_s: float = 0.0, count: int = 40) -> None:
        self._jump_s = jump_s
        self._random, self._shown, self._trigger = np.random.default_rng(seed), shown, trigger
        self.now, self._count, self._made = 50.0, count, itertools.count()
        trigger._clock = lambda: self.now

    def __iter__(self) -> Iterator[Any]:
        while (seq := next(self._made)) < self._count:
            chance = self._random.random()
            if chance < 0.15:
                self._trigger.fire(("dock", "gate", None)[seq % 3], f"box {seq}")
            elif chance < 0.25:
                yield None
            elif chance < 0.3:
                at = self._later()
                yield Captured(None, "gate", seq, self.wall(), "torn", at)
            yield self._frame(seq)
        yield Notice("gap", "dock", self.wall(), self.now, {"missing": 3})
        yield None

    def more(self, count: int) -> list[Captured]:
        return [self._frame(next(self._made)) for _ in range(count if self._random.random() < 0.5 else 0)]

    def _frame(self, seq: int) -> Captured:
        at = self._later()
        frame = self._shown[self._random.integers(len(self._shown)) if self._random.random() < 0.4 else (seq // 5) % 5]
        return Captured(frame.copy(), "dock" if seq % 2 else "gate", seq, self.wall(), "", at)

    def wall(self) -> float:
        """Each second the wall clock jumps there and back."""
        return 1e9 + self.now + self._jump_s * (int(self.now) % 2)

    def _later(self) -> float:
        self.now += float(self._random.integers(20, 120)) / 1e3
        return self.now


def record(
    bundle: Path,
    shown: Frames,
    folder: Path,
    mode: Any = "continuous",
    seed: int = 0,
    jump_s: float = 0.0,
    budget_ms: float = 20,
    **options: Any,
) -> Path:
    """The recording of a scan's last seconds; a fifth of it at most."""
    trigger = Trigger(TriggerOptions(mode=mode, time_ms=400, inputs=("mqtt://me:pw@host/t",) if mode == "single" else ()))
    duplicates = Duplicates(DuplicateOptions(window_ms=900, per_format={"Code 128": ONCE}))
    ring = Ring(RingOptions(str(folder / "ring"), "both"), trigger.picture)
    steps: list[Any] = [Votes(VoteOptions(window_ms=600)), trigger, CrossCheck(), duplicates, ring]
    incidents = Incidents(IncidentOptions(folder=str(folder), on=("gap",), **{"seconds": 0.6, **options}))
    source = Passing(shown, seed, trigger, jump_s)
    with Model.open(bundle) as model, pytest.MonkeyPatch.context() as patch:
        reading = Reading(model, CodeReader(budget_ms, ["EAN-13", "ITF", "Code 128"]))
        incidents.watch(reading, steps, {"sink": "mqtt://me:pw@host/x", "password": "pw"})
        clock = SimpleNamespace(monotonic=lambda: source.now, time=source.wall)
        patch.setattr("edgekit.scanner.pipeline.time", clock)
        Pipeline(source=source, reading=reading, steps=[incidents, *steps], sinks=[incidents], batch=2).run()
        incidents.close()
    (path,) = folder.glob("*.edgekit-incident")
    return path


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["continuous", "single", "burst", "external", "presentation"])
def test_all_that_has_state_is_replayed_byte_for_byte(
    digits_bundle: Bundle, shown: Frames, tmp_path: Path, mode: str, seed: int
) -> None:
    """The recording begins amid a scan: in windows of votes, duplicates and triggers, some of them fired before it."""
    path = record(digits_bundle.path, shown, tmp_path, mode, seed)
    found = replay(path)
    assert found.differences == []
    assert (found.fresh, found.absent, found.changed) == ([], [], [])
    assert 4 <= found.frames < 35
    about = open_recording(path).about
    assert about.first > 0
    assert about.formats == ("EAN-13", "ITF", "Code 128")
    assert b"pw" not in zipfile.ZipFile(path).read("incident.json")
    if mode != "continuous":  # with states taken away it is another scan
        bare = [replace(step, known=False) for step in about.steps]
        rewritten(path, "incident.json", msgspec.json.encode(replace(about, steps=tuple(bare))))
        assert set(replay(path).fresh) == {"votes", "trigger", "crosscheck", "duplicates"}


@pytest.mark.parametrize("mode", ["continuous", "single", "presentation"])
def test_a_wall_clock_that_jumps_a_day_changes_the_time_only(
    digits_bundle: Bundle, shown: Frames, tmp_path: Path, mode: str
) -> None:
    told: list[Any] = []
    for number, jump_s in enumerate((0.0, 86_400.0, -86_400.0)):
        path = record(digits_bundle.path, shown, tmp_path / str(number), mode, 3, jump_s, 0, seconds=60.0)
        assert replay(path).differences == []
        events = [msgspec.json.decode(line) for line in zipfile.ZipFile(path).read("events.jsonl").splitlines()]
        told.append([{**event, "time": "", "id": "", "kept": "", "latency_ms": 0} for event in events])
    assert told[0] == told[1] == told[2]
    assert len(told[0]) >= 4


def test_the_oldest_file_goes_though_the_clock_went_back(tmp_path: Path) -> None:
    incidents = Incidents(IncidentOptions(folder=str(tmp_path), on=("conflict",), cooldown_s=0, most_files=2))
    wall = 1e9
    for number in range(4):
        incidents.frame(Captured(None, "c", -1, wall, "gap", float(number)), {"event": "gap", "source": "c"})
        incidents.due(float(number), wall)
        incidents.send({"id": f"run-{number}", "source": "c", "conflict": [{"ai": "10"}]})
        incidents.flush()
        wall -= 86_400
    incidents.close()
    assert sorted(path.stem.partition("-")[2] for path in tmp_path.iterdir()) == ["conflict-run-2", "conflict-run-3"]


def test_frames_of_several_cameras_in_one_batch_are_answered_as_alone(digits_bundle: Bundle, shown: Frames) -> None:
    """Of unequal sizes, one of a kind that the model does not take among them."""
    odd = [shown[1], shown[2][:, :200], np.stack([shown[3]] * 3, 2), shown[4][:40, 300:]]
    with Model.open(digits_bundle.path) as model:
        reading = Reading(model, CodeReader(0), region=Region(0.1, 0.0, 1.0, 0.9))
        alone = [reading.answer(frame) for frame in odd]
        assert [answer.fields for answer in reading.answers(odd)] == [answer.fields for answer in alone]
        unfit = [*odd, np.zeros((4, 4, 7), np.uint8)]
        answers = reading.answers(unfit)
        assert [answer.fields for answer in answers] == [*(answer.fields for answer in alone), {}]
        assert answers[-1].reason == "unfit"


def test_a_model_that_takes_four_frames_at_a_time_is_refused(digits_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    import onnx

    graph = onnx.load_from_string(digits_bundle.read(FLOAT_GRAPH))
    for value in (graph.graph.input[0], graph.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    manifest = digits_bundle.manifest
    inputs, outputs = (tuple(replace(s, shape=(4, *s.shape[1:])) for s in each) for each in (manifest.inputs, manifest.outputs))
    with Bundle.create(tmp_path / "four.edge") as draft:
        for name in manifest.files:
            draft.write(name, digits_bundle.read(name) if name != FLOAT_GRAPH else graph.SerializeToString())
        draft.manifest = replace(manifest, inputs=inputs, outputs=outputs)
    file = tmp_path / "scan.toml"
    file.write_text('[model]\nbundle = "four.edge"\n[[source]]\naddress = "pattern:8x8@0,2"\n')
    for arguments in (["--check", file], [file]):
        done = cli("scan", *arguments)
        assert (done.code, "takes 4 frames at a time, a scan gives it one" in done.err) == (2, True)


def rewritten(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in {**members, name: data}.items():
            archive.writestr(each, content)


def relabelled(bundle: Bundle, path: Path) -> Bundle:
    """The same model, which calls a 0 a 9, and so on."""
    with Bundle.create(path) as draft:
        for name in bundle.manifest.files:
            draft.write(name, bundle.read(name))
        draft.manifest = replace(bundle.manifest, labels=tuple("9876543210"))
    return Bundle.open(path)


def test_what_another_model_would_have_said(digits_bundle: Bundle, shown: Frames, tmp_path: Path, cli: Cli) -> None:
    path = record(digits_bundle.path, shown, tmp_path, seconds=5.0)
    other = relabelled(digits_bundle, tmp_path / "other.edge")
    assert cli("replay", path).out.endswith("all as recorded\n")
    done = cli("replay", path, "--bundle", other.path)
    assert done.code == 3
    assert f"the model was {digits_bundle.digest[:12]}, {other.path} is {other.digest[:12]}" in done.out
    figures = cli("replay", path, "--bundle", other.path, "--json").json
    label = figures["difference"]["recorded"]["label"]
    assert f'label "{label}" -> "{9 - int(label)}"' in done.out
    assert figures["differing"] == len(figures["differences"]) > 1
    assert figures["difference"] == figures["differences"][0]

    place = digits_bundle.path
    place.rename(tmp_path / "away.edge")
    gone = cli("replay", path)
    assert (gone.code, "--bundle B (the scan ran" in gone.err) == (1, True)
    other.path.rename(place)  # another bundle lies there now
    done = cli("replay", path)
    assert (done.code, digits_bundle.digest[:12] in done.out, other.digest[:12] in done.out) == (3, True, True)


def test_files_that_are_no_recordings_are_refused(digits_bundle: Bundle, shown: Frames, tmp_path: Path, cli: Cli) -> None:
    path = record(digits_bundle.path, shown, tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 12 + 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="no recording of an incident"):
            replay(path)
    bomb = b"0" * (70 << 20)
    for name, data in (("journal.jsonl", bomb), ("incident.json", b'{"format": 9}'), ("frames/000000.png", b"GIF89a")):
        path.write_bytes(whole)
        rewritten(path, name, data)
        refused = cli("replay", path)
        assert (refused.code, refused.err.count("error:"), "Traceback" in refused.err) == (1, 1, False)
    assert cli("replay", tmp_path).code == cli("replay", tmp_path / "none").code == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=JSON)
def test_whatever_a_recording_holds_is_replayed_or_refused(
    digits_bundle: Bundle, shown: Frames, tmp_path_factory: Any, data: Any, junk: Any
) -> None:
    name = data.draw(st.sampled_from(["incident.json", "journal.jsonl", "events.jsonl"]))
    if not (cached := RECORDED):
        path = record(digits_bundle.path, shown, tmp_path_factory.mktemp("incident"), "single")
        cached.append((path, path.read_bytes()))
    path, whole = cached[0]
    path.write_bytes(whole)
    lines = zipfile.ZipFile(path).read(name).splitlines() if name != "incident.json" else [zipfile.ZipFile(path).read(name)]
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = msgspec.json.decode(lines[number])
    at: Any = changed
    while isinstance(at, dict | list) and at:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if data.draw(st.booleans()) or not isinstance(at[key], dict | list) or not at[key]:
            at[key] = junk
            break
        at = at[key]
    lines[number] = msgspec.json.encode(changed)
    rewritten(path, name, b"\n".join(lines))
    try:
        replay(path, bundle=digits_bundle.path)
    except EdgekitError as error:
        assert "\n" not in str(error)  # noqa: PT017


RECORDED: list[Any] = []


@pytest.mark.parametrize("late", [False, True])
def test_triggers_of_a_camera_that_gave_no_frame_and_of_one_that_goes(
    digits_bundle: Bundle, shown: Frames, tmp_path: Path, late: bool
) -> None:
    trigger = Trigger(TriggerOptions("external", time_ms=300), cameras=["dock", "gate"])
    incidents = Incidents(IncidentOptions(folder=str(tmp_path), on=("gap",), seconds=60))
    source = Passing(shown, 0, trigger)

    def items() -> Iterator[Any]:
        for seq in range(8):
            at = source._later()
            yield Captured(shown[0], "dock", seq, source.wall(), "", at)
            if seq == 2:
                trigger.fire(reference="all")
        if late:
            trigger.fire(reference="late")  # it is taken with the notice
            yield Notice("camera", "gate", source.wall(), source.now, {"state": "removed"})
        source.now += 5
        yield None
        yield Notice("gap", "dock", source.wall(), source.now, {"seconds": 1.0})

    with Model.open(digits_bundle.path) as model, pytest.MonkeyPatch.context() as patch:
        reading = Reading(model)
        incidents.watch(reading, [trigger])
        patch.setattr("edgekit.scanner.pipeline.time", SimpleNamespace(monotonic=lambda: source.now, time=source.wall))
        Pipeline(source=items(), reading=reading, steps=[incidents, trigger], sinks=[incidents]).run()
        incidents.close()
    (path,) = tmp_path.glob("*.edgekit-incident")
    events = [msgspec.json.decode(line) for line in zipfile.ZipFile(path).read("events.jsonl").splitlines()]
    assert ("gate", "late" if late else "all") in [
        (event["source"], event["trigger"]["reference"]) for event in events if "trigger" in event
    ]
    assert replay(path).differences == []


class _Closed:
    """A gate that lets no frame in."""

    name = "closed"

    def wants(self, captured: Captured) -> str:
        return "closed"

    def frame(self, captured: Captured, event: Any) -> list[Any]:
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Any]:
        return []

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("step", [_Closed(), Duplicates(DuplicateOptions(ONCE))], ids=["gate", "duplicates"])
def test_a_file_never_holds_more_text_than_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    """Of frames that nobody read, and of long codes that were held back, no event tells the size."""
    for module in ("recording", "steps.incident"):
        monkeypatch.setattr(f"edgekit.scanner.{module}.MAX_TEXT", 1 << 17)
    code = SimpleNamespace(figures=lambda: {"text": "9" * 2000, "format": "QR Code"})
    incidents = Incidents(IncidentOptions(folder=str(tmp_path), on=("gap",), seconds=3600))
    frames = (Captured(np.zeros((4, 4), np.uint8), "dock", seq, 1e9, "", float(seq)) for seq in range(1500))
    source = itertools.chain(frames, [Notice("gap", "dock", 1e9, 1500.0, {}), None])
    Pipeline(source=source, codes=lambda frame: [code], steps=[incidents, step], sinks=[incidents]).run()
    incidents.close()
    (path,) = tmp_path.glob("*.edgekit-incident")
    recorded = open_recording(path)
    assert len(recorded.rounds) > 30
    recorded.close()


def test_brackets_in_a_code_are_none_of_the_files_lists() -> None:
    from edgekit.scanner.recording import MAX_PARTS, _parts

    text = "[" * (MAX_PARTS + 1)
    assert _parts(msgspec.json.encode([{"text": text, "more": '"\\' + text}])) == 2
    assert _parts(b'"' + b'\\"' * 4_000_000 + b"[" * (MAX_PARTS + 1)) == 0  # a string without an end


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.edgekit-incident"
    about = b'{"format":1,"edgekit":"0","run_id":"r","first":0,"why":{},"codes":0.0,"config":[' + b"[]," * 2_000_000 + b"[]]}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in (("incident.json", about), ("journal.jsonl", b""), ("events.jsonl", b"")):
            file.writestr(name, data)
    with pytest.raises(DataError, match="holds more than 1000000 lists and objects"):
        replay(path)
