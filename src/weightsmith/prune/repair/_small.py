"""Train a small part of a pruned model: biases, norms, the head. The zeros are elsewhere, so they stay.

A pruned network has mostly lost the right means and sizes on the way, not what it knows. These are set by a few
numbers for each unit, which need next to no memory to train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn

from weightsmith.card import card
from weightsmith.errors import Error

Part = Literal["biases", "norms", "head"]
"""Of what biases, norms and the head are: see `trainable`."""


@card(
    paper="Zimmer, Andoni, Spiegel, Pokutta 2023, 'PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs'",
    covers=("perp",),
    unit="model",
    claim="training biases and norms alone, far less than one weight in a hundred, brings back part of what was lost",
)
@contextmanager
def trainable(module: nn.Module, which: Sequence[Part] = ("biases", "norms")) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, only these parameters of a module need gradients; outside, those that did before.

    By structure, not by name: ``"biases"`` are vectors of modules that hold a matrix too; ``"norms"`` are vectors of
    modules that hold none; ``"head"`` is what the model itself calls its output embeddings, else the last module that
    holds a matrix (tied to the embeddings, it trains them too).

    Args:
        module: its parameters' ``requires_grad`` are changed, inside.
        which: any of ``"biases"``, ``"norms"``, ``"head"``.

    Yields:
        name -> parameter, in the module's order.

    Raises:
        Error: another word, or nothing that fits.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1, bias=False))
    >>> with trainable(net) as chosen:
    ...     list(chosen), net[2].weight.requires_grad
    (['0.bias', '1.weight', '1.bias'], False)
    """
    unknown = [word for word in which if word not in get_args(Part)]
    if unknown or isinstance(which, str):
        raise Error(f"trainable knows {', '.join(get_args(Part))}, as a sequence; got {unknown or which!r}")
    chosen = small_parameters(module, which)
    if not chosen:
        raise Error(f"the module has no {' or '.join(which) or 'parameters that were asked for'}")
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    kept = {id(parameter) for parameter in chosen.values()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in kept)
        yield chosen
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def small_parameters(module: nn.Module, which: Sequence[Part]) -> dict[str, nn.Parameter]:
    """What `trainable` chooses."""
    found: set[int] = set()
    put_on = {inner for part in module.modules() for inner in getattr(part, "parametrizations", nn.Module()).modules()}
    parts = [part for part in module.modules() if part not in put_on]
    matrices = [part for part in parts if any(p.dim() > 1 for p in _values(part))]
    holders = {id(part) for part in matrices}
    for part in parts:
        word = "biases" if id(part) in holders else "norms"
        if word in which:
            found |= {id(p) for p in part.parameters(recurse=False) if p.dim() == 1 and p.is_floating_point()}
    if "head" in which and matrices:
        named: Any = getattr(module, "get_output_embeddings", lambda: None)()
        head = named if isinstance(named, nn.Module) else matrices[-1]
        found |= {id(p) for p in head.parameters(recurse=False) if p.is_floating_point()}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in found}


def _values(part: nn.Module) -> Iterator[nn.Parameter]:
    """Its own parameters, and those that stand under its parametrizations."""
    yield from part.parameters(recurse=False)
    for under in getattr(part, "parametrizations", {}).values():
        yield from under.parameters(recurse=False)
