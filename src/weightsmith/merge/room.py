"""The signature of merging, and the one loop that lifts a kernel to whole checkpoints."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, overload

import torch
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


_STATS = inspect.Parameter("stats", inspect.Parameter.KEYWORD_ONLY, annotation="Sequence[Source]")

_PARAMETERS = (
    inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Sequence[Source]"),
    inspect.Parameter("base", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation="Source | None"),
)


def lift(kernel: Callable[..., Tensor]) -> Merge:
    """``(models, base, **options) -> Weights`` from a kernel on tensors. Options may be `PerTensor`.

    Called with a tensor ``[k, *shape]`` of models, the public function is the kernel. Where its card needs
    statistics, ``stats`` is a list of them, one for each model and then one for the base if it needs a base;
    the kernel is handed them stacked after the base, or None for a tensor of which they say nothing.
    """
    needs = card_of(kernel).needs
    needs_base = "base" in needs
    statistic = next((need for need in needs if need.startswith("stats.")), None)
    keyed = "key" in inspect.signature(kernel).parameters  # random numbers that differ from tensor to tensor

    def merge(models: Any, base: Any = None, *more: Any, **options: Any) -> Any:
        if isinstance(models, Tensor):  # what follows the models is then what follows them in the kernel
            tensors = [base, *more] if needs_base or (statistic and base is not None) else []
            return kernel(models, *tensors, **options)
        if more:
            raise TypeError(f"{kernel.__name__} takes the models and a base by position; give the rest by name")
        given = options.pop("stats", None) if statistic else None
        opened = opened_models(models, kernel.__name__)
        origin = None if base is None else open(base)
        if needs_base and origin is None:
            raise Error(f"{kernel.__name__} needs base=, the weights that the models were fine-tuned from")
        check_alike(opened, origin, kernel.__name__)
        others = (*opened[1:], *((origin,) if origin is not None else ()))
        floating = opened[0].names(floating=True)
        chosen = per_tensor_options(kernel, options, floating)
        shapes: list[Any] = [example(len(opened), 2, 2), *([example(2, 2)] if needs_base else [])]
        told: tuple[Weights, ...] = ()
        stacks: dict[str, Stack] = {}
        if statistic:
            told = opened_statistics(given, statistic, len(opened), needs_base, kernel.__name__)
            stacks = aligned(told, opened[0].select(floating=True), statistic, kernel.__name__)
            shapes.append(example_statistics(statistic, len(told), (2, 2)))
        tried(kernel, chosen.values(), *shapes)

        def build(name: str, *nodes: Lazy) -> Lazy:
            if name not in chosen:
                return nodes[-1] if origin is not None else nodes[0]
            members = nodes[: len(opened)]
            arguments = [Stack(members), *([nodes[-1]] if needs_base else []), *([stacks.get(name)] if told else [])]
            spec = Spec(nodes[0].spec.shape, promote(*(node.spec.dtype for node in members)))
            return sole(staged(kernel, arguments, chosen[name] | ({"key": name} if keyed else {}), {"": spec}))

        merged = opened[0].zip_nodes(build, others, f"merge.{kernel.__name__}", options)
        return _after(merged, told) if told else merged

    return dressed(merge, kernel, (*_PARAMETERS, _STATS) if statistic else _PARAMETERS)


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


# Statistics


def opened_statistics(
    given: Sequence[Source] | None, statistic: str, count: int, of_base: bool, method: str
) -> tuple[Weights, ...]:
    """One statistic for each of ``count`` models, and one for the base."""
    wanted = f"one for each of the {count} models" + (", then one for the base" if of_base else "")
    if given is None or isinstance(given, str | os.PathLike | Mapping | nn.Module):
        found = "none" if given is None else f"one {type(given).__name__}"
        raise Error(f"{method} needs stats=, a list of what weightsmith.{statistic} finds, {wanted}; got {found}")
    if len(given) != count + of_base:
        raise Error(f"{method} needs stats= {wanted}; got {len(given)}")
    return tuple(open(one) for one in given)


def aligned(told: Sequence[Weights], model: Weights, statistic: str, method: str) -> dict[str, Stack]:
    """Weight name -> its statistics, for every weight of which they say something.

    A tied weight has its statistics under any of its names.
    """
    first = told[0]
    for other in told[1:]:
        same_names(first, other, f"{method}: stats must speak of the same weights")
    alike: dict[int, str] = {id(model.node(name)): name for name in model if name in first}
    stacks = {}
    for name in model:
        known = alike.get(id(model.node(name)))
        if known is not None:
            shape = _statistic_shape(statistic, model.spec(name).shape)
            for one in told:
                if one.spec(known).shape != shape:
                    raise Error(
                        f"{method}: {statistic} of {known} is {list(one.spec(known).shape)}, but its weight "
                        f"{list(model.spec(name).shape)} needs {'none' if shape is None else list(shape)}"
                    )
            stacks[name] = Stack(tuple(one.node(known) for one in told))
    if not stacks:
        raise Error(f"{method}: stats say nothing of any weight; they have {listed(first)}, the models {listed(model)}")
    return stacks


def example_statistics(statistic: str, count: int, shape: tuple[int, ...]) -> Tensor | None:
    """Statistics ``[count, ...]`` such as data could give for weights of a shape; None where there are none.

    They depend on nothing but the arguments, so that laws can be tried on methods that need them.
    """
    generator = torch.Generator().manual_seed(0)
    found = _statistic_shape(statistic, shape)
    if found is None:
        return None
    if statistic == "stats.gram":
        rows = torch.randn(count, found[0] + 2, found[0], generator=generator)
        return rows.mT @ rows
    return 0.1 + torch.rand(count, *found, generator=generator)


def _statistic_shape(statistic: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if statistic != "stats.gram":
        return shape
    return (math.prod(shape[1:]),) * 2 if len(shape) > 1 else None


def _after(merged: Weights, told: Sequence[Weights]) -> Weights:
    """The lineage names the statistics as well."""
    inputs = (*merged.lineage.inputs, *(one.lineage for one in told))
    lineage = dataclasses.replace(merged.lineage, inputs=inputs)
    return Weights({name: merged.node(name) for name in merged}, lineage, merged.files, merged.metadata)
