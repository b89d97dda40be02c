"""Parameters of a mergekit file: values by name and by depth, and which of several levels counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.errors import did_you_mean
from weightsmith.recipe._mergekit_methods import METHODS, Method, Option
from weightsmith.recipe._yaml import Node
from weightsmith.weights import matches

_YES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass
class Rule:
    """A value for the tensors whose name fits a filter."""

    filter: str | None
    values: tuple[Any, ...]
    """Several are spread over the layers of a slice."""
    node: Node
    met: bool = field(default=False, compare=False)
    """Whether some tensor's name fits."""

    def fits(self, name: str) -> bool:
        """A filter is a part of the name; ``re:`` and patterns with ``*`` are understood too."""
        if self.filter is None or self.filter == "*":
            return True
        if self.filter.startswith("re:") or "*" in self.filter:
            return matches(self.filter, name)
        return self.filter in name

    def at(self, depth: float) -> Any:
        """The value at a depth in [0, 1]: numbers between neighbours, yes or no by steps."""
        place = depth * (len(self.values) - 1)
        low = int(place)
        if isinstance(self.values[low], bool) or low + 1 >= len(self.values):
            return self.values[low]
        share = place - low
        return (1 - share) * self.values[low] + share * self.values[low + 1]


Rules = tuple[Rule, ...]
Level = Mapping[str, Rules]
"""Parameter -> its rules, at one place of a file."""


def read_level(node: Node | None, method: str, where: str, warn: Callable[[str], None], *, source: bool) -> Level:
    """A ``parameters:`` section.

    Args:
        method: what takes them, a key of `METHODS`.
        where: for messages.
        source: whether it stands at a model, where only parameters count of which each model has one.
    """
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, Mapping):
        raise node.error(f"parameters: must be a mapping, as {{weight: 0.5}}, got {node.value!r}")
    takes: Method = METHODS[method]
    found: dict[str, Rules] = {}
    for name, value in node.value.items():
        option = takes.parameters.get(name)
        if option is None:
            others = [other for other, one in METHODS.items() if name in one.parameters]
            every = dict.fromkeys([*takes.parameters, *(key for one in METHODS.values() for key in one.parameters)])
            near = "" if others else did_you_mean(str(name), every)
            said = f"it belongs to {', '.join(others)}" if others else "it is no parameter"
            warn(_at(node.at(name), f"{method} does not use {name!r}{near}; {said}"))
            continue
        if source and name in takes.shared:
            warn(_at(node.at(name), f"{name!r} has no effect at a model: {method} has one value for all; move it up"))
            continue
        rules = _read_rules(value, name, option)
        if option.ours is None and rules and any(v != option.default for r in rules for v in r.values):
            warn(_at(node.at(name), f"{name!r} has no effect in {method}: {option.note}"))
        found[name] = rules
    return found


def _at(node: Node, text: str) -> str:
    return f"{node.file}:{node.line}:{node.column}: {text}"


def _read_rules(node: Node, name: str, option: Option) -> Rules:
    """A number, a list over depth, ``{filter, value}``, or a list of those."""
    if node.value is None:
        raise node.error(f"{name}: has no value; leave the key out where another level is to count")
    conditional = isinstance(node.value, Mapping)
    entries = node.value if isinstance(node.value, list) else [node]
    if not conditional and not any(isinstance(entry.value, Mapping) for entry in entries):
        values = tuple(_value(entry, name, option) for entry in entries)
        return (Rule(None, values, node),) if values else ()
    rules = []
    for entry in entries:
        if not isinstance(entry.value, Mapping):
            raise entry.error(f"{name}: a list holds either numbers or {{filter, value}}, not both")
        for key in entry.value:
            if key not in ("filter", "value"):
                raise entry.at(key).error(
                    f"{name}: {{filter, value}} has no key {key!r}{did_you_mean(str(key), ('filter', 'value'))}"
                )
        if "value" not in entry.value:
            raise entry.error(f"{name}: a filter needs value:")
        value, pattern = entry.value["value"], entry.value.get("filter")
        if pattern is not None and not isinstance(pattern.value, str | None):
            raise pattern.error(f"{name}: a filter is a part of the tensors' names, got {pattern.value!r}")
        values = tuple(_value(one, name, option) for one in (value.value if isinstance(value.value, list) else [value]))
        if values:
            rules.append(Rule(pattern.value if pattern else None, values, pattern or value))
    return tuple(rules)


def _value(node: Node, name: str, option: Option) -> Any:
    value = node.value
    if option.kind is bool:
        said = _YES.get(str(value).lower())
        if said is None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise node.error(f"{name}: needs true or false, got {_said(value)}")
        return bool(value) if said is None else said
    try:
        if isinstance(value, bool | list | Mapping) or value is None:
            raise ValueError
        number = float(value)
    except ValueError:
        raise node.error(f"{name}: needs a number, got {_said(value)}") from None
    if not math.isfinite(number):
        raise node.error(f"{name}: needs a finite number, got {value}")
    if option.kind is int and number != int(number):
        raise node.error(f"{name}: needs a whole number, got {value}")
    return int(number) if option.kind is int else number


def _said(value: Any) -> str:
    if isinstance(value, list):
        return "a list within a list"
    return "a mapping" if isinstance(value, Mapping) else "nothing" if value is None else repr(value)


def lookup(levels: Sequence[Level], parameter: str, name: str, depth: float) -> Any:
    """The first value that counts for a tensor, from the innermost level outwards; None where there is none."""
    for level in levels:
        for rule in level.get(parameter, ()):
            if rule.fits(name):
                return rule.at(depth)
    return None


def mark(levels: Iterable[Level], parameters: Iterable[str], name: str) -> None:
    """Remember of every filter that a tensor's name fits it."""
    for level in levels:
        for parameter in parameters:
            for rule in level.get(parameter, ()):
                rule.met = rule.met or rule.fits(name)


def idle(levels: Iterable[Level]) -> list[str]:
    """What to say of filters that fit no tensor."""
    rules = {id(rule): (name, rule) for level in levels for name, rules in level.items() for rule in rules}
    return [
        _at(rule.node, f"the filter {rule.filter!r} of {name} fits no tensor")
        for name, rule in rules.values()
        if not rule.met and rule.filter is not None
    ]
