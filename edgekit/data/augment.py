"""Augmentation by policy: what may happen to a sample without changing what it is. Pictures by kornia.

Digits, letters and signs are never mirrored, photos may be; medical pictures are treated gently; goods on a conveyor are
blurred, glared at, tilted and covered. Draws come from torch's global generator, which training seeds for each epoch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra, UsageError
from edgekit.manifest import ImagePreprocessing, Preprocessing, SeriesPreprocessing, TextPreprocessing
from edgekit.preprocess import Preprocess, Preprocessor, make_preprocessor

try:
    import torch
    from torch import Tensor, nn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kornia speaks of torch's deprecations
        import kornia.augmentation as ka
        from kornia.geometry.transform import warp_perspective
except ImportError as error:
    raise MissingExtra("train", (error.name or "torch").partition(".")[0]) from None

__all__ = ["POLICIES", "Augmentation", "Policy", "make_augmentation", "policy_named"]


@dataclass(frozen=True)
class Policy:
    """Largest changes; 0 leaves a kind of change out. ``kind``: image, text or series.

    Pictures: ``crop``: a random part of at least this share of the area, scaled to the whole. ``rotation`` and ``shear``
    in degrees; ``scale`` and ``shift`` as shares of the side, ``perspective`` as the share of half the side that a corner
    moves at most, each way. ``light``: added or taken, as a share of the range; ``contrast`` (a gain) and ``saturation``
    as factors 1 +- x. Chances: ``warmth`` (another colour temperature), ``mirror``, ``blur`` (out of focus), ``motion``
    (blur), ``glare`` (a soft bright or dark spot), ``noise``, ``erase`` (a covered rectangle). ``mixup``: beta of blending
    pairs (arXiv:1710.09412); ``cutmix``: the chance that a rectangle of the other picture is pasted instead
    (arXiv:1905.04899).
    ``margin``: pictures to crop are read larger by this share, so that crops do not lose sharpness. ``smaller``: crops are
    trained on this much below the model's size, for models that take any: crops magnify what they show, so pictures at full
    size show things as large as they were learnt (arXiv:1906.06423). ``epochs``: so much change takes at least so many passes
    to learn from.

    Text: ``drop``, the share of tokens replaced by the unknown one. Series: ``light`` scales each channel, ``noise`` adds
    normal noise in units of its deviation, ``shift`` moves the window in time, ``scale`` warps time.
    """

    kind: str = "image"
    crop: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    mirror: float = 0.0
    light: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    warmth: float = 0.0
    blur: float = 0.0
    motion: float = 0.0
    glare: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop: float = 0.0
    margin: float = 0.0
    smaller: float = 0.0
    epochs: int = 0


POLICIES: dict[str, Policy] = {
    "none": Policy("any"),
    "digits": Policy(rotation=15, scale=0.12, shift=0.075, shear=11),
    "signs": Policy(
        rotation=8, scale=0.15, shift=0.1, perspective=0.25, light=0.12, contrast=0.4, blur=0.15, motion=0.15, glare=0.2,
        erase=0.1,
    ),
    "photos": Policy(
        rotation=15, crop=0.3, mirror=0.5, light=0.15, contrast=0.3, saturation=0.3, warmth=0.3, erase=0.25, mixup=0.2,
        cutmix=0.5, margin=1 / 7, smaller=1 / 7, epochs=150,
    ),
    "medical": Policy(rotation=10, scale=0.1, shift=0.05, mirror=0.5, light=0.06, contrast=0.1),
    "logistics": Policy(
        rotation=8, scale=0.12, shift=0.06, perspective=0.3, light=0.1, contrast=0.35, blur=0.2, motion=0.2, glare=0.3,
        noise=0.2, erase=0.25,
    ),
    "lines": Policy(rotation=1, scale=0.03, shift=0.01, shear=4, light=0.1, contrast=0.3, noise=0.2),
    "text": Policy("text", drop=0.1),
    "series": Policy("series", light=0.2, noise=0.1, shift=0.1, scale=0.15),
}  # fmt: skip


def policy_named(name: str) -> Policy:
    """Raises `UsageError` for an unknown policy."""
    if name not in POLICIES:
        raise UsageError(f"there is no augmentation {name!r}", f"choose one of: {', '.join(POLICIES)}")
    return POLICIES[name]


class Augmentation:
    """How the samples of a training split are read (`read`), and what is done to a batch of them (`__call__`).

    This base does nothing but what the model's preprocessing does.
    """

    def __init__(self, policy: Policy, read: Preprocess) -> None:
        self.policy, self.read = policy, read

    def __call__(self, x: Tensor) -> Tensor:
        """A batch as `read` gave it -> a batch as the module takes it."""
        return x


def make_augmentation(
    name: str, preprocessing: Preprocessing, tokenizer: bytes | None = None, *, resizes: bool = False
) -> Augmentation:
    """The policy called ``name`` for inputs of this kind; ``resizes``: the model takes pictures of any size.

    Raises `UsageError` for an unknown policy, or one of another kind.
    """
    policy = policy_named(name)
    kind = {ImagePreprocessing: "image", TextPreprocessing: "text", SeriesPreprocessing: "series"}[type(preprocessing)]
    if policy.kind not in (kind, "any"):
        fitting = [key for key, value in POLICIES.items() if value.kind in (kind, "any")]
        raise UsageError(
            f"the augmentation {name!r} is for {policy.kind}, the data is {kind}", f"choose one of: {', '.join(fitting)}"
        )
    if isinstance(preprocessing, ImagePreprocessing):
        return _Pictures(policy, preprocessing, resizes)
    read = make_preprocessor(preprocessing, tokenizer)
    if isinstance(preprocessing, TextPreprocessing):
        return _Tokens(policy, read, preprocessing.pad)
    return _Series(policy, read)


class _Pictures(Augmentation):
    """uint8 (N, C, H', W') -> float32 (N, C, H, W), changed and normalised. Held as bytes, a quarter of the memory."""

    def __init__(self, policy: Policy, spec: ImagePreprocessing, resizes: bool) -> None:
        channels = spec.channels
        larger = msgspec.structs.replace(
            spec,
            width=round(spec.width * (1 + policy.margin)),
            height=round(spec.height * (1 + policy.margin)),
            mean=(0.0,) * channels,
            std=(1 / 255,) * channels,
        )
        resize = Preprocessor(larger)

        def read(frame: NDArray[Any]) -> NDArray[np.uint8]:
            return np.rint(resize(frame)).astype(np.uint8)

        super().__init__(policy, read)
        self.mean = torch.tensor(spec.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(spec.std).view(1, -1, 1, 1)
        share = 1 - policy.smaller if resizes else 1.0
        self.steps = nn.Sequential(*_steps(policy, round(spec.height * share), round(spec.width * share)))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y: Tensor = self.steps(x.float() / 255)
        return (y - self.mean.to(y.device)) / self.std.to(y.device)


def _steps(p: Policy, height: int, width: int) -> list[nn.Module]:
    """kornia's modules for a policy, in the order in which the world does it: geometry, light, optics, sensor, cover."""
    steps: list[nn.Module] = []
    if p.rotation or p.scale or p.shift or p.shear:
        shift = (p.shift, p.shift) if p.shift else None
        scale = (1 - p.scale, 1 + p.scale) * 2 if p.scale else None  # width and height apart
        shear = p.shear or None
        border = "reflection" if p.crop else "border"  # what a photo goes on with; a mirrored stroke would be another one
        steps.append(ka.RandomAffine(p.rotation, shift, scale, shear, padding_mode=border, p=1.0))
    if p.perspective:
        steps.append(_Perspective(p.perspective, p=0.5))
    if p.crop:
        steps.append(ka.RandomResizedCrop((height, width), (p.crop, 1.0), (0.75, 4 / 3), cropping_mode="resample"))
    if p.mirror:
        steps.append(ka.RandomHorizontalFlip(p=p.mirror))
    if p.light:
        steps.append(ka.RandomBrightness((1 - p.light, 1 + p.light), p=0.8))  # kornia adds the factor less 1
    if p.contrast:
        steps.append(ka.RandomContrast((1 - p.contrast, 1 + p.contrast), p=0.8))
    if p.saturation:
        steps.append(_Coloured(ka.ColorJitter(saturation=p.saturation, p=0.8)))
    if p.warmth:
        steps.append(_Coloured(ka.RandomPlanckianJitter(p=p.warmth)))
    if p.glare:
        spot = ka.RandomGaussianIllumination(gain=(0.1, 0.5), sigma=(0.2, 0.8), sign=(-1.0, 1.0), p=1.0)
        steps.append(_Sometimes(spot, p.glare))
    if p.motion:
        steps.append(ka.RandomMotionBlur((3, 7), 180.0, 0.5, border_type="replicate", p=p.motion))
    if p.blur:
        steps.append(ka.RandomGaussianBlur((5, 5), (0.3, 1.6), p=p.blur))
    if p.noise:
        steps.append(ka.RandomGaussianNoise(0.0, 0.05, p=p.noise))
    if p.erase:
        steps.append(ka.RandomErasing((0.02, 0.25), p=p.erase))
    return steps


class _Perspective(ka.RandomPerspective):  # type: ignore[misc]
    """Kornia's fills with black, and black wedges would tell a tilted picture from others: the border goes on instead."""

    def apply_transform(self, input: Tensor, params: Any, flags: Any, transform: Any = None) -> Tensor:  # noqa: A002  kornia's
        size = (input.shape[2], input.shape[3])
        y: Tensor = warp_perspective(
            input, transform, size, mode="bilinear", padding_mode="border", align_corners=flags["align_corners"]
        )
        return y


class _Sometimes(nn.Module):
    """Changes some pictures of a batch, each by its chance; kornia 0.8's own draw fails here where it picks none."""

    def __init__(self, step: nn.Module, chance: float) -> None:
        super().__init__()
        self.step, self.chance = step, chance

    def forward(self, x: Tensor) -> Tensor:
        chosen = (torch.rand(len(x)) < self.chance).nonzero().flatten().to(x.device)
        return x.index_copy(0, chosen, self.step(x[chosen])) if len(chosen) else x


class _Coloured(nn.Module):
    """Leaves grey pictures alone, which have no colour to change."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x) if x.shape[1] == 3 else x


class _Tokens(Augmentation):
    """int64 (N, T) -> the same without the columns that are padding in every row; some tokens become unknown (1)."""

    def __init__(self, policy: Policy, read: Preprocess, pad: int) -> None:
        super().__init__(policy, read)
        self.pad = pad

    def __call__(self, x: Tensor) -> Tensor:
        x = x[:, : max(1, int((x != self.pad).sum(1).max()))]
        if self.policy.drop:
            lost = (torch.rand(x.shape) < self.policy.drop).to(x.device) & (x != self.pad)
            x = x.masked_fill(lost, 1)
        return x


class _Series(Augmentation):
    """float32 (N, T, C + 1), the last channel the mask -> the same, warped in time, scaled and noisy where it counts."""

    def __call__(self, x: Tensor) -> Tensor:
        p, (count, steps, channels) = self.policy, x.shape
        x = x[:, : max(1, int(x[:, :, -1].sum(1).max()))]
        steps = x.shape[1]
        values, mask = x[:, :, :-1], x[:, :, -1:]
        if p.scale or p.shift:  # linear resampling at warped times, within each series' own length
            last = mask.sum(1) - 1  # (N, 1)
            speed = 1 + (torch.rand(count, 1, device=x.device) * 2 - 1) * p.scale
            offset = (torch.rand(count, 1, device=x.device) * 2 - 1) * p.shift * last
            times = (torch.arange(steps, device=x.device) * speed + offset).clamp(min=0)  # (N, T)
            times = torch.minimum(times, last.clamp(min=0))
            low = times.floor().long()
            high = torch.minimum(low + 1, last.clamp(min=0).long())
            weight = (times - low)[:, :, None]
            index = [i[:, :, None].expand(-1, -1, channels - 1) for i in (low, high)]
            values = values.gather(1, index[0]) * (1 - weight) + values.gather(1, index[1]) * weight
        if p.light:
            values = values * (1 + (torch.rand(count, 1, channels - 1, device=x.device) * 2 - 1) * p.light)
        if p.noise:
            values = values + torch.randn_like(values) * p.noise
        return torch.cat([values * mask, mask], 2)
