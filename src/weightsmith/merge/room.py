"""The signature of merging, and the one loop that lifts a kernel to whole checkpoints."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, overload

from torch import Tensor, nn

from weightsmith.card import card_of
from weightsmith.errors import Error, listed
from weightsmith.lifting import dressed, example, per_tensor_options, sole, staged, tried
from weightsmith.weights import Lazy, Spec, Stack, Weights, open, promote, same_names

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
"""Anything that `weightsmith.open` opens, `Weights` included."""


class Kernel(Protocol):
    """What a merging method is: ``(models [k, *shape], base [*shape], **options) -> [*shape]``."""

    __name__: str

    def __call__(self, models: Tensor, base: Tensor, /, **options: Any) -> Tensor: ...


class Merge(Protocol):
    """What a user calls."""

    kernel: Callable[..., Tensor]

    @overload
    def __call__(self, models: Sequence[Source], base: Source | None = None, **options: Any) -> Weights: ...

    @overload
    def __call__(self, models: Tensor, base: Tensor | None = None, **options: Any) -> Tensor: ...


_PARAMETERS = (
    inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Sequence[Source]"),
    inspect.Parameter("base", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation="Source | None"),
)


def lift(kernel: Callable[..., Tensor]) -> Merge:
    """``(models, base, **options) -> Weights`` from a kernel on tensors. Options may be `PerTensor`.

    Called with a tensor ``[k, *shape]`` of models, the public function is the kernel.
    """
    needs_base = "base" in card_of(kernel).needs

    def merge(models: Any, base: Any = None, **options: Any) -> Any:
        if isinstance(models, Tensor):
            return kernel(models, *([base] if needs_base else []), **options)
        opened = opened_models(models, kernel.__name__)
        origin = None if base is None else open(base)
        if needs_base and origin is None:
            raise Error(f"{kernel.__name__} needs base=, the weights that the models were fine-tuned from")
        check_alike(opened, origin, kernel.__name__)
        others = (*opened[1:], *((origin,) if origin is not None else ()))
        floating = opened[0].names(floating=True)
        chosen = per_tensor_options(kernel, options, floating)
        shapes = [example(len(opened), 2, 2), *([example(2, 2)] if needs_base else [])]
        tried(kernel, chosen.values(), *shapes)

        def build(name: str, *nodes: Lazy) -> Lazy:
            if name not in chosen:
                return nodes[-1] if origin is not None else nodes[0]
            members = nodes[: len(opened)]
            arguments = [Stack(members), *([nodes[-1]] if needs_base else [])]
            spec = Spec(nodes[0].spec.shape, promote(*(node.spec.dtype for node in members)))
            return sole(staged(kernel, arguments, chosen[name], {"": spec}))

        return opened[0].zip_nodes(build, others, f"merge.{kernel.__name__}", options)

    return dressed(merge, kernel, _PARAMETERS)


def opened_models(models: Sequence[Source], method: str) -> list[Weights]:
    """The models as `Weights`; at least one."""
    if isinstance(models, str | os.PathLike | Mapping | nn.Module):
        raise Error(f"{method} takes a list of models, got one {type(models).__name__}")
    if not models:
        raise Error(f"{method} needs at least 1 model, got 0")
    return [open(model) for model in models]


def check_alike(models: Sequence[Weights], base: Weights | None, method: str) -> None:
    """Models of one architecture, or an error that says which tensors differ and how."""
    named = [(f"model {number + 1}", model) for number, model in enumerate(models)]
    named += [("the base", base)] if base is not None else []
    first = models[0]
    for who, other in named[1:]:
        same_names(first, other, f"{method}: model 1 and {who} must have the same tensors")
        wrong = [
            f"{name} {list(first.spec(name).shape)} against {list(other.spec(name).shape)}"
            for name in first
            if first.spec(name).shape != other.spec(name).shape
        ]
        if wrong:
            raise Error(f"{method}: model 1 and {who} differ in shape: {listed(wrong)}")
