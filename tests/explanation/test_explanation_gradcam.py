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


def manifest() -> Manifest:
    dataset = load("digits")
    return Manifest(
        format=FORMAT,
        name="net",
        task="image-classification",
        inputs=(),
        outputs=(),
        model=ModelConfig("textbook", {"classes": 10, "channels": 1, "height": 28, "width": 28}),
        preprocessing=dataset.preprocessing,
        labels=dataset.labels,
        history=(history_entry("train", {}, {}),),
    )


def net() -> torch.nn.Module:
    """The textbook net with seeded weights: Grad-CAM is arithmetic, it needs no training."""
    from edgekit.models.module import create

    torch.manual_seed(0)
    config = manifest().model
    assert config
    return create(config)


def test_the_map_is_gradient_times_activation(tmp_path: Path) -> None:
    import safetensors.torch

    from edgekit.explanation.gradcam import attribute
    from edgekit.models.module import load as load_module

    with Bundle.create(tmp_path / "net.edge") as draft:
        draft.write(WEIGHTS, safetensors.torch.save(net().state_dict()))
        draft.manifest = manifest()
    bundle = Bundle.open(tmp_path / "net.edge")
    model = Model(bundle, open_runner(bundle))  # never entered: the map needs the weights alone
    question = ImageQuestion(model, model.preprocess(load("digits").test.read(0)), 3)
    found = attribute(question)
    module = load_module(bundle)
    kept = []
    last = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    last.register_forward_hook(lambda _, __, output: kept.append(output))
    logit = module(torch.from_numpy(question.x))[0, 3]
    (gradient,) = torch.autograd.grad(logit, kept[0])
    cam = torch.einsum("c,chw->hw", gradient[0].mean((1, 2)), kept[0][0]).relu().detach()
    assert found.figures["map"] == list(cam.shape)
    assert found.heat.shape == (28, 28)
    assert found.heat.max() <= float(cam.max()) * 1.0001  # interpolation invents no higher peak
    coarse = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(found.heat)[None], cam.shape)[0]
    assert np.corrcoef(coarse.ravel().numpy(), cam.ravel().numpy())[0, 1] > 0.9


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
