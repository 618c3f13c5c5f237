"""docs/pruning.md says what the command and the code do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from edgekit.cli.pruning import prune as command
from edgekit.pruning.groups import analyse
from edgekit.pruning.importance import CRITERIA
from edgekit.pruning.recover import SAMPLES

DOCS = Path(__file__).parents[2] / "docs" / "pruning.md"
TEXT = DOCS.read_text(encoding="utf-8")


def test_every_option_is_documented_and_none_else() -> None:
    known = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    targets = TEXT.partition("## Targets")[2].partition("\n\nA measured")[0]
    named = set(re.findall(r"`(--[\w-]+)`", targets)) | {"--importance", "--unit", "--out", "--help", "--json"}
    assert known <= named
    assert set(re.findall(r"`(--[\w-]+)", TEXT)) <= known


def test_the_criteria_and_figures_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w[\w-]*)` \|", TEXT, re.M)
    assert sorted(rows) == sorted(CRITERIA)
    assert f"up to {SAMPLES} training samples" in TEXT


class Attention(nn.Module):
    """`nn.MultiheadAttention`, whose module demands its own width, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.out = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.out(self.layer(x).mean(1))
        return answer


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).view(-1, 32, 8, 8)
        answer: torch.Tensor = self.out(self.second(hidden).mean((2, 3)))
        return answer


@pytest.mark.parametrize(
    ("module", "shape", "kept", "cut"),
    [(Attention(), (2, 5, 32), "layer.self_attn", "layer.linear1"), (HardCoded(), (2, 3, 8, 8), "first", "second")],
    ids=["attention", "hard-coded"],
)
def test_what_stays_is_named_with_its_reason(module: nn.Module, shape: tuple[int, ...], kept: str, cut: str) -> None:
    network = analyse(module.eval(), torch.randn(shape))
    assert network.kept[kept].startswith("its module cannot run narrower: ")
    assert cut in {group.name for group in network.groups}
    if kept == "first":
        assert network.kept[kept] in " ".join(TEXT.split())
