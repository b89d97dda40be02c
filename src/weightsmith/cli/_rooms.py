"""``weightsmith merge ties ...``: a command for every method, made from its card and signature.

Both are read as text, so help and completion import nothing of a room. A room takes part when its
``room.py`` says in ``_PARAMETERS`` what it adds to a kernel's own options, and a method when files
and options are all that it needs.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from weightsmith.catalogue import PACKAGE, Catalogue, Method, Parameter
from weightsmith.cli._manual import PATH, SAVING, Manual, Option
from weightsmith.cli._save import save, save_options
from weightsmith.errors import did_you_mean

_FILES = {"base", "stats"}
"""What a method may need and a path can give."""

_GIVEN = {*_FILES, "evaluate"}
"""What a method may need and an option can give."""

_METHOD = "Method"

# For options that a room adds, which no docstring explains, and those whose docstring speaks of tensors and symbols.
_WORDS = {
    "base": "The checkpoint that the models were trained from.",
    "pattern": "Only tensors whose name fits: a glob or 're:...'. Repeatable.",
    "sparsity": "Share to remove, from 0 to 1, or an N:M pattern such as 2:4.",
    "scope": "Among what the budget is shared: each tensor, each row (output), or all together.",
    "structure": "What goes as one: element, row, column, or a block such as 16x16.",
    "action": "Zeros in place of what is removed, or the mask of what is kept.",
    "bits": "Width of a code, from 1 to 8; with --calibrate also a mean such as 3.5.  [default: the grid's own]",
    "group": "Inputs that share a step; none for the grid's own (whole rows for integers).",
    "grid": "The points that weights may take: int, nf4, mxfp4, ...",
    "symmetric": "Whether zero lies in the middle of an integer grid.  [default: yes]",
    "scale_dtype": "In what steps are stored.  [default: that of the weights]",
    "indivisible": "What is done where groups do not fill a row.",
    "rest": "What becomes of tensors that not all have in one shape.",
    "nonfinite": "Whether NaN and infinity may be written.",
    "stats": "What data says of each model, one file a model in their order, then one for the base. Repeatable.",
}

_STATS = "What data says of the model: what weightsmith.stats found, saved."

_SPEC = "Quality on held-out data, higher is better: score.py:function, or text:held_out.txt for a language model."


def rooms() -> list[str]:
    """The outermost rooms that have commands."""
    return list(dict.fromkeys(method.room.split(".")[0] for method in _methods()))


@functools.cache
def catalogue() -> Catalogue:
    """Read once: every command looks into it several times."""
    return Catalogue()


@functools.cache
def _methods() -> tuple[Method, ...]:
    found = catalogue()
    lifted = {room: found.lifted(room) for room in found.tables if found.leading(room)}
    return tuple(m for m in found.methods if m.room in lifted and _is_command(m, m.name in lifted[m.room]))


def _is_command(method: Method, is_lifted: bool) -> bool:
    """Whether files and words are all that a method needs."""
    needs = {need.partition(".")[0] for need in method.needs}
    first = method.public[0].annotation if method.public else ""
    on_models = "Source" in first and "tuple" not in first and method.returns == "Weights"
    return needs <= _GIVEN and (is_lifted or on_models)


Find = Callable[[], Sequence[Method]]
Make = Callable[[Method], click.Command]


class Room(click.Group):
    """The methods of a room, and the rooms inside it.

    Args:
        room: its name, ``merge`` or ``merge.align``.
        find: the methods that have commands, of this room and others.
        make: the command of a method.
    """

    def __init__(self, room: str, find: Find, make: Make, **fields: Any):
        super().__init__(room.rpartition(".")[2], **fields)
        self.room, self.find, self.make = room, find, make

    def list_commands(self, ctx: click.Context) -> list[str]:
        inner = (m.room[len(self.room) + 1 :].split(".")[0] for m in self.find() if m.room.startswith(self.room + "."))
        return [m.name for m in self.find() if m.room == self.room] + list(dict.fromkeys(inner))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for method in self.find():
            if (method.room, method.name) == (self.room, cmd_name):
                return self.make(method)
        if cmd_name not in self.list_commands(ctx):
            return None
        return described(type(self), f"{self.room}.{cmd_name}", self.find, self.make)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0].endswith((".yaml", ".yml")):
            return "run", importlib.import_module("weightsmith.cli._run").command(), args  # weightsmith merge FILE
        if args and args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"no method {args[0]!r} in {self.room}{did_you_mean(args[0], known)}")
        return super().resolve_command(ctx, args)


def group(room: str) -> click.Group:
    """The commands of one room."""
    return described(Room, room, _methods, command)


def described(kind: type[Room], room: str, find: Find, make: Make) -> Room:
    """A group for a room, with the words of its docstring."""
    module = ast.parse(PACKAGE.joinpath(*room.split("."), "__init__.py").read_text(encoding="utf-8"))
    about = (ast.get_docstring(module) or room).split("\n\n")[0]
    help = _plain(" ".join(about.split()))
    return kind(
        room,
        find,
        make,
        help=help,
        short_help=help.split(":")[0].rstrip(".") + ".",
        epilog=f"weightsmith methods --room {room} lists every method, with those that need more than files.",
    )


def command(method: Method) -> click.Command:
    """The command of one method."""
    first, *others = method.public
    several = "Sequence" in first.annotation
    options = options_of(method, others)
    names = {one.name for one in options}
    argument = click.Argument(
        ["inputs"], type=PATH, nargs=-1 if several else 1, required=True, metavar="MODEL..." if several else "PATH"
    )

    def run(inputs: Any, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in names}
        _run(method, list(inputs) if several else inputs, chosen, given)

    said = " ".join(method.room.split("."))
    base = " --base base/" if "base" in method.needs else ""
    inputs = "run_a/ run_b/" if several else "model/"
    return Manual(
        method.name,
        callback=run,
        params=[argument, *options, *save_options(without={n for n in names if n})],
        help=about(method),
        short_help=_plain(method.summary),
        examples=[(f"weightsmith {said} {method.name} {inputs}{base} -o out/", "With its defaults, into a folder.")],
        status=SAVING,
    )


def options_of(method: Method, parameters: Sequence[Parameter]) -> list[click.Option]:
    """An option for each of the parameters that a shell can give."""
    own = _arguments(method.docstring)
    own = {name: text for name, text in own.items() if name not in _WORDS or not text.startswith(("``[", ":math:"))}
    words = _WORDS | own
    told = [p for p in parameters if "Callable" not in p.annotation]  # a shell has no functions to be told of a step
    return [_option(p, words.get(p.name, ""), method) for p in told]


def _run(method: Method, inputs: Any, chosen: dict[str, Any], given: dict[str, Any]) -> None:
    room = importlib.import_module(f"weightsmith.{method.room}")
    options = {name: built(value) for name, value in chosen.items() if value is not None and value != ()}
    if isinstance(options.get("evaluate"), str):
        from weightsmith.evaluators import evaluator

        options["evaluate"] = evaluator(options["evaluate"])
    save(room.METHODS[method.name](inputs, **options), given)


# Options


def _option(parameter: Parameter, help: str, method: Method) -> click.Option:
    flag = "--" + parameter.name.replace("_", "-")
    required = parameter.default is None or parameter.name in {need.partition(".")[0] for need in method.needs}
    fields: dict[str, Any] = {"section": _METHOD, "required": required}
    words = re.findall(r"""["']([^"']+)["']""", parameter.annotation) if "Literal" in parameter.annotation else []
    names = [flag]
    if parameter.name in _FILES or "Source" in parameter.annotation:
        several = parameter.name == "stats" and "Sequence" in method.public[0].annotation
        fields |= {"type": PATH, "multiple": several or "Sequence" in parameter.annotation}
        if parameter.name == "stats" and not several:
            help = _STATS
    elif parameter.name == "evaluate":
        fields["metavar"] = "SPEC"
        help = _SPEC
    elif parameter.name == "pattern":
        fields |= {"multiple": True, "metavar": "PATTERN"}
        if not help.endswith("Repeatable."):
            help = f"{help.rstrip('.')}: a glob or 're:...'. Repeatable."
    elif parameter.annotation == "bool":
        names, fields["default"] = [f"{flag}/--no-{flag[2:]}"], None
    elif words and parameter.annotation.startswith("Literal"):
        fields["type"] = click.Choice(words)
    else:
        fields |= {"type": Value(text="str" in parameter.annotation), "metavar": "VALUE"}
    usual = "" if parameter.default in (None, "None") or required else f"  [default: {_said(parameter.default)}]"
    help = _plain(help)
    return Option([parameter.name, *names], help=help[:1].upper() + help[1:] + usual, **fields)


def _said(default: str) -> str:
    """A default as one would type it."""
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return default
    if isinstance(value, tuple | list) and value and not isinstance(value[0], tuple | list):
        return ",".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


class Value(click.ParamType):
    """An option of a method: a number, a list, a word, or something by tensor.

    ``0.5``, ``1,2,3``, ``none``, ``'{"*.bias": 0, "*": 0.5}'`` and ``'by_depth(0.1, 0.9)'`` are
    what the option may be in Python. Words are for options that take them.
    """

    name = "value"

    def __init__(self, text: bool = False):
        self.text = text

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        word = value.strip()
        depth = re.fullmatch(r"by_depth\((.+)\)", word)
        try:
            if depth:
                return ByDepth(tuple(float(part) for part in depth[1].strip("[]").split(",")))
            return Nothing() if word.lower() == "none" else _literal(word)
        except (ValueError, RecursionError):
            if self.text and not word.startswith(("{", "[")):
                return word
            self.fail(
                f'{value!r} is neither a number, a list (1,2,3), {{"pattern": value, "*": value}} '
                "nor by_depth(first, ..., last)",
                param,
                ctx,
            )


class ByDepth(tuple[float, ...]):
    """Becomes `weightsmith.by_depth` once a method runs; until then nothing needs torch."""


class Nothing:
    """The word none, which is not the same as an option that was not given."""


def _literal(word: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if "," in word and not word.startswith(("{", "[")):
        word = f"[{word}]"
    return json.loads(word)


def built(value: Any) -> Any:
    """The value that a method takes for a word of the command line."""
    if isinstance(value, ByDepth):
        from weightsmith import by_depth

        return by_depth(value)
    if isinstance(value, Nothing):
        return None
    return list(value) if isinstance(value, tuple) else value


# Words


def about(method: Method) -> str:
    """The help of a method's command."""
    parts = [_plain(method.summary)]
    if method.claim:
        parts.append(f"What it promises: {_plain(method.claim)}.")
    if method.departs:
        parts.append(f"Where it departs from the paper: {_plain(method.departs)}.")
    if method.paper:
        parts.append(f"From: {method.paper}.")
    return "\n\n".join(parts)


def _arguments(docstring: str) -> dict[str, str]:
    """Argument -> text, from the ``Args:`` section of a docstring."""
    return {name: " ".join(text.split()) for name, text in _sections(docstring)}


def _sections(docstring: str) -> Iterator[tuple[str, str]]:
    found = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    if found:
        for entry in re.split(r"\n(?=    \w)", "\n" + found[1].rstrip()):
            name, colon, text = entry.partition(":")
            if colon:
                yield name.strip(), text


def _plain(text: str) -> str:
    """Docstring markup as plain text."""
    return re.sub(r":\w+:(?=`)", "", text).replace("`", "")
