"""``folder:PATH``: one folder a class (ImageFolder), or ``train/`` and ``val/`` (or ``test/``) of such folders.

Where there is no ``val/`` or ``test/``, a fifth is held out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from edgekit.errors import DataError
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import IMAGE_SUFFIXES, read_image
from edgekit.progress import say

from .dataset import Dataset, Split, digest_of, stratified

__all__ = ["load"]

TEST_SHARE = 0.2
SIZE = 112


def load(path: str) -> Dataset:
    """Raises `DataError` where the folder is missing or holds no classes with images."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}", "folder:PATH wants one folder a class: PATH/CLASS/*.jpg")
    train_root = root / "train"
    held_out = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    test_root = held_out[0] if held_out else None
    if train_root.is_dir() and test_root:
        if len(held_out) > 1:
            say(f"{test_root} is held out; {held_out[1]} is not used: --validation takes its share from {train_root}")
        labels = _classes(train_root)
        if extra := sorted(set(_classes(test_root)) - set(labels)):
            raise DataError(f"{test_root} has the class {extra[0]!r}, which {train_root} lacks", "give both the same classes")
        train, digests = _split(train_root, labels)
        test, test_digests = _split(test_root, labels, may_lack=True)
        # A picture that is in both would be learnt by heart: it stays in test only.
        seen = set(test_digests)
        train = train.take(i for i, digest in enumerate(digests) if digest not in seen)
        every, digests = test, digests + test_digests
    else:
        if train_root.is_dir() and any(path.is_dir() for path in train_root.iterdir()):
            say(f"{root} has train/, but no val/ or test/: a fifth of train/ is held out")
            root = train_root
        labels = _classes(root)
        every, digests = _split(root, labels)
        inside, outside = stratified(every.targets, digests, TEST_SHARE)
        train, test = every.take(inside), every.take(outside)
    return Dataset(
        spec=f"folder:{path}",
        labels=labels,
        digest=digest_of([*labels, *train.ids, *every.ids, *digests]),
        train=train,
        test=test,
        all=every,
        preprocessing=ImagePreprocessing(SIZE, SIZE, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), fit="crop"),
        augmentation="photos",
    )


def _classes(root: Path) -> tuple[str, ...]:
    found = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if odd := [name for name in found if not _is_text(name)]:
        raise DataError(f"the class folder {odd[0]!r} in {root} is not named in UTF-8", "rename it")
    if len(found) < 2:
        raise DataError(
            f"{root} holds {len(found)} class folders, at least 2 are needed", "one folder a class: PATH/CLASS/*.jpg"
        )
    return found


def _split(root: Path, labels: tuple[str, ...], *, may_lack: bool = False) -> tuple[Split, list[str]]:
    """Every image below ``root`` with its content's sha256. Raises `DataError` for a class without images, but for
    ``may_lack``."""
    files: list[Path] = []
    targets: list[int] = []
    for target, label in enumerate(labels):
        images = sorted(p for p in (root / label).rglob("*") if _is_image(p)) if (root / label).is_dir() else []
        if not images and not may_lack:
            raise DataError(
                f"the class folder {root / label} holds no images", f"add images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        files += images
        targets += [target] * len(images)
    ids = tuple(str(p.relative_to(root)) for p in files)
    digests = [_digest(p) for p in files]
    return Split(ids, np.array(targets, np.int64), lambda i: read_image(files[i]), tuple(digests)), digests


def _is_image(path: Path) -> bool:
    """By name; folders, the hidden files that file managers leave (``._x.jpg``), pipes and devices are none. A link that leads
    nowhere is a damaged one."""
    named = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return named and (path.is_file() or not path.exists())


def _digest(path: Path) -> str:
    """sha256 of the content. A file that cannot be read stays in the list, to be named, skipped and counted as damaged."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"unreadable {path.name}: {error.strerror}"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
