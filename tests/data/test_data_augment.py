"""Augmentation: shapes, seeds, what may never happen to a digit, and contents that must survive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.data.augment import POLICIES, Policy, make_augmentation
from edgekit.errors import UsageError
from edgekit.manifest import ImagePreprocessing, SeriesPreprocessing, TextPreprocessing

PICTURES = [name for name, policy in POLICIES.items() if policy.kind in ("image", "any")]


def spec(channels: int) -> ImagePreprocessing:
    return ImagePreprocessing(24, 20, 1 if channels == 1 else 3, (0.5,) * channels, (0.25,) * channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", PICTURES)
def test_pictures_keep_their_shape_and_follow_the_seed(policy: str, channels: int):
    augmentation = make_augmentation(policy, spec(channels))
    frames = np.random.default_rng(0).integers(0, 255, (8, 40, 44, 3), np.uint8)
    x = torch.from_numpy(np.concatenate([augmentation.read(frame) for frame in frames]))
    assert x.dtype == torch.uint8
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(augmentation(x))
    assert found[0].shape == (8, channels, 20, 24)
    assert found[0].dtype == torch.float32
    assert torch.isfinite(found[0]).all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (policy == "none")


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("policy", PICTURES)
def test_no_draw_of_a_small_batch_fails(policy: str, count: int):
    """kornia's glare failed where no picture of the batch drew it: nearly every batch of one."""
    augmentation = make_augmentation(policy, spec(3))
    frame = np.random.default_rng(0).integers(0, 255, (40, 44, 3), np.uint8)
    x = torch.from_numpy(np.concatenate([augmentation.read(frame)] * count))
    for seed in range(25):
        torch.manual_seed(seed)
        assert augmentation(x).shape == (count, 3, 20, 24)


def mass(policy: Policy, monkeypatch: pytest.MonkeyPatch, at: tuple[float, float] = (0.5, 0.5)) -> tuple[Any, Any, Any]:
    """A disc of radius 12 at ``at`` of 100x100 black, changed 400 times: its centre (x, y) and its radius, in pixels."""
    monkeypatch.setitem(POLICIES, "measured", policy)
    augmentation = make_augmentation("measured", ImagePreprocessing(100, 100, 1, (0.0,), (1.0,)), resizes=True)
    rows, columns = np.mgrid[:100, :100] + 0.5
    frame = np.where((columns - 100 * at[0]) ** 2 + (rows - 100 * at[1]) ** 2 < 144, 255, 0).astype(np.uint8)
    torch.manual_seed(0)
    found = augmentation(torch.from_numpy(augmentation.read(frame)).repeat(400, 1, 1, 1))[:, 0].double().numpy()
    rows, columns = np.mgrid[: found.shape[1], : found.shape[2]] + 0.5
    total = found.sum((1, 2))
    x, y = (found * columns).sum((1, 2)) / total, (found * rows).sum((1, 2)) / total
    wide = np.sqrt((found * (columns - x[:, None, None]) ** 2).sum((1, 2)) / total)
    return x, y, 2 * wide  # of a disc the deviation along an axis is half the radius


def test_a_policy_changes_as_much_as_it_says(monkeypatch: pytest.MonkeyPatch):
    """In pixels and degrees: libraries count in sides, half sides and slopes, and once digits moved twice as far."""
    x, y, _ = mass(Policy(shift=0.1), monkeypatch)
    assert 9 < np.abs(np.stack([x, y]) - 50).max() < 10.5
    x, y, _ = mass(Policy(rotation=10), monkeypatch, at=(0.85, 0.5))
    assert 9 < np.abs(np.degrees(np.arctan2(y - 50, x - 50))).max() < 10.5
    _, _, radius = mass(Policy(scale=0.2), monkeypatch)
    assert 9.3 < radius.min() < 10.2
    assert 13.8 < radius.max() < 14.7
    x, y, _ = mass(Policy(shear=10), monkeypatch, at=(0.5, 0.8))
    assert 0.8 < np.abs(x - 50).max() / (30 * np.tan(np.radians(10))) < 1.1
    x, y, _ = mass(Policy(perspective=0.3), monkeypatch, at=(0.2, 0.2))  # corners move by up to 15 pixels
    assert 6 < np.abs(np.stack([x, y]) - 20).max() < 15


@pytest.mark.parametrize("name", PICTURES)
def test_things_are_learnt_as_large_as_the_device_sees_them(name: str, monkeypatch: pytest.MonkeyPatch):
    """Their size on the device is well within those of training."""
    only = {"rotation", "scale", "shift", "shear", "perspective", "crop", "margin", "smaller"}
    geometry = Policy(**{key: getattr(POLICIES[name], key) for key in only})
    _, _, radius = mass(geometry, monkeypatch)
    low, median, high = np.percentile(radius, [5, 50, 95])
    assert low < 12.1
    assert high > 11.9
    assert median == pytest.approx(12, rel=0.15)


def test_no_augmentation_gives_what_the_device_sees():
    augmentation = make_augmentation("none", spec(1))
    frame = np.random.default_rng(0).integers(0, 255, (20, 24), np.uint8)
    found = augmentation(torch.from_numpy(augmentation.read(frame)))
    np.testing.assert_allclose(found[0, 0], (frame / 255 - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("policy", ["signs", "photos"])
def test_no_black_comes_in_from_outside(policy: str, monkeypatch: pytest.MonkeyPatch):
    """What turns or tilts a picture shows what lies beside it: the border, or its mirror image."""
    monkeypatch.setitem(POLICIES, policy, replace(POLICIES[policy], light=0, contrast=0, glare=0, erase=0, noise=0, warmth=0))
    augmentation = make_augmentation(policy, spec(3))
    white = np.full((20, 24, 3), 255, np.uint8)
    torch.manual_seed(0)
    found = augmentation(torch.from_numpy(np.concatenate([augmentation.read(white)] * 32)))
    assert found.min() > (0.98 - 0.5) / 0.25


@pytest.mark.parametrize("policy", ["digits", "signs", "logistics", "lines"])
def test_what_can_be_read_is_never_mirrored(policy: str):
    """A ramp from left to right stays one, whatever else happens to it."""
    frame = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (32, 1))
    augmentation = make_augmentation(policy, ImagePreprocessing(32, 32, 1, (0.0,), (1.0,)))
    torch.manual_seed(0)
    x = torch.from_numpy(augmentation.read(frame)).expand(64, -1, -1, -1).contiguous()
    moved = augmentation(x)[:, 0, 10:22]
    assert (moved[:, :, 20:26].mean((1, 2)) > moved[:, :, 6:12].mean((1, 2))).float().mean() > 0.9


def test_photos_are_mirrored():
    frame = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (32, 1))
    augmentation = make_augmentation("photos", ImagePreprocessing(32, 32, 1, (0.0,), (1.0,)))
    x = torch.from_numpy(augmentation.read(frame)).expand(200, -1, -1, -1).contiguous()
    torch.manual_seed(0)
    moved = augmentation(x)[:, 0]
    share = (moved[:, :, 20:].mean((1, 2)) > moved[:, :, :12].mean((1, 2))).float().mean()
    assert 0.3 < share < 0.7


def test_models_that_take_any_size_train_on_smaller_crops():
    large = ImagePreprocessing(112, 112, 3, (0.5,) * 3, (0.25,) * 3)
    frame = np.zeros((150, 150, 3), np.uint8)
    for resizes, side in ((True, 96), (False, 112)):
        augmentation = make_augmentation("photos", large, resizes=resizes)
        x = torch.from_numpy(augmentation.read(frame))
        assert x.shape[2:] == (128, 128)
        assert augmentation(x).shape[2:] == (side, side)


def test_series_keep_their_mask_and_stay_zero_behind_it():
    augmentation = make_augmentation("series", SeriesPreprocessing(40, 3, (0.0,) * 3, (1.0,) * 3))
    series = np.cumsum(np.random.default_rng(0).normal(size=(25, 3)), 0).astype(np.float32)
    x = torch.from_numpy(np.concatenate([augmentation.read(series), augmentation.read(series[:10])]))
    torch.manual_seed(0)
    y = augmentation(x)
    assert y.shape == (2, 25, 4)  # what is padding in all of them is cut off
    assert torch.equal(y[:, :, 3], x[:, :25, 3])
    assert not y[1, 10:, :3].any()
    assert not torch.equal(y[0, :, :3], x[0, :25, :3])


def test_tokens_are_dropped_but_never_padding():
    from edgekit.training.tokenizer import fit_tokenizer

    tokenizer = fit_tokenizer(["one two three four five six seven eight"] * 3, 400)
    augmentation = make_augmentation("text", TextPreprocessing(64), tokenizer)
    x = torch.from_numpy(np.concatenate([augmentation.read("one two three four five six seven eight " * 4)] * 20))
    torch.manual_seed(0)
    y = augmentation(x)
    assert y.shape[1] < 64
    lost = (y != x[:, : y.shape[1]]).float().mean()
    assert 0.03 < lost < 0.2
    assert ((y == 0) == (x[:, : y.shape[1]] == 0)).all()


def test_a_policy_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="for text"):
        make_augmentation("text", spec(1))
    with pytest.raises(UsageError, match="there is no augmentation"):
        make_augmentation("nonsense", spec(1))
