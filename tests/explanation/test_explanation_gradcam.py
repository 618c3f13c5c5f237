"""Grad-CAM on PyTorch weights, against the gradient computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import WEIGHTS, Bundle
from edgekit.data import load
from edgekit.errors import UsageError
from edgekit.explanation import explain
from edgekit.explanation.images import ImageQuestion
from edgekit.manifest import FORMAT, Manifest, ModelConfig, history_entry
from edgekit.runtime import Model, open_runner

torch = pytest.importorskip("torch")


def manifest(preset: str = "textbook") -> Manifest:
    dataset = load("digits")
    return Manifest(
        format=FORMAT,
        name="net",
        task="image-classification",
        inputs=(),
        outputs=(),
        model=ModelConfig(preset, {"classes": 10, "channels": 1, "height": 28, "width": 28}),
        preprocessing=dataset.preprocessing,
        labels=dataset.labels,
        history=(history_entry("train", {}, {}),),
    )


def net(preset: str = "textbook") -> torch.nn.Module:
    """A net with seeded weights: Grad-CAM is arithmetic, it needs no training."""
    from edgekit.models.module import create

    torch.manual_seed(0)
    config = manifest(preset).model
    assert config
    return create(config)


def asked(path: Path, module: torch.nn.Module, preset: str) -> ImageQuestion:
    """Why a three? Asked of a bundle of these weights alone."""
    import safetensors.torch

    with Bundle.create(path) as draft:
        draft.write(WEIGHTS, safetensors.torch.save(module.state_dict()))
        draft.manifest = manifest(preset)
    bundle = Bundle.open(path)
    model = Model(bundle, open_runner(bundle))  # never entered: the map needs the weights alone
    return ImageQuestion(model, model.preprocess(load("digits").test.read(0)), 3)


@pytest.mark.parametrize(("preset", "last"), [("textbook", "features.7"), ("residual", "blocks.3")])
def test_the_map_is_gradient_times_activation(tmp_path: Path, preset: str, last: str) -> None:
    from edgekit.explanation.gradcam import attribute
    from edgekit.models.module import load as load_module

    question = asked(tmp_path / "net.edge", net(preset), preset)
    found = attribute(question)
    module = load_module(question.model.bundle)
    kept = []
    module.get_submodule(last).register_forward_hook(lambda _, __, output: kept.append(output))
    logit = module(torch.from_numpy(question.x))[0, 3]
    (gradient,) = torch.autograd.grad(logit, kept[0])
    cam = torch.einsum("c,chw->hw", gradient[0].mean((1, 2)), kept[0][0]).relu().detach()
    assert found.figures == {"layer": last, "map": list(cam.shape)}
    assert found.heat.shape == (28, 28)
    assert found.heat.max() <= float(cam.max()) * 1.0001  # interpolation invents no higher peak
    coarse = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(found.heat)[None], cam.shape)[0]
    assert np.corrcoef(coarse.ravel().numpy(), cam.ravel().numpy())[0, 1] > 0.9


def test_the_map_is_of_both_branches_of_the_last_block(tmp_path: Path) -> None:
    """The shortcut's convolution runs last: a map of it alone would not know what the block's own path says."""
    from edgekit.explanation.gradcam import attribute

    module = net("residual")
    maps = []
    for weight in (1.0, -1.0):
        with torch.no_grad():
            module.blocks[-1].norm2.weight.fill_(weight)
            module.blocks[-1].norm2.bias.fill_(10)  # no ReLU cuts: the gradients are the same both times
        maps.append(attribute(asked(tmp_path / f"{weight}.edge", module, "residual")).heat)
    assert not np.allclose(maps[0], maps[1], atol=0.01 * float(maps[0].max()))


@pytest.mark.slow
def test_it_writes_its_picture_and_refuses_int8(tmp_path: Path) -> None:
    from edgekit.models.module import write_model

    dataset = load("digits")
    inputs = dataset.test.take(range(8)).tensors(dataset.preprocessing).x
    trained = write_model(tmp_path / "net.edge", net(), inputs, manifest(), history_entry("train", {}, {}))
    Image.fromarray(dataset.test.read(0)).save(tmp_path / "d.png")
    result = explain(trained, tmp_path / "d.png", out=tmp_path / "why", method="gradcam")
    assert result["graph"] == WEIGHTS
    assert (tmp_path / "why" / "d.gradcam.png").is_file()
    with pytest.raises(UsageError, match="float weights"):
        explain(trained, tmp_path / "d.png", out=tmp_path / "why", method="gradcam", precision="int8")
