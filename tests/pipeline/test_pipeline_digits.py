"""The built-in recipe for digits, in fewer epochs; a file of its own, so that one core has it and another the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.bundle import Bundle
from edgekit.pipeline import built_in_recipes


@pytest.mark.slow
def test_the_built_in_recipe_reaches_its_figures(cli, tmp_path: Path):
    """The main job in a fourth of its epochs or less: 98% float, at most half of the MACs, a drop of at most a point after
    pruning and int8. All of its epochs are `make demo` and `benchmarks/digits.py`: 99%, and half a point."""
    shorter = {"epochs = 24": "epochs = 6", "epochs = 40": "epochs = 12", "epochs = 80": "epochs = 10"}
    text = built_in_recipes()["digits"].read_text(encoding="utf-8")
    for long, short in shorter.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    recipe = tmp_path / "digits.toml"
    recipe.write_text(text, encoding="utf-8")
    outcome = cli("pipeline", recipe, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    answer = outcome.json
    top1 = {row["stage"].split()[-1]: row["top1"] for row in answer["table"]}
    assert top1["textbook"] >= 0.96
    assert top1["depthwise"] >= 0.98
    assert top1["depthwise"] - top1["depthwise-int8"] <= 0.01 + 1e-9
    pruned = Bundle.open(tmp_path / "out/depthwise-half.edge").last("prune")
    assert pruned is not None
    assert pruned.figures["macs_share"] <= 0.5
    assert [Path(path).name for path in answer["engines"]] == ["rtx-ada.engine"]
    assert [Path(path).name for path in answer["kits"]] == ["jetson-orin-nano.kit.zip"]
    assert len(Path(answer["events"]).read_text().splitlines()) == 20
    assert len(list((tmp_path / "out/explanations").glob("*.png"))) == 20
    assert (tmp_path / "out/report.html").stat().st_size > 100_000
