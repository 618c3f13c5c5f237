"""A study of trials in one file that every process appends to: what knows Optuna is here, and nothing of what is tried."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import EdgekitError, MissingExtra, UsageError
from edgekit.progress import say

from .plan import Plan

__all__ = ["Journal", "check_study", "described"]

NAME = "edgekit"  # of the one study in a journal
#: So many trials are random, and end before one may be given up: a median of fewer says little.
UNPRUNED = 5

Direction = Literal["maximize", "minimize"]


def check_study(path: Path, trials: int, validation: float) -> None:
    """Raise `UsageError` for options that no search takes, or for a file at ``path`` that is no study."""
    if trials < 1 or not 0 < validation < 1:
        raise UsageError(f"{trials} trials, a validation share of {validation:g}", "wanted: trials >= 1, 0 < validation < 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("search does not run under torchrun", "give the same command several times instead, with one --study")
    refuse_inside_bundle(path)
    if path.is_dir() or (path.exists() and path.stat().st_size and not _is_journal(path)):
        raise UsageError(f"{path} is there and is no study", "name another --study")


def _is_journal(path: Path) -> bool:
    """Whether the first line is an entry of Optuna's. It would append to any file."""
    with path.open("rb") as file:
        line = file.readline(1 << 16)
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _mend(path: Path) -> None:
    """Leave out a last line that a power cut or a full disk cut short: the next one would be written behind it, and nobody
    could read either. Another process may be in the middle of one, so it has a moment."""
    for patience_s in (0.5, 0.0):
        if not path.exists() or not (content := path.read_bytes()) or content.endswith(b"\n"):
            return
        time.sleep(patience_s)
    with path.open("r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)
    say(f"{path}: its last line was cut short, and is left out")


def described(plan: Plan) -> dict[str, Any]:
    """What the trials of a study have in common beside the options: scores of other data or models say nothing here."""
    return {
        "data": plan.dataset.digest,
        "model": f"hf:{plan.weights_from}" if plan.weights_from else plan.model.name,
        "input": repr(plan.preprocessing),
        "augmentation": plan.augmentation,
    }


class Journal:
    """The study in the file at ``path``, about ``about``, made or gone on with; ``about["seed"]`` decides what is drawn.

    One value a trial for each of ``directions``; ``warmup``: the steps before a trial of one value may be given up.
    Raises `MissingExtra` without Optuna, `UsageError` for a damaged study or one about something else.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], directions: Sequence[Direction] = ("maximize",), warmup: int = 0
    ) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise MissingExtra("search", "optuna") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path, self.about, self.optuna = path, dict(about), optuna
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        try:
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name=NAME,
                directions=list(directions),
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),  # until `ask` sets a better one
                pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=warmup),
            )
        except (ValueError, KeyError, TypeError, AttributeError):  # what lines of another kind make of Optuna's reader
            raise UsageError(f"the study {path} is damaged", "name another --study") from None
        if len(self.study.directions) != len(directions):
            raise UsageError(f"the study {path} is of another objective", "give the --objective that it was begun with")
        known = self.study.user_attrs.get("about", about)
        if other := [key for key in about if known.get(key) != about[key]]:
            was, key = known.get(other[0]), other[0]
            values = "" if key == "data" else f": {was}, not {about[key]}"  # digests say nothing to people
            raise UsageError(
                f"the study {path} is of another {key}{values}",
                "give the data and options that it was begun with, or another --study",
            )

    def begin(self, defaults: Mapping[str, Any]) -> None:
        """Note what the study is of; what its first trial will try."""
        if "about" not in self.study.user_attrs:
            self.study.set_user_attr("about", self.about)
            self.study.enqueue_trial(dict(defaults), skip_if_exists=True)

    def ask(self) -> Any:
        """A new trial. Its draws are seeded by its number: a search done again draws the same, and processes that run
        side by side never do."""
        trial = self.study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna 4 calls the liar experimental
            self.study.sampler = self.optuna.samplers.TPESampler(
                n_startup_trials=UNPRUNED,
                seed=self.seed(trial),
                multivariate=False,  # else it would draw when asked, before it is seeded
                constant_liar=True,  # keeps off what other processes are trying
            )
        return trial

    def seed(self, trial: Any) -> int:
        return int(self.about["seed"] + 7_919 * trial.number) % 2**32

    def tell(self, trial: Any, state: str, values: Sequence[float] | None = None, reason: str | None = None) -> None:
        """End a trial: COMPLETE, PRUNED, or FAIL, for a ``reason`` or because it was interrupted."""
        if reason is not None:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, values, state=self.optuna.trial.TrialState[state])

    def trials(self) -> list[Any]:
        """All there are, by number, also those that run, wait or were interrupted."""
        found: list[Any] = self.study.get_trials(deepcopy=False)
        return found

    def finished(self) -> list[Any]:
        """Trials that count; one that was interrupted does not."""
        return [t for t in self.trials() if t.state.name in ("COMPLETE", "PRUNED") or "reason" in t.user_attrs]

    def complete(self) -> list[Any]:
        """Finished trials that have values, by number. Raises `EdgekitError` where there is none."""
        finished = self.finished()
        good = [t for t in finished if t.state.name == "COMPLETE"]
        if not good:
            raise EdgekitError(
                f"all {len(finished)} trials failed; the last: {finished[-1].user_attrs['reason']}",
                "try another --model or --size, or look at the data",
            )
        return good

    def counts(self) -> dict[str, int]:
        states = [t.state.name for t in self.finished()]
        return {"trials": len(states), "pruned": states.count("PRUNED"), "failed": states.count("FAIL")}
