"""The signature of quantizing, and the one loop that lifts it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args, overload

import torch
from torch import Tensor, nn

from weightsmith.card import card_of
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.lifting import dressed, example, per_tensor_options, tried
from weightsmith.prune import prunable
from weightsmith.prune.room import of_targets
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._layout import Layout, endings_of, parts_of, with_codes
from weightsmith.quantize.grids import Grid, Integer, described, named
from weightsmith.weights import (
    Entire,
    Held,
    Inputs,
    Lazy,
    Output,
    Pattern,
    PerTensor,
    Step,
    Weights,
    Work,
    apply,
    open,
    resolve,
)

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

Indivisible = Literal["error", "ragged", "pad", "shrink", "skip"]
"""What is done where groups do not fill a row: nothing (an error), a shorter last group, inputs of zeros at its end,
the largest smaller group that fills it, or leaving the tensor as it is."""

Action = Literal["codes", "values"]
"""Codes and what decodes them, or the values that they stand for."""


class Quantize(Protocol):
    """What a user calls."""

    kernel: Callable[..., Coded]

    @overload
    def __call__(
        self,
        weights: Source,
        *,
        stats: Source | None = None,
        bits: PerTensor[int] | None = None,
        group: PerTensor[int | None] = None,
        grid: PerTensor[str | Grid] = "int",
        symmetric: PerTensor[bool] | None = None,
        scale_dtype: PerTensor[torch.dtype | str] | None = None,
        indivisible: Indivisible = "error",
        pattern: Pattern | None = None,
        action: Action = "codes",
        **options: Any,
    ) -> Weights: ...

    @overload
    def __call__(self, weights: Tensor, *given: Any, **options: Any) -> Coded: ...


_KINDS = inspect.Parameter
_PARAMETERS = (
    _KINDS("weights", _KINDS.POSITIONAL_OR_KEYWORD, annotation="Source"),
    _KINDS("stats", _KINDS.KEYWORD_ONLY, default=None, annotation="Source | None"),
    _KINDS("bits", _KINDS.KEYWORD_ONLY, default=None, annotation="PerTensor[float] | None"),
    _KINDS("group", _KINDS.KEYWORD_ONLY, default=None, annotation="PerTensor[int | None]"),
    _KINDS("grid", _KINDS.KEYWORD_ONLY, default="int", annotation="PerTensor[str | Grid]"),
    _KINDS("symmetric", _KINDS.KEYWORD_ONLY, default=None, annotation="PerTensor[bool] | None"),
    _KINDS("scale_dtype", _KINDS.KEYWORD_ONLY, default=None, annotation="PerTensor[str] | None"),
    _KINDS(
        "indivisible",
        _KINDS.KEYWORD_ONLY,
        default="error",
        annotation='Literal["error", "ragged", "pad", "shrink", "skip"]',
    ),
    _KINDS("pattern", _KINDS.KEYWORD_ONLY, default=None, annotation="Pattern | None"),
    _KINDS("action", _KINDS.KEYWORD_ONLY, default="codes", annotation='Literal["codes", "values"]'),
)

SETTINGS = ("bits", "group", "symmetric", "scale_dtype")
"""Options that make a grid from a word."""

REMEDY = 'say with indivisible= what is to be done: "ragged", "pad", "shrink" or "skip"'


def lift(kernel: Callable[..., Coded]) -> Any:
    """``(weights, *, stats, bits, group, grid, ...) -> Weights`` from a rounding ``(weight [out, in], gram) -> Coded``.

    The public function takes, beside the rounding's own options (each possibly `PerTensor`): ``grid``, a word of
    `weightsmith.quantize.grids` with ``bits``, ``group`` (None: the grid's own, whole rows for integers),
    ``symmetric`` and ``scale_dtype`` (default: that of the weights), or a grid; ``indivisible``, what is done where
    groups do not fill a row; ``stats``, the Gram matrices of the inputs, needed where the card says so;
    ``pattern``, which tensors (default: matrices and convolutions without embeddings and the head); ``action``,
    ``"codes"`` or the ``"values"`` that they stand for. Convolutions are quantized as ``[out, in * kernel]``, fused
    experts ``[experts, out, in]`` as the matrices that they are. Called with a tensor it is the kernel, with a grid
    made of the same options.
    """
    needs = "stats.gram" in card_of(kernel).needs
    takes = needs or takes_gram(kernel)
    about = [one.replace(default=usual_grid(kernel)) if one.name == "grid" else one for one in _PARAMETERS]
    own = {"grid": usual_grid(kernel)} | dict.fromkeys(SETTINGS)

    def quantize(weights: Any, *given: Any, **options: Any) -> Any:
        if isinstance(weights, Tensor):
            made = {name: options.pop(name, usual) for name, usual in own.items()}
            return kernel(weights, *given, grid=named(made.pop("grid"), **made), **options)
        if given:
            raise Error(f"{kernel.__name__} takes weights; all else goes by name")
        action, stats = options.pop("action", "codes"), options.pop("stats", None)
        if action not in get_args(Action):
            raise Error(f"action is 'codes' or 'values', got {action!r}")
        opened = open(weights)
        plans = planned(kernel, opened, options)
        grams: Mapping[str, Any] = {}
        if stats is not None and not takes:
            raise Error(f"{kernel.__name__} takes no stats")
        if needs or stats is not None:
            grams = _grams(stats, opened, plans, kernel.__name__)
        said = {name: value for name, value in options.items() if name != "pattern"}
        if action == "values":
            coded = {name: _work(kernel, opened.node(name), plan, grams.get(name)) for name, plan in plans.items()}

            def build(name: str, node: Lazy) -> Lazy:
                return _values(node, plans[name], coded[name]) if name in coded else node

            return opened.zip_nodes(build, (), f"quantize.{kernel.__name__}", said)
        return _coded_by(kernel, opened, plans, grams, said)

    return dressed(quantize, kernel, about)


def outlined(kernel: Callable[..., Coded], weights: Source, options: Mapping[str, Any]) -> Weights:
    """The names, shapes and words that a rounding will give, for what is to be checked before long work.

    Its codes are not to be read: no data have been asked.
    """
    opened = open(weights)
    return _coded_by(kernel, opened, planned(kernel, opened, options), {}, {})


def takes_gram(kernel: Callable[..., Any]) -> bool:
    """Whether a rounding can be told of the inputs."""
    return "gram" in inspect.signature(kernel).parameters


def _coded_by(
    kernel: Callable[..., Coded], weights: Weights, plans: Mapping[str, Plan], grams: Mapping[str, Any],
    said: Mapping[str, Any],
) -> Weights:  # fmt: skip
    nodes = {
        name: nodes_of(_work(kernel, weights.node(name), plan, grams.get(name)), plan) for name, plan in plans.items()
    }
    step = Step(f"quantize.{kernel.__name__}", said, (weights.lineage,))
    return with_codes(weights, nodes, {name: plan.layout for name, plan in plans.items()}, step)


def _grams(stats: Source | None, weights: Weights, plans: Mapping[str, Plan], method: str) -> dict[str, Any]:
    """The Gram matrices of all tensors; of fused experts ``[experts, in, in]`` or ``[experts, in]``."""
    told = None if stats is None else open(stats)
    fused: dict[str, Any] = {}
    for name, plan in plans.items():
        inputs, experts = plan.layout.inputs, plan.layout.experts
        if told is not None and experts > 0 and name in told:
            shape = told.spec(name).shape
            if shape not in ((experts, inputs, inputs), (experts, inputs)):
                raise Error(f"{method}: stats.gram of {name} is {list(shape)}; of {experts} experts it has one of each")
            fused[name] = told.node(name)
        elif told is not None and name in told and _by_rows(told.spec(name).shape, plan.layout):
            fused[name] = told.node(name)
    return fused | of_targets(told, "stats.gram", weights, [name for name in plans if name not in fused], method)


def _by_rows(shape: Sequence[int], layout: Layout) -> bool:
    """Whether this is a Gram matrix for each of several runs of rows, as `weightsmith.stats.guided_gram` finds them."""
    inputs = (layout.inputs, layout.inputs)
    return len(shape) == 3 and shape[0] > 1 and tuple(shape[1:]) == inputs and layout.rows % shape[0] == 0


# What is done with each tensor, before anything is read


@dataclass(frozen=True)
class Plan:
    """What becomes of one tensor."""

    layout: Layout
    options: Mapping[str, Any]

    @property
    def grid(self) -> Grid:
        return self.layout.grid


def planned(kernel: Callable[..., Coded], weights: Weights, options: Mapping[str, Any]) -> dict[str, Plan]:
    """Tensor -> plan, every option looked up and checked.

    Raises:
        Error: options that do not fit, a pattern that fits no matrix, or groups that do not fill rows, all by name.
    """
    given = dict(options)
    targets = targets_of(weights, given.pop("pattern", None))
    policy = given.pop("indivisible", "error")
    if policy not in get_args(Indivisible):
        raise Error(f"indivisible is one of {', '.join(get_args(Indivisible))}; got {policy!r}")
    usual_settings = {"grid": usual_grid(kernel), **dict.fromkeys(SETTINGS)}
    about = {name: resolve(given.pop(name, usual), targets, name) for name, usual in usual_settings.items()}
    _known(kernel, given)
    chosen = per_tensor_options(kernel, {**given, "grid": Integer()}, targets)
    chosen = {name: {key: value for key, value in own.items() if key != "grid"} for name, own in chosen.items()}
    grids: dict[str, Grid] = {}
    for name in targets:
        made = {option: column[name] for option, column in about.items()}
        spec = weights.spec(name)
        if made["scale_dtype"] is None and isinstance(made["grid"], str):
            made["scale_dtype"] = spec.dtype if spec.dtype.itemsize > 1 else torch.bfloat16
        try:
            grids[name] = named(made.pop("grid"), **made)
        except Error as error:
            raise Error(f"{name} {list(spec.shape)}: {error}") from None
    known = [torch.eye(2)] if "stats.gram" in card_of(kernel).needs else []
    tried(kernel, [{**chosen[name], "grid": grid} for name, grid in grids.items()], example(2, 2), *known)
    layouts = {name: Layout.of(name, weights.spec(name), grid) for name, grid in grids.items()}
    return {name: Plan(layout, chosen[name]) for name, layout in divided(layouts, policy).items()}


def usual_grid(kernel: Callable[..., Coded]) -> str:
    """The word of the grid that a rounding has by default."""
    usual = inspect.signature(kernel).parameters["grid"].default
    return described(usual)["grid"] if isinstance(usual, Grid) else "int"


def _known(kernel: Callable[..., Coded], given: Mapping[str, Any]) -> None:
    """A misspelt option is told with all that there are."""
    from weightsmith.lifting import options_of

    known = [*(name for name in options_of(kernel) if name != "grid"), *(p.name for p in _PARAMETERS[2:])]
    for name in given:
        if name not in known:
            raise Error(
                f"{kernel.__name__} has no option {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}"
            )


def targets_of(weights: Weights, pattern: Pattern | None) -> list[str]:
    """The tensors to quantize, tied ones once."""
    if pattern is None:
        names = prunable(weights)
    else:
        ties = weights.ties
        names = list(dict.fromkeys(ties.get(name, name) for name in weights.names(pattern, floating=True)))
    flat = [name for name in names if not weights.spec(name).shape]
    if flat or not names:
        raise Error(f"no matrix to quantize fits pattern={pattern!r}" if not names else f"{flat[0]} is a single number")
    return names


def divided(layouts: Mapping[str, Layout], policy: str, remedy: str = REMEDY) -> dict[str, Layout]:
    """Layouts in which groups fill rows, or are let be as the policy says; an error names all that do not.

    ``remedy`` is what the error says beside the groups that fit: callers without ``indivisible=`` have another.
    """
    found, wrong = {}, []
    for name, layout in layouts.items():
        group, inputs = layout.grid.group, layout.inputs
        if group is None or inputs % group == 0 or policy == "ragged":
            found[name] = layout
        elif policy == "pad":
            found[name] = replace(layout, padding=-inputs % group)
        elif policy == "shrink":
            found[name] = replace(layout, grid=with_group(layout.grid, largest_divisor(inputs, group)))
        elif policy == "error":
            wrong.append(name)
    if wrong:
        first = layouts[wrong[0]]
        fitting = [size for size in (16, 32, 48, 64, 96, 128, 192, 256) if first.inputs % size == 0]
        hint = f"; these fit: {', '.join(map(str, fitting))}, or None for whole rows" if fitting else "; use group=None"
        raise Error(
            f"{listed(wrong)}: groups of {first.grid.group} do not fill a row of {first.inputs} inputs{hint}; "
            f"or {remedy}"
        )
    if not found:
        raise Error("no tensor has rows that groups fill, and indivisible='skip' leaves the others as they are")
    return found


def largest_divisor(number: int, most: int) -> int:
    """The largest whole number up to ``most`` that divides another.

    >>> largest_divisor(576, 128)
    96
    """
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)


def with_group(grid: Any, group: int) -> Any:
    """The same grid with groups of another size."""
    try:
        return replace(grid, group=group)
    except TypeError:
        raise Error(f"groups of {type(grid).__name__} have one size; indivisible='shrink' cannot change it") from None


# What each tensor becomes


def _work(kernel: Callable[..., Coded], node: Lazy, plan: Plan, gram: Any) -> Work:
    """The endings of a tensor, as outputs of one function."""
    layout = plan.layout
    outputs = endings_of(layout)
    alone = any(stored.shared for stored in layout.grid.stored().values())
    each = gram is not None and layout.experts > 0  # every expert has a Gram matrix of its own
    unit = "tensor" if alone or each else card_of(kernel).unit
    arguments = [node] if gram is None else [node, Entire(gram.node if hasattr(gram, "node") else gram)]
    function = partial(_encoded, kernel, layout, tuple(plan.options.items()))
    return Work(function, Inputs(arguments, unit), outputs)  # type: ignore[arg-type]


def nodes_of(work: Work, plan: Plan) -> dict[str, Lazy]:
    """Ending -> node."""
    found: dict[str, Lazy] = {key: Output(work, key) for key in work.outputs}
    return found | {"_shape": Held(torch.tensor(plan.layout.shape))}


def _encoded(
    kernel: Callable[..., Coded], layout: Layout, options: Sequence[tuple[str, Any]], weight: Tensor,
    gram: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    return parts_of(rounded(kernel, layout, dict(options), weight, gram), layout)


def rounded(
    kernel: Callable[..., Coded], layout: Layout, options: Mapping[str, Any], weight: Tensor, gram: Tensor | None
) -> Coded:
    """The codes of a tensor or of a run of its rows, by a rounding of matrices."""
    rows = layout.matrix(weight)
    told = [] if gram is None else [gram]
    if gram is not None and layout.experts > 0:
        common = [name for name, one in layout.grid.stored().items() if one.shared]
        if common:
            raise Error(
                f"{layout.grid} has one {common[0]} for the whole tensor, and the experts of one tensor are rounded "
                "one by one; leave them out with pattern=, or take another grid"
            )
        pieces = [
            kernel(one, layout.padded(own), grid=layout.grid, **options)
            for one, own in zip(rows.unflatten(0, (layout.experts, -1)), gram, strict=True)
        ]
        params = {name: torch.cat([piece.params[name] for piece in pieces]) for name in pieces[0].params}
        return Coded(torch.cat([piece.codes for piece in pieces]), params, layout.grid, pieces[0].shared)
    return kernel(rows, *(layout.padded(one) for one in told), grid=layout.grid, **options)


def _values(node: Lazy, plan: Plan, work: Work) -> Lazy:
    """The values that codes stand for, in the place of a tensor."""
    arguments, unit = work.cut.arguments, work.cut.unit
    whole = partial(_decoded, work.function, plan.layout)
    return apply(whole, *arguments, unit=unit, spec=node.spec)


def _decoded(encode: Any, layout: Layout, *arguments: Tensor) -> Tensor:
    kernel, _, options = encode.args
    weight, *gram = arguments
    found = rounded(kernel, layout, dict(options), weight, gram[0] if gram else None)
    return found.values()[:, : layout.inputs].reshape(weight.shape).to(weight.dtype)


__all__ = ["Action", "Indivisible", "Integer", "Plan", "Quantize", "Source", "lift", "planned", "targets_of"]
