"""2:4: which layers are masked, channel orders that keep more and change nothing, and the pattern in the exported graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit.errors import GoldenError, UsageError
from edgekit.models.export import export_onnx
from edgekit.pruning.permutation import permutation, retained
from edgekit.pruning.sparsity import Mask24, check_exported, is_24, maskable, permute_channels, permuted, reorder, retained_24


def net(channels: int = 16, side: int = 3) -> nn.Sequential:
    """Conv - BatchNorm - ReLU - Conv - BatchNorm - ReLU - Flatten - Linear, of weights whose channels differ in size."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Flatten(), nn.Linear(channels * side * side, 8),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (module[1], module[4]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
        for layer in (module[3], module[7]):
            layer.weight.mul_(torch.rand(channels).exp().pow(3).repeat_interleave(layer.weight.shape[1] // channels).view(
                1, -1, *[1] * (layer.weight.ndim - 2)))  # fmt: skip
    return module.eval()


def groups(channels: int = 16, side: int = 3) -> list[list[dict[tuple[str, int], list[int]]]]:
    """The channels behind both convolutions of `net`; a flattened one owns ``side`` x ``side`` inputs of the linear layer."""

    def norm(name: str, i: int) -> dict[tuple[str, int], list[int]]:
        return {(f"{name}.{part}", 0): [i] for part in ("weight", "bias", "running_mean", "running_var")}

    space = side * side
    return [
        [{("0.weight", 0): [i], ("0.bias", 0): [i], **norm("1", i), ("3.weight", 1): [i]} for i in range(channels)],
        [
            {
                ("3.weight", 0): [i],
                ("3.bias", 0): [i],
                **norm("4", i),
                ("7.weight", 1): [*range(i * space, i * space + space)],
            }
            for i in range(channels)
        ],
    ]


def test_layers_that_tensorrt_runs_sparse_are_masked() -> None:
    module = nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 8, 3),
            "conv": nn.Conv2d(8, 8, 3),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "series": nn.Conv1d(12, 4, 5),
            "transposed": nn.ConvTranspose2d(8, 8, 2),
            "recurrent": nn.LSTM(8, 8),
            "linear": nn.Linear(16, 5),
            "odd": nn.Linear(10, 4),
        }
    )
    module["tied"] = nn.Linear(16, 5)
    module["tied"].weight = module["linear"].weight
    mask = Mask24(module)
    assert [name for name, _, _ in mask.layers] == ["conv", "series", "linear"]
    assert [*mask.weights] == ["conv.weight", "series.weight", "linear.weight"]
    assert mask.share == 0.5
    before = {name: value.clone() for name, value in module.state_dict().items()}
    mask()
    for name, value in module.state_dict().items():
        sparse = name in (*mask.weights, "tied.weight")
        assert torch.equal(value, before[name]) != sparse
        assert not sparse or (is_24(value) and is_24(value.bfloat16()))
    once = module["conv"].weight.clone()
    with torch.no_grad():
        module["conv"].weight.add_(1.0)  # a step of training
    mask()
    assert torch.equal(module["conv"].weight == 0, once == 0)


class Leftover(nn.Module):
    """Holds a layer that its forward never calls, as an auxiliary head of training is."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.spare = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layer_that_never_runs_is_not_masked() -> None:
    module, x = Leftover(10).eval(), torch.randn(2, 1, 8, 8)
    module.head.weight.requires_grad_(False)
    mask = Mask24(module, x)
    assert [*mask.weights] == ["head.weight"]
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["head.weight"]
    mask()
    assert check_exported(export_onnx(module, x), mask)["layers"] == 1


weights = st.tuples(
    st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(["normal", "heavy", "few", "zeros"])
)


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(1, 3), st.integers(0, 3))
def test_an_order_is_a_permutation_that_never_keeps_less(case: tuple[int, int, int, str], parts: int, seed: int) -> None:
    fours, rows, start, kind = case
    random = np.random.default_rng(start)
    made = {"normal": lambda s: random.normal(size=s), "heavy": lambda s: random.standard_cauchy(s)}
    made |= {"few": lambda s: random.integers(0, 2, s), "zeros": lambda s: np.zeros(s)}
    matrices = [torch.from_numpy(made[kind]((rows + i, 4 * fours)).astype(np.float32)) for i in range(parts)]
    order = permutation(matrices, seed=seed)
    assert sorted(order.tolist()) == [*range(4 * fours)]
    assert retained([m[:, order] for m in matrices]) >= retained(matrices)
    assert torch.equal(permutation(matrices, seed=seed), order)


@pytest.mark.parametrize("fours", [2, 5, 16])
def test_an_order_that_keeps_all_is_found(fours: int) -> None:
    """Half of the channels are zero, and all of them lie in the same fours."""
    weight = torch.randn(20, 4 * fours, generator=torch.Generator().manual_seed(1))
    weight[:, : 2 * fours] = 0
    assert retained([weight]) < 0.9
    order = permutation([weight])
    assert retained([weight[:, order]]) == pytest.approx(1.0)


def test_rows_that_disagree_are_weighed_by_all_their_magnitude() -> None:
    small, large = torch.rand(8, 16), 100 * torch.rand(8, 16)
    small[:, :8] = 0
    large[:, ::2] = 0
    order = permutation([small, large])
    assert retained([large[:, order]]) > 0.95


@pytest.mark.parametrize(
    ("matrices", "words"),
    [
        ([torch.ones(2, 6)], r"\(2, 6\)"),
        ([torch.ones(2, 4), torch.ones(2, 8)], "4, 8"),
        ([], "no weights"),
        ([torch.ones(4)], "4"),
    ],
)
def test_what_has_no_order_is_refused(matrices: list[Tensor], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        permutation(matrices)


@pytest.mark.parametrize("side", [1, 3])
def test_permuted_channels_change_nothing_and_keep_more(side: int) -> None:
    module = net(side=side)
    x = torch.randn(4, 3, side, side)
    wanted, state, masked = module(x), module.state_dict(), maskable(module)
    assert [*masked] == ["3.weight", "7.weight"]
    new: dict[str, Tensor] = dict(state)
    for channels in groups(side=side):
        new = permuted(new, channels, masked)
    assert any(not torch.equal(new[name], state[name]) for name in state)
    assert retained_24(new, masked) > retained_24(state, masked) + 0.01
    module.load_state_dict(new)
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    again = permuted(module.state_dict(), list(reversed(groups(side=side)[0])), masked)
    assert retained_24(again, masked) >= retained_24(new, masked)


def test_a_module_is_permuted_in_place() -> None:
    module = net().train()
    x = torch.randn(4, 3, 3, 3)
    wanted = module.eval()(x)
    module.train()
    figures = permute_channels(module, groups(), x)
    assert module.training
    assert figures["groups"] >= 1
    assert figures["after"] > figures["before"] + 0.01
    assert figures["after"] == pytest.approx(retained_24(module.state_dict(), maskable(module)))
    torch.testing.assert_close(module.eval()(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_group_that_is_not_whole_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    module = net()
    broken = [{key: value for key, value in channel.items() if key[0] != "1.bias"} for channel in groups()[0]]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    figures = permute_channels(module, [broken], torch.randn(4, 3, 3, 3))
    assert figures["groups"] == 0
    assert figures["after"] == figures["before"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert "channel group 0" in capsys.readouterr().err


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(16)), st.permutations(range(16)))
def test_any_order_of_whole_groups_gives_the_same_answers(first: list[int], second: list[int]) -> None:
    module = net()
    x = torch.randn(2, 3, 3, 3)
    wanted = module(x)
    state = module.state_dict()
    for channels, order in zip(groups(), (first, second), strict=True):
        before, state = state, reorder(state, channels, order)
        back = reorder(state, channels, np.argsort(order).tolist())
        assert all(torch.equal(back[name], before[name]) for name in before)
    assert torch.equal(state["0.bias"], module.state_dict()["0.bias"][first])
    module.load_state_dict(state)
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [[0, 1], [*range(15), 14], [*range(1, 17)]])
def test_an_order_that_is_none_is_refused(order: list[int]) -> None:
    with pytest.raises(UsageError, match="no order of 16 channels"):
        reorder(net().state_dict(), groups()[0], order)


def test_channels_that_differ_do_not_move() -> None:
    channels = groups()[0]
    del channels[3]["3.weight", 1]
    with pytest.raises(UsageError, match=r"3\.weight"):
        reorder(net().state_dict(), channels, range(16))


def test_the_exported_graph_holds_the_pattern() -> None:
    module = net()
    mask = Mask24(module)
    graph = export_onnx(module, torch.randn(2, 3, 3, 3))
    with pytest.raises(GoldenError, match="0 weights with the 2:4 pattern, 2 were masked"):
        check_exported(graph, mask)
    mask()
    graph = export_onnx(module, torch.randn(2, 3, 3, 3))
    assert check_exported(graph, mask) == {"layers": 2, "of": 3, "share": 0.5}
