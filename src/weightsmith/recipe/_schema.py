"""From a YAML document to a recipe in which every key, name and reference has been checked.

Nothing is opened here and nothing is imported but what names of methods need: a typing mistake is
found in milliseconds, with its line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightsmith.errors import did_you_mean
from weightsmith.recipe._expression import names_in
from weightsmith.recipe._kinds import check_value, check_weights, kind
from weightsmith.recipe._methods import Method, find
from weightsmith.recipe._yaml import Node, load, plain

KEYS = ("title", "inputs", "steps", "save", "evaluate", "sweep", "report")
_INPUT = ("path", "format", "at", "dtype")
_OUTPUT = ("weights", "dtype", "format", "max_shard_size")
_MEASURE = ("with", "on")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_LIKE_A_PATH = re.compile(r"[/.]|^~")


@dataclass(frozen=True)
class Input:
    """Weights to open."""

    path: Node
    options: Mapping[str, str]
    places: Mapping[str, Node] = field(default_factory=dict, compare=False)
    """Where the options stand."""


@dataclass(frozen=True)
class Step:
    """A call of a method; or arithmetic, where there is an ``expression``."""

    name: str
    node: Node
    method: Method | None
    arguments: Mapping[str, Node]
    expression: Node | None = None

    @property
    def said(self) -> str:
        """What it does, in a word."""
        return self.method.name if self.method else "expression"


@dataclass(frozen=True)
class Output:
    """Where a result goes. The path may name swept options in braces."""

    path: str
    weights: str
    options: Mapping[str, Any]
    node: Node
    places: Mapping[str, Node] = field(default_factory=dict, compare=False)
    """Where the options stand."""


@dataclass(frozen=True)
class Measure:
    """A figure of merit, and what it is taken of."""

    name: str
    spec: Node
    on: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Named inputs, steps that are calls of methods, outputs, figures of merit, and what is swept."""

    name: str
    title: str
    inputs: Mapping[str, Input]
    steps: Mapping[str, Step]
    outputs: tuple[Output, ...]
    measures: tuple[Measure, ...]
    sweep: Mapping[str, tuple[Node, ...]]
    report: str | None
    document: Node

    def uses(self, name: str) -> list[str]:
        """The inputs and steps that a step names, in the order in which it does."""
        step = self.steps.get(name)
        return _named(step, {*self.inputs, *self.steps}) if step else []

    def affected(self, name: str) -> tuple[str, ...]:
        """The swept options on which an input or step depends."""
        reached, todo = {name}, [name]
        while todo:
            fresh = [used for used in self.uses(todo.pop()) if used not in reached]
            reached.update(fresh)
            todo += fresh
        return tuple(key for key in self.sweep if _owner(key) in reached)

    @property
    def last(self) -> str:
        """The last step, or the last input where there is none."""
        return list(self.steps or self.inputs)[-1]


def read(document: Node) -> Recipe:
    """A recipe from a document, or an error with line and column."""
    top = mapping(document, "a recipe", KEYS, ("inputs",))
    inputs = {name: _input(name, node) for name, node in items(top.get("inputs"), "inputs")}
    if not inputs:
        raise top["inputs"].error("there are no inputs: write name: path")
    steps: dict[str, Step] = {}
    for name, node in items(top.get("steps"), "steps"):
        _check_name(name, node, {**inputs, **steps})
        steps[name] = _step(name, node, [*inputs, *steps])
    known = [*inputs, *steps]
    sweep = {key: _choices(key, node, steps, inputs) for key, node in items(top.get("sweep"), "sweep")}
    outputs = tuple(_output(path, node, known) for path, node in items(top.get("save"), "save"))
    saved = tuple(dict.fromkeys(output.weights for output in outputs)) or (known[-1],)
    measures = tuple(_measure(name, node, known, saved) for name, node in items(top.get("evaluate"), "evaluate"))
    if not outputs and not measures:
        raise document.error("nothing comes of this recipe: it has neither save: nor evaluate:")
    title = _title(top["title"]) if "title" in top else ""
    report = page_path(top["report"]) if "report" in top else None
    recipe = Recipe(document.file, title, inputs, steps, outputs, measures, sweep, report, document)
    _check_sweep(recipe)
    return recipe


def with_settings(document: Node, settings: Iterable[tuple[str, Node]]) -> Node:
    """The document with other values at some places: ``merged.density`` is an option of the step ``merged``."""
    for key, value in settings:
        document = _set(document, _place(document, key, value), value)
    return document


def setting(text: str, origin: str = "--set") -> tuple[str, Node]:
    """``merged.density=0.3`` as a place and a value, which is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise Node(text, 1, 1, origin).error(f"{text!r}: write step.option=value")
    documents = load(value, f"{origin} {key.strip()}")
    if len(documents) > 1:
        raise documents[1].error("one value is set; this is a second one")
    return key.strip(), documents[0] if documents else Node(None, 1, 1, f"{origin} {key.strip()}")


# Pieces that other readers of documents use


def mapping(node: Node, what: str, keys: Sequence[str] | None = None, needed: Sequence[str] = ()) -> dict[str, Node]:
    """The entries of a mapping; an error for one that is not known, and for one that lacks."""
    if not isinstance(node.value, Mapping):
        raise node.error(f"{what} must be a mapping of names to values, got {kind(node)}")
    entries: dict[str, Node] = dict(node.value)
    for key, value in entries.items():
        if keys is not None and key not in keys:
            near = did_you_mean(str(key), keys)
            raise node.at(key).error(f"{what} has no key {key!r}{near}; it may have {', '.join(keys)}")
        if not isinstance(key, str):
            raise value.error(f"{what}: the name {key!r} is not a word")
    for key in needed:
        if key not in entries:
            raise node.error(f"{what} needs {key}:")
    return entries


def items(node: Node | None, what: str) -> list[tuple[str, Node]]:
    """The entries of a mapping that may be missing or empty."""
    return [] if node is None or node.value is None else list(mapping(node, what).items())


def word(node: Node, what: str) -> str:
    """A text."""
    if not isinstance(node.value, str) or not node.value.strip():
        raise node.error(f"{what} must be a word, got {kind(node)}")
    return node.value


def words(node: Node, what: str) -> list[Node]:
    """A list, or one value as a list of one."""
    return list(node.value) if isinstance(node.value, list) else [node]


# Sections


def _title(node: Node) -> str:
    if isinstance(node.value, list | Mapping):
        raise node.error(f"title must be a text, got {kind(node)}")
    return "" if node.value is None else str(node.value)


def page_path(node: Node) -> str:
    """Where a report is to be written: the path of a page."""
    path = word(node, "report")
    if not path.lower().endswith((".html", ".htm")):
        raise node.error(f"the report is an HTML page, so its path ends in .html, got {path!r}")
    return path


def _input(name: str, node: Node) -> Input:
    _check_name(name, node, {})
    if isinstance(node.value, str):
        return Input(node, {})
    entries = mapping(node, f"the input {name}", _INPUT, ("path",))
    options = {key: word(value, f"{key} of the input {name}") for key, value in entries.items() if key != "path"}
    word(entries["path"], f"path of the input {name}")
    return Input(entries["path"], options, entries)


def _check_name(name: str, node: Node, taken: Mapping[str, Any]) -> None:
    if not _NAME.fullmatch(name):
        raise node.error(f"{name!r} cannot be a name: letters from a to z, digits, - and _, and a letter or _ first")
    if name in taken:
        raise node.error(f"there is an input or a step {name!r} already")


def _step(name: str, node: Node, known: Sequence[str]) -> Step:
    entries = mapping(node, f"the step {name}")
    if "expression" in entries:
        mapping(node, f"the step {name}", ("expression",))
        expression = entries["expression"]
        text = word(expression, "expression")
        try:
            spoken = names_in(text)
        except ValueError as error:
            raise expression.error(str(error)) from None
        for used in spoken:
            if used not in known:
                raise expression.error(f"no input or earlier step {used!r}{did_you_mean(used, known)}")
        return Step(name, node, None, {}, expression)
    if "method" not in entries:
        raise node.error(f"the step {name} needs method: such as merge.ties (weightsmith methods lists them)")
    method = find(entries["method"])
    arguments = {key: value for key, value in entries.items() if key != "method"}
    aliases = method.aliases | ({"else": "rest"} if "rest" in method.parameters else {})
    for alias, key in aliases.items():
        if alias in arguments and key in arguments:
            raise node.at(alias).error(f"{alias}: and {key}: are the same option of {method.name}; say one of them")
    arguments = {aliases.get(key, key): value for key, value in arguments.items()}
    for key, value in arguments.items():
        if key not in method.parameters:
            near = did_you_mean(key, method.parameters)
            takes = ", ".join(method.parameters) or "nothing"
            raise _key_of(node, key, value).error(f"{method.name} has no option {key!r}{near}; it takes {takes}")
    first = next(iter(method.parameters), None)
    if first and first not in arguments and method.takes_weights(first) and known:
        arguments = {first: Node(known[-1], node.line, node.column, node.file), **arguments}
    lacking = [key for key in method.required if key not in arguments or arguments[key].value is None]
    if lacking:
        raise node.error(f"{method.name} needs {lacking[0]}:")
    for key, value in arguments.items():
        if method.takes_weights(key):
            check_weights(method, key, value)
            _check_references(value, known)
        elif key != "evaluate":
            check_value(method, key, value)
    return Step(name, node, method, arguments)


def _key_of(node: Node, key: str, value: Node) -> Node:
    return node.at(key) if isinstance(node.value, Mapping) and key in node.value else value


def _check_references(node: Node, known: Sequence[str]) -> None:
    """A word that stands for weights is the name of an input or an earlier step, or a path."""
    if isinstance(node.value, list):
        for inner in node.value:
            _check_references(inner, known)
    elif isinstance(node.value, str) and base_name(node.value) not in known and not _LIKE_A_PATH.search(node.value):
        raise node.error(f"no input or earlier step {node.value!r}{did_you_mean(node.value, known)}")


def base_name(reference: str) -> str:
    """``shared.0``, the first of several results, is a result of ``shared``."""
    name, _, index = reference.partition(".")
    return name if index.isdigit() else reference


def _output(path: str, node: Node, known: Sequence[str]) -> Output:
    if not path.strip() or not path.isprintable():
        raise node.error(f"an output needs a path of printable characters, got {path!r}")
    if isinstance(node.value, str):
        return Output(path, _reference(node, known), {}, node)
    entries = mapping(node, f"the output {path}", _OUTPUT, ("weights",))
    given = {key: value for key, value in entries.items() if key != "weights"}
    for key, value in given.items():
        is_size = key == "max_shard_size" and isinstance(value.value, int | float) and not isinstance(value.value, bool)
        by_tensor = key == "dtype" and isinstance(value.value, Mapping)
        if value.value is not None and not is_size and not by_tensor:
            word(value, f"{key} of the output {path}")
    options = {key: plain(value) for key, value in given.items()}
    return Output(path, _reference(entries["weights"], known), options, node, given)


def _reference(node: Node, known: Sequence[str]) -> str:
    name = word(node, "what is saved or measured")
    if base_name(name) not in known:
        raise node.error(f"no input or step {name!r}{did_you_mean(name, known)}")
    return name


def _measure(name: str, node: Node, known: Sequence[str], saved: tuple[str, ...]) -> Measure:
    if not name.strip():
        raise node.error("a figure of merit needs a name")
    if isinstance(node.value, str):
        return Measure(name, node, saved)
    entries = mapping(node, f"the measure {name}", _MEASURE, ("with",))
    word(entries["with"], f"with: of the measure {name}")
    on = [_reference(one, known) for one in words(entries["on"], "on")] if "on" in entries else saved
    if not on:
        raise entries["on"].error(f"on: of the measure {name} is an empty list, so nothing would be measured")
    return Measure(name, entries["with"], tuple(on))


def _choices(key: str, node: Node, steps: Mapping[str, Step], inputs: Mapping[str, Input]) -> tuple[Node, ...]:
    owner, _, option = key.partition(".")
    if owner not in steps and owner not in inputs:
        known = [*inputs, *steps]
        raise node.error(f"sweep: no input or step {owner!r}{did_you_mean(owner, known)}; write step.option: [values]")
    if owner in steps and not option:
        raise node.error(f"sweep: which option of {owner}? Write {owner}.option: [values]")
    if not isinstance(node.value, list) or not node.value:
        raise node.error(f"sweep: {key} needs a list of values, got {kind(node)}")
    return tuple(node.value)


def _check_sweep(recipe: Recipe) -> None:
    """What a sweep makes has either a place for each variant, or a figure by which the best is chosen."""
    for output in recipe.outputs:
        for key in re.findall(r"\{([^{}]*)\}", output.path):
            if key not in recipe.sweep:
                known = did_you_mean(key, recipe.sweep)
                raise output.node.error(f"the path {output.path} speaks of {key!r}, which is not swept{known}")
        free = [key for key in recipe.affected(base_name(output.weights)) if "{" + key + "}" not in output.path]
        if free and not recipe.measures:
            raise output.node.error(
                f"the sweep makes several of {output.weights}, and {output.path} has room for one: write "
                f"{{{free[0]}}} into the path, or evaluate: so that the best can be kept"
            )


# References and settings


def _named(step: Step, known: set[str]) -> list[str]:
    if step.expression is not None:
        return names_in(word(step.expression, "expression"))
    found: list[str] = []

    def walk(node: Node) -> None:
        if isinstance(node.value, list):
            for inner in node.value:
                walk(inner)
        elif isinstance(node.value, str) and base_name(node.value) in known:
            found.append(base_name(node.value))

    for key, value in step.arguments.items():
        if step.method is not None and step.method.takes_weights(key):
            walk(value)
    return list(dict.fromkeys(found))


def _owner(key: str) -> str:
    return key.partition(".")[0]


def _place(document: Node, key: str, value: Node) -> list[str]:
    top = mapping(document, "a recipe")
    parts = key.split(".")
    for section in ("steps", "inputs"):
        names = dict(items(top.get(section), section))
        if parts[0] in names:
            return [section, *parts]
    if parts[0] in top or parts[0] in KEYS:
        return parts
    known = [name for section in ("steps", "inputs") for name, _ in items(top.get(section), section)]
    raise value.error(f"no step, input or section {parts[0]!r}{did_you_mean(parts[0], [*known, *KEYS])}")


_SHORT = {"inputs": "path", "save": "weights", "evaluate": "with"}
"""What a lone word stands for in these sections."""


def _set(node: Node, place: Sequence[str], value: Node, at: tuple[str, ...] = ()) -> Node:
    """A document with another value at a place. ``at`` is where its node stands."""
    if not place:
        return value
    if isinstance(node.value, list):
        there = list(node.value)
        if not place[0].isdecimal() or int(place[0]) >= len(there):
            raise value.error(f"{'.'.join(at)} is a list of {len(there)}, counted from 0; it has no item {place[0]!r}")
        there[int(place[0])] = _set(there[int(place[0])], place[1:], value, (*at, place[0]))
        return replace(node, value=there)
    by_tensor = len(at) == 3 and at[0] == "steps"  # an option, which may become a mapping of patterns
    if isinstance(node.value, Mapping):
        inner = dict(node.value)
    elif node.value is None:
        inner = {}
    elif len(at) == 2 and at[0] in _SHORT:
        inner = {_SHORT[at[0]]: node}
    elif by_tensor:
        inner = {"*": node}
    else:
        raise value.error(f"{'.'.join(at) or 'the file'} is {kind(node)}, so it has no {'.'.join(place)!r}")
    key, rest = _split(place, inner, at)
    made = _set(inner.get(key, Node(None, value.line, value.column, value.file)), rest, value, (*at, key))
    # The first pattern that fits is taken, so a new one stands before what was there.
    first = {key: made} if by_tensor and key not in inner else {}
    return replace(node, value={**first, **inner, key: made})


def _split(place: Sequence[str], inner: Mapping[Any, Node], at: tuple[str, ...]) -> tuple[str, Sequence[str]]:
    """The first key of a place, and what follows. Paths, patterns and swept options have dots of their own."""
    for count in range(len(place), 0, -1):
        if ".".join(place[:count]) in inner:
            return ".".join(place[:count]), place[count:]
    count = 1
    if at in (("save",), ("evaluate",)):
        options = _OUTPUT if at == ("save",) else _MEASURE
        count = len(place) - 1 if len(place) > 1 and place[-1] in options else len(place)
    elif at == ("sweep",) or (at[:1] == ("steps",) and len(at) >= 3):
        count = len(place)
    return ".".join(place[:count]), place[count:]
