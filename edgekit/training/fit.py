"""The training loop: AdamW, one cycle, label smoothing, EMA weights, a checkpoint after every epoch.

Every epoch draws from its own generator, seeded by (seed, epoch), so a resumed run continues as if never stopped.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.data import Tensors
from edgekit.data.augment import augment
from edgekit.errors import EdgekitError, MissingExtra, UsageError
from edgekit.files import atomic_write
from edgekit.progress import bar, say

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["FitConfig", "answers", "fit"]


@dataclass(frozen=True)
class FitConfig:
    """``lr`` is the peak of the cycle (Smith, arXiv:1708.07120), reached after ``warmup`` of the steps.

    ``ema`` averages the weights (Polyak): its decay grows to this value. ``smoothing`` is label smoothing
    (arXiv:1512.00567). ``weight_decay`` is decoupled (AdamW, arXiv:1711.05101).
    """

    epochs: int
    lr: float
    batch: int = 128
    weight_decay: float = 0.05
    smoothing: float = 0.1
    ema: float = 0.995
    warmup: float = 0.2
    seed: int = 0
    augmentation: str = "none"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not 0 < self.lr < 10 or not 0 <= self.ema < 1:
            raise UsageError(
                f"epochs {self.epochs}, batch {self.batch}, lr {self.lr}", "wanted: epochs >= 1, batch >= 2, 0 < lr < 10"
            )


def fit(
    module: nn.Module,
    data: Tensors,
    held_out: Tensors,
    config: FitConfig,
    *,
    checkpoint: Path | None = None,
    label: str = "training",
    after_step: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``module`` in place; it ends with the averaged weights, in eval mode. Returns the curve, a row an epoch.

    The curve's ``top1`` is on ``held_out`` and only shown: nothing is chosen by it. With ``checkpoint`` each epoch is
    saved there and a run that was stopped goes on from it. ``after_step`` runs after each update (a mask).
    Raises `EdgekitError` where the loss is no longer finite; the last good checkpoint stays.
    """
    if torch.cuda.is_available():
        module.cuda()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(module, data, config, after_step)
    curve = run.resume(checkpoint, label)
    with bar(label, config.epochs * run.steps) as advance:
        advance(len(curve) * run.steps, "")
        for epoch in range(len(curve), config.epochs):
            note = f"  top-1 {curve[-1]['top1']:.2%}" if curve else ""
            loss = run.epoch(epoch, advance, note)
            if not np.isfinite(loss):
                raise EdgekitError(f"the loss is no longer finite in epoch {epoch + 1}", f"lower --lr (now {config.lr:g})")
            top1 = float((run.averaged_answers(held_out.x) == held_out.y).mean())
            curve.append({"epoch": epoch + 1, "loss": loss, "top1": top1, "lr": float(run.schedule.get_last_lr()[0])})
            run.save(checkpoint, curve)
    module.load_state_dict(run.average)
    module.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return curve


def answers(module: nn.Module, x: NDArray[np.float32], batch: int = 500) -> NDArray[np.int64]:
    """Class indices int64 (N,) of float32 (N, C, H, W), in eval mode."""
    module.eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        parts = [module(torch.from_numpy(x[i : i + batch]).to(device)).argmax(1).cpu().numpy() for i in range(0, len(x), batch)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    trained = module.state_dict()
    floating = [name for name, tensor in trained.items() if tensor.dtype.is_floating_point]
    with torch.no_grad():
        torch._foreach_lerp_([average[n] for n in floating], [trained[n] for n in floating], 1 - decay)
        for name in trained.keys() - set(floating):
            average[name].copy_(trained[name])


def _key(module: nn.Module, data: Tensors, config: FitConfig) -> str:
    """What a checkpoint belongs to: the same settings, samples and starting weights."""
    digest = hashlib.sha256(msgspec.json.encode([asdict(config), data.x.shape]))
    digest.update(np.ascontiguousarray(data.x).data)
    digest.update(np.ascontiguousarray(data.y).data)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Run:
    """One training run: the module, its averaged weights, and where it is in the cycle."""

    def __init__(self, module: nn.Module, data: Tensors, config: FitConfig, after_step: Callable[[], None] | None) -> None:
        self.module, self.config, self.after_step = module, config, after_step
        self.x, self.y = torch.from_numpy(data.x), torch.from_numpy(data.y)
        self.batch = min(config.batch, len(data.x))
        self.steps = len(data.x) // self.batch
        self.key = _key(module, data, config)
        self.average = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        total = config.epochs * self.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            config.lr,
            total_steps=max(total, 2),
            pct_start=min(max(config.warmup, 1.5 / total), 0.9),  # a warm-up of exactly one step divides by zero
        )

    def epoch(self, epoch: int, advance: Callable[[int, str], None], note: str) -> float:
        """One pass over the shuffled data; returns the mean loss. ``advance`` hears of each step."""
        config, device = self.config, next(self.module.parameters()).device
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        torch.manual_seed(config.seed * 100_003 + epoch)  # dropout draws from the global generator
        order = torch.randperm(len(self.x), generator=generator)
        self.module.train()
        total = 0.0
        for step in range(self.steps):
            rows = order[step * self.batch : (step + 1) * self.batch]
            x = augment(self.x[rows], config.augmentation, generator).to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(self.module(x), self.y[rows].to(device), label_smoothing=config.smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
            self.optimizer.step()
            self.schedule.step()
            if self.after_step:
                self.after_step()
            done = epoch * self.steps + step
            _average(self.average, self.module, min(config.ema, (1 + done) / (10 + done)))
            total += loss.item()
            advance(1, f"loss {total / (step + 1):.3f}{note}")
        return total / self.steps

    def save(self, path: Path | None, curve: list[dict[str, float]]) -> None:
        if path is None:
            return
        state = {
            "key": self.key,
            "curve": curve,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if not callable(v)},
        }
        buffer = io.BytesIO()  # not the file: on a full disk torch.save raises no OSError
        torch.save(state, buffer)
        atomic_write(path, buffer.getvalue())

    def resume(self, path: Path | None, label: str) -> list[dict[str, float]]:
        """Load ``path`` if it belongs to this run; the curve so far, empty for a fresh start."""
        if path is None or not path.is_file():
            return []
        try:
            state = torch.load(path, weights_only=True)
        except Exception:  # noqa: BLE001  a damaged checkpoint costs time, not the run
            say(f"{path} cannot be read; starting again")
            return []
        if state.get("key") != self.key:
            say(f"{path} belongs to other settings or data; starting again")
            return []
        self.module.load_state_dict(state["module"])
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        curve: list[dict[str, float]] = state["curve"]
        say(f"{label}: resuming after epoch {len(curve)} of {self.config.epochs}")
        return curve

    def averaged_answers(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
        """Answers with the averaged weights; the trained ones are put back after."""
        trained = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        try:
            self.module.load_state_dict(self.average)
            return answers(self.module, x)
        finally:
            self.module.load_state_dict(trained)
