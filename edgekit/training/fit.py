"""The training loop: AdamW or SGD, one cycle, EMA weights, a checkpoint after every epoch; on one device or on many.

Every epoch draws from its own generator, seeded by (seed, epoch), so a run that was stopped at any step goes on from its
last whole epoch and ends as if it had never been stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Tensors
from edgekit.data.augment import Augmentation, policy_named
from edgekit.data.tensors import Rows, batches
from edgekit.errors import EdgekitError, MissingExtra, UsageError
from edgekit.progress import bar, say

from .checkpoint import load_checkpoint, run_key, save_checkpoint
from .devices import Devices
from .logs import Log, no_log

try:
    import torch
    from torch import Tensor, nn
except ImportError:
    raise MissingExtra("train", "torch") from None

from .objective import Classification, Objective

__all__ = ["FitConfig", "Watched", "epoch_seconds", "fit", "outputs_of"]

#: Steps until which averaged batch norms remember how they began.
SHORT_RUN = 2000
SETTLING = 2000  # samples
ANSWERED = 250  # samples at once, at most
WARMUP_EPOCHS = 8  # at most
FEW_STEPS = 10
#: Of SGD; AdamW's first beta. From the upper to the lower while the rate rises, and back.
MOMENTA = (0.85, 0.95)
TIMED = 3  # steps that say what an epoch takes


@dataclass(frozen=True)
class FitConfig:
    """``lr`` is the peak of the cycle (Smith, arXiv:1708.07120), reached after ``warmup`` of the steps, at
    most `WARMUP_EPOCHS`; momentum (AdamW's first beta) goes the other way, between `MOMENTA`.

    ``ema`` averages the weights (Polyak) over at most 1 / (1 - ema) steps, and over 15% of a
    short run. ``smoothing`` is label smoothing.
    ``weight_decay`` is decoupled (AdamW, arXiv:1711.05101); biases and norms have none. ``clip`` bounds the gradient's norm.
    Pairs are blended (mixup, cutmix) until ``blend`` of the epochs. ``patience``: stop after so many epochs without a better
    score on the validation split; 0: never.
    """

    epochs: int
    lr: float
    batch: int = 128
    weight_decay: float = 0.05
    smoothing: float = 0.1
    ema: float = 0.998
    warmup: float = 0.2
    seed: int = 0
    augmentation: str = "none"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    clip: float = 5.0
    blend: float = 0.85
    patience: int = 0

    def __post_init__(self) -> None:
        counts = (self.epochs, self.batch, self.patience, self.seed)
        rates = (self.lr, self.ema, self.smoothing, self.weight_decay)
        if not all(isinstance(n, int) for n in counts) or not all(isinstance(rate, int | float) for rate in rates):
            raise UsageError(f"{self}", "wanted: whole numbers of epochs, batch, patience and seed; numbers elsewhere")
        if self.patience < 0 or not 0 <= self.seed < 2**32:
            raise UsageError(f"patience {self.patience}, seed {self.seed}", "wanted: 0 or more, a seed below 2**32")
        if self.epochs < 1 or self.batch < 2 or not 0 < self.lr <= 10 or not 0 <= self.ema < 1:
            raise UsageError(
                f"epochs {self.epochs}, batch {self.batch}, lr {self.lr}", "wanted: epochs >= 1, batch >= 2, 0 < lr <= 10"
            )
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError(f"there is no optimizer {self.optimizer!r}", "choose one of: adamw, sgd")
        if not 0 <= self.smoothing < 1 or not 0 <= self.weight_decay < 10:
            raise UsageError(
                f"smoothing {self.smoothing}, weight decay {self.weight_decay}",
                "wanted: 0 <= smoothing < 1, 0 <= weight decay < 10",
            )


@dataclass(frozen=True)
class Watched:
    """Samples scored after every epoch. ``choose``: the epoch that scores best is kept (a validation split); else the last
    one is, and the score is only shown (a test split: nothing may be chosen by it)."""

    tensors: Tensors
    choose: bool = False


def fit(
    module: nn.Module,
    data: Tensors,
    watched: Watched | Tensors,
    config: FitConfig,
    *,
    objective: Objective | None = None,
    augmentation: Augmentation | None = None,
    checkpoint: Path | None = None,
    about: str = "",
    label: str = "training",
    after_step: Callable[[], None] | None = None,
    log: Log = no_log,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``module`` in place; it ends with the averaged weights, in eval mode. Returns the curve, a row an epoch.

    ``data.x`` is what ``augmentation.read`` gave, what ``augmentation`` makes of a batch is what the module takes; without
    one ``data.x`` is. With ``checkpoint`` each epoch is saved there and a run that was stopped goes on from it, if it is of
    the same settings, samples and ``about``, which says what cannot be seen of samples that are decoded on demand.
    ``after_step`` runs after each update (a mask), ``on_epoch`` after each epoch with its score and may raise to stop.
    Raises `EdgekitError` where the loss is no longer finite; the last good checkpoint stays.
    """
    if isinstance(watched, Tensors):
        watched = Watched(watched)
    devices = Devices()
    policy = policy_named(config.augmentation)
    objective = objective or Classification(int(data.y.max(initial=0)) + 1, config.smoothing, policy)
    with devices.together():
        run = _Run(module, data, config, objective, augmentation, after_step, devices, about)
        curve = run.resume(checkpoint, label)
        if config.epochs * run.steps < FEW_STEPS:
            say(f"{config.epochs * run.steps} steps in all are few to learn from: raise --epochs, or lower --batch")
        with bar(label, config.epochs * run.steps) as advance:
            advance(len(curve) * run.steps, "")
            for epoch in range(len(curve), config.epochs):
                if run.weary(curve):
                    break
                note = f"  {objective.metric} {curve[-1][objective.metric]:.2%}" if curve else ""
                loss = devices.mean(run.epoch(epoch, advance, note))
                score = devices.share(run.score(watched.tensors, epoch) if devices.main else 0.0)
                row = {"epoch": epoch + 1, "loss": loss, objective.metric: score, "lr": float(run.schedule.get_last_lr()[0])}
                curve.append(row)
                log(row)
                run.note(score, epoch, watched.choose)
                if devices.main:
                    save_checkpoint(checkpoint, run.state(curve))
                if on_epoch:
                    on_epoch(epoch, score)
        run.finish(watched.choose, len(curve))
    return curve


def epoch_seconds(
    module: nn.Module,
    data: Tensors,
    watched: Tensors,
    config: FitConfig,
    objective: Objective,
    augmentation: Augmentation | None = None,
) -> float:
    """What an epoch of `fit` takes here: some of its steps, with reading and augmentation, and one scoring of ``watched``.

    ``module`` is used up: hand over a copy. The generator of random numbers ends as it was.
    """
    with torch.random.fork_rng():
        run = _Run(
            module, data, replace(config, epochs=max(config.epochs, TIMED + 1)), objective, augmentation, None, Devices()
        )
        run.objective.blend(True)
        run.parallel.train()
        taken = []
        for step in range(TIMED + 1):  # the first takes longer
            rows = (np.arange(run.batch) + step * run.batch) % len(data.x)
            started = time.perf_counter()
            run.advance(rows, next(batches(data.x, [rows])))
            _average(run.average, module, run.decay)
            taken.append(time.perf_counter() - started)
        started = time.perf_counter()
        run.score(watched, 0)
        return run.steps * sum(taken[1:]) / TIMED + time.perf_counter() - started


def outputs_of(module: nn.Module, x: Rows, batch: int = ANSWERED) -> NDArray[np.float32]:
    """What ``module`` answers to (N, ...), in eval mode, on the device where its weights are."""
    module.eval()
    device = next(module.parameters()).device
    orders = [np.arange(i, min(i + batch, len(x))) for i in range(0, len(x), batch)]
    with torch.no_grad():
        parts = [module(torch.from_numpy(rows).to(device)).float().cpu().numpy() for rows in batches(x, orders)]
    return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    trained = module.state_dict()
    floating = [name for name, tensor in trained.items() if tensor.dtype.is_floating_point]
    with torch.no_grad():
        torch._foreach_lerp_([average[n] for n in floating], [trained[n] for n in floating], 1 - decay)
        for name in trained.keys() - set(floating):
            average[name].copy_(trained[name])


def parameter_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay, biases and norms do not. A module that knows better says so (`Pretrained`)."""
    if hasattr(module, "parameter_groups"):
        own: list[dict[str, Any]] = module.parameter_groups(lr, weight_decay)  # type: ignore[operator]
        return own
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Run:
    """One training run: the module, its averaged weights, and where it is in the cycle."""

    def __init__(
        self,
        module: nn.Module,
        data: Tensors,
        config: FitConfig,
        objective: Objective,
        augmentation: Augmentation | None,
        after_step: Callable[[], None] | None,
        devices: Devices,
        about: str = "",
    ) -> None:
        self.module, self.config, self.objective, self.after_step = module, config, objective, after_step
        self.augmentation, self.devices = augmentation, devices
        module.to(devices.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.x, self.y = data.x, torch.from_numpy(data.y)
        self.batch = devices.whole(config.batch, len(data.x))
        self.key = run_key(module, data, {**asdict(config), "batch": self.batch, "about": about}, objective)
        self.steps = len(data.x) // self.batch
        self.at_once = min(ANSWERED, 2 * self.batch)  # a batch that fits in training, twice: its gradients do not count
        self.average = _copy(module)
        self.settled = self.average
        self.best: dict[str, Tensor] | None = None
        self.best_score, self.best_epoch = -math.inf, 0
        groups = parameter_groups(module, config.lr, config.weight_decay)
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=MOMENTA[1], nesterov=True)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        total = config.epochs * self.steps
        self.decay = min(config.ema, 1 - 1 / max(20.0, 0.15 * total))
        # A warm-up of exactly one step divides by zero.
        warmup = min(max(min(config.warmup, WARMUP_EPOCHS / config.epochs), 1.5 / total), 0.9)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in groups],
            total_steps=max(total, 2),
            pct_start=warmup,
            base_momentum=MOMENTA[0],
            max_momentum=MOMENTA[1],
        )
        self.parallel = devices.wrap(module)

    def epoch(self, epoch: int, advance: Callable[[int, str], None], note: str) -> float:
        """One pass over the shuffled data; returns the mean loss. ``advance`` hears of each step."""
        config, devices = self.config, self.devices
        seed = config.seed * 100_003 + epoch
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed)).numpy()
        torch.manual_seed(seed + 7_919 * devices.rank)  # augmentation and dropout draw from the global generator
        self.objective.blend(epoch < config.blend * config.epochs)
        self.parallel.train()
        chosen = [order[i * self.batch : (i + 1) * self.batch][devices.rank :: devices.world] for i in range(self.steps)]
        total = 0.0
        for step, (rows, samples) in enumerate(zip(chosen, batches(self.x, chosen), strict=True)):
            loss = self.advance(rows, samples)
            if loss is None:
                raise EdgekitError(
                    f"the loss or its gradient is no longer finite in epoch {epoch + 1}, step {step + 1}",
                    f"lower --lr (now {config.lr:g}) and train again; what was saved before stays",
                )
            total += loss
            done = epoch * self.steps + step
            _average(self.average, self.module, min(self.decay, (1 + done) / (10 + done)))
            advance(1, f"loss {total / (step + 1):.3f}{note}")
        return total / self.steps

    def advance(self, rows: NDArray[np.int64], samples: NDArray[Any]) -> float | None:
        """One update by ``samples``, which are ``rows`` of the data; see `_step`."""
        x, y = torch.from_numpy(samples).to(self.devices.device), self.y[rows].to(self.devices.device)
        return self._step(self.augmentation(x) if self.augmentation else x, y)

    def _step(self, x: Tensor, y: Tensor) -> float | None:
        """One update; the loss before it. None, and no update, where the loss or the gradient is not finite."""
        if x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        with self.devices.autocast():
            loss = self.objective.loss(self.parallel, x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            return None
        self.optimizer.step()
        self.schedule.step()
        if self.after_step:
            self.after_step()
        return value

    def score(self, tensors: Tensors, epoch: int) -> float:
        """Of the averaged weights, settled, after ``epoch``: what would be written now. The trained ones are put back."""
        trained = _copy(self.module)
        try:
            self.module.load_state_dict(self.average)
            self._settle(epoch + 1)
            self.settled = _copy(self.module)
            return self.objective.score(outputs_of(self.module, tensors.x, self.at_once), tensors.y)
        finally:
            self.module.load_state_dict(trained)

    def note(self, score: float, epoch: int, choose: bool) -> None:
        """Remember the best epoch, and its weights where they will be chosen."""
        if score > self.best_score:
            self.best_score, self.best_epoch = score, epoch
            if choose:
                self.best = self.settled

    def weary(self, curve: list[dict[str, float]]) -> bool:
        return 0 < self.config.patience <= len(curve) - 1 - self.best_epoch

    def finish(self, choose: bool, epochs: int) -> None:
        """The module ends with the weights that count, in eval mode, after ``epochs``."""
        if choose and self.best:
            self.module.load_state_dict(self.best)
        else:
            self.module.load_state_dict(self.average)
            self._settle(epochs)
        self.module.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # The batch norms of each process have seen its own samples: all end with those of the main one.
        self.module.load_state_dict(self.devices.share(self.module.state_dict()))

    def _settle(self, epochs: int) -> None:
        """Soon after the start, batch norms take their statistics anew: the averaged ones still remember the first steps.

        From a random draw: splits are sorted by class, and a batch of one class has other statistics than all of them.
        """
        if epochs * self.steps > SHORT_RUN:
            return
        drawn = np.random.default_rng(self.config.seed).permutation(len(self.x))[:SETTLING]
        chosen = np.array_split(drawn, max(1, len(drawn) // self.at_once))
        torch.manual_seed(self.config.seed)

        def samples() -> Any:
            for rows in batches(self.x, chosen):
                x = torch.from_numpy(rows).to(self.devices.device)
                yield self.augmentation(x) if self.augmentation else x

        torch.optim.swa_utils.update_bn(samples(), self.module)

    def state(self, curve: list[dict[str, float]]) -> dict[str, Any]:
        return {
            "key": self.key,
            "curve": curve,
            "module": self.module.state_dict(),
            "average": self.average,
            "best": self.best or {},
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if not callable(v)},
        }

    def resume(self, path: Path | None, label: str) -> list[dict[str, float]]:
        """Load ``path`` if it belongs to this run; the curve so far, empty for a fresh start.

        The main process reads it for all: another machine need not have the file, and all must start at one epoch.
        """
        state = self.devices.share(load_checkpoint(path, self.key) if self.devices.main else None)
        if state is None:
            return []
        self.module.load_state_dict(state["module"])
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)
        self.best = state["best"] or None
        self.best_score, self.best_epoch = state["best_score"], state["best_epoch"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        curve: list[dict[str, float]] = state["curve"]
        say(f"{label}: resuming after epoch {len(curve)} of {self.config.epochs}")
        return curve
