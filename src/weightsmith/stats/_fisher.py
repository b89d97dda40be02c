"""How much the model's answers hang on each single weight.

A weight whose change would change the predictions much was put where it is by the data; one with
little Fisher information could be elsewhere. Its diagonal is the mean square of the gradients of
single examples' log-likelihoods; the square of a batch's mean gradient is something else, and
smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from weightsmith.errors import Error
from weightsmith.stats.room import (
    Access,
    Batch,
    Forward,
    Loss,
    chosen_names,
    collect,
    counted,
    mapped,
    predictions,
    size,
)
from weightsmith.weights import Pattern, Weights, matches, working, working_dtype

Labels = Literal["all", "sampled", "given"]
Parameters = dict[str, Tensor]
Likelihood = Callable[[Parameters, Batch, Tensor], Tensor]
"""``(parameters, batch of one, label [1, ...])`` to a number whose gradient is wanted."""


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: Labels = "all",
    draws: int = 1,
    seed: int = 0,
    pattern: Pattern = "*",
    at_once: int = 32,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Weights:
    r"""The diagonal of the Fisher information of every parameter.

    .. math:: F = \frac1n \sum_x \mathbb E_y\, \bigl(\nabla \log p(y \mid x)\bigr)^2

    with :math:`y` from the model's own predictions (the true Fisher information: ``"all"``, the exact
    sum over classes, or ``"sampled"``), or the labels of the data (``"given"``, the empirical one).

    Args:
        model: asked in evaluation mode and left as it was; frozen parameters count as well.
        batches: ``inputs``, ``(inputs, labels)`` or mappings for Hugging Face models.
        labels: whose labels. ``"all"`` needs logits ``[n, classes]`` and one gradient a class; a text's
            labels are sampled at every position, and its gradient is that of the sum over them.
        draws: labels drawn for an example, with ``"sampled"``.
        seed: of the drawing.
        pattern: names of the parameters.
        at_once: examples whose gradients are held together.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        loss: ``(model, batch) -> number``, with ``"given"``: minus the log-likelihood of the labels.

    Returns:
        Weights: ``[*shape]`` under the name of each parameter, float32 (float64 for such), a mean over
        examples that was summed in float64. Tied parameters share one tensor.

    Raises:
        ValueError: no batch, no parameter that fits, no labels, or logits of another shape.

    >>> layer = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(layer.weight)                     # both classes are equally likely
    >>> fisher(layer, [torch.tensor([[1.0], [3.0]])])["weight"]    # mean of x^2 / 4
    tensor([[1.2500],
            [1.2500]])
    """
    statistic = Fisher(labels, draws, seed, pattern, at_once)
    return collect(model, batches, {"fisher": statistic}, forward=forward, loss=loss)["fisher"]


@dataclass(frozen=True)
class Fisher:
    """The settings of `fisher`, for `collect`."""

    labels: Labels = "all"
    draws: int = 1
    seed: int = 0
    pattern: Pattern = "*"
    at_once: int = 32
    kind = "fisher"

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise Error(f"labels is one of {', '.join(get_args(Labels))}; got {self.labels!r}")
        for name in ("draws", "at_once"):
            if getattr(self, name) < 1:
                raise Error(f"{name} is at least 1, got {getattr(self, name)}")

    def counter(self, access: Access) -> _Counter:
        every = dict(access.model.named_parameters(remove_duplicate=False))
        able = {name: parameter for name, parameter in every.items() if parameter.is_floating_point()}
        chosen = {name: parameter for name, parameter in able.items() if matches(self.pattern, name)}
        chosen_names(able, list(chosen), self.pattern)
        return _Counter(self, access, chosen)


class _Counter:
    def __init__(self, settings: Fisher, access: Access, chosen: Mapping[str, Tensor]):
        self.settings, self.access = settings, access
        first = {id(parameter): name for name, parameter in reversed(list(chosen.items()))}
        self.names = {name: first[id(parameter)] for name, parameter in chosen.items()}
        self.parameters = {name: chosen[name].detach() for name in dict.fromkeys(self.names.values())}
        self.totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.parameters.items()}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.examples = 0
        self.together = True  # whether the model can be asked for the gradients of several examples at once

    def watching(self, batch: Batch) -> None:
        """No hooks: it makes passes of its own."""

    def see(self, batch: Batch) -> None:
        step = self.settings.at_once
        for start in range(0, size(batch), step):
            part = mapped(lambda value, start=start: value[start : start + step], batch)
            for likelihood, labels, shares in self._labelled(part):
                self._add(likelihood, part, labels, shares)
        self.examples += size(batch)

    def _labelled(self, part: Batch) -> Iterator[tuple[Likelihood, Tensor, Tensor]]:
        """Log-likelihoods of the examples, labels ``[n, ...]``, and what the squares count ``[n]``."""
        ones = torch.ones(size(part))
        if self.settings.labels == "given":
            yield self._given, ones, ones
            return
        with torch.no_grad():
            logits = self.access.forward(self.access.model, part)
        rows, keep = predictions(logits, part), counted(logits, part)
        if self.settings.labels == "sampled":
            for _ in range(self.settings.draws):
                yield self._labels, drawn(rows, self.generator).where(keep, -1), ones / self.settings.draws
            return
        if rows.dim() != 2:
            raise Error(f'labels="all" needs logits [n, classes], got {list(logits.shape)}; use labels="sampled"')
        for label, chances in enumerate(rows.softmax(dim=-1).unbind(dim=-1)):
            yield self._labels, torch.full_like(chances, label, dtype=torch.long), chances

    def _given(self, parameters: Parameters, one: Batch, label: Tensor) -> Tensor:
        loss = self.access.loss(self._model(parameters), one)
        if loss.numel() != 1:
            raise Error(f"loss= must return one number, got {list(loss.shape)}")
        return loss.sum()

    def _labels(self, parameters: Parameters, one: Batch, label: Tensor) -> Tensor:
        rows = predictions(self.access.forward(self._model(parameters), one), one)
        found = rows.log_softmax(dim=-1).gather(-1, label.clamp(min=0)[..., None])[..., 0]
        return (found * (label >= 0)).sum()

    def _model(self, parameters: Parameters) -> Callable[..., Any]:
        model = self.access.model

        def called(*inputs: Any, **named: Any) -> Any:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # some models write to them
            return functional_call(model, parameters | buffers, inputs, named)

        return called

    def _add(self, likelihood: Likelihood, part: Batch, labels: Tensor, shares: Tensor) -> None:
        if self.together:
            try:
                squares = self._squares_together(likelihood, part, labels, shares)
            except Exception:
                # Not every model can be vectorised. One by one is slower, and shows what is really wrong.
                self.together = False
            else:
                self._add_squares(squares)
                return
        for i in range(size(part)):
            one = mapped(lambda value, i=i: value[i : i + 1], part)
            found = grad(likelihood)(self.parameters, one, labels[i : i + 1])
            self._add_squares({name: working(g).square() * shares[i].to(g.device) for name, g in found.items()})

    def _squares_together(self, likelihood: Likelihood, part: Batch, labels: Tensor, shares: Tensor) -> Parameters:
        ones = mapped(lambda value: value[:, None], part)  # each example is a batch of one
        gradients = vmap(grad(likelihood), in_dims=(None, _axes(ones), 0))(self.parameters, ones, labels[:, None])
        squares = {name: working(g).square() for name, g in gradients.items()}
        return {name: torch.tensordot(shares.to(s), s, dims=1) for name, s in squares.items()}

    def _add_squares(self, squares: Parameters) -> None:
        for name, square in squares.items():
            self.totals[name] += square

    def result(self) -> Parameters:
        means = {
            name: (total / max(self.examples, 1)).to(working_dtype(self.parameters[name].dtype))
            for name, total in self.totals.items()
        }
        return {name: means[first] for name, first in self.names.items()}


def _axes(part: Batch) -> Any:
    """Along which axis the examples of each value of a batch lie."""
    if isinstance(part, Mapping):
        return {name: _axes(value) for name, value in part.items()}
    if isinstance(part, tuple):
        return tuple(_axes(value) for value in part)
    return 0 if isinstance(part, Tensor) and part.dim() else None


def drawn(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A label for each row of logits ``[..., classes]``, by its probability."""
    chances = rows.softmax(dim=-1).reshape(-1, rows.shape[-1]).cpu()
    return torch.multinomial(chances, 1, generator=generator).reshape(rows.shape[:-1]).to(rows.device)
