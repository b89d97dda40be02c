"""What functions of this room share: a loss over batches, and a model that is moved through weight space and back.

A point is ``origin + c_1 d_1 + c_2 d_2 + ...``; the model's own tensors are written to, so no copy of the model
is made for a point.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.inspect._models import untouched
from weightsmith.stats import room
from weightsmith.weights import PerTensor, Weights, open, resolve, working_dtype

Loss = Callable[..., Any]
"""``(model)`` or, with batches, ``(model, batch)`` to a number (a mean over the batch's examples), or to several
by name, the loss first."""

Batches = Iterable[Any]
Source = Any
"""A checkpoint: whatever `weightsmith.open` opens."""


# What is measured


@dataclass(frozen=True)
class Objective:
    """A loss over batches. ``values`` is what one batch gives, with the weight that it has in the mean."""

    loss: Loss | None
    batches: Batches | None

    @classmethod
    def of(cls, loss: Loss | None, batches: Batches | None) -> Objective:
        """Checked; what can be read only once is read now, since every point needs it again."""
        if loss is None and batches is None:
            raise Error("give batches=, or a loss=(model) -> number that brings its own data")
        if batches is not None and iter(batches) is batches:
            batches = list(batches)
        if isinstance(batches, Tensor) or (isinstance(batches, Sequence) and not len(batches)):
            raise Error("batches= is an iterable of at least one batch, such as [(inputs, labels)]")
        return cls(loss, batches)

    def each(self) -> Iterator[Any]:
        """The batches; one empty one where the loss brings its data."""
        return iter((None,) if self.batches is None else self.batches)

    def values(self, model: Callable[..., Any], batch: Any) -> tuple[dict[str, Tensor], float]:
        """The means over a batch by name, with their graph, and its weight."""
        if self.loss is None:
            logits = room.default_forward(model, batch)
            weight = float(room.counted(logits, batch).sum())
            total = room.default_loss(lambda *inputs, **named: logits, batch)
            values = {"loss": total / max(weight, 1.0)}
            if not isinstance(batch, Mapping):
                values["error"] = (logits.argmax(dim=-1) != batch[1]).to(total.dtype).mean()
            return values, weight
        found = self.loss(model) if self.batches is None else self.loss(model, batch)
        values = dict(found) if isinstance(found, Mapping) else {"loss": found}
        for name, value in values.items():
            if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise Error(f"loss= must return one number, got {shape} for {name!r}")
        tensors = {n: v.reshape(()) if isinstance(v, Tensor) else torch.tensor(float(v)) for n, v in values.items()}
        return tensors, 1.0 if self.batches is None else float(room.size(batch))

    def loss_of(self, model: Callable[..., Any], batch: Any) -> tuple[Tensor, float]:
        """The loss alone, to be differentiated, and its weight."""
        values, weight = self.values(model, batch)
        name, value = next(iter(values.items()))
        if not value.requires_grad:
            raise Error(f"the {name} has no gradient; compute it from the model's outputs without item() and detach()")
        return value, weight

    @torch.no_grad()
    def __call__(self, model: Callable[..., Any]) -> dict[str, Tensor]:
        """Means over all batches, float64: numbers, or one for each of the models that ``vmap`` tries."""
        totals: dict[str, Tensor] = {}
        weights = 0.0
        for batch in self.each():
            values, weight = self.values(model, batch)
            for name, value in values.items():
                part = value.detach().double() * weight
                totals[name] = totals[name] + part if name in totals else part
            weights += weight
        if not weights:
            raise Error("the batches are empty: no example to take a mean over")
        return {name: total / weights for name, total in totals.items()}

    def scalar(self, model: Callable[..., Any]) -> float:
        """The loss alone, as a number."""
        return float(next(iter(self(model).values())))


# A model that is lent


@contextmanager
def borrowed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Evaluation mode, and the model's tensors to be written to; afterwards all is as it was, also the random state."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    with untouched(model):
        yield own


def deviations(prior: PerTensor[float], parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """The prior's standard deviation for each name."""
    found = resolve(prior, parameters, "prior")
    for name, value in found.items():
        if not (math.isfinite(value) and value > 0):
            raise Error(f"prior is above 0; for {name} it is {value}")
    return found


def opened(source: Source, own: Mapping[str, Tensor], what: str) -> Weights:
    """A checkpoint or direction whose tensors are some of the model's."""
    weights = source if isinstance(source, Weights) else open(source)
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise Error(f"{what}: the model has no {listed(unknown)}{did_you_mean(unknown[0], own)}")
    wrong = [f"{n} {list(weights.spec(n).shape)} for {list(own[n].shape)}"
             for n in weights if weights.spec(n).shape != tuple(own[n].shape)]  # fmt: skip
    if wrong:
        raise Error(f"{what}: shapes do not fit the model: {listed(wrong)}")
    return weights


class Walk:
    """A model on its way through weight space; used inside `walking`."""

    def __init__(self, own: Mapping[str, Tensor], origin: Source, directions: Sequence[Source]):
        self.directions = [opened(direction, own, "direction") for direction in directions]
        start = None if origin is None else opened(origin, own, "origin")
        tied: dict[int, list[str]] = {}
        for name, tensor in own.items():
            tied.setdefault(id(tensor), []).append(name)

        def of(weights: Weights, name: str) -> Tensor | None:
            tensor = own[name]
            held = next((other for other in tied[id(tensor)] if other in weights), None)
            if held is None:
                return None
            wide = working_dtype(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            return weights[held].detach().to(tensor.device, wide, copy=True)  # it may be the model's own, which moves

        self.own = own
        self.moved: dict[str, tuple[Tensor, Tensor, list[Tensor | None]]] = {}
        self.before: dict[str, Tensor] = {}
        for name, *_ in tied.values():  # what is tied moves once
            tensor = own[name]
            steps = [of(direction, name) for direction in self.directions]
            base = None if start is None else of(start, name)
            if not tensor.is_floating_point():
                steps = []  # what is counted is not moved
            if base is None and all(step is None for step in steps):
                continue
            self.before[name] = tensor.detach().clone()
            wide = working_dtype(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            base = self.before[name].to(wide) if base is None else base
            self.moved[name] = (tensor, base, steps)

    def at(self, name: str, point: Sequence[float]) -> Tensor:
        """One tensor at a point, in working precision."""
        _, value, steps = self.moved[name]
        for amount, step in zip(point, steps, strict=False):
            if step is not None and amount:
                value = value.add(step, alpha=amount)
        return value

    @torch.no_grad()
    def go(self, point: Sequence[float]) -> None:
        """Write a point's tensors into the model."""
        for name, (tensor, _, _) in self.moved.items():
            tensor.copy_(self.at(name, point))

    @torch.no_grad()
    def back(self) -> None:
        """To where the model was."""
        for name, value in self.before.items():
            self.moved[name][0].copy_(value)

    def digest(self) -> str:
        """Of all that makes a point: what moves, and what stays."""
        total = hashlib.sha256()
        for name, tensor in self.own.items():
            _, base, steps = self.moved.get(name, (tensor, tensor, []))
            total.update(name.encode())
            for value in (base, *steps):
                total.update(b"-" if value is None else _bytes(value))
        return total.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def walking(model: nn.Module, origin: Source, directions: Sequence[Source]) -> Iterator[Walk]:
    """The model as a `Walk`; afterwards it is where it was, also after an error."""
    with borrowed(model) as own:
        walk = Walk(own, origin, directions)
        try:
            yield walk
        finally:
            walk.back()
