"""The recipe's schema. Every stage is a struct whose fields are the options of its verb; an unknown key is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "BUILT_IN",
    "Bench",
    "Build",
    "Eval",
    "Explain",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Samples",
    "Scan",
    "Stage",
    "Train",
    "read_recipe",
]

BUILT_IN = Path(__file__).with_name("recipes") / "digits.toml"


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower, tag_field="run", omit_defaults=True):
    """Fields left out are not passed on: the verb's own defaults hold."""

    def options(self, *without: str) -> dict[str, Any]:
        """The options that the recipe states, but for those that the pipeline resolves itself."""
        stated = {name: getattr(self, name) for name in self.__struct_fields__ if name not in without}
        return {name: value for name, value in stated.items() if value is not None}


class Train(Stage, frozen=True):
    out: str
    data: str | None = None
    model: str | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    size: int | None = None
    seed: int | None = None


class Prune(Stage, frozen=True):
    bundle: str
    out: str
    keep: float | None = None
    speedup: float | None = None
    max_drop: float | None = None
    sparsity: str | None = None
    data: str | None = None
    epochs: int | None = None
    seed: int | None = None


class Quantize(Stage, frozen=True):
    bundle: str
    out: str
    calib: str | None = None
    max_drop: float | None = None
    min_snr: float | None = None
    share: float | None = None
    method: str | None = None
    samples: int | None = None


class Eval(Stage, frozen=True):
    bundles: tuple[str, ...]
    data: str | None = None


class Build(Stage, frozen=True):
    bundle: str
    target: str
    precision: str | None = None
    batch: str | None = None


class Bench(Stage, frozen=True):
    bundles: tuple[str, ...]
    scenario: str | None = None
    seconds: float | None = None
    threads: int | None = None


class Samples(Stage, frozen=True):
    """Held-out pictures as files."""

    out: str
    count: int = 20
    data: str | None = None


class Explain(Stage, frozen=True):
    bundle: str
    images: str
    out: str
    method: str | None = None


class Report(Stage, frozen=True):
    bundles: tuple[str, ...]
    out: str = "report.html"
    explanations: str | None = None


class Scan(Stage, frozen=True):
    bundle: str
    source: str


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``data`` and ``seed`` are for every stage that does not state its own; ``out`` is the output folder."""

    name: str
    stage: tuple[Train | Prune | Quantize | Eval | Build | Bench | Samples | Explain | Report | Scan, ...]
    data: str | None = None
    seed: int = 0
    out: str | None = None


def read_recipe(path: str | os.PathLike[str] | None = None) -> Recipe:
    """Read and check a recipe, the built-in one without ``path``. Raises `UsageError` that names the key at fault."""
    file = Path(path) if path is not None else BUILT_IN
    try:
        recipe = msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), Recipe)
    except FileNotFoundError:
        raise UsageError(f"there is no recipe {file}", f"copy the built-in one: {BUILT_IN}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{file}: {error}", "the built-in recipe shows every key: edgekit pipeline --show") from None
    _check_names(recipe, file)
    return recipe


def _check_names(recipe: Recipe, file: Path) -> None:
    """Every name a stage reads must be written by a stage before it, and no two may write the same."""
    written: set[str] = set()
    for number, stage in enumerate(recipe.stage, 1):
        where = f"{file}: stage {number} ({type(stage).__name__.lower()})"
        read = getattr(stage, "bundles", ()) or (getattr(stage, "bundle", None),)
        for name in read:
            if name is not None and name not in written:
                raise UsageError(f"{where} reads {name!r}, which no earlier stage writes", "mind the order of the stages")
        out = getattr(stage, "out", None)
        if out is not None:
            if not out or "/" in out or out.startswith("."):
                raise UsageError(f"{where} writes {out!r}", "out is a plain name inside the output folder")
            if out in written:
                raise UsageError(f"{where} writes {out!r} again", "give each output its own name")
            written.add(out)
        if isinstance(stage, Train | Samples | Eval) and not (stage.data or recipe.data):
            raise UsageError(f"{where} has no data", 'add data = "digits" at the top, or to the stage')
