"""From a function on tensors to a function on `Weights`: what the rooms' own loops share.

A kernel is a pure function on tensors. Its card says in which unit it may be cut and which
statistics it needs first; this module turns that into nodes that stream. The rooms decide what the
arguments are (`room.py` in each).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from weightsmith.card import card_of
from weightsmith.errors import Error, did_you_mean
from weightsmith.weights import Inputs, Output, Reduction, Spec, Work, resolve, single
from weightsmith.weights._lazy import Argument, Unit

INTERNAL = ("solved", "start", "key", "generator")
"""Keywords that the engine supplies and a caller does not."""


def options_of(kernel: Callable[..., Any]) -> dict[str, Any]:
    """The keyword options a caller may give, with their defaults."""
    parameters = inspect.signature(kernel).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in INTERNAL}


def checked_options(kernel: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """An error for an option that the kernel does not have."""
    known = options_of(kernel)
    for name in given:
        if name not in known:
            method = kernel.__name__
            raise Error(
                f"{method} has no option {name!r}{did_you_mean(name, known)}; it has {', '.join(known) or 'none'}"
            )
    lacking = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in given]
    if lacking:
        raise Error(f"{kernel.__name__} needs the option {lacking[0]}=")


def per_tensor_options(
    kernel: Callable[..., Any], given: Mapping[str, Any], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Tensor -> option -> value, every `PerTensor` option looked up."""
    checked_options(kernel, given)
    names = list(names)
    columns = {option: resolve(value, names, option) for option, value in given.items()}
    return {name: {option: column[name] for option, column in columns.items()} for name in names}


def tried(kernel: Callable[..., Any], options: Iterable[Mapping[str, Any]], *arguments: Any) -> None:
    """Run a kernel on tiny tensors once for every different set of options, so that a bad one is found now."""
    seen: list[Mapping[str, Any]] = []
    for chosen in options:
        if chosen not in seen:
            seen.append(chosen)
            kernel(*arguments, **chosen)


def staged(
    kernel: Callable[..., Any],
    arguments: Sequence[Argument],
    options: Mapping[str, Any],
    outputs: Mapping[str, Spec],
    *,
    function: Callable[..., Any] | None = None,
    joint: tuple[Reduction, int] | None = None,
) -> Work:
    """The streamed form of ``kernel(*arguments, **options)``, with its statistics if its card names any.

    Args:
        function: what is called in place of the kernel, such as one that checks its result.
        joint: the reduction of several tensors that were to be solved together, and where this one begins in it.
    """
    card = card_of(kernel)
    unit = unit_of(kernel, arguments, options)
    inputs = Inputs(arguments, unit)
    if joint is not None:
        return Work(function or kernel, inputs, outputs, options, *joint)
    reduction = None
    if card.solve is not None and unit == card.unit:
        reduction = Reduction([inputs], solver_of(kernel, options))
    return Work(function or kernel, inputs, outputs, options, reduction)


def unit_of(kernel: Callable[..., Any], arguments: Sequence[Argument], options: Mapping[str, Any]) -> Unit:
    """What may not be torn apart: what the card says, for these shapes and options."""
    card = card_of(kernel)
    if card.unit_for is None:
        return cast(Unit, card.unit)
    shape = Inputs(arguments, "tensor").nodes[0].spec.shape
    return cast(Unit, card.unit_for(shape, **accepted(card.unit_for, options)))


def solver_of(kernel: Callable[..., Any], options: Mapping[str, Any]) -> Callable[[], Any]:
    """What a `Reduction` is to run for a kernel: the solver of its card with those options that it takes."""
    card = card_of(kernel)
    if card.solve is None:
        raise TypeError(f"the card of {kernel.__name__} has no solve=")
    solve = functools.partial(card.solve, **accepted(card.solve, options))
    if inspect.isgeneratorfunction(card.solve):
        return solve
    if card.reduce is None:
        raise TypeError(f"the card of {kernel.__name__} has solve= without reduce=")
    return functools.partial(single, card.reduce, solve)


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a function has a parameter for."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def sole(work: Work) -> Output:
    """The node of a work with one output."""
    return Output(work)


def example(*shape: int) -> torch.Tensor:
    """Small harmless values to try a kernel's options on."""
    count = torch.Size(shape).numel()
    return torch.linspace(0.5, 1.0, count).reshape(shape)


def dressed(public: Callable[..., Any], kernel: Callable[..., Any], leading: Sequence[inspect.Parameter]) -> Any:
    """Give the public function the kernel's name, card and docstring, and a signature of its own."""
    parameters = inspect.signature(kernel).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in INTERNAL]
    own: Any = public
    own.__name__ = own.__qualname__ = kernel.__name__
    own.__doc__ = kernel.__doc__
    own.__module__ = kernel.__module__.rsplit(".", 1)[0]
    own.__signature__ = inspect.Signature([*leading, *(k for k in keywords if k.name not in {p.name for p in leading})])
    own.kernel = kernel
    own.card = card_of(kernel)
    return own
