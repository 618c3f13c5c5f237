"""What a stopped `prune` needs to go on: the cut that it is fine-tuning, and the checkpoint of the fine-tuning."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import nn

from edgekit.manifest import ModelEdits
from edgekit.models.module import adopt_shapes, edit
from edgekit.progress import say
from edgekit.training.checkpoint import load_checkpoint, save_checkpoint

from .sparsity import Mask24

__all__ = ["Cut", "Resume"]


class Cut(NamedTuple):
    """A module after ``steps``, its cuts. ``predicted``: its share of the original's time by the table, before it was measured;
    ``epochs``: for how many it is fine-tuned; ``curve``: a row for each of these that is done; ``mask``: of its 2:4 weights;
    ``found``: whether these are all cuts, or the search was stopped among them."""

    module: nn.Module
    edits: ModelEdits
    steps: list[dict[str, Any]]
    predicted: float | None
    epochs: int
    curve: list[dict[str, float]]
    mask: Mask24 | None = None
    found: bool = True


class Resume:
    """Files beside ``target``: ``.checkpoint`` of the fine-tuning, ``.checkpoint.cut`` of what is fine-tuned."""

    def __init__(self, target: Path, about: str) -> None:
        self.fitting = target.with_name(f"{target.name}.checkpoint")
        self._path = target.with_name(f"{target.name}.checkpoint.cut")
        self._key = hashlib.sha256(about.encode()).hexdigest()

    def save(self, cut: Cut) -> None:
        save_checkpoint(
            self._path,
            {
                "key": self._key,
                "state": cut.module.state_dict(),
                "edits": msgspec.to_builtins(cut.edits),
                "steps": cut.steps,
                "predicted": cut.predicted,
                "epochs": cut.epochs,
                "found": cut.found,
                "curve": [],  # what tells a checkpoint from other files
            },
        )
        self.fitting.unlink(missing_ok=True)  # of another cut

    def load(self, module: nn.Module) -> Cut | None:
        """The cut that a stopped run of the same settings had come to, as a copy of ``module``; None where there is none."""
        found = load_checkpoint(self._path, self._key)
        if found is None:
            return None
        edits = msgspec.convert(found["edits"], ModelEdits)
        cut = copy.deepcopy(module)
        present = {name for name, _ in cut.named_modules()}
        fresh = tuple(name for name in edits.skipped if name in present)
        edit(cut, ModelEdits(edits.attributes, fresh))
        adopt_shapes(cut, found["state"])
        cut.load_state_dict(found["state"])
        done = "the cut" if found["found"] else f"cut {len(found['steps'])}"
        say(f"going on from {done} in {self._path.name}")
        return Cut(cut, edits, found["steps"], found["predicted"], found["epochs"], [], found=found["found"])

    def forget(self) -> None:
        for path in (self.fitting, self._path):
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.old").unlink(missing_ok=True)
