"""Streams over the network and GStreamer's pipelines: real servers that serve, refuse, die, hang and send damaged pictures."""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.errors import UsageError
from edgekit.scanner import CameraOptions, Cameras, Captured, open_source
from edgekit.scanner.sources.decode import Picture, Refused, pictures
from edgekit.scanner.sources.trouble import Trouble

from . import camera_kit
from .camera_kit import notices, of, until

EXACT = CameraOptions(queue="wait", depth=32, stall_s=10, open_s=20)
LOSSY = CameraOptions(queue="wait", depth=32, stall_s=10, open_s=20, transport="udp")
FAST = CameraOptions(stall_s=0.6, retry_s=0.05, retry_most_s=0.1, open_s=10, depth=32)


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("no_proxy", "*")
    yield
    assert not camera_kit.left_over()


def needed(program: str, packages: str) -> str:
    """Where a program is; in CI its absence is a failure."""
    found = shutil.which(program)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs {program}: apt-get install {packages}")
        pytest.skip(f"{program} is not installed")
    return found


def test_every_picture_of_a_stream_comes_in_order_with_its_number_and_time(serve: Any) -> None:
    count = 60
    stream = camera_kit.paced(camera_kit.encoded("mpeg2video", "mpegts", count), count)
    rtsp = serve("RtspServer", camera_kit.rtp(count), "camera:s3cret word")
    http, plain = serve("HttpServer", stream, "camera:s3cret"), serve("Server", stream)
    page = serve("MjpegServer", camera_kit.multipart(count))
    names = {
        "rtsp": f"rtsp://camera:s3cret%20word@127.0.0.1:{rtsp.port}/live",
        "http": f"http://camera:s3cret@127.0.0.1:{http.port}/live.ts",
        "page": f"http://127.0.0.1:{page.port}/video",
        "tcp": f"tcp://127.0.0.1:{plain.port}",
    }
    begun, wall = time.monotonic(), time.time()
    options = dict.fromkeys(names, EXACT) | {"page": CameraOptions(depth=64, stall_s=10, open_s=20)}
    with Cameras(names, options) as cameras:
        items = until(cameras, lambda items: all(len(of(items, name)) >= 20 for name in names))
        assert not notices(items, "gap")
        page.silent.set()
        begun_gap = time.monotonic()
        items += until(cameras, lambda more: time.monotonic() > begun_gap + 1)
        page.silent.clear()  # its pictures have no times of their own
        items += until(cameras, lambda more: notices(items + more, "gap", "page", reason="no picture came"))
        assert 0.5 < notices(items, "gap", "page")[0].details["seconds"] < 60
    for name in names:
        frames = of(items, name)
        assert [frame.seq for frame in frames] == list(range(len(frames))) == [number_of(frame) for frame in frames], name
        assert all(camera_kit.is_true(frame.frame) for frame in frames)
        times = [frame.monotonic for frame in frames]
        assert begun < times[0] <= times[-1] < time.monotonic()
        assert times == sorted(times)
        assert all(abs(frame.time - wall - (frame.monotonic - begun)) < 0.1 for frame in frames)
        assert [each.details["state"] for each in notices(items, "camera", name)][-1] == "up"


def number_of(frame: Captured) -> int:
    return int(camera_kit.number_in(frame.frame))


def test_one_dies_and_comes_back_one_hangs_and_one_is_slow_while_another_goes_on(serve: Any) -> None:
    pieces = camera_kit.rtp(600)
    dies, hangs = serve("RtspServer", pieces), serve("MjpegServer", camera_kit.multipart(600))
    names = {
        "dies": f"rtsp://127.0.0.1:{dies.port}/live",
        "hangs": f"http://127.0.0.1:{hangs.port}/video",
        "slow": "pattern:64x48@1",
        "well": "pattern:64x48@50",
    }
    options = dict.fromkeys(names, FAST) | dict.fromkeys(("slow", "well"), CameraOptions(stall_s=10, depth=32))
    with Cameras(names, options) as cameras:
        until(cameras, lambda items: {item.source for item in items if isinstance(item, Captured)} == set(names))
        dies.close()
        hangs.silent.set()
        begun = time.monotonic()
        gone = {"dies", "hangs"}
        items = until(cameras, lambda items: {each.source for each in notices(items, "camera", state="down")} >= gone)
        down = {each.source: each for each in reversed(notices(items, "camera", state="down"))}
        assert all(each.monotonic - begun < 3 + 5 for each in down.values())  # 3 s; the rest is for loaded machines
        assert down["hangs"].details["reason"] == "no picture for 0.6 s"
        refused = "the connection was refused: is it switched on, and is the port right?"
        items += until(cameras, lambda more: notices(items + more, "camera", "dies", state="down", reason=refused))
        hangs.silent.clear()
        serve("RtspServer", pieces, port=dies.port)
        items += until(cameras, lambda more: {each.source for each in notices(more, "gap", reason="reconnected")} >= gone)
        assert all(each.details["seconds"] > 0.1 for each in notices(items, "gap", reason="reconnected"))
        assert not notices(items, "camera", "well")
        assert not notices(items, "camera", "slow")
        for name in names:
            seqs = [frame.seq for frame in of(items, name)]
            assert seqs == sorted(set(seqs))
        well = of(items, "well")
        assert well[-1].seq - well[0].seq + 1 <= len(well) / 0.95
        assert len(of(items, "slow")) >= 1


def test_what_is_refused_says_why_and_what_to_do_while_the_scan_goes_on(serve: Any, kit: Any) -> None:
    rtsp, http = serve("RtspServer", camera_kit.rtp(2), "camera:right"), serve("HttpServer", [], "camera:right")
    free = serve("HttpServer", [])
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(8)  # takes calls and never answers
        wrong = {
            f"rtsp://camera:wr0ng@127.0.0.1:{rtsp.port}/live": "wrong user or password (401): write USER:PASSWORD@",
            f"http://127.0.0.1:{http.port}/live": "wrong user or password (401): write USER:PASSWORD@",
            f"http://127.0.0.1:{free.port}/missing": "there is no such stream (404): compare the address",
            f"http://127.0.0.1:{free.port}/page": "it is no video: ",
            f"tcp://127.0.0.1:{kit.free_port()}": "the connection was refused: is it switched on",
            "rtsp://nowhere.invalid/live": "unknown host nowhere.invalid: is the name right",
            f"http://127.0.0.1:{mute.getsockname()[1]}/": "no answer in time: is it switched on, and is the address right?",
        }
        names = {str(i): spec for i, spec in enumerate(wrong)} | {"well": "pattern:64x48@20"}
        options = {name: CameraOptions(open_s=2, retry_s=1, retry_most_s=60) for name in names}
        slow = "no picture yet, still connecting"

        def told(items: list[Any]) -> dict[str, str]:
            found = [(each.source, each.details["reason"]) for each in notices(items, "camera", state="down")]
            return {source: reason for source, reason in found if reason != slow}

        with Cameras(names, options) as cameras:
            items = until(cameras, lambda items: len(told(items)) == len(wrong))
            assert of(until(cameras, lambda items: of(items, "well")), "well")
    for i, (spec, reason) in enumerate(wrong.items()):
        assert told(items)[str(i)].startswith(reason), (spec, told(items)[str(i)])
        assert "wr0ng" not in told(items)[str(i)]
        assert "\n" not in told(items)[str(i)]


@pytest.mark.parametrize(("address", "device"), [("camera:99", "/dev/video99"), ("v4l2:/nonexistent", "/nonexistent")])
def test_a_camera_that_is_not_there(address: str, device: str) -> None:
    with pytest.raises(Trouble, match=f"there is no {device}; is it plugged in"):
        next(pictures(address, CameraOptions()))


def test_datagrams_are_joined_in_their_midst(kit: Any) -> None:
    data, port, stop = camera_kit.encoded("mpeg2video", "mpegts", 400), kit.free_port(), threading.Event()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            for start in range(0, len(data), 7 * 188):
                out.sendto(data[start : start + 7 * 188], ("127.0.0.1", port))
                if stop.wait(7 * 188 / len(data) * 400 / camera_kit.FPS):
                    return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with Cameras({"udp": f"udp://127.0.0.1:{port}"}, EXACT) as cameras:
            items = until(cameras, lambda items: len(of(items, "udp")) >= 15)
    finally:
        stop.set()
        sender.join()
    numbers = [number_of(frame) for frame in of(items, "udp")]
    assert numbers == sorted(set(numbers))
    assert all(camera_kit.is_true(frame.frame) for frame in of(items, "udp"))


def test_a_real_rtsp_server(kit: Any, tmp_path: Path) -> None:
    """RTSP::Server of Debian, which speaks UDP only and is fed by FFmpeg's own RTSP client."""
    program = needed("rtsp-server-perl", "rtsp-server-perl")
    ports = [kit.free_port(), kit.free_port()]
    addresses = ["--client_listen_address=127.0.0.1", "--source_listen_address=127.0.0.1"]
    with subprocess.Popen(
        [program, *addresses, "-c", str(ports[0]), "-s", str(ports[1])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        feed = threading.Thread(target=_feed, args=(f"rtsp://127.0.0.1:{ports[1]}/live", stop := threading.Event()))
        try:
            kit.wait_for(lambda: all(_answers(port) for port in ports), 60)
            feed.start()
            stream = f"rtsp://127.0.0.1:{ports[0]}/live"
            names = {"udp": stream, "tcp": stream, "none": f"{stream}r"}
            options = {
                name: CameraOptions(transport="udp" if name == "udp" else "tcp", open_s=20, retry_s=0.2) for name in names
            }
            with Cameras(names, options) as cameras:
                reason = 'it does not understand the request (400): try transport = "udp", or another address'
                items = until(
                    cameras,
                    lambda items: len(of(items, "udp")) >= 15 and notices(items, "camera", "tcp", reason=reason),
                )
                assert notices(items, "camera", "none")[-1].details["reason"].startswith("there is no such stream (404): ")
        finally:
            stop.set()
            server.kill()
            if feed.ident is not None:
                feed.join()
    frames = of(items, "udp")
    numbers = [number_of(frame) for frame in frames]
    assert numbers == sorted(set(numbers))
    assert all(camera_kit.is_true(frame.frame) for frame in frames)
    assert frames[0].frame.shape == (camera_kit.HEIGHT, camera_kit.WIDTH, 3)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _feed(address: str, stop: threading.Event) -> None:
    import av

    with av.open(address, "w", format="rtsp") as out:
        stream = out.add_stream(
            "libx264", rate=camera_kit.FPS, options={"g": "5", "bf": "0", "preset": "ultrafast", "crf": "12"}
        )
        stream.width, stream.height, stream.pix_fmt = camera_kit.WIDTH, camera_kit.HEIGHT, "yuv420p"
        for number in range(1000):
            frame = av.VideoFrame.from_ndarray(camera_kit.picture(number), "rgb24").reformat(format="yuv420p")
            frame.pts = number
            try:
                out.mux(stream.encode(frame))
            except OSError:
                return
            if stop.wait(1 / camera_kit.FPS):
                return


# Damage in the stream


@pytest.mark.parametrize(
    ("codec", "container"), [("mpeg2video", "mpegts"), ("libx264", "mpegts"), ("mpeg4", "mpegts"), ("mjpeg", "matroska")]
)
@pytest.mark.parametrize("fault", ["none", "lost", "joined", "cut"])
def test_no_picture_is_made_up_where_a_part_of_the_stream_is_missing(
    tmp_path: Path, codec: str, container: str, fault: str
) -> None:
    data, rolls = bytearray(camera_kit.encoded(codec, container)), random.Random(1)
    if fault == "lost":
        for _ in range(6):
            start = rolls.randrange(10, len(data) // 188) * 188
            del data[start : start + 188]
    elif fault == "joined":
        del data[: len(data) // 188 // 3 * 188]
    elif fault == "cut":
        del data[len(data) * 2 // 3 :]
    path = tmp_path / "stream.ts"
    path.write_bytes(data)
    came = list(pictures(str(path), CameraOptions()))
    shown = 0
    for item in pictures(str(path), CameraOptions()):  # each is valid until the next one
        if isinstance(item, Picture):
            frame = item.rows.reshape(camera_kit.HEIGHT, camera_kit.WIDTH, 3)
            assert camera_kit.is_true(frame)
            shown += 1
    assert shown >= (100 if fault == "none" else 50)
    whole = fault == "none"
    assert any(isinstance(item, Refused) or item for item in came if not isinstance(item, Picture)) <= (not whole)


def test_no_picture_is_made_up_where_datagrams_are_lost(serve: Any) -> None:
    rolls = random.Random(1)
    pieces = [packets if rolls.random() > 0.06 else [] for packets in camera_kit.rtp(200, "libx264")]
    server = serve("DatagramRtspServer", pieces)
    with Cameras({"lossy": f"rtsp://127.0.0.1:{server.port}/live"}, LOSSY) as cameras:
        items = until(cameras, lambda items: (frames := of(items, "lossy")) and number_of(frames[-1]) >= 80)
        (row,) = cameras.counts()
    numbers = [number_of(frame) for frame in of(items, "lossy")]
    assert numbers == sorted(set(numbers))
    assert all(camera_kit.is_true(frame.frame) for frame in of(items, "lossy"))
    assert row["dropped"]["damaged"] > 0


@pytest.mark.parametrize("damaged", ["drop", "keep"])
def test_a_damaged_header_that_asks_for_what_ffmpeg_lacks_costs_its_picture(tmp_path: Path, damaged: Any) -> None:
    """Its decoder says "not yet implemented" of that packet; the ones behind it are sound."""
    stream = bytearray()
    for number in range(10):
        one = io.BytesIO()
        Image.new("RGB", (96, 64), (20 * number, 90, 40)).save(one, "JPEG")
        data = bytearray(one.getvalue())
        if number == 4:
            data[data.index(b"\xff\xc0") + 11] = 0x33  # of the first component: three samples each way to two of the others
        stream += data
    path = tmp_path / "odd.mjpeg"
    path.write_bytes(stream)
    with Cameras([str(path)], CameraOptions(damaged=damaged)) as cameras:
        items = until(cameras, lambda items: False)
        (row,) = cameras.counts()
    assert row["state"] == "ended"
    assert row["refused_packets"] == 1
    assert len([item for item in items if isinstance(item, Captured)]) == 9


def test_what_is_no_frame_is_counted_beside_the_frames(tmp_path: Path) -> None:
    data, rolls = bytearray(camera_kit.encoded("mpeg2video", "mpegts")), random.Random(1)
    for _ in range(40):
        data[rolls.randrange(2000, len(data))] ^= 1 << rolls.randrange(8)
    path = tmp_path / "flipped.ts"
    path.write_bytes(data)
    with Cameras([str(path)]) as cameras:
        items = until(cameras, lambda items: False)
        (row,) = cameras.counts()
    assert row["state"] == "ended"
    assert row["refused_packets"] > 0
    assert row["captured"] == row["given"] + row["dropped"]["damaged"] <= 100
    gaps = notices(items, "gap")
    assert sum(gap.details.get("packets", 0) for gap in gaps) == row["refused_packets"]
    assert sum(gap.details.get("frames", 0) for gap in gaps) == row["dropped"]["damaged"]


def test_a_file_whose_pictures_change_their_size_and_one_that_is_played_again(tmp_path: Path) -> None:
    path = tmp_path / "two sizes.mjpeg"
    path.write_bytes(camera_kit.encoded("mjpeg", "mjpeg", 4) + camera_kit.encoded("mjpeg", "mjpeg", 36, (128, 80), 4))
    once, again = str(path), tmp_path / "again.ts"
    again.write_bytes(camera_kit.encoded("mpeg2video", "mpegts", 10))
    options = {"once": CameraOptions(), "again": CameraOptions(loop=True, paced=True, queue="wait")}
    with Cameras({"once": once, "again": str(again)}, options) as cameras:
        first = until(cameras, lambda items: of(items, "once"))
        time.sleep(0.5)  # the size changes while the queue is full
        counts = {"once": 40, "again": 25}
        items = first + until(cameras, lambda more: all(len(of(first + more, name)) >= counts[name] for name in counts))
    frames = of(items, "once")
    assert [number_of(frame) for frame in frames] == list(range(40))
    assert [frame.frame.shape[:2] for frame in frames] == [(64, 96)] * 4 + [(80, 128)] * 36
    (change,) = notices(items, "camera", "once")
    assert change.details == {"state": "up", "width": 128, "height": 80, "reason": "its pictures were 96 x 64"}
    looped = of(items, "again")
    assert [number_of(frame) for frame in looped] == [i % 10 for i in range(len(looped))]
    assert looped[19].monotonic - looped[0].monotonic > 18 / camera_kit.FPS - 0.1


# GStreamer


def test_gstreamer_pipelines(kit: Any) -> None:
    needed("gst-launch-1.0", "gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good")
    size = "video/x-raw,framerate=20/1,width="
    test = "gst:videotestsrc is-live=true pattern"
    names = {
        "odd": f"{test}=red ! {size}67,height=51",
        "ends": f"{test}=blue num-buffers=12 ! {size}64,height=48",
        "grows": f"gst:videotestsrc pattern=green num-buffers=5 ! {size}66,height=49 ! concat name=c "
        f"videotestsrc num-buffers=5 ! {size}98,height=66 ! c. c.",
        "unknown": "gst:nosuchsource",
        "missing": "gst:filesrc location=/nonexistent ! decodebin",
        "sound": "gst:audiotestsrc",
        "cut": "gst:videotestsrc !",
    }
    why = {
        "ends": "the pipeline ended",
        "grows": "its pictures changed their size",
        "unknown": 'erroneous pipeline: no element "nosuchsource"; is its plugin installed? apt-get install gstreamer1.0-tools',
        "missing": "filesrc0: Resource not found (No such file",
        "sound": "erroneous pipeline: could not link audiotestsrc0 to videoconvert0; try it: gst-launch-1.0 PIPELINE",
        "cut": "erroneous pipeline: syntax error; try it",
    }

    def told(items: list[Any]) -> dict[str, str]:
        down = [(each.source, each.details["reason"]) for each in notices(items, "camera", state="down")]
        return {source: reason for source, reason in down if "still connecting" not in reason}

    options = CameraOptions(queue="wait", depth=32, retry_s=60, retry_most_s=60, open_s=30, stall_s=20)
    with Cameras(names, options) as cameras:
        items = until(cameras, lambda items: set(told(items)) == set(why) and len(of(items, "odd")) > 10)
    for name, reason in why.items():
        assert told(items)[name].startswith(reason), told(items)[name]
    for name, colour, size, count in (
        ("odd", (255, 0, 0), (51, 67), 0),
        ("ends", (0, 0, 255), (48, 64), 12),
        ("grows", (0, 255, 0), (49, 66), 5),
    ):
        frames = of(items, name)
        assert {frame.frame.shape for frame in frames} == {(*size, 3)}
        assert all(np.abs(frame.frame.astype(int) - colour).max() < 10 for frame in frames)
        assert len(frames) == (count or len(frames))


def test_without_gstreamer_the_cure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Trouble, match=r"gst-launch-1.0 is not installed: apt-get install gstreamer1.0-tools"):
        list(pictures("gst:videotestsrc", CameraOptions()))
    with pytest.raises(UsageError, match="cannot be split into words"):
        open_source('gst:filesrc location="x')
