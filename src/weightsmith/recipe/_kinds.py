"""What kind of value an option takes, by its annotation: found before anything is opened.

Only annotations of numbers, words and yes-or-no are judged; what else a method takes it checks itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightsmith.recipe._yaml import Node

if TYPE_CHECKING:
    from weightsmith.recipe._methods import Method

_JUDGED = {"PerTensor", "Sequence", "float", "int", "bool", "str", "None"}
_ONE = ("Source", "Source | None")
FROM_ELSEWHERE = "python"
"""The key of a mapping that takes a value from a file of the user's."""


def kind(node: Node) -> str:
    """What a value is, in words for a message."""
    value = node.value
    if isinstance(value, list | str) and not value:
        return "an empty list" if isinstance(value, list) else "an empty text"
    names = {dict: "a mapping", list: "a list", type(None): "nothing", str: "a text", bool: "yes or no"}
    return next((said for which, said in names.items() if isinstance(value, which)), f"{value!r}"[:60])


def check_value(method: Method, key: str, node: Node) -> None:
    """An error for a value that an option cannot have, whatever the weights are."""
    parameter = method.parameters[key]
    words = set(re.findall(r"[A-Za-z_.]+", str(parameter.annotation)))
    if parameter.annotation is parameter.empty or not words <= _JUDGED:
        return
    if parameter.default is None:
        words.add("None")
    _check(key, node, words, may_differ=True)


def _check(key: str, node: Node, words: set[str], may_differ: bool) -> None:
    value = node.value
    if isinstance(value, Mapping):
        if list(value) == [FROM_ELSEWHERE]:
            return
        if list(value) == ["by_depth"]:
            _check_curve(key, value["by_depth"], words)
        elif not may_differ or not value or not all(isinstance(pattern, str) for pattern in value):
            raise node.error(f"{key} must be {_said(words)}, or a mapping of patterns to that")
        elif "by_depth" in value or FROM_ELSEWHERE in value:
            raise node.error(
                f"{key}: by_depth and python stand alone in their mapping, and here are {', '.join(value)}"
            )
        else:
            for inner in value.values():
                is_curve = isinstance(inner.value, Mapping) and list(inner.value) == ["by_depth"]
                _check(key, inner, words, may_differ=is_curve)
    elif isinstance(value, list):
        if "Sequence" not in words:
            raise node.error(f"{key} must be {_said(words)}, got a list")
        for inner in value:
            _check(key, inner, words - {"None"}, may_differ)
    elif not _fits(value, words):
        raise node.error(f"{key} must be {_said(words)}, got {kind(node)}")
    elif isinstance(value, int) and "float" in words and abs(value) > 1e300:
        raise node.error(f"{key} is too large a number")


def _check_curve(key: str, node: Node, words: set[str]) -> None:
    if not isinstance(node.value, list) or not node.value:
        raise node.error(f"{key}: by_depth needs a list of numbers, got {kind(node)}")
    for inner in node.value:
        _check(key, inner, {"float"}, may_differ=False)


def _fits(value: object, words: set[str]) -> bool:
    if value is None:
        return "None" in words
    if isinstance(value, bool):
        return "bool" in words
    if isinstance(value, int):
        return bool({"int", "float"} & words)
    if isinstance(value, float):
        return "float" in words
    return isinstance(value, str) and "str" in words


def _said(words: set[str]) -> str:
    names = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text"}
    if "float" in words:
        words = words - {"int"}
    said = [name for word, name in names.items() if word in words]
    said += [f"a list of {said[0].removeprefix('a ').removesuffix('number')}numbers"] if "Sequence" in words else []
    return " or ".join(said)


def check_weights(method: Method, key: str, node: Node) -> None:
    """An error for a value that cannot stand for weights."""
    annotation = str(method.parameters[key].annotation)
    is_one, value = annotation in _ONE, node.value
    if isinstance(value, Mapping) and list(value) == [FROM_ELSEWHERE]:
        return
    if value is None and "None" in annotation:
        return
    wanted = "the name of an input or of an earlier step, or a path"
    if is_one and not isinstance(value, str):
        raise node.error(f"{method.name} takes one {key}: {wanted}; got {kind(node)}")
    if annotation != "Sequence[Source]" or isinstance(value, str):
        return
    if not isinstance(value, list):
        raise node.error(f"{method.name} takes a list of {key}, each {wanted}; got {kind(node)}")
    for inner in value:
        is_taken = isinstance(inner.value, Mapping) and list(inner.value) == [FROM_ELSEWHERE]
        if not isinstance(inner.value, str) and not is_taken:
            raise inner.error(f"{method.name} takes a list of {key}, each {wanted}; got {kind(inner)}")
