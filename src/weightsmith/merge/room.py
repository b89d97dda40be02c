"""The signature of merging, and the one loop that lifts a kernel to whole checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from weightsmith.card import card_of
from weightsmith.errors import Error, listed
from weightsmith.lifting import accepted, dressed, example, per_tensor_options, sole, solver_of, staged, tried, unit_of
from weightsmith.merge._match import check_alike, matched, with_config, with_ties
from weightsmith.weights import Inputs, Lazy, Reduction, Spec, Stack, Weights, open, promote, same_names
from weightsmith.weights._lazy import takes_start

__all__ = ["Kernel", "Merge", "Source", "check_alike", "example_statistics", "lift", "opened_models"]

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
    inspect.Parameter(
        "rest", inspect.Parameter.KEYWORD_ONLY, default="error", annotation='Literal["error", "base", "first", "drop"]'
    ),
    inspect.Parameter(
        "nonfinite", inspect.Parameter.KEYWORD_ONLY, default="refuse", annotation='Literal["refuse", "allow"]'
    ),
)


def lift(kernel: Callable[..., Tensor]) -> Merge:
    """``(models, base, **options) -> Weights`` from a kernel on tensors. Options may be `PerTensor`.

    Called with a tensor ``[k, *shape]`` of models, the public function is the kernel. Where its card needs
    a base, or where the kernel can take one (``base: Tensor | None = None``) and it is given, the kernel is handed
    it; else the base serves only for tensors that hold no floats. Where the card needs statistics, ``stats`` is a
    list of them, one for each model and then one for the base if it needs a base; the kernel is handed them stacked
    after the base, or None for a tensor of which they say nothing.

    Every merge takes two options more. ``rest`` says what becomes of tensors that not all have in one shape:
    ``"error"`` lists them; ``"base"`` takes them from the base, so that the result has its tensors and no others;
    ``"first"`` from the first model that has them; ``"drop"`` leaves them out. ``nonfinite="allow"`` lets a merge
    write NaN and infinity, which is refused else, by the name of the tensor and of the model that had it.

    Tied tensors are merged once and stay tied. Where a name is tied in some models only, or where tied names are
    given different options, they come apart; a ``config.json`` then says ``tie_word_embeddings: false``.
    """
    card = card_of(kernel)
    parameters = inspect.signature(kernel).parameters
    needs_base = "base" in card.needs
    statistic = next((need for need in card.needs if need.startswith("stats.")), None)
    keyed = "key" in parameters  # random numbers that differ from tensor to tensor
    finite = functools.partial(checked, kernel=kernel)

    def merge(models: Any, base: Any = None, *more: Any, **options: Any) -> Any:
        if isinstance(models, Tensor):  # what follows the models is then what follows them in the kernel
            taken = needs_base or (base is not None and (statistic is not None or "base" in parameters))
            return kernel(models, *([base, *more] if taken else []), **options)
        if more:
            raise TypeError(f"{kernel.__name__} takes the models and a base by position; give the rest by name")
        said, given = dict(options), options.pop("stats", None) if statistic else None
        rest, nonfinite = options.pop("rest", "error"), options.pop("nonfinite", "refuse")
        if nonfinite not in ("refuse", "allow"):
            raise Error(f"{kernel.__name__}: nonfinite must be 'refuse' or 'allow', got {nonfinite!r}")
        opened = opened_models(models, kernel.__name__)
        origin = None if base is None else open(base)
        if needs_base and origin is None:
            raise Error(f"{kernel.__name__} needs base=, the weights that the models were fine-tuned from")
        used = origin is not None and "base" in parameters
        inputs = with_ties([*opened, *([origin] if origin is not None else [])])
        match = matched(inputs[: len(opened)], inputs[-1] if origin is not None else None, used, rest, kernel.__name__)
        opened, origin = match.models, match.base
        floating = opened[0].names(floating=True)
        chosen = per_tensor_options(kernel, options, floating)
        shapes: list[Any] = [example(len(opened), 2, 2), *([example(2, 2)] if used else [])]
        told: tuple[Weights, ...] = ()
        stacks: dict[str, Stack] = {}
        if statistic:
            told = opened_statistics(given, statistic, len(opened), needs_base, kernel.__name__)
            stacks = aligned(told, opened[0].select(floating=True), statistic, kernel.__name__)
            shapes.append(example_statistics(statistic, len(told), (2, 2)))
        tried(kernel, chosen.values(), *shapes)

        def arguments(name: str) -> list[Any]:
            members = tuple(model.node(name) for model in opened)
            of_base = [origin.node(name)] if used and origin is not None else []
            return [Stack(members), *of_base, *([stacks.get(name)] if told else [])]

        together = solved_together(kernel, arguments, chosen)

        def build(name: str, *nodes: Lazy) -> Lazy:
            if name not in chosen:
                return origin.node(name) if origin is not None and name in origin else nodes[0]
            spec = Spec(nodes[0].spec.shape, promote(*(node.spec.dtype for node in nodes)))
            own = chosen[name] | ({"key": name} if keyed else {})
            function = finite if nonfinite == "refuse" else None
            return sole(staged(kernel, arguments(name), own, {"": spec}, function=function, joint=together.get(name)))

        def apart(name: str) -> object:
            return chosen.get(name), origin is not None and name in origin and id(origin.node(name))

        merged = opened[0].zip_nodes(build, tuple(opened[1:]), f"merge.{kernel.__name__}", _said(said), apart)
        if base is not None or told:
            merged = _after(merged, [*([origin] if origin is not None else []), *told])
        return with_config(match.whole(merged), inputs)

    return dressed(merge, kernel, (*_PARAMETERS, _STATS) if statistic else _PARAMETERS)


def _said(options: dict[str, Any]) -> dict[str, Any]:
    usual = {"rest": "error", "nonfinite": "refuse"}
    return {name: value for name, value in options.items() if name != "stats" and usual.get(name) != value}


def solved_together(
    kernel: Callable[..., Tensor], arguments: Callable[[str], list[Any]], chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Reduction, int]]:
    """Tensor -> the reduction over all tensors that its coefficients come from, and where it begins in it.

    Empty unless the card says of these options that tensors are solved together.
    """
    card = card_of(kernel)
    if card.joint is None or card.solve is None or not chosen:
        return {}
    wanted = {name: card.joint(**accepted(card.joint, options)) for name, options in chosen.items()}
    if not any(wanted.values()):
        return {}
    first, *others = chosen
    solver_options = accepted(card.solve, chosen[first])
    for name in others:
        if not wanted[name] or not wanted[first] or accepted(card.solve, chosen[name]) != solver_options:
            raise Error(
                f"{kernel.__name__}: the whole model has one threshold here, so {', '.join(solver_options)} cannot "
                f"differ by tensor; {first} and {name} have other values"
            )
    places: dict[tuple[int, ...], int] = {}
    items: list[Inputs] = []
    index: dict[str, int] = {}
    for name, options in chosen.items():
        inputs = Inputs(arguments(name), unit_of(kernel, arguments(name), options))
        key = tuple(id(node) for node in inputs.nodes)
        if key not in places:  # tied tensors count once
            places[key] = len(items)
            items.append(inputs)
        index[name] = places[key]
    reduction = Reduction(items, solver_of(kernel, chosen[first]))
    return {name: (reduction, reduction.offsets[place]) for name, place in index.items()}


def checked(*arguments: Any, kernel: Callable[..., Tensor], start: int = 0, **options: Any) -> Tensor:
    """What a kernel makes of a chunk; an error where that is NaN or infinite."""
    result = kernel(*arguments, **({"start": start} if takes_start(kernel) else {}), **options)
    # One sum finds out whether all is well: it is finite unless something in it is not, or it overflows.
    if result.numel() and not math.isfinite(result.sum()) and not (wrong := ~result.isfinite()).logical_not().all():
        raise Error(_whose(arguments, result, wrong, start))
    return result


def _whose(arguments: Sequence[Any], result: Tensor, wrong: Tensor, start: int) -> str:
    place = int(wrong.flatten().nonzero()[0])
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    models, others = tensors[0], tensors[1:]
    named = [(f"model {number + 1}", model) for number, model in enumerate(models)]
    named += [("the base", one) for one in others[:1] if one.shape == models.shape[1:]]
    there = [who for who, values in named if not values.reshape(-1)[place].isfinite()]
    near = [who for who, values in named if not values.isfinite().all()]
    found = f"the merge gives {float(result.flatten()[place])} at element {start + place}"
    if there:
        return f"{found}, because {' and '.join(there)} holds no number there; mend it, or pass nonfinite='allow'"
    if near:
        return f"{found}, because {' and '.join(near)} holds NaN or infinity nearby; mend it, or nonfinite='allow'"
    return (
        f"{found}, where all inputs are finite: it comes from the merge itself (too large a weight?) or from NaN or "
        "infinity elsewhere in this tensor; weightsmith.inspect.verify finds those; or pass nonfinite='allow'"
    )


def opened_models(models: Sequence[Source], method: str) -> list[Weights]:
    """The models as `Weights`; at least one."""
    if isinstance(models, str | os.PathLike | Mapping | nn.Module):
        raise Error(f"{method} takes a list of models, got one {type(models).__name__}")
    if not models:
        raise Error(f"{method} needs at least 1 model, got 0")
    return [open(model) for model in models]


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
    """The lineage names the base and the statistics as well."""
    inputs = (*merged.lineage.inputs, *(one.lineage for one in told))
    lineage = dataclasses.replace(merged.lineage, inputs=inputs)
    return Weights({name: merged.node(name) for name in merged}, lineage, merged.files, merged.metadata)
