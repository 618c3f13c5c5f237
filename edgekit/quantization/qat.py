"""Quantization-aware training: an int8 graph's weights, biases and steps are trained until it answers as the float graph.

The int8 graph itself is what is trained (`torch_graph`), so placement and form stay; only numbers in it change. The float
graph teaches (G. Hinton et al., "Distilling the knowledge in a neural network", 2015); labels, where there are some, help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import MissingExtra, UsageError
from edgekit.progress import bar, say

from .prepare import constants, prepare
from .samples import Samples
from .simulate import Array, Feeds, Noise, Simulator
from .torch_graph import TorchGraph

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["BATCH", "QatResult", "check_trainable", "fine_tune"]

BATCH = 32  # samples a step; those of a graph with a fixed batch, or of other shapes, are added up to it
TEMPERATURE = 2.0
#: Beside the normalised squared error of the logits. More for the labels and the int8 graph leaves its teacher: half took
#: digits from 31.7 to 24.8 dB, for a top-1 within the noise.
DIVERGENCE, LABELS = 0.5, 0.01
#: Rates of AdamW at the start of the cosine. Of weights in their steps of int8, of steps and of float values in shares of
#: their own size: so one rate suits every layer of every graph.
WEIGHT_RATE, STEP_RATE, FLOAT_RATE = 0.01, 2e-4, 3e-4
BETAS = (0.9, 0.99)  # a step whose gradient is rare must not jump: the second moment forgets soon
CLIP = 1.0  # of the gradient's norm
_BATCH_BYTES = 64 << 20


class QatResult(NamedTuple):
    """Bytes of the int8 graph. ``figures``: epochs, best_epoch (0: the graph that was given), loss (a list, one an epoch),
    snr_db and, with labels, top1, each {"before", "after"}."""

    graph: bytes
    figures: dict[str, Any]


class _Score(NamedTuple):
    """Compared in this order; ``top1`` (a share) is 0 where there are no labels.

    A few labelled samples more are often luck: they alone do not pay for a lower SNR, so both must hold (`no_worse`).
    """

    top1: float
    snr_db: float

    def no_worse(self, other: _Score) -> bool:
        return self.top1 >= other.top1 and self.snr_db >= other.snr_db


def fine_tune(
    graph: bytes, float_graph: bytes, samples: Samples, held_out: Samples, *, epochs: int, seed: int = 0
) -> QatResult:
    """Train an int8 graph that `insert` made to answer as the float graph that it was made from.

    ``samples`` teach, ``held_out`` choose the epoch: by top-1 where they have ``targets``, then by the output's SNR to the
    float graph. What is returned is not worse in either than the graph given, which is returned itself where no epoch is
    better. Same seed, same machine: same bytes.
    Raises `GraphError` for a node that PyTorch cannot run (it is named), `UsageError` where there is nothing to learn from.
    """
    if epochs < 1:
        raise UsageError(f"{epochs} epochs of quantization-aware training", "give 1 or more")
    if not len(samples) or not len(held_out):
        raise UsageError(
            f"quantization-aware training has {len(samples)} samples, {len(held_out)} held out", "give more with --calib"
        )
    model, original = onnx.load_model_from_string(graph), onnx.load_model_from_string(float_graph)
    run = _Run(model, original, samples, epochs, seed)
    judge = _Judge(original, held_out)
    before = best = judge.score(model)
    chosen, best_epoch, losses = graph, 0, list[float]()
    with bar("quantization-aware training", epochs * len(samples)) as advance:
        for epoch in range(epochs):
            loss = run.epoch(epoch, advance, f"{best.snr_db:.1f} dB")
            if not np.isfinite(loss):
                say(f"the loss of epoch {epoch + 1} is not finite: training ends here")
                break
            losses.append(round(loss, 6))
            trained = run.module.export()
            score = judge.score(trained)
            if score > best and score.no_worse(before):
                best, best_epoch = score, epoch + 1
                chosen = trained.SerializeToString(deterministic=True)
    if not best_epoch:
        say("no epoch was better than the graph without training: that one is kept")
    figures: dict[str, Any] = {"epochs": epochs, "best_epoch": best_epoch, "loss": losses}
    figures["snr_db"] = {"before": round(before.snr_db, 2), "after": round(best.snr_db, 2)}
    if held_out.targets is not None:
        figures["top1"] = {"before": before.top1, "after": best.top1}
    return QatResult(chosen, figures)


def check_trainable(float_graph: bytes) -> None:
    """Raises `GraphError` for a node that PyTorch cannot run: before a calibration that would be for nothing."""
    TorchGraph(prepare(float_graph, quiet=True))


class _Judge:
    """Scores a graph on held-out samples, as ONNX Runtime runs it."""

    def __init__(self, original: onnx.ModelProto, held_out: Samples) -> None:
        self.teacher, self.held_out = Simulator(original), held_out
        self.name = original.graph.output[0].name

    def score(self, model: onnx.ModelProto) -> _Score:
        run, noise, targets, right, done = Simulator(model), Noise(), self.held_out.targets, 0, 0
        for feeds in self.held_out.batches():
            found = run(feeds)
            noise.add(self.teacher(feeds), found)
            if targets is not None:
                answers = found[self.name].argmax(-1).ravel()
                right += int((answers == targets[done : done + len(answers)]).sum())
                done += len(answers)
        return _Score(right / max(done, 1), noise.snr_db())


class _Run:
    """The module, its teacher, its optimizer."""

    def __init__(self, model: onnx.ModelProto, original: onnx.ModelProto, samples: Samples, epochs: int, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = TorchGraph(model, originals(model, original)).to(self.device)
        self.teacher, self.samples, self.seed = Simulator(original), samples, seed
        self.label_output = original.graph.output[0].name
        steps = [part.ratio for part in (*self.module.weights.values(), *self.module.steps)]
        groups = [
            {"params": [weight.master for weight in self.module.weights.values()], "lr": WEIGHT_RATE},
            {"params": [step for step in steps if step.requires_grad], "lr": STEP_RATE},
            {"params": [value.shift for value in self.module.floats.values()], "lr": FLOAT_RATE},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * -(-len(samples) // BATCH))
        self.shapes: dict[int, tuple[Any, ...]] = {}

    def epoch(self, epoch: int, advance: Callable[[int, str], None], note: str) -> float:
        """One pass over the shuffled samples; the mean loss, NaN as soon as it is not finite."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        total, done = 0.0, 0
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            loss = 0.0
            for rows, feeds in self._batches(chosen):
                part = self._loss(rows, feeds) * (len(rows) / len(chosen))
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.item()
            norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP))
            if not np.isfinite(loss) or not np.isfinite(norm):
                return float("nan")
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            total, done = total + loss * len(chosen), done + len(chosen)
            advance(len(chosen), f"loss {total / done:.4f}  {note}")
        return total / done

    def _batches(self, chosen: NDArray[np.int64]) -> Iterator[tuple[list[int], Feeds]]:
        """The chosen samples, those of one shape together as far as the graph takes batches."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i in map(int, chosen):
            if i not in self.shapes:
                feeds = self.samples.read(i)
                size = sum(array.nbytes for array in feeds.values())
                self.shapes[i] = (size, *(array.shape[1:] for array in feeds.values()))
            groups.setdefault(self.shapes[i], []).append(i)
        for shape, rows in groups.items():
            most = max(1, _BATCH_BYTES // max(shape[0], 1)) if self.samples.batchable else 1
            for first in range(0, len(rows), most):
                part = rows[first : first + most]
                every = [self.samples.read(i) for i in part]
                yield part, {name: np.concatenate([feeds[name] for feeds in every]) for name in every[0]}

    def _loss(self, rows: list[int], feeds: Feeds) -> Tensor:
        """Mean over the float outputs of what tells them from the teacher's."""
        answers = self.module({name: torch.tensor(array, device=self.device) for name, array in feeds.items()})
        losses = []
        for name, wanted in self.teacher(feeds).items():
            if wanted.dtype.kind != "f":
                continue
            target, found = torch.tensor(wanted, device=self.device), answers[name]
            loss = F.mse_loss(found, target) / target.var(correction=0).clamp(min=1e-12)
            if self.samples.targets is not None and name == self.label_output and target.ndim == 2:
                labels = torch.tensor(self.samples.targets[rows], device=self.device)
                loss = loss + classification_loss(found, target, labels)
            losses.append(loss)
        return torch.stack(losses).mean()


def classification_loss(found: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The divergence from the teacher's distribution at `TEMPERATURE`, and a little cross-entropy; all (N, classes)."""
    if bool((target >= 0).all()) and bool(((target.sum(1) - 1).abs() < 1e-3).all()):  # the graph ends in a softmax
        found, target = found.clamp(min=1e-9).log(), target.clamp(min=1e-9).log()
    student, teacher = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (found, target))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return DIVERGENCE * divergence + LABELS * F.cross_entropy(found, labels)


def originals(model: onnx.ModelProto, original: onnx.ModelProto) -> dict[str, Array]:
    """int8 initializer of ``model`` -> the float32 weights of the same node of the float graph, where that has them."""
    prepared = prepare(original.SerializeToString(), quiet=True).graph
    known, nodes = constants(prepared), {node.name: node for node in prepared.node}
    stored = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, Array] = {}
    for node in model.graph.node:
        same = nodes.get(node.name)
        if same is None or same.op_type != node.op_type:
            continue
        for ours, theirs in zip(node.input, same.input, strict=False):
            if ours in stored and theirs in known:
                found[stored[ours]] = numpy_helper.to_array(known[theirs])
    return found
