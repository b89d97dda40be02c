"""The card a method wears, and the table that lists a room's methods.

A card is literal: its text is read by tools that never import the code (`weightsmith methods`, the
shell commands, the documentation), so every value in it is written out, not computed. ``reduce``, ``solve``,
``unit_for`` and ``joint`` alone are names of functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

Function = TypeVar("Function", bound=Callable[..., Any])

NEEDS = (
    "base",
    "stats.gram",
    "stats.activations",
    "stats.fisher",
    "stats.gradients",
    "evaluate",
    "graph",
    "data",
)
"""Everything that a method may need beside the weights it works on."""

Unit = Literal["element", "row", "tensor", "group", "model"]
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a method says of itself.

    Attributes:
        paper: authors, year, title; equation or section where known.
        covers: keys of the catalogue whose mechanism this is.
        needs: what must be supplied beside the weights; words of `NEEDS`.
        unit: the smallest piece it can be computed on: element, row, tensor, group or model.
        reduce: ``(*chunk) -> statistics``, added up over chunks before the first output.
        solve: ``(statistics, **options) -> coefficients``, handed to the method as ``solved``.
        unit_for: ``(shape, **options) -> unit`` where options change what may not be torn apart; with another
            unit than the card's the method works without ``solve``.
        joint: ``(**options) -> bool``: whether all tensors are solved together, as one.
        laws: names of the room's laws that hold for it.
        claim: what it promises, in a clause that could be measured.
        departs: where it differs from the paper, and why.
    """

    paper: str
    covers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    unit: Unit = "element"
    reduce: Callable[..., Any] | None = None
    solve: Callable[..., Any] | None = None
    unit_for: Callable[..., Unit] | None = None
    joint: Callable[..., bool] | None = None
    laws: tuple[str, ...] = ()
    claim: str = ""
    departs: str = ""


def card(**fields: Any) -> Callable[[Function], Function]:
    """Attach a `Card` to a function and return the function unchanged."""
    made = Card(**fields)
    unknown = [need for need in made.needs if need not in NEEDS]
    if unknown or made.unit not in UNITS:
        raise TypeError(f"a card knows needs {NEEDS} and units {UNITS}; got {unknown or made.unit}")

    def attach(function: Function) -> Function:
        function.card = made  # type: ignore[attr-defined]
        return function

    return attach


def card_of(function: Callable[..., Any]) -> Card:
    """The card of a kernel or of the public function lifted from it."""
    return getattr(function, "card")  # noqa: B009 - functions have no declared attribute of that name


def table(*methods: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A room's methods by name. Written out in full in the room's ``__init__``."""
    named = {method.__name__: method for method in methods}
    if len(named) != len(methods):
        raise TypeError("two methods of a room have one name")
    return named
