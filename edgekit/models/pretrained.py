"""Fine-tuning of a pretrained text encoder: DistilBERT, MiniLM and the other families in `FAMILIES`.

A checkpoint is a local folder as the Hugging Face libraries write it. Nothing is downloaded and no code of a checkpoint
runs. Its config goes into the bundle's manifest, so that the bundle needs the folder no more.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.errors import DataError, MissingExtra, UsageError, first_line
from edgekit.progress import say

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import huggingface_hub.constants
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.models.auto import modeling_auto
        from transformers.utils import logging
except ImportError:
    raise MissingExtra("finetune", "transformers") from None

__all__ = ["FAMILIES", "Checkpoint", "Pretrained", "load_weights", "read_checkpoint"]

#: ``model_type`` of the encoders that are tested: padding does not change their answer, and they export to ONNX.
FAMILIES = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "megatron-bert", "modernbert", "mpnet", "rembert", "roberta", "xlm-roberta",
)  # fmt: skip
#: These number their positions from the padding's id + 1.
_SHIFTED = ("camembert", "mpnet", "roberta", "xlm-roberta")
#: These make other masks of their own out of the plain one.
_OWN_MASK = ("deberta", "deberta-v2", "modernbert")
#: Added to the score of a padded token: exp of it is exactly 0, and it fits into fp16, unlike the smallest float32.
_MASKED = -1e4
#: The longest text that a manifest allows, in tokens.
_LONGEST = 8192
#: How much of the encoder may be missing from a checkpoint: tensors, and numbers in them.
_MISSING = 0.1
#: Of a config: what says where it came from, what the task was, or how to run it, and not what the network is.
_NOISE = {
    "architectures", "attn_implementation", "dtype", "experts_implementation", "finetuning_task", "gradient_checkpointing",
    "id2label", "label2id", "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model", "sentencepiece.model")


class Checkpoint(NamedTuple):
    """What a checkpoint folder says, but for its weights.

    ``config`` describes the encoder and is plain JSON; ``tokenizer`` are the bytes of a ``tokenizer.json``; ``pad`` is the
    id of padding; ``length`` the most tokens that a text may have.
    """

    config: dict[str, Any]
    tokenizer: bytes
    pad: int
    length: int


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Check a checkpoint folder and read its config and tokenizer; the weights' headers are read, not the weights.

    Wanted: ``config.json``; ``model.safetensors``, its shards with their index, or ``pytorch_model.bin``; and
    ``tokenizer.json``, or the vocabulary that one can be made from. Raises `UsageError` for what is no folder or no encoder
    of `FAMILIES`, `DataError` for missing and damaged files.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder", "give the folder of a checkpoint, with config.json and model.safetensors")
    raw = _json(path / "config.json")
    _refuse_foreign(raw, str(path))
    _check_weights(path)
    with _offline():
        try:
            config = _essential(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict())
        except Exception as error:  # noqa: BLE001  the library raises what it likes
            raise DataError(f"{path / 'config.json'} is not valid: {first_line(error)}", "copy the checkpoint again") from None
    _refuse_foreign(config, str(path))
    tokenizer = _tokenizer(path)
    settings = _json(path / "tokenizer_config.json", needed=False)
    parsed = Tokenizer.from_buffer(tokenizer)
    entries, largest = config.get("vocab_size", 0), max(parsed.get_vocab(True).values(), default=-1)
    if not 0 <= largest < entries:
        raise DataError(
            f"the tokenizer of {path} knows ids up to {largest}, its model {entries} of them",
            "put the model's own tokenizer.json into the folder",
        )
    stated = settings.get("model_max_length")
    limits = [_positions(config), _LONGEST, *([stated] if isinstance(stated, int) and stated > 0 else [])]
    return Checkpoint(config, tokenizer, _pad(path, parsed, settings, config), min(limits))


class Pretrained(nn.Module):
    """A pretrained encoder, the mean over its tokens, and a linear head: int64 ids (N, T) -> float32 logits (N, classes).

    The mean instead of the first token (Sentence-BERT, Reimers and Gurevych, arXiv:1908.10084): it suits every family, and
    is what MiniLM checkpoints were trained for. DistilBERT: arXiv:1910.01108; BERT: arXiv:1810.04805.

    ``config`` and ``pad`` are of `read_checkpoint`; ``length`` is T, which positions must suffice for; ``vocabulary`` is
    the tokenizer's and unused, the config has its own. Fresh weights: `load_weights` puts the checkpoint's in.
    Raises `UsageError` for a config that is no encoder's of `FAMILIES`, or a length beyond its positions.
    """

    def __init__(self, classes: int, config: dict[str, Any], pad: int, length: int = 128, vocabulary: int = 0) -> None:
        super().__init__()
        _refuse_foreign(config, "the config")
        config = _essential(config)
        if not 0 < length <= _positions(config):
            raise UsageError(f"texts of {length} tokens do not fit this encoder", f"choose a length up to {_positions(config)}")
        if not 0 <= pad < config.get("vocab_size", 0):
            raise UsageError(f"the padding's id {pad} is none of the encoder's", "take config and pad from one checkpoint")
        self.pad, self.family = pad, str(config["model_type"])
        self.shift = _shift(config)
        with _offline():
            try:
                # Eager attention: plain matrix products, which export to the graph that compilers fuse.
                self.encoder = AutoModel.from_config(
                    AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
                )
            except Exception as error:  # noqa: BLE001  the library raises what it likes
                raise UsageError(f"this config makes no encoder: {first_line(error)}", "read the checkpoint again") from None
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # unused here
        known = inspect.signature(self.encoder.forward).parameters
        self.positions, self.types = "position_ids" in known, "token_type_ids" in known
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        real = x != self.pad  # (N, T)
        hidden = self.encoder(input_ids=x, attention_mask=self._mask(real), **self._places(x)).last_hidden_state  # (N, T, D)
        weight = real.unsqueeze(2).to(hidden.dtype)  # (N, T, 1)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)  # (N, D)
        logits: Tensor = self.classifier(self.dropout(mean))  # (N, classes)
        return logits

    def _mask(self, real: Tensor) -> Tensor:
        """What attention adds to its scores, (N, 1, 1, T). Made here: the library's own exports to gathers and ranges."""
        if self.family in _OWN_MASK:
            return real.long()
        return (~real).unsqueeze(1).unsqueeze(1).to(self.classifier.weight.dtype) * _MASKED

    def _places(self, x: Tensor) -> dict[str, Tensor]:
        """Positions and segments, (1, T), where the encoder takes them: constants of the graph.

        RoBERTa would count the tokens before each; padding is at the end and unseen, so plain counting is the same.
        """
        found: dict[str, Tensor] = {}
        if self.family not in _OWN_MASK:
            if self.positions:
                found["position_ids"] = (torch.arange(x.shape[1], device=x.device) + self.shift).unsqueeze(0)
            if self.types:
                found["token_type_ids"] = torch.zeros(1, x.shape[1], dtype=torch.long, device=x.device)
        return found

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW: the encoder at ``lr``, all else at ten times that; no decay of biases and norms.

        The head is new and has further to go (Howard and Ruder, arXiv:1801.06146); the decay is BERT's (arXiv:1810.04805).
        """
        groups: list[dict[str, Any]] = []
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        for rate, encoder in ((lr, True), (10 * lr, False)):
            ours = [parameter for name, parameter in named if name.startswith("encoder.") == encoder]
            groups.append({"params": [p for p in ours if p.ndim > 1], "lr": rate, "weight_decay": weight_decay})
            groups.append({"params": [p for p in ours if p.ndim < 2], "lr": rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]


def load_weights(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put the weights of a checkpoint folder into ``module.encoder``, as float32; the head stays as it is.

    A head that the checkpoint has is left out. What the checkpoint lacks stays as freshly made, and is said.
    Raises `DataError` where the weights are missing, damaged, of another shape, or too few of the encoder's.
    """
    assert isinstance(module, Pretrained)
    path = Path(folder)
    _check_weights(path)
    with _offline():
        try:
            loaded, info = type(module.encoder).from_pretrained(
                path,
                config=copy.deepcopy(module.encoder.config),
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                weights_only=True,  # a pytorch_model.bin is a pickle
            )
        except Exception as error:  # noqa: BLE001  the library raises what it likes
            raise DataError(
                f"the weights in {path} do not fit {module.family}: {first_line(error)}",
                "use the config.json that came with them, or copy the checkpoint again",
            ) from None
    wanted = module.encoder.state_dict()
    new = sorted(name for name in info["missing_keys"] if name in wanted)
    numbers = sum(wanted[name].numel() for name in new) / sum(tensor.numel() for tensor in wanted.values())
    if max(len(new) / len(wanted), numbers) > _MISSING:
        raise DataError(
            f"{path} lacks {len(new)} of the {len(wanted)} tensors of its encoder, such as {new[0]}",
            f"give a checkpoint of the family {module.family}, saved whole",
        )
    trained = loaded.state_dict()
    module.encoder.load_state_dict({name: trained[name] for name in wanted})
    also = f", and {', '.join(new[:3])}{' ...' if len(new) > 3 else ''}, which {path.name} lacks" if new else ""
    say(f"{module.family}: {len(wanted) - len(new)} tensors from {path.name}; newly initialised: the head{also}")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No network, no warnings and no bars of the Hugging Face libraries within; as they were behind."""
    constants = huggingface_hub.constants
    offline, verbosity, bars = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        constants.HF_HUB_OFFLINE = True
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _json(path: Path, needed: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if not needed:
            return {}
        raise DataError(f"{path.parent} has no {path.name}", "give the folder that save_pretrained wrote, all of it")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {first_line(error)}", "copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object", "copy the checkpoint again")
    return found


def _refuse_foreign(config: dict[str, Any], where: str) -> None:
    """Raises `UsageError` for what is no encoder of `FAMILIES`, and for what would run code or kernels from elsewhere."""
    family = config.get("model_type")
    choose = f"choose an encoder of these: {', '.join(FAMILIES)}"
    if "auto_map" in config:
        raise UsageError(f"{where} brings Python code of its own (auto_map), which edgekit does not run", choose)
    if family in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise UsageError(f"{where} is of {family}, an encoder with a decoder: it writes text", choose)
    if config.get("is_decoder") or (family not in FAMILIES and family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise UsageError(f"{where} is of {family}, a decoder: it writes text", choose)
    if family not in FAMILIES:
        raise UsageError(f"{where} is of the family {family!r}, which edgekit does not fine-tune", choose)
    if "quantization_config" in config:
        raise UsageError(f"{where} is quantized already", "fine-tune the float checkpoint; edgekit quantize comes after")


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that say what the network is, sorted, and as JSON gives them back. Paths and names of hubs are left out."""
    kept = {
        key: value
        for key, value in sorted(config.items())
        if key not in _NOISE and not key.startswith("_") and not (isinstance(value, str) and set(value) & {"/", "\\"})
    }
    essential: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return essential


def _shift(config: dict[str, Any]) -> int:
    """The first position's number."""
    return int(config["pad_token_id"]) + 1 if config["model_type"] in _SHIFTED else 0


def _positions(config: dict[str, Any]) -> int:
    """How many tokens the encoder has positions for. Raises `UsageError` where the config does not tell."""
    try:
        return int(config["max_position_embeddings"]) - _shift(config)
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            "the config tells neither its positions nor its padding",
            "wanted: max_position_embeddings and pad_token_id, whole numbers both",
        ) from None


def _check_weights(path: Path) -> None:
    """Raises `DataError` where no weights are there, or a safetensors file cannot be opened."""
    if (path / "adapter_config.json").exists():
        raise DataError(f"{path} holds an adapter, not a whole model", "merge it into its model first (merge_and_unload)")
    names = [name for name in _WEIGHTS if (path / name).is_file()][:1]
    index = next((path / f"{name}.index.json" for name in _WEIGHTS if (path / f"{name}.index.json").is_file()), None)
    if not names and index:
        table = _json(index).get("weight_map")
        names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
        away = [name for name in names if Path(name).name != name or not (path / name).is_file()]
        if away:
            raise DataError(f"{path} has no {away[0]}, which {index.name} names", "copy all shards of the checkpoint")
    if not names:
        raise DataError(f"{path} has no weights", "wanted: model.safetensors, or pytorch_model.bin, beside config.json")
    for name in names:
        with (path / name).open("rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise DataError(f"{path / name} is a pointer of Git LFS, not the weights", "fetch them: git lfs pull")
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path / name} is damaged: {first_line(error)}", "copy the checkpoint again") from None


def _tokenizer(path: Path) -> bytes:
    """The bytes of ``tokenizer.json``; made from the vocabulary where only that is there."""
    mend = "where the checkpoint was made: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    file = path / "tokenizer.json"
    if file.is_file():
        data = file.read_bytes()
        try:
            Tokenizer.from_buffer(data)
        except Exception as error:  # noqa: BLE001  the library raises bare Exception
            raise DataError(f"{file} cannot be read: {first_line(error)}", "copy the checkpoint again") from None
        return data
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise DataError(f"{path} has no tokenizer.json", mend)
    with _offline():
        try:
            made = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, use_fast=True)
            converted: str = made.backend_tokenizer.to_str()
        except Exception as error:  # noqa: BLE001  the library raises what it likes
            raise DataError(f"{path} has no tokenizer.json, and none can be made: {first_line(error)}", mend) from None
    return converted.encode()


def _pad(path: Path, tokenizer: Tokenizer, settings: dict[str, Any], config: dict[str, Any]) -> int:
    """The tokenizer's padding, before the config's: some configs keep their family's default beside another tokenizer."""
    stated = settings.get("pad_token")
    token = stated.get("content") if isinstance(stated, dict) else stated
    for name in (token, "[PAD]", "<pad>"):
        found = tokenizer.token_to_id(name) if isinstance(name, str) else None
        if found is not None:
            return int(found)
    if not isinstance(config.get("pad_token_id"), int):
        raise DataError(f"{path} has no padding token", "name one as pad_token in tokenizer_config.json")
    return int(config["pad_token_id"])
