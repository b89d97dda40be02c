"""A linear layer that keeps several changes of low rank, and a router that says how much of each an input gets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error

Router = Literal["arrow", "centroid", "gate", "mean"]
Factors = tuple[Tensor, Tensor]
"""``B [out, rank]`` and ``A [rank, in]``: the change is ``B @ A``."""


class RoutedLinear(nn.Module):
    r"""A linear layer with changes of low rank, of which a router makes more or less for each input.

    .. math:: y = W_0 x + b + \sum_e g_e(x)\, B_e A_e x, \qquad g(x) = \mathrm{softmax}_{T(x)}(s(x) / \tau)

    with :math:`T(x)` the ``keep`` experts of the highest scores :math:`s`: :math:`|v_e \cdot x|` (``"arrow"``,
    :math:`v_e` the first right singular vector of :math:`B_e A_e`), :math:`-\|x - c_e\|^2` (``"centroid"``), or
    :math:`u_e \cdot x + a_e` (``"gate"``). With ``"mean"``, :math:`g` is ``weight`` for every input.

    Args:
        layer: with :math:`W_0` and :math:`b`; it is copied and frozen.
        factors: of each expert.
        router: how scores are found.
        points: ``[k, in]``, the centroids; for no other router.
        weight: ``[k]``, for ``"mean"``; by default the same for all, adding up to 1.
        keep: how many experts work on an input; by default all.
        temperature: :math:`\tau`.
        level: ``"token"``: an input of its own at every position; ``"example"``: by the mean of the scores over
            the positions.

    >>> layer = torch.nn.Linear(2, 1, bias=False).requires_grad_(False)
    >>> _ = layer.weight.zero_()
    >>> factors = [(torch.ones(1, 1), torch.tensor([[1.0, 0.0]])), (torch.ones(1, 1), torch.tensor([[0.0, 5.0]]))]
    >>> routed = RoutedLinear(layer, factors, "arrow", keep=1)
    >>> routed(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))          # one for each, by what its expert reads
    tensor([[ 2.],
            [10.]])
    """

    down: Tensor
    up: Tensor

    def __init__(
        self,
        layer: nn.Linear,
        factors: Sequence[Factors],
        router: Router = "arrow",
        *,
        points: Tensor | None = None,
        weight: Sequence[float] | Tensor | None = None,
        keep: int | None = None,
        temperature: float = 1.0,
        level: Literal["token", "example"] = "token",
    ):
        super().__init__()
        count, rank = len(factors), max(b.shape[1] for b, _ in factors)
        self.layer = copy.deepcopy(layer).requires_grad_(False)
        self.router, self.keep, self.temperature, self.level = router, keep or count, temperature, level
        place = {"device": layer.weight.device, "dtype": torch.promote_types(layer.weight.dtype, torch.float32)}
        up, down = (
            torch.zeros(count, layer.out_features, rank, **place),
            torch.zeros(count, rank, layer.in_features, **place),
        )
        for number, (b, a) in enumerate(factors):
            up[number, :, : b.shape[1]], down[number, : a.shape[0]] = b, a
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        if router == "mean":
            given = torch.full((count,), 1 / count) if weight is None else torch.as_tensor(weight)
            self.register_buffer("shares", given.to(up))
        elif router == "gate":
            self.slope = nn.Parameter(torch.zeros(count, layer.in_features, **place))
            self.offset = nn.Parameter(torch.zeros(count, **place))
        else:
            found = torch.stack([direction(b, a) for b, a in zip(up, down, strict=True)]) if points is None else points
            self.register_buffer("points", found.to(up))

    def scores(self, inputs: Tensor) -> Tensor:
        """``[..., k]``: how well each expert fits an input."""
        inputs = inputs.to(self.up.dtype)
        if self.router == "gate":
            return functional.linear(inputs, self.slope, self.offset)
        points = self.get_buffer("points")
        if self.router == "arrow":
            return functional.linear(inputs, points).abs()
        return 2 * functional.linear(inputs, points) - points.square().sum(-1) - inputs.square().sum(-1, keepdim=True)

    def weight(self, inputs: Tensor) -> Tensor:
        """How much of each expert an input gets: ``[..., k]``, or with ``level="example"`` ``[n, 1, ..., k]``."""
        if self.router == "mean":
            return self.get_buffer("shares").expand(*inputs.shape[:-1], -1)
        scores = self.scores(inputs)
        if self.level == "example" and inputs.dim() > 2:
            scores = scores.mean(dim=tuple(range(1, inputs.dim() - 1)), keepdim=True)
        return self._shared(scores)

    def _shared(self, scores: Tensor) -> Tensor:
        best = scores.topk(self.keep, dim=-1)
        return torch.zeros_like(scores).scatter(-1, best.indices, (best.values / self.temperature).softmax(-1))

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output with each input's own share of every change."""
        inner = torch.einsum("...i,kri->...kr", inputs.to(self.up.dtype), self.down) * self.weight(inputs)[..., None]
        changed = functional.linear(inner.flatten(-2), self.up.permute(1, 0, 2).flatten(1))
        plain = self.layer(inputs)
        return (plain.to(changed.dtype) + changed).to(plain.dtype)

    def fold(self, weight: Sequence[float] | Tensor | None = None) -> nn.Linear:
        """The plain layer with one share of each change for all inputs.

        Args:
            weight: ``[k]``. By default what the router gives without an input: its shares, or those of its offset.

        Raises:
            Error: the router gives nothing without an input, or there is another number of experts.
        """
        if weight is None and self.router not in ("mean", "gate"):
            raise Error(
                f"the router {self.router!r} needs an input to choose by; fold(weight=...) chooses for all inputs"
            )
        if weight is None:
            found = self.get_buffer("shares") if self.router == "mean" else self._shared(self.offset.detach())
        else:
            found = torch.as_tensor(weight).to(self.up)
        if found.shape != self.up.shape[:1]:
            raise Error(f"fold needs {len(self.up)} coefficients, got {list(found.shape)}")
        plain = copy.deepcopy(self.layer)
        with torch.no_grad():
            change = torch.einsum("k,kor,kri->oi", found, self.up, self.down)
            plain.weight.copy_(plain.weight.to(change.dtype) + change)
        return plain


def direction(b: Tensor, a: Tensor) -> Tensor:
    """The first right singular vector of ``b @ a``: what the change reads most of an input. Zero if it is zero.

    >>> direction(torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0, 3.0]])).abs()
    tensor([0., 1.])
    """
    small = torch.linalg.qr(b).R @ a
    values, rows = torch.linalg.svd(small, full_matrices=False)[1:]
    return rows[0] * (values[0] > 0)


def factored(change: Tensor, rank: int | None = None) -> Factors:
    """``B`` and ``A`` of the best approximation of a matrix with this rank; by default of the rank it has."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    least = values[:1] * max(change.shape) * torch.finfo(values.dtype).eps
    most = max(int((values > least).sum()), 1)
    kept = most if rank is None else min(rank, most)
    return left[:, :kept] * values[:kept], right[:kept]
