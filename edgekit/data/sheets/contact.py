"""`augmentation_sheet`: samples as they are beside what a policy makes of them. Needs torch, kornia and Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.data import load
from edgekit.data.augment import Policy, make_augmentation, policy_named
from edgekit.data.dataset import Dataset
from edgekit.errors import DataError, InputError, MissingExtra, UsageError
from edgekit.files import atomic_write
from edgekit.manifest import ImagePreprocessing, Preprocessing, SeriesPreprocessing, TextPreprocessing
from edgekit.preprocess import make_preprocessor

from . import new_picture
from .drawing import GREY, LINE, RED, WIDTH, Image, ImageDraw, as_seen, blank, clean, paste, png, spark, thumb, width_of, write

__all__ = ["SAMPLES", "VERSIONS", "augmentation_sheet"]

SAMPLES, VERSIONS = 8, 8
#: Fields of a policy that are no change to a sample, or one that is made elsewhere.
_NO_CHANGES = frozenset({"kind", "margin", "smaller", "epochs", "mixup", "cutmix"})


def augmentation_sheet(
    spec: str,
    out: str | os.PathLike[str],
    policy: str | None = None,
    size: int | None = None,
    seed: int = 0,
    tokenizer_of: Callable[[Iterable[str]], bytes] | None = None,
) -> dict[str, Any]:
    """Draw `SAMPLES` training samples of the data set ``spec``, one a class where possible, to ``out`` (PNG).

    Each is shown as the model would see it without augmentation, and in `VERSIONS` changed versions; of text, the tokens.
    ``policy`` is the data set's by default, ``size`` the height and width of pictures to classify. ``tokenizer_of`` makes a
    ``tokenizer.json`` of the training texts; only text needs it. The same seed gives the same sheet.

    Returns ``data``, ``policy``, ``seed``, ``samples`` (their ids), ``versions``, ``out``. Raises `OutputExists`,
    `UsageError` for an unknown data set or policy, or one of another kind, `DataError` where no sample can be read,
    `MissingExtra`.
    """
    path = new_picture(out)
    dataset = load(spec)
    preprocessing = _sized(dataset, size)
    name = policy or dataset.augmentation
    tokenizer = None
    if isinstance(preprocessing, TextPreprocessing):
        policy_named(name)  # an unknown one is refused before a tokenizer is made
        if tokenizer_of is None:
            raise UsageError(f"{spec} is text, which is changed token by token", "give tokenizer_of")
        tokenizer = tokenizer_of(dataset.train.read(i) for i in range(len(dataset.train)))
    augmentation = make_augmentation(name, preprocessing, tokenizer)
    chosen = _chosen(dataset, preprocessing, tokenizer, seed)
    torch.manual_seed(seed)
    rows: list[Image.Image] = [_title(dataset, name)]
    for i in chosen:
        sample = dataset.train.read(i)
        x = torch.from_numpy(augmentation.read(sample))
        changed = augmentation(x.expand(VERSIONS, *x.shape[1:]).contiguous()).numpy()
        rows.append(_row(preprocessing, tokenizer, sample, changed, _caption(dataset, i)))
    atomic_write(path, png(rows))
    ids = [dataset.train.ids[i] for i in chosen]
    return {"data": spec, "policy": name, "seed": seed, "samples": ids, "versions": VERSIONS, "out": str(path)}


def _sized(dataset: Dataset, size: int | None) -> Preprocessing:
    spec = dataset.preprocessing
    if size is None:
        return spec
    if not isinstance(spec, ImagePreprocessing) or dataset.task == "text-recognition":
        raise UsageError(f"--size {size} is for pictures to classify, {dataset.spec} is for {dataset.task}", "leave --size out")
    return msgspec.structs.replace(spec, width=size, height=size)


def _chosen(dataset: Dataset, spec: Preprocessing, tokenizer: bytes | None, seed: int) -> list[int]:
    """Indices of readable training samples: the classes in turn until there are `SAMPLES`."""
    rng = np.random.default_rng(seed)
    train = dataset.train
    order = rng.permutation(len(train)).tolist()
    classes = train.targets.tolist() if train.targets.ndim == 1 else [0] * len(train)
    queues: dict[int, list[int]] = {}
    for i in order:
        queues.setdefault(classes[i], []).append(i)
    preprocess = make_preprocessor(spec, tokenizer)
    chosen: list[int] = []
    waiting = [queues[label] for label in sorted(queues)]
    if len(waiting) > SAMPLES:  # evenly over the classes
        waiting = [waiting[i] for i in np.linspace(0, len(waiting) - 1, SAMPLES).astype(int)]
    while waiting and len(chosen) < SAMPLES:
        queue = waiting.pop(0)
        while queue:
            i = queue.pop()
            try:
                preprocess(train.read(i))
            except (DataError, InputError):
                continue
            chosen.append(i)
            waiting.append(queue)
            break
    if not chosen:
        raise DataError(f"no training sample of {dataset.spec} can be read", "repair or replace them")
    return sorted(chosen, key=lambda i: (classes[i], i))


def _caption(dataset: Dataset, i: int) -> tuple[str, str]:
    """(class, or what is written; id)."""
    targets = np.atleast_1d(dataset.train.targets[i])
    return "".join(dataset.labels[int(target)] for target in targets if target >= 0), dataset.train.ids[i]


def _title(dataset: Dataset, name: str) -> Image.Image:
    """The policy's name, and how much of what it does."""
    policy = policy_named(name)
    image = blank(62)
    write(image, (0, 18), f"{dataset.spec}, policy {name}", 28, width=WIDTH)
    values = {key: getattr(policy, key) for key in Policy.__dataclass_fields__}
    changes = [f"{key} {value:.3g}" for key, value in values.items() if value and key not in _NO_CHANGES]
    words = ", ".join(changes) or "nothing is changed"
    if policy.mixup or policy.cutmix:
        words += "  (not shown: mixup and cutmix, which the training loop does to pairs)"
    if dataset.task == "text-classification":
        words += "  (the first tokens of each text; · has no letters: a space, or the mark of capitals)"
    write(image, (0, 50), words, 14, GREY, WIDTH)
    return image


def _row(
    spec: Preprocessing, tokenizer: bytes | None, sample: Any, changed: NDArray[Any], caption: tuple[str, str]
) -> Image.Image:
    """One sample: its caption, the original at the left, the changed versions beside it."""
    if isinstance(spec, TextPreprocessing):
        assert tokenizer is not None
        body = _tokens(spec, tokenizer, sample, changed)
    elif isinstance(spec, SeriesPreprocessing):
        body = _series(spec, sample, changed)
    else:
        body = _pictures(spec, sample, changed)
    image = blank(body.height + 22)
    write(image, (0, 8), caption[0], 14, width=WIDTH / 2)
    start = min(width_of(caption[0], 14), WIDTH / 2) + 12
    write(image, (start, 9), caption[1], 12, GREY, WIDTH - start)
    paste(image, body, 0, 22)
    return image


def _pictures(spec: ImagePreprocessing, frame: Any, changed: NDArray[np.float32]) -> Image.Image:
    """Eight beside the original, or of lines, which are wide, two columns of four."""
    original = as_seen(frame, spec)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    pixels = np.rint((changed * std + mean) * 255).clip(0, 255).astype(np.uint8)  # (N, C, H, W)
    versions = np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:])).transpose(0, 2, 3, 1)
    columns = 2 if spec.width > 3 * spec.height else VERSIONS
    cell = (WIDTH - 16) // (columns + 1)
    pieces = [thumb(np.ascontiguousarray(version), cell - 8, cell - 8) for version in versions]
    tall = max(piece.height for piece in pieces) + 8
    image = blank(tall * -(-VERSIONS // columns))
    paste(image, thumb(original, cell - 8, cell - 8), 0, 0)
    ImageDraw.Draw(image).line((cell + 3, 0, cell + 3, image.height - 9), LINE)
    for place, piece in enumerate(pieces):
        paste(image, piece, 16 + cell * (1 + place % columns), place // columns * tall)
    return image


def _series(spec: SeriesPreprocessing, sample: Any, changed: NDArray[np.float32]) -> Image.Image:
    """The changed lines over the original's, which are grey."""
    original = _values(make_preprocessor(spec)(sample)[0])
    cell = (WIDTH - 16) // (VERSIONS + 1)
    lane = 18 if spec.channels > 1 else 60
    steps = len(original)
    first = spark(original, spec, cell - 8, lane, steps=steps)
    image = blank(first.height)
    paste(image, first, 0, 0)
    ImageDraw.Draw(image).line((cell + 3, 0, cell + 3, image.height), LINE)
    for place, version in enumerate(changed):
        piece = spark(_values(version), spec, cell - 8, lane, steps=steps, under=original)
        paste(image, piece, 16 + cell * (1 + place), 0)
    return image


def _values(series: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, C + 1) -> the steps that are no padding, without the mask."""
    return series[series[:, -1] > 0, :-1]


def _tokens(spec: TextPreprocessing, tokenizer: bytes, text: str, changed: NDArray[np.int64]) -> Image.Image:
    """A row of tokens for the original and for each version, those that were dropped crossed out."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtra("text", "tokenizers") from None
    reader = Tokenizer.from_buffer(tokenizer)
    original = make_preprocessor(spec, tokenizer)(text)[0][: changed.shape[1]]
    words = [clean(reader.decode([int(token)], skip_special_tokens=False)) or "·" for token in original if token != spec.pad]
    room, shown = 0.0, 0
    for word in words:
        room += width_of(word, 12) + 14
        if room > WIDTH:
            break
        shown += 1
    image = blank(22 * (1 + VERSIONS) + 6)
    pen = ImageDraw.Draw(image)
    for row, tokens in enumerate((original, *changed)):
        x, y = 0.0, 22 * row + 10 + (6 if row else 0)
        for word, token, before in zip(words[:shown], tokens, original, strict=False):
            wide, lost = width_of(word, 12), token != before
            pen.rounded_rectangle((x, y - 9, x + wide + 10, y + 9), 4, (252, 228, 230) if lost else (241, 243, 245))
            write(image, (x + 5, y), word, 12, RED if lost else (60, 70, 82))
            if lost:
                pen.line((x + 2, y, x + wide + 8, y), RED)
            x += wide + 14
    pen.line((0, 23, WIDTH, 23), LINE)
    return image
