"""Attention rollout on the transformer presets, against the product of attentions written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import TOKENIZER, WEIGHTS, Bundle
from edgekit.data import load
from edgekit.errors import UsageError
from edgekit.explanation import explain
from edgekit.explanation.images import ImageQuestion
from edgekit.explanation.texts import Texts
from edgekit.manifest import FORMAT, Manifest, ModelConfig, Preprocessing, Task, TextPreprocessing, history_entry
from edgekit.runtime import Model, open_runner
from edgekit.training.tokenizer import fit_tokenizer

torch = pytest.importorskip("torch")


def write(path: Path, config: ModelConfig, task: Task, preprocessing: Preprocessing, tokenizer: bytes = b"") -> Bundle:
    """A bundle of seeded weights alone: rollout is arithmetic, it needs no training."""
    import safetensors.torch

    from edgekit.models.module import create

    torch.manual_seed(0)
    with Bundle.create(path) as draft:
        draft.write(WEIGHTS, safetensors.torch.save(create(config).state_dict()))
        if tokenizer:
            draft.write(TOKENIZER, tokenizer)
        draft.manifest = Manifest(
            format=FORMAT,
            name=path.stem,
            task=task,
            inputs=(),
            outputs=(),
            model=config,
            preprocessing=preprocessing,
            labels=tuple(map(str, range(config.args["classes"]))),
            history=(history_entry("train", {}, {}),),
        )
    return Bundle.open(path)


def by_hand(module: torch.nn.Module, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(1, T, dim) before the blocks -> rollout (T, T), head by head."""
    flow = torch.eye(y.shape[1])
    for block in module.blocks:
        normed = block.norm1(y)[0]
        size = normed.shape[1] // block.heads
        maps = []
        for head in range(block.heads):
            part = slice(head * size, (head + 1) * size)
            logits = block.query(normed)[:, part] @ block.key(normed)[:, part].T / size**0.5
            maps.append(torch.softmax(logits if bias is None else logits + bias[0, 0], 1))
        attention = 0.5 * torch.stack(maps).mean(0) + 0.5 * torch.eye(len(flow))
        flow = attention @ flow
        y = block(y, bias)
    return flow


@torch.no_grad()
def test_the_map_of_a_vit_is_the_product_of_its_attentions(tmp_path: Path) -> None:
    from edgekit.explanation.rollout import attribute
    from edgekit.models.module import load as load_module

    args = {"classes": 10, "channels": 1, "height": 28, "width": 28}
    bundle = write(tmp_path / "vit.edge", ModelConfig("vit", args), "image-classification", load("digits").preprocessing)
    model = Model(bundle, open_runner(bundle))  # never entered: the map needs the weights alone
    question = ImageQuestion(model, model.preprocess(load("digits").test.read(0)), 3)
    found = attribute(question)
    assert found.figures == {"blocks": 3, "tokens": 49, "map": [7, 7]}
    assert found.heat.shape == (28, 28)
    assert found.heat.min() >= 0
    module = load_module(bundle)
    stem = module.stem(torch.from_numpy(question.x)).flatten(2).transpose(1, 2) + module.position
    flow = by_hand(module, stem, None)
    assert torch.allclose(flow.sum(1), torch.ones(49), atol=1e-5)
    shares = flow.mean(0)
    coarse = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(found.heat)[None], (7, 7)).ravel()
    assert np.corrcoef(coarse, shares)[0, 1] > 0.9


@torch.no_grad()
def test_the_words_of_a_text_get_the_shares_of_their_tokens(tmp_path: Path) -> None:
    from edgekit.explanation.rollout import attribute
    from edgekit.models.module import load as load_module

    data = fit_tokenizer(["hello prize parcel monday street"] * 20, 400)
    config = ModelConfig("transformer-text", {"classes": 2, "vocabulary": 400, "length": 16, "pad": 0})
    bundle = write(tmp_path / "mails.edge", config, "text-classification", TextPreprocessing(16), data)
    model = Model(bundle, open_runner(bundle))
    question = Texts(model).question("hello PRIZE, monday", 0)
    found = attribute(question)
    module = load_module(bundle)
    x = torch.from_numpy(question.x)
    read = x[0] != 0
    bias = torch.where(x != 0, 0.0, -1e4)[:, None, None]
    flow = by_hand(module, module.embedding(x) + module.position, bias)
    shares = flow[read].mean(0)
    assert float(shares[~read].sum()) < 1e-6  # nothing comes from padding
    words = np.array([sum(float(shares[i]) for i in word.tokens) for word in question.words])
    assert found.heat == pytest.approx(words - words.min(), abs=1e-6)
    assert found.figures == {"blocks": 2, "tokens": int(read.sum())}


def test_a_model_without_attention_is_refused_in_one_line(trained_bundle: Bundle, tmp_path: Path) -> None:
    Image.fromarray(load("digits").test.read(0)).save(tmp_path / "d.png")
    with pytest.raises(UsageError, match="no attention blocks") as caught:
        explain(trained_bundle, tmp_path / "d.png", out=tmp_path / "why", method="rollout")
    assert caught.value.hint == "use --method occlusion or lime"
    with pytest.raises(UsageError, match="the same for all classes"):
        explain(trained_bundle, tmp_path / "d.png", out=tmp_path / "why", method="rollout", label="3")
    assert not (tmp_path / "why").exists()


def test_it_writes_its_picture(trained_vit: Bundle, tmp_path: Path) -> None:
    Image.fromarray(load("digits").test.read(0)).save(tmp_path / "d.png")
    row = explain(trained_vit, tmp_path / "d.png", out=tmp_path / "why", method="rollout")["images"][0]
    assert row["overlay"] == "d.rollout.png"
    assert 0 <= row["deletion_auc"] <= 1


def test_gradcam_of_tokens_is_refused(trained_vit: Bundle, tmp_path: Path) -> None:
    """The only maps of a ViT are its patches, before all that it makes of them."""
    Image.fromarray(load("digits").test.read(0)).save(tmp_path / "d.png")
    with pytest.raises(UsageError, match="works on tokens") as refused:
        explain(trained_vit, tmp_path / "d.png", out=tmp_path / "why", method="gradcam")
    assert "rollout" in refused.value.hint
    assert not (tmp_path / "why").exists()


@pytest.fixture(scope="module")
def trained_vit(tmp_path_factory: pytest.TempPathFactory, few_digits: str) -> Bundle:
    from edgekit.training import train

    return train(data=few_digits, model="vit", out=tmp_path_factory.mktemp("vit") / "vit.edge", epochs=2, batch=32, seed=1)
