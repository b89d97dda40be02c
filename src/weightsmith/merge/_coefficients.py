"""Coefficients of a combination of models, found by gradient descent on what the combination does.

What can be mixed from models, ``start + sum_i a_i direction_i``, is linear in the coefficients: the slope along
a coefficient is the inner product of the gradient by the weights with the direction that it scales. So training
them costs about what training the model costs, and only as much can be learned as there are coefficients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from weightsmith import progress
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.stats.room import Batch, Forward, Loss, counted, default_forward, default_loss, predictions, size
from weightsmith.weights import Weights, depth_of, working

Per = Literal["model", "layer", "tensor"]
"""What shares a coefficient: all of a model, all tensors of one depth, or nothing."""

Objective = Literal["entropy", "agreement", "confident", "labels"]

Values = Mapping[str, Tensor]


# What can be mixed


@dataclass(frozen=True, eq=False)
class Span:
    """All that can be mixed from some models: held in memory, beside a module that it is tried in."""

    module: nn.Module
    start: Values
    """Under the first name of each tensor of floats."""
    directions: Values
    """``[k, *shape]``: how each model differs from the start."""
    fixed: Values
    """What holds no floats."""
    first: Mapping[str, str]
    """Every name with floats -> the first name of the same tensor."""
    group: Mapping[str, int]
    """First name -> row of the coefficients ``[groups, k]``."""

    @property
    def groups(self) -> int:
        """How many coefficients each model has."""
        return len(set(self.group.values()))

    def mixed(self, weight: Tensor) -> dict[str, Tensor]:
        """Values under the first names, for coefficients ``[groups, k]``."""
        return {
            name: start + torch.tensordot(weight[self.group[name]].to(start), self.directions[name], dims=1)
            for name, start in self.start.items()
        }

    def model(self, values: Values) -> Callable[..., Any]:
        """The module as a function of its inputs, with these values under first names."""
        held = {**self.fixed, **{name: values[first] for name, first in self.first.items()}}
        return lambda *inputs, **named: functional_call(self.module, held, inputs, named)

    def single(self, number: int) -> dict[str, Tensor]:
        """The values of one model."""
        return {name: start + self.directions[name][number] for name, start in self.start.items()}

    def option(self, weight: Tensor) -> dict[str, list[float]]:
        """Coefficients ``[groups, k]`` as an option that differs by tensor."""
        rows = weight.tolist()
        if self.groups == 1:
            return {"*": rows[0]}
        return {escape(name): rows[self.group[first]] for name, first in self.first.items()}


def span(module: nn.Module, models: Sequence[Weights], start: Weights, per: Per, method: str) -> Span:
    """Read models into memory as differences from a start: float32 or wider, on the module's devices.

    Args:
        module: has every tensor of the models under its name; what it has beside them stays its own.
        models: alike, and like the start.
        start: what the coefficients 0 stand for.
        per: what shares a coefficient.
        method: for errors.
    """
    if per not in get_args(Per):
        raise Error(f"{method}: per is one of {', '.join(get_args(Per))}; got {per!r}")
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    unknown = [name for name in start if name not in own]
    if unknown:
        hint = did_you_mean(unknown[0], own)
        raise Error(f"{method}: the module has no {listed(unknown)}{hint}; leave them out with .drop(...)")
    wrong = [
        f"{name} {list(start.spec(name).shape)} against {list(own[name].shape)}"
        for name in start
        if start.spec(name).shape != tuple(own[name].shape)
    ]
    if wrong:
        raise Error(f"{method}: the models and the module differ in shape: {listed(wrong)}")
    names = start.names(floating=True)
    if not names:
        raise Error(f"{method}: the models have no tensor of floats to mix")
    first = _first_names(names, own, (start, *models))
    begun, directions = {}, {}
    for name in dict.fromkeys(first.values()):
        place = start[name].device if own[name].is_meta else own[name].device
        begun[name] = working(start[name].to(place))
        stacked = torch.stack([model[name].to(place, begun[name].dtype) for model in models])
        directions[name] = stacked.sub_(begun[name])
    fixed = {name: start[name].to(own[name].device) for name in start if name not in first}
    return Span(module, begun, directions, fixed, first, _grouped(names, first, per))


def _first_names(names: Sequence[str], own: Mapping[str, Tensor], weights: Sequence[Weights]) -> dict[str, str]:
    """Names that are one tensor in the module, or in all the weights, share a coefficient and a value."""
    seen: dict[object, str] = {}
    first = {}
    for name in names:
        keys = (id(own[name]), tuple(id(one.node(name)) for one in weights))
        found = next((seen[key] for key in keys if key in seen), name)
        seen.update(dict.fromkeys(keys, found))
        first[name] = found
    return first


def _grouped(names: Sequence[str], first: Mapping[str, str], per: Per) -> dict[str, int]:
    depths = depth_of(names)
    keys = {name: {"model": 0, "layer": depths[name], "tensor": name}[per] for name in dict.fromkeys(first.values())}
    rows = {key: row for row, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: rows[key] for name, key in keys.items()}


# What is asked of a mixture


def entropy(logits: Tensor, batch: Batch) -> Tensor:
    """How unsure the predictions are: the mean of ``-sum_c p_c log p_c``."""
    rows = predictions(logits, batch)
    unsure = -(rows.softmax(-1) * rows.log_softmax(-1)).sum(-1)
    return _mean(unsure, counted(logits, batch))


def agreement(logits: Tensor, told: Tensor, batch: Batch, confident: bool = False) -> Tensor:
    """Cross-entropy with the classes that another model finds likeliest.

    With ``confident``, predictions count where both agree, or where the other model is at least as sure.
    """
    rows, others = predictions(logits, batch), predictions(told, batch)
    labels = others.argmax(-1)
    losses = functional.cross_entropy(rows.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    keep = counted(logits, batch)
    if confident:
        sure = others.softmax(-1).amax(-1) >= rows.softmax(-1).amax(-1)
        keep = keep & (sure | (rows.argmax(-1) == labels))
    return _mean(losses, keep)


def likelihood(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with the labels of the batch."""
    total = default_loss(lambda *_, **__: logits, batch)
    return total / counted(logits, batch).sum().clamp(min=1)


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    return (values * keep).sum() / keep.sum().clamp(min=1)


def asked(span: Span, values: Values, batch: Batch, task: int, objective: Objective | Loss, forward: Forward) -> Tensor:
    """What an objective says of a mixture on a batch of one task."""
    if objective not in ("agreement", "confident"):
        return asked_of(span.model(values), batch, objective, forward)
    with torch.no_grad():
        told = forward(span.model(span.single(task)), batch)
    return agreement(forward(span.model(values), batch), told, batch, confident=objective == "confident")


def asked_of(model: Callable[..., Any], batch: Batch, objective: Objective | Loss, forward: Forward) -> Tensor:
    """What an objective that needs no other model says of a model on a batch."""
    if callable(objective):
        return objective(model, batch) / size(batch)
    return (entropy if objective == "entropy" else likelihood)(forward(model, batch), batch)


def check_objective(objective: object, method: str, taught: bool = True) -> None:
    """An error for a word that names no objective; ``taught``: whether the models can be asked as well."""
    known = get_args(Objective) if taught else ("entropy", "labels")
    if not callable(objective) and objective not in known:
        raise Error(f"{method}: loss is a function or one of {', '.join(known)}; got {objective!r}")


def forwards(forward: Forward | Sequence[Forward] | None, count: int, method: str) -> list[Forward]:
    """One way to ask the model for each task."""
    if forward is None or callable(forward):
        return [forward or default_forward] * count
    if len(forward) != count:
        raise Error(f"{method}: forward is one function, or one for each of the {count} models; got {len(forward)}")
    return list(forward)


# The descent


@dataclass(frozen=True, eq=False)
class Descent:
    """What the next step needs: the values, and the running means that Adam keeps of their gradients."""

    values: dict[str, Tensor]
    means: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0


@dataclass(frozen=True)
class Progress:
    """What a person wants to see of a step."""

    number: int
    """From 1."""
    losses: tuple[float, ...]
    """Of each task, on its batch, before the step."""
    weight: Mapping[str, Any]
    """The coefficients after the step, as they would stand in a merge; empty where there are none."""


Slope = Callable[[Values, int, Batch], Tensor]
"""``(values, task, batch) -> loss``, differentiable in the values."""


def step(
    descent: Descent, batches: Sequence[Batch], loss: Slope, rate: float, bounds: Mapping[str, tuple[float, float]]
) -> tuple[Descent, tuple[float, ...]]:
    """One step of Adam down the mean loss of all tasks, and the losses before it.

    One task's graph is held at a time. ``bounds`` of a value are kept by moving it back to the nearest of them.
    """
    slopes = {name: torch.zeros_like(value) for name, value in descent.values.items()}
    losses = []
    for task, batch in enumerate(batches):
        values = {name: value.detach().requires_grad_() for name, value in descent.values.items()}
        with torch.enable_grad():
            found = loss(values, task, batch)
            if found.requires_grad:  # a batch of which nothing counts has no slope
                gradients = torch.autograd.grad(found, list(values.values()), allow_unused=True)
                for name, gradient in zip(values, gradients, strict=True):
                    if gradient is not None:
                        slopes[name] = slopes[name] + gradient / len(batches)
        losses.append(float(found.detach()))
    return _adam(descent, slopes, rate, bounds), tuple(losses)


def _adam(descent: Descent, slopes: Values, rate: float, bounds: Mapping[str, tuple[float, float]]) -> Descent:
    count, fading, forgetting, tiny = descent.count + 1, 0.9, 0.999, 1e-8
    values, means, squares = {}, {}, {}
    for name, slope in slopes.items():
        means[name] = fading * descent.means.get(name, torch.zeros_like(slope)) + (1 - fading) * slope
        squares[name] = forgetting * descent.squares.get(name, torch.zeros_like(slope)) + (1 - forgetting) * slope**2
        size = (squares[name] / (1 - forgetting**count)).sqrt() + tiny
        values[name] = descent.values[name] - rate * (means[name] / (1 - fading**count)) / size
        if name in bounds:
            values[name] = values[name].clamp(*bounds[name])
    return Descent(values, means, squares, count)


def descend(
    label: str,
    values: Values,
    data: Sequence[Iterable[Batch]],
    loss: Slope,
    *,
    steps: int,
    rate: float,
    seed: int,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    tell: Callable[[int, tuple[float, ...], Values], None] | None = None,
) -> dict[str, Tensor]:
    """The values after so many steps, each on the next batch of every task."""
    if steps < 0 or not rate > 0:
        raise Error(f"{label} needs steps >= 0 and a rate > 0, got {steps} and {rate}")
    descent = Descent(dict(values))
    streams = [cycled(batches, seed + task, f"{label}: data of task {task + 1}") for task, batches in enumerate(data)]
    with progress.task(label, steps) as advance:
        for number in range(1, steps + 1):
            descent, losses = step(descent, [next(stream) for stream in streams], loss, rate, bounds or {})
            if not all(value.isfinite().all() for value in descent.values.values()):
                raise Error(f"{label}: step {number} led to values that are not finite; lower rate={rate}")
            if tell is not None:
                tell(number, losses, descent.values)
            advance(1)
    return descent.values


def cycled(batches: Iterable[Batch], seed: int, where: str) -> Iterator[Batch]:
    """The batches over and over; a list of them in a new order every time, a loader in its own."""
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | tuple):
        raise Error(f"{where} is a list or a loader of batches, got a {type(batches).__name__}, which is one batch")
    order = random.Random(seed)
    while True:
        found = order.sample(batches, len(batches)) if isinstance(batches, Sequence) else batches
        empty = True
        for batch in found:
            empty = False
            yield batch
        if empty:
            raise Error(f"{where} ran out of batches; give a list or a loader, which can be read again")


def check_data(data: Sequence[Iterable[Batch]], count: int, method: str) -> None:
    """An error unless there are batches for each of the tasks."""
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Sequence):
        raise Error(f"{method}: data is a list of iterables of batches, one a model; got a {type(data).__name__}")
    if len(data) != count:
        raise Error(f"{method}: data needs batches for each of the {count} models, got {len(data)}")
