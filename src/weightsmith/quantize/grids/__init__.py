"""Grids: the points that weights may take, and what turns codes back into them.

The signature: a frozen dataclass of settings with ``fit(values) -> params``, ``encode(values, params) -> codes`` and
``decode(codes, params) -> values``, all on ``[..., n]`` with the inputs of one group last. Which code a weight gets is
the business of a rounding, not of a grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from weightsmith.errors import Error, FormatError, did_you_mean
from weightsmith.quantize.grids._elements import ELEMENTS, Element, element_of, of_element, table_of, to_element
from weightsmith.quantize.grids._floats import Float, Microscaling, NvFloat4
from weightsmith.quantize.grids._grid import Grid, Packing, Params, Stored, looked_up, nearest, settings
from weightsmith.quantize.grids._integer import Integer, Span
from weightsmith.quantize.grids._levels import Levels, centres
from weightsmith.quantize.grids._power import EXPONENTS, Power
from weightsmith.quantize.grids._quantized import quantized
from weightsmith.quantize.grids._residual import Residual
from weightsmith.quantize.grids._signs import Sign, Ternary
from weightsmith.quantize.grids._tables import MixedTypes, NormalFloat
from weightsmith.quantize.grids._two_four import TwoFour
from weightsmith.weights import as_dtype

GRIDS: dict[str, type] = {
    "billm": Residual,
    "bitmod": MixedTypes,
    "float": Float,
    "int": Integer,
    "levels": Levels,
    "mx": Microscaling,
    "nf4": NormalFloat,
    "nvfp4": NvFloat4,
    "power": Power,
    "sign": Sign,
    "ternary": Ternary,
    "two_four": TwoFour,
}
"""Grids by the word that stands for them, in calls and in files."""

SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "fp4": ("float", {"element": "e2m1"}),
    "fp6": ("float", {"element": "e2m3"}),
    "fp8": ("float", {"element": "e4m3"}),
    "mxfp4": ("mx", {"element": "e2m1"}),
    "mxfp6": ("mx", {"element": "e2m3"}),
    "mxfp8": ("mx", {"element": "e4m3"}),
    "mxint8": ("mx", {"element": "int8"}),
}
"""Further words: a word of `GRIDS` and settings, which other settings overrule."""


def named(word: str | Grid, **given: Any) -> Grid:
    """A grid from its word and settings; settings that are None are the grid's own.

    Args:
        word: one of `GRIDS` or `SHORT`, or a grid, which takes no settings.

    Raises:
        Error: an unknown word, a setting that the grid does not have, or any beside a grid.

    >>> named("int", bits=3) == Integer(bits=3), named("mxfp6", element="e3m2")
    (True, Microscaling(element='e3m2', group=32, scaling='floor'))
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(word, str):
        if given:
            raise Error(f"the grid {word} is whole as it is: say {', '.join(sorted(given))} in it")
        return word
    if word in SHORT:
        word, usual = SHORT[word]
        given = usual | given
    if word not in GRIDS:
        words = sorted({*GRIDS, *SHORT})
        raise Error(f"there is no grid {word!r}{did_you_mean(word, words)}; known: {', '.join(words)}")
    known = inspect.signature(GRIDS[word]).parameters
    given = {name: value for name, value in given.items() if name in known or name != "scale_dtype"}
    for name in given:
        if name not in known:
            raise Error(f"the grid {word} has no {name}; it has {', '.join(known)}")
    if "scale_dtype" in given:
        given["scale_dtype"] = as_dtype(given["scale_dtype"])
    return GRIDS[word](**given)


def described(grid: Grid) -> dict[str, Any]:
    """A grid as plain values, for a header: its word under ``grid``, and what is not at its default.

    Raises:
        Error: a grid of a class that is not in `GRIDS`.

    >>> described(Integer(bits=3, group=64))
    {'grid': 'int', 'bits': 3, 'group': 64}
    """
    for word, kind in GRIDS.items():
        if type(grid) is kind:
            return {"grid": word, **settings(grid)}
    raise Error(f"{type(grid).__name__} is no grid that files can name; known: {', '.join(GRIDS)}")


def restored(said: Mapping[str, Any]) -> Grid:
    """The grid that `described` told of; what it says is not trusted.

    Raises:
        FormatError: words that tell of no grid, or of one that cannot be.

    >>> restored({"grid": "int", "bits": 3, "group": 64}).bits
    3
    """
    kind = GRIDS.get(str(said.get("grid", "int")))
    if kind is None:
        raise FormatError(f"there is no grid {said.get('grid')!r}; known: {', '.join(GRIDS)}")
    known = {field.name for field in fields(kind)}
    given: dict[str, Any] = {}
    for name, value in said.items():
        if name == "grid":
            continue
        if name not in known or not isinstance(value, int | float | str | bool | None):
            raise FormatError(f"the grid {said.get('grid', 'int')} has no setting {name}={value!r}")
        given[name] = value
    try:
        return kind(**{name: as_dtype(value) if name.endswith("dtype") else value for name, value in given.items()})
    except (Error, TypeError) as error:
        raise FormatError(f"a header tells of a grid that cannot be: {error}") from None


__all__ = [
    "ELEMENTS",
    "EXPONENTS",
    "GRIDS",
    "SHORT",
    "Element",
    "Float",
    "Grid",
    "Integer",
    "Levels",
    "Microscaling",
    "MixedTypes",
    "NormalFloat",
    "NvFloat4",
    "Packing",
    "Params",
    "Power",
    "Residual",
    "Sign",
    "Span",
    "Stored",
    "Ternary",
    "TwoFour",
    "centres",
    "described",
    "element_of",
    "looked_up",
    "named",
    "nearest",
    "of_element",
    "quantized",
    "restored",
    "table_of",
    "to_element",
]
