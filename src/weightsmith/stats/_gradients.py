"""Which way the data pull each weight, and how hard.

A weight on which the loss leans has a gradient; one that the data do not care about has none. One backward pass a
batch tells, whatever the model: the sum of all examples' gradients is the gradient of the sum of their losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.errors import Error, listed
from weightsmith.stats.room import Access, Batch, Loss, chosen_names, collect, size
from weightsmith.weights import Pattern, Weights, matches, working, working_dtype


def gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    power: Literal[1, 2] = 1,
    pattern: Pattern = "*",
    loss: Loss | None = None,
) -> Weights:
    r"""The mean gradient of every parameter, or the mean square of the batches' gradients.

    .. math:: g = \frac1n \sum_b n_b\, g_b \quad (\text{power } 1), \qquad
        s = \frac1n \sum_b n_b\, g_b^2 \quad (\text{power } 2), \qquad
        g_b = \frac{1}{n_b} \sum_{x \in b} \nabla \ell(x)

    With ``power=1`` the cut of the data into batches makes no difference: it is the gradient of the mean loss. With
    ``power=2`` it does: in the mean over a batch, gradients of single examples cancel, so for :math:`n_b` independent
    examples near a minimum the square is about :math:`1 / n_b` of the mean square of single examples. The latter is
    Fisher information, `fisher` with ``labels="given"``, which this equals with batches of one example; what Adam
    keeps is this one.

    Args:
        model: asked in evaluation mode and left as it was; frozen parameters count as well.
        batches: ``(inputs, labels)`` or mappings.
        power: of the batches' gradients.
        pattern: names of the parameters.
        loss: ``(model, batch) -> number``, summed over the examples of the batch; the default is cross-entropy.

    Returns:
        Weights: ``[*shape]`` under the name of each parameter, float32 (float64 for such), summed in float64; zeros
        where the loss does not depend on it. Tied parameters share one tensor. A backward pass a batch; the memory is
        that of the pass and float64 sums of the parameters.

    Raises:
        ValueError: no batch, no parameter that fits, no labels, a loss of several numbers, or gradients that are not
            finite.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> data = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    >>> linear = lambda model, batch: model(batch).sum()           # the gradient of an example is its input
    >>> gradients(layer, data, loss=linear)["weight"], gradients(layer, data, loss=linear, power=2)["weight"]
    (tensor([[2.]]), tensor([[5.]]))
    """
    return collect(model, batches, {"gradients": Gradients(power, pattern)}, loss=loss)["gradients"]


@dataclass(frozen=True)
class Gradients:
    """The settings of `gradients`, for `collect`."""

    power: Literal[1, 2] = 1
    pattern: Pattern = "*"

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise Error(f"power is 1 (mean gradient) or 2 (mean square of batches' gradients), got {self.power!r}")

    @property
    def kind(self) -> str:
        return "gradients" if self.power == 1 else "squared gradients"

    def counter(self, access: Access) -> _Counter:
        return _Counter(self.power, access, Leaves(access.model, self.pattern))


class Leaves:
    """Parameters that fit a pattern, each tied one once, as leaves of their own: the model's stay as they are."""

    def __init__(self, model: nn.Module, pattern: Pattern):
        if torch.is_inference_mode_enabled():
            raise Error("derivatives cannot be taken under torch.inference_mode(); torch.no_grad() does no harm")
        every = dict(model.named_parameters(remove_duplicate=False))
        able = {name: parameter for name, parameter in every.items() if parameter.is_floating_point()}
        chosen = {name: parameter for name, parameter in able.items() if matches(pattern, name)}
        chosen_names(able, list(chosen), pattern)
        first = {id(parameter): name for name, parameter in reversed(list(chosen.items()))}
        self.model = model
        self.names = {name: first[id(parameter)] for name, parameter in chosen.items()}
        """Every name, and the first of its tensor."""
        self.values = {name: chosen[name].detach().requires_grad_() for name in dict.fromkeys(self.names.values())}

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.values.values())

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model, asked with the leaves in place of its parameters."""
        return functional_call(self.model, self.values, inputs, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def zeros(self) -> list[Tensor]:
        """Room for sums, float64."""
        return [torch.zeros_like(value, dtype=torch.float64, requires_grad=False) for value in self.tensors]

    def means(self, totals: Iterable[Tensor], examples: int) -> dict[str, Tensor]:
        """Sums over examples as means, under every name; an error where they are not finite."""
        found = {
            name: (total / max(examples, 1)).to(working_dtype(value.dtype))
            for (name, value), total in zip(self.values.items(), totals, strict=True)
        }
        bad = [name for name, value in found.items() if not value.isfinite().all()]
        if bad:
            raise Error(
                f"derivatives by {listed(bad)} are not finite: is the loss finite for every batch? A model in float16 "
                "may leave its range; use bfloat16 or float32"
            )
        return {name: found[first] for name, first in self.names.items()}


def loss_of(access: Access, leaves: Leaves, batch: Batch) -> Tensor:
    """The loss of a batch, summed over examples, with its graph."""
    found = access.loss(leaves, batch)
    if not isinstance(found, Tensor) or found.numel() != 1:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise Error(f"loss= must return one number, got {shape}")
    if not found.requires_grad:
        raise Error("the loss depends on none of these parameters through the model that loss= was given")
    return found.sum()


def backward(loss: Tensor, leaves: Leaves) -> list[Tensor]:
    """The gradient of a number by the leaves, float32 or wider; zeros for those it does not depend on."""
    found = torch.autograd.grad(loss, leaves.tensors, materialize_grads=True)
    return [working(part.to_dense() if part.is_sparse else part) for part in found]


class _Counter:
    def __init__(self, power: int, access: Access, leaves: Leaves):
        self.power, self.access, self.leaves = power, access, leaves
        self.totals = leaves.zeros()
        self.examples = 0

    def watching(self, batch: Batch) -> None:
        """No hooks: it makes a pass of its own."""

    def see(self, batch: Batch) -> None:
        count = size(batch)
        if not count:
            return
        with torch.enable_grad():
            found = backward(loss_of(self.access, self.leaves, batch), self.leaves)
        for total, part in zip(self.totals, found, strict=True):
            # n_b g_b is the gradient of the summed loss, and n_b g_b^2 its square over n_b.
            if self.power == 1:
                total.add_(part)
            else:
                total.addcmul_(part.double(), part.double(), value=1 / count)
        self.examples += count

    def result(self) -> dict[str, Tensor]:
        return self.leaves.means(self.totals, self.examples)
