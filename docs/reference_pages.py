"""The reference, made from the code when the site is built: commands, Python, config, events, manifest, errors."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import click
import msgspec

from edgekit.cli import COMMANDS, cli

__all__ = ["ANSWERS", "MODULES", "PAGES", "answer_of", "commands_page", "public_names"]

#: The public modules, in the order of the page.
MODULES = {
    "edgekit": "The verbs, one a stage, and the bundle. Each is loaded on first use.",
    "edgekit.runtime": "What ships to the device: numpy and one backend.",
    "edgekit.scanner": "Scanning inside an application.",
    "edgekit.errors": "What is raised on purpose; [errors](errors.md) draws them as a tree.",
}

#: command -> the functions behind it, whose docstrings say in "Returns" what the keys of --json are. A command that adds keys
#: says which in a "Returns" of its own, behind the form feed where click ends its help.
ANSWERS: dict[str, tuple[str, ...]] = {
    "train": (),
    "prune": (),
    "quantize": (),
    "import": (),
    "build": (),
    "inspect": (),
    "bench": (),
    "scan": (),
    "replay": (),
    "data": ("edgekit.data.sheets.report:data_report",),
    "augment": ("edgekit.data.sheets.contact:augmentation_sheet",),
    "eval": ("edgekit.evaluation:evaluate",),
    "targets": (),
    "estimate": ("edgekit.compiler:estimate",),
    "compare": ("edgekit.benchmarking:compare",),
    "explain": ("edgekit.explanation:explain",),
    "report": ("edgekit.reporting:report",),
    "doctor": ("edgekit.benchmarking:doctor", "edgekit.chaos:run_cases"),
    "pack": ("edgekit.deployment:contents",),
    "sign": ("edgekit.deployment:contents",),
    "verify": ("edgekit.deployment:verify", "edgekit.deployment:contents"),
    "keygen": ("edgekit.deployment:keygen",),
    "revoke": ("edgekit.deployment:revoke",),
    "install": ("edgekit.deployment:install",),
    "rollback": ("edgekit.deployment:rollback",),
    "status": ("edgekit.deployment:status",),
    "search": ("edgekit.training.search:search",),
    "pipeline": ("edgekit.pipeline:pipeline",),
    "harvest": ("edgekit.scanner.gathered:gather",),
}


def answer_of(name: str) -> str:
    """What the docstrings say of the keys of a command's ``--json``, "" where they do not."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    texts = [inspect.cleandoc((command.callback.__doc__ or "").partition("\f")[2])]
    for home in ANSWERS.get(name, ()):
        module, _, function = home.partition(":")
        texts.append(inspect.getdoc(getattr(importlib.import_module(module), function)) or "")
    found = [re.search(r"\bReturns (.*?)(?=\.\s+Raises\b|\n\n|\Z)", text, re.S) for text in texts]
    parts = [" ".join(each[1].split()).removesuffix(".") for each in found if each]
    return "; ".join(parts).replace(":; ", ": ")


def commands_page() -> str:
    """Every command: usage, what it does, arguments, options with defaults, the keys of --json, examples."""
    groups = [f"- [`edgekit {name}`](#edgekit-{name}): {command.get_short_help_str(200)}" for name, command in _commands()]
    return "\n\n".join(["\n".join(groups), *(_command(name, command) for name, command in _commands())])


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield name, command


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"edgekit {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    prose, examples = _help(command.help or "")
    parts = [f"## edgekit {name}", f"```text\nedgekit {name} {usage}\n```", prose]
    rows = [_option(parameter, context) for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    parts.append("\n".join(["| option | what it does |", "|---|---|", *rows]))
    if answer := answer_of(name):
        parts.append(f"With `--json`: {answer}.")
    if examples:
        parts.append("```sh\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(part for part in parts if part)


def _help(text: str) -> tuple[str, list[str]]:
    """Help as click reads it, up to a form feed: paragraphs, and behind a \\b lines as they stand, here the examples."""
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in inspect.cleandoc(text.partition("\f")[0]).split("\n\n"):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "\b":
            kept = [line.strip() for line in lines[1:]]
            if kept and kept[0].startswith("Example"):
                examples += kept[1:]
            else:
                prose.append("```text\n" + "\n".join(lines[1:]) + "\n```")
        else:
            prose.append(_plain(" ".join(lines)))
    return "\n\n".join(prose), examples


def _option(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None, option.name
    names, what = record
    return f"| `{_cell(names)}` | {_cell(_plain(what))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(text: str) -> str:
    """Words of a help text as Markdown that shows them as they are."""
    return re.sub(r"([*_<>\[\]`])", r"\\\1", text)


def public_names() -> dict[str, list[str]]:
    """module -> its ``__all__``."""
    return {module: list(importlib.import_module(module).__all__) for module in MODULES}


def api_page() -> str:
    """Every public name: signature and docstring; of classes their public methods and fields too."""
    parts: list[str] = []
    for module, about in MODULES.items():
        parts += [f"## {module}", about]
        home = importlib.import_module(module)
        parts += [_name(module, name, getattr(home, name)) for name in home.__all__]
    return "\n\n".join(parts)


def _name(module: str, name: str, thing: Any) -> str:
    parts = [f"### {module}.{name}".replace("__", r"\_\_")]
    if inspect.isclass(thing):
        parts += [_signature(name, thing, "class "), _docstring(thing), _fields(thing), *_methods(name, thing)]
    elif callable(thing):
        parts += [_signature(name, thing, ""), _docstring(thing)]
    elif isinstance(thing, dict):
        parts.append("One of: " + ", ".join(f"`{key}`" for key in thing) + ".")
    else:
        parts.append(f"`{thing!r}`")
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, thing: Any, kind: str) -> str:
    if inspect.isclass(thing):
        made_by_base = issubclass(thing, Exception) and "__init__" not in vars(thing)
        if made_by_base or getattr(thing, "_is_protocol", False):
            return ""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    shown: list[str] = []
    starred = False
    for p in signature.parameters.values():
        if p.name in ("self", "cls") or p.name.startswith("_"):
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        shown.append(_parameter(p))
    typed = signature.return_annotation is not signature.empty and not inspect.isclass(thing)
    returns = f" -> {_annotation(signature.return_annotation)}" if typed else ""
    line = f"{kind}{name}({', '.join(shown)}){returns}"
    if len(line) > 88:
        line = f"{kind}{name}(\n    " + ",\n    ".join(shown) + f",\n){returns}"
    return f"```python\n{line}\n```"


def _parameter(p: inspect.Parameter) -> str:
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    typed = "" if p.annotation is p.empty else f": {_annotation(p.annotation)}"
    default = "" if p.default is p.empty else f"{' = ' if typed else '='}{_default(p.default)}"
    return f"{stars}{p.name}{typed}{default}"


def _default(value: Any) -> str:
    shown = repr(value)
    return "..." if shown.startswith("<") or value is msgspec.NODEFAULT else shown


def _annotation(annotation: Any) -> str:
    """As it is written in code: names without their modules."""
    return annotation if isinstance(annotation, str) else _type(annotation)


def _docstring(thing: Any) -> str:
    """A docstring as Markdown: ``::`` announces an indented block, names stand in backticks already."""
    text = inspect.getdoc(thing) if thing.__doc__ else ""
    if not text or text.startswith(f"{getattr(thing, '__name__', '')}("):  # what a NamedTuple writes by itself
        return ""
    text = re.sub(r"^(\s*)([A-Z][\w ]*)::$", r"\1\2:", text, flags=re.M).replace("::\n", ":\n")
    return re.sub(r"(?<![`\w])\*(?=[\w.])", r"\\*", text)


def _fields(thing: type) -> str:
    """Fields of a struct, dataclass or named tuple, with types and defaults."""
    if issubclass(thing, msgspec.Struct):
        rows = [(f.name, _type(f.type), f.default) for f in msgspec.structs.fields(thing)]
    elif hasattr(thing, "_fields"):
        rows = [(name, str(thing.__annotations__.get(name, "")), msgspec.NODEFAULT) for name in thing._fields]
    elif hasattr(thing, "__dataclass_fields__"):
        rows = [(f.name, _type(f.type), msgspec.NODEFAULT) for f in thing.__dataclass_fields__.values()]
    else:
        return ""
    rows = [row for row in rows if not row[0].startswith("_")]
    if not rows:
        return ""
    if all(default is msgspec.NODEFAULT for *_, default in rows):
        return "\n".join(["| field | type |", "|---|---|", *(f"| `{name}` | `{_cell(kind)}` |" for name, kind, _ in rows)])
    lines = [
        f"| `{name}` | `{_cell(kind)}` | {'' if default is msgspec.NODEFAULT else f'`{_cell(repr(default))}`'} |"
        for name, kind, default in rows
    ]
    return "\n".join(["| field | type | default |", "|---|---|---|", *lines])


def _type(kind: Any) -> str:
    """A type as it is written in code, without the modules' names."""
    if typing.get_origin(kind) is None and isinstance(kind, type):
        return kind.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", kind if isinstance(kind, str) else str(kind))


def _methods(name: str, thing: type) -> Iterator[str]:
    for key, member in vars(thing).items():
        if key.startswith("_") and key != "__call__":
            continue
        if isinstance(member, property) and member.__doc__:
            yield f"#### {name}.{key}\n\n{_docstring(member)}"
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if inspect.isfunction(function) and function.__doc__:
            shown = name if key == "__call__" else f"{name}.{key}"
            yield f"#### {shown + '()' if key != '__call__' else name + '(...)'}\n\n{_signature(shown, function, '')}\n\n" + (
                _docstring(function)
            )


def config_page() -> str:
    """The file that ``edgekit scan --example`` prints."""
    from edgekit.scanner.example import example_config

    return f"```toml\n{example_config().strip()}\n```"


def events_page() -> str:
    from edgekit.scanner import event_schema

    return _schema(event_schema())


def manifest_page() -> str:
    from edgekit.manifest import Manifest

    return _schema(msgspec.json.schema(Manifest))


def _schema(schema: dict[str, Any]) -> str:
    """The definitions of a JSON Schema, a table each."""
    parts = []
    for name, form in schema["$defs"].items():
        parts.append(f"## {name}")
        if about := form.get("description"):
            parts.append(re.sub(r"\s+", " ", about) if "|" not in about else about)
        needed = form.get("required", ())
        given = {key: value for key, value in form.get("properties", {}).items() if value is not False}
        rows = [(f"`{key}`{'' if key in needed else ', optional'}", _kind(value), _said(value)) for key, value in given.items()]
        if any(said for *_, said in rows):
            lines = [
                "| key | type | what |",
                "|---|---|---|",
                *(f"| {key} | {kind} | {_cell(said)} |" for key, kind, said in rows),
            ]
        else:
            lines = ["| key | type |", "|---|---|", *(f"| {key} | {kind} |" for key, kind, _ in rows)]
        if rows:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _kind(value: Any) -> str:
    """The type of a key in words; a definition is linked."""
    if not isinstance(value, dict):
        return "any"
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in value or "const" in value:
        return " or ".join(f"`{option!r}`" for option in value.get("enum", [value.get("const")]))
    if forms := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(_kind(form) for form in forms)
    if value.get("type") == "array":
        items = value.get("items")
        return f"array of {_kind(items)}" if isinstance(items, dict) and items else "array"
    extra = value.get("additionalProperties")
    if value.get("type") == "object" and isinstance(extra, dict) and extra:
        return f"object of {_kind(extra)}"
    return str(value.get("type", "any"))


def _said(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    bounds = [
        f"{word} {value[key]}"
        for key, word in (("minimum", "from"), ("maximum", "to"), ("exclusiveMinimum", "above"), ("pattern", "like"))
        if key in value and key != "pattern"
    ]
    default = f"default {value['default']!r}" if value.get("default") not in (None, "", [], {}, ()) else ""
    return _plain("; ".join(filter(None, [value.get("description", ""), " ".join(bounds), default])))


def errors_page() -> str:
    from edgekit import errors

    assert errors.__doc__ is not None
    _, tree, _ = errors.__doc__.split("\n\n")
    parts = [f"```text\n{inspect.cleandoc(tree)}\n```"]
    for name in errors.__all__:
        thing = getattr(errors, name)
        if inspect.isclass(thing) and thing.__doc__:
            parts.append(f"**{name}** (exit {thing.exit_code}): {_docstring(thing)}")
    return "\n\n".join(parts)


#: page -> what is appended to the words that stand in its file.
PAGES: dict[str, Callable[[], str]] = {
    "reference/commands": commands_page,
    "reference/python": api_page,
    "reference/config": config_page,
    "reference/events": events_page,
    "reference/manifest": manifest_page,
    "reference/errors": errors_page,
}
