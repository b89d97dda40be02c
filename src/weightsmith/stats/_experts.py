"""How much the inputs of each expert lie in each direction, where all experts' weights are one tensor.

A mixture of experts often keeps the weights of all experts of a layer in one tensor ``[experts, out, in]`` that no
layer of its own stands for: there is nothing to hang a hook on. What can be seen is the product itself: the model
multiplies rows with a part of the tensor (one expert after another) or with all of it (rows sorted by expert).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from weightsmith.errors import Error
from weightsmith.stats._gram import add_into, add_product, check_sums, finite, mirror
from weightsmith.stats._taps import AT_ONCE, Store, apart, look
from weightsmith.stats.room import Access, Batch, Forward, chosen_names, collect, size
from weightsmith.weights import Pattern, Weights, matches, working

Form = Literal["full", "diagonal"]

_GROUPED = tuple(
    function
    for function in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if function is not None
)


def expert_gram(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    form: Form = "full",
    pattern: Pattern = "*",
    sums: torch.dtype = torch.float64,
    store: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    forward: Forward | None = None,
) -> Weights:
    r"""Gram matrices of the inputs of each expert, for experts that are fused into one tensor.

    .. math:: G_e = X_e^\top X_e

    with :math:`X_e` ``[rows, in]`` what the weights ``[out, in]`` of expert e are multiplied with: the tokens that were
    sent to it, as often as they were, or what it makes of them.

    Args:
        model: asked in evaluation mode and left as it was. It must multiply with the parameter itself, through
            ``torch.nn.functional.linear`` or ``grouped_mm``: in transformers, ``experts_implementation`` is ``"eager"``
            or ``"grouped_mm"``; where it multiplies with a copy (``"batched_mm"``) nothing is seen.
        batches: ``inputs``, ``(inputs, labels)`` or mappings. Padded tokens count, if the model sends them to experts:
            leave padding out of the data.
        form: ``"full"``, or ``"diagonal"``: of each input its sum of squares.
        pattern: names of the parameters; those with three axes are taken.
        sums, store, memory: as for `gram`. A matrix for each expert is much: of 128 experts and 2048 inputs 4 GB a
            tensor.
        forward: ``(model, batch) -> logits``, where the default does not fit.

    Returns:
        Weights: ``[experts, in, in]`` or ``[experts, in]`` float32 under the name of each parameter ``[experts, out,
        in]``, zeros for experts that were sent nothing. Parameters that were not seen have none, such as those that
        lie ``[experts, in, out]``.

    Raises:
        ValueError: no batch, no parameter that fits, none that was seen in use, or inputs that are not finite.

    >>> class Experts(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(2, 3, 1))
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.weight[1])
    >>> expert_gram(Experts(), [torch.tensor([[1.0], [2.0]])])["weight"].flatten()
    tensor([0., 5.])
    """
    statistic = ExpertGram(pattern, form, sums, store, memory)
    return collect(model, batches, {"gram": statistic}, forward=forward)["gram"]


@dataclass(frozen=True)
class ExpertGram:
    """The settings of `expert_gram`, for `collect`."""

    pattern: Pattern = "*"
    form: Form = "full"
    sums: torch.dtype = torch.float64
    store: str | os.PathLike[str] | None = None
    memory: int | str | None = None
    kind = "expert gram"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise Error(f"form is one of {', '.join(get_args(Form))}; got {self.form!r}")
        check_sums(self.sums)
        Store.of(self.store, self.memory)

    def counter(self, access: Access) -> _Counter:
        able = {name: value for name, value in access.model.named_parameters() if _fused(value)}
        chosen = {name: value.detach() for name, value in able.items() if matches(self.pattern, name)}
        chosen_names(able, list(chosen), self.pattern)
        return _Counter(chosen, self.form, self.sums, Store.of(self.store, self.memory))


def _fused(value: Tensor) -> bool:
    return value.dim() == 3 and value.is_floating_point() and value.is_contiguous() and value.numel() > 0


@dataclass
class _Counter:
    weights: Mapping[str, Tensor]
    form: Form
    sums: torch.dtype
    store: Store
    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    checks: list[tuple[list[str], Tensor]] = field(default_factory=list)
    batches: int = 0

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        with _Products(self):
            yield

    def see(self, batch: Batch) -> None:
        self.batches += 1
        if size(batch) and not self.counts:
            raise Error(
                "none of these parameters was seen in a product: the model multiplies with copies of them, or they lie "
                "[experts, in, out]. In transformers, choose experts_implementation='eager' or 'grouped_mm'"
            )
        look("inputs", self.checks, self.batches)
        self.checks.clear()

    def add(self, name: str, expert: int, rows: Tensor) -> None:
        """Rows ``[r, in]`` that an expert's weights were multiplied with."""
        with apart(rows):
            inputs = rows.shape[1]
            shape = (inputs, inputs) if self.form == "full" else (inputs,)
            if name not in self.totals:
                example = torch.zeros((), dtype=working(rows[:0]).dtype, device=rows.device)
                self.totals[name] = self.store.zeros(example.expand(len(self.weights[name]), *shape), self.sums)
            found = torch.zeros(shape, dtype=working(rows[:0]).dtype, device=rows.device)
            for some in rows.split(max(AT_ONCE // inputs, 1)):
                add_product(found, working(some))
            self.checks.append(([name], finite(found)))
            total = self.totals[name][expert]
            add_into(total, found.to(total.device))
            self.counts[name] = self.counts.get(name, 0) + len(rows)

    def rows(self) -> dict[str, float]:
        return {name: float(self.counts.get(name, 0)) for name in self.weights}

    def result(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in self.weights:
            if self.counts.get(name, 0):
                total = self.totals.pop(name)
                made[name] = total if total.dtype == torch.float32 else self.store.copy(total, torch.float32)
                if self.form == "full":
                    mirror(made[name])
        return made


class _Products(TorchFunctionMode):
    """Sees every product with a watched parameter, and changes none."""

    def __init__(self, counter: _Counter):
        super().__init__()
        self.counter = counter
        self.places = {
            value.data_ptr() + expert * value[0].nbytes: (name, expert)
            for name, value in counter.weights.items()
            for expert in range(len(value))
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            given, weight = _arguments(args, kwargs, ("input", "weight"))
            if weight.dim() == 2 and (place := self._place(weight, weight)):
                self.counter.add(*place, given.detach().reshape(-1, given.shape[-1]))
        elif func in _GROUPED:
            given, weight = _arguments(args, kwargs, ("mat_a", "mat_b"))
            ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
            by_expert = weight.dim() == 3 and len(weight) > 0 and given.dim() == 2
            if by_expert and ends is not None and (place := self._place(weight, weight[0].mT)):
                self._grouped(*place, given.detach(), [0, *ends.tolist()])
        return func(*args, **kwargs)

    def _place(self, value: Tensor, expert: Tensor) -> tuple[str, int] | None:
        """Name and expert of which ``expert`` is the weight, ``[out, in]``, in the parameter itself."""
        place = self.places.get(value.data_ptr())
        if place is None:
            return None
        own = self.counter.weights[place[0]][place[1]]
        same = own.shape == expert.shape and own.stride() == expert.stride() and own.dtype == expert.dtype
        return place if same else None

    def _grouped(self, name: str, first: int, given: Tensor, ends: list[int]) -> None:
        """Rows sorted by expert, for all experts or a run of them."""
        for expert, (start, stop) in enumerate(itertools.pairwise(ends), first):
            if start < stop:
                self.counter.add(name, expert, given[start:stop])


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, str]) -> tuple[Any, ...]:
    return tuple(args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names))
