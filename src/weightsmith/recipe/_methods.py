"""What a step's ``method:`` may name: every method of every room, and the verbs of `Weights`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.card import Card
from weightsmith.catalogue import Catalogue
from weightsmith.errors import did_you_mean
from weightsmith.lifting import options_of
from weightsmith.recipe._kinds import kind
from weightsmith.recipe._yaml import Node

HIDDEN = ("on_step",)
"""Arguments that are functions to be told of something; a recipe has no use for them."""


@dataclass(frozen=True)
class Method:
    """A function that a recipe can call."""

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]

    @property
    def required(self) -> list[str]:
        """What must be given."""
        needs = self.card.needs if self.card else ()
        named = [name for name, p in self.parameters.items() if p.default is inspect.Parameter.empty]
        return list(dict.fromkeys([*named, *(need for need in ("base",) if need in needs)]))

    @property
    def card(self) -> Card | None:
        """The method's card; verbs wear none."""
        return getattr(self.function, "card", None)

    @property
    def aliases(self) -> dict[str, str]:
        """The word ``weights`` for the first argument, whatever its name is."""
        first = next(iter(self.parameters), "weights")
        return {} if "weights" in self.parameters or not self.takes_weights(first) else {"weights": first}

    @property
    def is_eager(self) -> bool:
        """Whether the call itself does long work: it measures models on its way, or compares several unit by unit."""
        needs = set(self.card.needs) if self.card else set()
        compares = "graph" in needs and self.takes_several
        return bool({"evaluate", "data"} & needs) or compares or "evaluate" in self.parameters

    @property
    def takes_several(self) -> bool:
        """Whether it is given more than one checkpoint."""
        given = [str(p.annotation) for name, p in self.parameters.items() if self.takes_weights(name)]
        return len(given) > 1 or any("Sequence" in annotation for annotation in given)

    @property
    def gives_several(self) -> bool:
        """Whether it makes a list of checkpoints."""
        return "list[" in str(inspect.signature(self.function).return_annotation)

    def takes_weights(self, argument: str) -> bool:
        """Whether an argument is weights, or several."""
        parameter = self.parameters.get(argument)
        return parameter is not None and "Source" in str(parameter.annotation)


def find(node: Node) -> Method:
    """The method that a node names."""
    name = node.value
    if not isinstance(name, str):
        raise node.error(f"method: must be a name such as merge.ties, got {kind(node)}")
    from weightsmith.recipe._verbs import VERBS

    if name in VERBS:
        return _method(name, VERBS[name])
    if name in _rooms():  # a room may have one method that its own name stands for
        main = getattr(importlib.import_module(f"weightsmith.{name}"), "MAIN", None)
        if main is not None:
            return _method(f"{name}.{main.__name__}", main)
    room, _, last = name.rpartition(".")
    if room in _rooms():
        module = importlib.import_module(f"weightsmith.{room}")
        listed: Mapping[str, Callable[..., Any]] = getattr(module, "METHODS", {})
        function = listed.get(last) or _public(module, last)
        if function is not None:
            return _method(name, function)
    known = [*VERBS, *(method.path for method in Catalogue().methods)]
    same = [path for path in known if path.rpartition(".")[2] == name]  # the room was left out
    near = f" (did you mean {same[0]!r}?)" if same else did_you_mean(name, known)
    raise node.error(f"no method {name!r}{near}; weightsmith methods lists them")


@functools.cache
def _rooms() -> set[str]:
    catalogue = Catalogue()
    return {*catalogue.tables, "adapt", "stats"}


def _public(module: Any, name: str) -> Callable[..., Any] | None:
    """A function that a room exports and that returns weights."""
    found = getattr(module, name, None) if name in getattr(module, "__all__", ()) else None
    if not inspect.isfunction(found) or "Weights" not in str(inspect.signature(found).return_annotation):
        return None
    return found


def _method(name: str, function: Callable[..., Any]) -> Method:
    parameters = inspect.signature(function).parameters
    usable = {
        key: parameter
        for key, parameter in parameters.items()
        if key not in HIDDEN and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        handed = _handed_on(name.rpartition(".")[0])
        usable |= {key: handed[key] for key in handed if key not in usable}
    return Method(name, function, usable)


@functools.cache
def _handed_on(room: str) -> dict[str, inspect.Parameter]:
    """Options of a room's kernels, which a function that takes more by name may hand on to one of them."""
    listed = getattr(importlib.import_module(f"weightsmith.{room}"), "METHODS", {}) if room in _rooms() else {}
    found: dict[str, inspect.Parameter] = {}
    for one in listed.values():
        if hasattr(one, "kernel"):
            own = inspect.signature(one).parameters
            found |= {key: own[key] for key in options_of(one.kernel)}
    return found
