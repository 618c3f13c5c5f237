"""``camera:N`` and ``v4l2:/dev/videoN``: cameras at this machine, by OpenCV."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .options import CameraOptions
from .trouble import Trouble

if TYPE_CHECKING:
    from .decode import Item

__all__ = ["camera_pictures", "device_of"]


def device_of(spec: str) -> str:
    """``camera:0`` and ``v4l2:/dev/video0`` -> ``/dev/video0``."""
    kind, _, rest = spec.partition(":")
    return f"/dev/video{rest}" if kind.lower() == "camera" else rest


def camera_pictures(spec: str, options: CameraOptions) -> Iterator[Item]:
    device = device_of(spec)
    if not os.path.exists(device):
        raise Trouble(f"there is no {device}; is it plugged in? ls /dev/video* shows what is")
    if not os.access(device, os.R_OK | os.W_OK):
        raise Trouble(f"this user may not read {device}; add it to the group video")
    import cv2

    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    if not capture.isOpened():
        raise Trouble(f"{device} cannot be opened as a camera; another program may use it")
    if options.format:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*options.format.upper().ljust(4)[:4]))
    for setting, value in (
        (cv2.CAP_PROP_FRAME_WIDTH, options.width),
        (cv2.CAP_PROP_FRAME_HEIGHT, options.height),
        (cv2.CAP_PROP_FPS, options.fps),
    ):
        if value:
            capture.set(setting, value)
    width, height = (int(capture.get(each)) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > options.max_pixels:
        raise Trouble(f"its pictures of {width} x {height} exceed max_pixels = {options.max_pixels}", final=True)
    yield from captured_pictures(capture)


def captured_pictures(capture: Any) -> Iterator[Item]:
    """What an open ``cv2.VideoCapture`` gives until it fails. Raises `Trouble` then."""
    import cv2

    from .decode import Picture

    try:
        while capture.grab():
            now = time.monotonic()
            got, bgr = capture.retrieve()
            if not got:
                yield 1
                continue
            rgb = cv2.cvtColor(bgr, cv2.COLOR_GRAY2RGB if bgr.ndim == 2 else cv2.COLOR_BGR2RGB)
            yield Picture(rgb.reshape(rgb.shape[0], -1), now)
    finally:
        capture.release()
    raise Trouble("it gives no pictures any more; was it unplugged?")
