"""The recipe's schema. A stage is a struct whose fields are the options of its verb; an unknown key is refused.

A stage says what it reads, what it is called, and how it runs; `run.py` decides whether it has to.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, get_args

import msgspec

from edgekit.errors import EdgekitError, UsageError, first_line
from edgekit.files import read_file
from edgekit.manifest import is_safe_name

from .stages import Bench, Build, Eval, Explain, Making, Prune, Quantize, Report, Samples, Scan, Seed, Train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["BUILT_IN", "STATE", "AnyStage", "Recipe", "built_in_recipes", "read_recipe", "recipe_file"]

#: The file of the output folder in which `run.py` notes what is done.
STATE = "pipeline.json"

_RECIPES = Path(__file__).with_name("recipes")
BUILT_IN = _RECIPES / "digits.toml"


def built_in_recipes() -> dict[str, Path]:
    """The recipes that come with edgekit, by name."""
    return {path.stem: path for path in sorted(_RECIPES.glob("*.toml"))}


def recipe_file(recipe: str | os.PathLike[str] | None) -> Path:
    """The file of a recipe: a path, or the name of a built-in one where no such file lies here; None: the digits."""
    if recipe is None:
        return BUILT_IN
    path = Path(recipe)
    return path if path.is_file() else built_in_recipes().get(str(recipe), path)


AnyStage = Train | Prune | Quantize | Eval | Build | Bench | Samples | Explain | Report | Scan


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``data`` and ``seed`` are for every stage that does not state its own; ``out`` is the output folder."""

    name: str
    stage: Annotated[tuple[AnyStage, ...], msgspec.Meta(min_length=1)]
    data: str | None = None
    seed: Seed = 0
    out: str | None = None


def read_recipe(path: str | os.PathLike[str] | None = None, data: str | None = None) -> Recipe:
    """Read and check a recipe: a file, the name of a built-in one, or the built-in digits without ``path``.

    ``data`` takes the place of the recipe's own. Raises `UsageError` that names the key at fault, `DataError` for data that
    is not there.
    """
    file = recipe_file(path)
    try:
        recipe = msgspec.convert(tomllib.loads(read_file(file).decode()), Recipe)
    except FileNotFoundError:
        names = ", ".join(built_in_recipes())
        raise UsageError(
            f"there is no recipe {file}", f"write one: edgekit pipeline --show > my.toml; built in: {names}"
        ) from None
    except msgspec.ValidationError as error:
        raise _mistake(str(error), file) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        plain = {IsADirectoryError: "it is a folder", UnicodeDecodeError: "it is no UTF-8 text"}.get(type(error))
        words = plain or getattr(error, "strerror", "") or first_line(error)
        raise UsageError(f"{file}: {words}", "the built-in recipe shows how: edgekit pipeline --show") from None
    if data is not None:
        recipe = msgspec.structs.replace(recipe, data=data)
    _check_names(recipe, file)
    return recipe


def _mistake(message: str, file: Path) -> UsageError:
    """msgspec's words with stages counted from 1, and the names that would have been right."""
    what, _, where = message.partition(" - at `$")
    stage = re.match(r"\.stage\[(\d+)\]", where)
    hint = "the built-in recipe shows how: edgekit pipeline --show"
    if stage:
        number = int(stage[1])
        what = f"stage {number + 1}: {what}" + where.rstrip("`")[stage.end() :].replace(".", " in ", 1)
        stages = tomllib.loads(file.read_text(encoding="utf-8"))["stage"]
        kinds = {kind.__name__.lower(): kind for kind in get_args(AnyStage)}
        run = stages[number].get("run") if isinstance(stages[number], dict) else None
        hint = f"run is one of: {', '.join(kinds)}"
        if isinstance(run, str) and run in kinds:
            hint = f"a {run} stage takes: {', '.join(kinds[run].__struct_encode_fields__)}"
    elif "unknown field" in what:
        hint = f"at the top a recipe takes: {', '.join(Recipe.__struct_fields__)}"
    return UsageError(f"{file}: {what}", hint)


def _check_names(recipe: Recipe, file: Path) -> None:
    """Every bundle a stage reads must be made by a stage before it; outputs and stages are each there once.

    Models, targets and data must be there as well: hours of training come before the stage that would notice.
    """
    if not _plain(recipe.name):
        raise UsageError(f"{file}: the name {recipe.name!r}", "name is a plain word; it names the output folder")
    outputs: set[str] = set()
    labels: set[str] = set()
    bundles: set[str] = set()
    quantized: set[str] = set()
    pictures: set[str] = set()
    for number, stage in enumerate(recipe.stage, 1):
        where = f"{file}: stage {number} ({stage.label()})"
        for name in stage.bundles_read():
            if name not in bundles:
                raise UsageError(f"{where} reads {name!r}, which no earlier stage writes", "mind the order of the stages")
        if stage.label() in labels:
            raise UsageError(f"{where} is there twice", "join the two, or give them other names or options")
        labels.add(stage.label())
        out = getattr(stage, "out", None)
        if out is not None:
            if not _plain(out) or out == STATE:
                raise UsageError(f"{where} writes {out!r}", "out is a plain name inside the output folder")
            if out in outputs:
                raise UsageError(f"{where} writes {out!r} again", "give each output its own name")
            if not isinstance(stage, Making) and out.endswith((".edge", ".checkpoint")):
                raise UsageError(f"{where} writes {out!r}", "names that end so are for bundles; choose another")
            outputs.add(out)
            kind = bundles if isinstance(stage, Making) else pictures
            kind.add(out)
        if isinstance(stage, Quantize):
            quantized.add(stage.out)
        if getattr(stage, "precision", None) == "int8" and (float_ones := set(stage.bundles_read()) - quantized):
            raise UsageError(f"{where}: {min(float_ones)!r} has no int8 graph", "name a bundle that a quantize stage makes")
        for path in stage.paths_read():
            if path is not None and path not in pictures and not os.path.exists(path):
                raise UsageError(f"{where} reads {path!r}, which no earlier stage writes and which is no path", "mind the name")
        try:
            stage.check(recipe.data)
        except EdgekitError as error:
            raise type(error)(f"{where}: {error.message}", error.hint) from None


def _plain(name: str) -> bool:
    return is_safe_name(name) and "/" not in name
