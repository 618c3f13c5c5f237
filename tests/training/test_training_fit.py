"""The loop itself: statistics of batch norms, gradients that are not finite, blended pairs, samples decoded on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.data import Tensors, load
from edgekit.data.augment import Policy, policy_named
from edgekit.data.tensors import Streamed, read_tensors
from edgekit.errors import EdgekitError
from edgekit.training import FitConfig, fit
from edgekit.training.fit import outputs_of
from edgekit.training.objective import Classification, Reading


def blobs(count: int, classes: int = 6) -> Tensors:
    """(count, 8) around one centre a class, sorted by class, as data sets on disk are."""
    random = np.random.default_rng(0)
    y = np.sort(np.arange(count) % classes)
    x = (random.normal(0, 3, (classes, 8))[y] + random.normal(0, 0.5, (count, 8))).astype(np.float32)
    return Tensors(x, y, tuple(map(str, range(count))), ())


def normed(classes: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes))


def test_data_that_is_sorted_by_class_ends_with_the_statistics_of_all():
    """After a short run batch norms are settled anew; from sorted samples that once cost 40 points."""
    data, module = blobs(2400), normed()
    curve = fit(module, data, data, FitConfig(3, 0.01, 64))
    top1 = float((outputs_of(module, data.x).argmax(1) == data.y).mean())
    assert top1 > 0.95
    assert top1 >= curve[-1]["top1"] - 0.02
    with torch.no_grad():
        hidden = module[0](torch.from_numpy(data.x)).mean(0)
    assert float((module[1].running_mean - hidden).abs().max()) < 0.5


class _Spiteful(nn.Module):
    """Finite answers, and from one step on a gradient that is not."""

    def __init__(self, bad_from: int) -> None:
        super().__init__()
        self.layer, self.steps, self.bad_from = nn.Linear(8, 6), 0, bad_from

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            self.steps += 1
            if self.steps >= self.bad_from:
                y.register_hook(lambda gradient: gradient * float("nan"))
        return y


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path):
    """In the last step of an epoch: the checkpoint would have held NaN as the last good epoch."""
    data = blobs(128)
    module = _Spiteful(bad_from=4)  # two steps an epoch: the last one of the second
    with pytest.raises(EdgekitError, match="no longer finite in epoch 2, step 2"):
        fit(module, data, data, FitConfig(4, 0.01, 64), checkpoint=tmp_path / "c")
    state = torch.load(tmp_path / "c", weights_only=True)
    assert len(state["curve"]) == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["average"].values())
    assert torch.isfinite(module.layer.weight).all()


def test_samples_decoded_on_demand_train_to_the_same_weights(few_digits: str):
    dataset = load(few_digits)
    kept = dataset.train.tensors(dataset.preprocessing)
    streamed = dataset.train.tensors(dataset.preprocessing, keep_bytes=1000)
    assert isinstance(kept.x, np.ndarray)
    assert isinstance(streamed.x, Streamed)
    assert streamed.x.shape == kept.x.shape
    np.testing.assert_array_equal(streamed.x[5:9], kept.x[5:9])
    np.testing.assert_array_equal(streamed.x[np.array([7, 3])], kept.x[[7, 3]])
    found = []
    for data in (kept, streamed):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        fit(module, data, kept, FitConfig(2, 0.01, 32))
        found.append(module[1].weight.detach().clone())
    assert torch.equal(*found)


def test_damaged_samples_are_left_out_of_what_is_decoded_on_demand():
    def read(i: int) -> np.ndarray:
        if i % 10 == 3:
            raise EdgekitError("broken") if i < 0 else _damage()
        return np.full((1, 4), i, np.float32)

    for keep in (1 << 20, 8):
        found = read_tensors(tuple(map(str, range(40))), np.arange(40), read, lambda sample: sample[None], keep)
        assert found.damaged == ("3", "13", "23", "33")
        assert [int(row[0, 0]) for row in found.x[:]] == [i for i in range(40) if i % 10 != 3]
        assert list(found.y) == [i for i in range(40) if i % 10 != 3]


def _damage() -> Exception:
    from edgekit.errors import DataError

    return DataError("broken")


def test_blended_pairs_have_blended_targets():
    torch.manual_seed(0)
    objective = Classification(4, 0.0, Policy(mixup=1.0))
    x = torch.eye(4)[:, :, None, None].repeat(1, 1, 2, 2)  # the channel that is on says the class
    y = torch.arange(4)
    mixed, shares = objective.blended(x, y)
    torch.testing.assert_close(mixed[:, :, 0, 0], shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    objective.blend(False)
    assert objective.blended(x, y)[1] is y


def test_pasted_pairs_have_targets_by_area():
    torch.manual_seed(0)
    objective = Classification(4, 0.0, Policy(cutmix=1.0))
    x = torch.eye(4)[:, :, None, None].repeat(1, 1, 10, 12)
    y = torch.arange(4)
    left = []
    for _ in range(200):
        mixed, shares = objective.blended(x, y)
        torch.testing.assert_close(mixed.mean((2, 3)), shares)  # each pixel is of one of the two, and counted
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        left.append(float(shares.diagonal().min()))  # one that was paired with itself is all there
    assert min(left) < 0.4
    assert max(left) > 0.95
    assert 0.64 < np.mean(left) < 0.74
    assert x.equal(torch.eye(4)[:, :, None, None].repeat(1, 1, 10, 12)), "the samples were changed in place"


def test_class_weights_count_in_the_loss():
    objective = Classification(2, 0.0, policy_named("none"))
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    plain = objective.against(logits, torch.tensor([0, 1]))
    objective.weigh(np.array([0.2, 1.8], np.float32))
    assert objective.against(logits, torch.tensor([0, 1])) > plain


def test_a_reader_learns_to_read():
    """Columns that show one character each, blanks between: CTC finds the alignment by itself."""
    random = np.random.default_rng(0)
    lines = random.integers(1, 6, (256, 4))
    x = np.zeros((256, 12, 6), np.float32)
    for row, line in zip(x, lines, strict=True):
        row[np.sort(random.choice(6, 4, replace=False)) * 2 + 1, line] = 1  # somewhere, in order, never side by side
    x += random.normal(0, 0.1, x.shape).astype(np.float32)
    data = Tensors(x, lines.astype(np.int64), tuple(map(str, range(256))), ())
    torch.manual_seed(0)
    module, objective = nn.Linear(6, 6), Reading()
    assert objective.score(outputs_of(module, x), data.y) < 0.5
    curve = fit(module, data, data, FitConfig(20, 0.1, 64), objective=objective)
    assert curve[-1]["characters"] > 0.98
