"""Train and run networks as hardware of few bits would compute them.

Every product of a linear layer sees both of its factors at the points of a grid, with blocks along the axis that it
sums over: weights and inputs forwards, gradients with weights and with inputs backwards. A matrix and its transpose are
quantized apart, since their blocks run along different axes. Weights themselves stay as they are, and so does the
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from weightsmith.card import card
from weightsmith.quantize.grids import Grid, named, quantized


@card(
    paper="Rouhani et al. 2023, 'Microscaling Data Formats for Deep Learning'",
    covers=("microscaling",),
    unit="model",
    claim="a small language model whose products see weights, inputs and gradients in six bits learns as well",
    departs="products of linear layers alone; those inside attention and the sums between layers stay as they are; "
    "blocks of the gradient of weights run over the rows of all examples",
)
@contextmanager
def low_precision(
    grid: str | Grid = "mxfp6",
    *,
    gradients: str | Grid | None = None,
    weights: Iterable[Tensor] | None = None,
) -> Iterator[None]:
    r"""Within this context linear layers multiply quantized factors.

    .. math:: Y = q(X)\, q(W)^\top, \qquad \dot X = q(\dot Y)\, q^\top(W), \qquad
        \dot W = q^\top(\dot Y)^\top q^\top(X)

    with :math:`q` along the last axis and :math:`q^\top` along the first. No module is changed; what is computed in
    here keeps its quantized gradients when ``backward`` is called later. Where checkpoints compute a layer again,
    ``backward`` belongs in here too. `torch.nn.MultiheadAttention` computes its products itself, and they stay as they
    are.

    Args:
        grid: of weights and inputs: a grid, or its word. The word ``"mxfp6"`` stands for E2M3; E3M2, of wider range, is
            ``Microscaling("e3m2")``.
        gradients: of gradients, ``grid`` by default.
        weights: the parameters whose products are meant, all by default.

    Raises:
        Error: an unknown grid, and within the context values that are not finite.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[5.9, 0.1]]))
    >>> with low_precision("mxfp4"):
    ...     layer(torch.tensor([[1.0, 0.0]])).item()
    6.0
    """
    forwards = named(grid)
    backwards = forwards if gradients is None else named(gradients)
    chosen = None if weights is None else {id(weight): weight for weight in weights}
    with _Mode(forwards, backwards, chosen):
        yield


class _Mode(TorchFunctionMode):
    """Linear products are computed by `_Product`."""

    def __init__(self, forwards: Grid, backwards: Grid, chosen: dict[int, Tensor] | None):
        super().__init__()
        self.forwards, self.backwards, self.chosen = forwards, backwards, chosen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear(*args, **given)
            if self.chosen is None or id(weight) in self.chosen:
                return _Product.apply(*_cast(x, weight, bias), self.forwards, self.backwards)
        return func(*args, **given)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _cast(*given: Tensor | None) -> list[Tensor | None]:
    """What a linear product is given where ``torch.autocast`` chooses its dtype."""
    kind = next(one.device.type for one in given if one is not None)
    if not torch.is_autocast_enabled(kind):
        return list(given)
    dtype = torch.get_autocast_dtype(kind)
    return [one if one is None or one.dtype == torch.float64 else one.to(dtype) for one in given]


class _Product(torch.autograd.Function):
    """``x [..., in]`` times ``weight [out, in]``, transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forwards: Grid, backwards: Grid) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grids, ctx.bias = (forwards, backwards), bias is not None
        made = quantized(x, forwards) @ quantized(weight, forwards).t()
        return made if bias is None else made + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = given
        x, weight = ctx.saved_tensors
        forwards, backwards = ctx.grids
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = quantized(gradient, backwards) @ quantized(weight, forwards, axis=0)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            for_weight = quantized(rows, backwards, axis=0).t() @ quantized(inputs, forwards, axis=0)
        if ctx.bias and ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias, None, None
