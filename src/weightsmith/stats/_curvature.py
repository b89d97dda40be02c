"""How the loss bends along each single weight, and what bending does to the gradient.

A step along one weight changes the loss by its gradient and then by its curvature. The matrix of all curvatures is
never held; its products with random signs, times the signs, average to its diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightsmith import solve
from weightsmith.errors import Error
from weightsmith.stats._gradients import Leaves, gradients, loss_of
from weightsmith.stats.room import Access, Batch, Forward, Loss, collect, size
from weightsmith.weights import Pattern, Weights, working_dtype

Matrix = Literal["hessian", "gauss_newton"]


def curvature(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    draws: int = 1,
    seed: int = 0,
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Weights:
    r"""The diagonal of the Hessian of the mean loss, sampled with random signs.

    .. math:: h = \frac1n \sum_b \frac1m \sum_{i=1}^m z_{bi} \odot H_b z_{bi}, \qquad
        H_b = \sum_{x \in b} \nabla^2 \ell(x)

    Every batch has signs of its own, so that more batches are more draws as well; shards of data, and processes of a
    group, have the same ones unless each is given another seed. Values are right on average, and off by the entries
    beside the diagonal; some come out below zero where the curvature is not.

    Args:
        model: asked in evaluation mode and left as it was; frozen parameters count as well. Its dtype is that of the
            products: in bf16 they are rough.
        batches: ``(inputs, labels)`` or mappings.
        draws: m, products a batch; each costs about two gradients.
        seed: of the signs.
        matrix: ``"hessian"``, or ``"gauss_newton"``: without the network's own curvature, so that the diagonal of the
            matrix is not negative for a loss that is convex in the outputs.
        pattern: names of the parameters.
        forward: ``(model, batch) -> outputs``, for the Gauss-Newton matrix, where the default does not fit.
        loss: ``(model, batch) -> number``, summed over the examples of the batch; the default is cross-entropy. For
            the Gauss-Newton matrix it is also called with a model that answers those outputs.

    Returns:
        Weights: ``[*shape]`` under the name of each parameter, float32 (float64 for such), summed in float64. Tied
        parameters share one tensor, whose curvature is that of moving them together. The memory is that of two passes
        and some numbers a parameter: float64 sums, signs and products.

    Raises:
        ValueError: no draw, no batch, no parameter that fits, no labels, a loss of several numbers, or products that
            are not finite.

    Bekas, Kokiopoulou, Saad 2007, 'An estimator for the diagonal of a matrix'; Schraudolph 2002, 'Fast Curvature
    Matrix-Vector Products for Second-Order Gradient Descent' (Gauss-Newton). For a loss that is a mean over other
    things than examples, and for eigenvalues, see `weightsmith.inspect.landscape`.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> bowl = lambda model, batch: (model(batch) ** 2).sum() / 2        # the Hessian is the mean of x x'
    >>> curvature(layer, [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])], loss=bowl)["weight"]
    tensor([[2., 8.]])
    """
    settings = Curvature(draws, seed, matrix, pattern)
    return collect(model, batches, {"curvature": settings}, forward=forward, loss=loss)["curvature"]


@dataclass(frozen=True)
class Curvature:
    """The settings of `curvature`, for `collect`."""

    draws: int = 1
    seed: int = 0
    matrix: Matrix = "hessian"
    pattern: Pattern = "*"
    kind = "curvature"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise Error(f"draws is at least 1, got {self.draws}")
        if self.matrix not in get_args(Matrix):
            raise Error(f"matrix is one of {', '.join(get_args(Matrix))}; got {self.matrix!r}")

    def counter(self, access: Access) -> _Counter:
        return _Counter(self, access, Leaves(access.model, self.pattern))


def hessian_gradient(
    model: nn.Module, batches: Iterable[Batch], *, pattern: Pattern = "*", loss: Loss | None = None
) -> Weights:
    r"""The Hessian of the mean loss times its gradient: how a step along the gradient changes the gradient.

    .. math:: H g = \tfrac12 \nabla \lVert g \rVert^2, \qquad g = \frac1n \sum_x \nabla \ell(x), \quad
        H = \frac1n \sum_x \nabla^2 \ell(x)

    Exact, over all of the data. It is no sum over examples: shards of data cannot be combined.

    Args:
        model: asked in evaluation mode and left as it was; frozen parameters count as well.
        batches: ``(inputs, labels)`` or mappings; read twice, so that what can be read only once is held.
        pattern: names of the parameters; gradient and Hessian are those of these alone.
        loss: ``(model, batch) -> number``, summed over the examples of the batch; the default is cross-entropy.

    Returns:
        Weights: ``[*shape]`` under the name of each parameter, float32 (float64 for such). The products are made in
        the dtype of the model, to which the gradient is rounded for them: in bf16 they are rough.

    Raises:
        ValueError: no batch, no parameter that fits, no labels, a loss of several numbers, or products that are not
            finite.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
    >>> bowl = lambda model, batch: (model(batch) ** 2).sum()            # g = 2 w, H = 2 for inputs of 1
    >>> hessian_gradient(layer, [torch.ones(1, 1)], loss=bowl)["weight"]
    tensor([[12.]])
    """
    if iter(batches) is batches:
        batches = list(batches)
    gradient = gradients(model, batches, pattern=pattern, loss=loss)
    found = collect(model, batches, {"": _Along(gradient, pattern)}, loss=loss)[""]
    return Weights({name: found.node(name) for name in found})  # without the words that `combine` reads


@dataclass(frozen=True)
class _Along:
    """The Hessian of the mean loss times a vector."""

    vector: Weights
    pattern: Pattern
    kind = "hessian product"

    def counter(self, access: Access) -> _Product:
        return _Product(access, Leaves(access.model, self.pattern), self.vector)


class _Counter:
    def __init__(self, settings: Curvature, access: Access, leaves: Leaves):
        self.settings, self.access, self.leaves = settings, access, leaves
        self.sizes = [value.numel() for value in leaves.tensors]
        self.totals = leaves.zeros()
        self.examples = self.batches = 0

    def watching(self, batch: Batch) -> None:
        """No hooks: it makes passes of its own."""

    def see(self, batch: Batch) -> None:
        count = size(batch)
        if not count:
            return
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # attention's fast kernels have no second derivative
            product = self._product(batch)
            seed = solve.seed_for(self.settings.seed, "curvature", self.batches)
            like = self._like()
            diagonal = solve.hutchinson_diagonal(
                lambda columns: self._joined(product(self._split(columns)), like),
                sum(self.sizes),
                self.settings.draws,
                seed=seed,
                like=like,
            )
        for total, part in zip(self.totals, diagonal.split(self.sizes), strict=True):
            total.add_(part.reshape(total.shape).to(total.device))
        self.examples, self.batches = self.examples + count, self.batches + 1

    def _product(self, batch: Batch) -> solve.Product:
        if self.settings.matrix == "hessian":
            return solve.hessian_product(loss_of(self.access, self.leaves, batch), self.leaves.tensors)
        outputs = self.access.forward(self.leaves, batch)
        if not outputs.requires_grad:
            raise Error("the outputs depend on none of these parameters")
        return solve.gauss_newton_product(
            lambda found: self.access.loss(lambda *inputs, **named: found, batch), outputs, self.leaves.tensors
        )

    def _like(self) -> Tensor:
        dtypes = [working_dtype(value.dtype) for value in self.leaves.tensors]
        return torch.empty(0, dtype=max(dtypes, key=lambda d: d.itemsize), device=self.leaves.tensors[0].device)

    def _split(self, columns: Tensor) -> list[Tensor]:
        parts = columns.T.split(self.sizes, dim=1)
        return [
            part.reshape(len(part), *value.shape).to(value)
            for part, value in zip(parts, self.leaves.tensors, strict=True)
        ]

    def _joined(self, vectors: Sequence[Tensor], like: Tensor) -> Tensor:
        return torch.cat([vector.detach().reshape(len(vector), -1).to(like) for vector in vectors], dim=1).T

    def result(self) -> dict[str, Tensor]:
        return self.leaves.means(self.totals, self.examples)


class _Product:
    def __init__(self, access: Access, leaves: Leaves, vector: Weights):
        self.access, self.leaves = access, leaves
        self.vector = [vector[name].to(value)[None] for name, value in leaves.values.items()]
        self.totals = leaves.zeros()
        self.examples = 0

    def watching(self, batch: Batch) -> None:
        """No hooks: it makes passes of its own."""

    def see(self, batch: Batch) -> None:
        if not size(batch):
            return
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            product = solve.hessian_product(loss_of(self.access, self.leaves, batch), self.leaves.tensors)
            for total, part in zip(self.totals, product(self.vector), strict=True):
                total.add_(part[0].detach())
        self.examples += size(batch)

    def result(self) -> dict[str, Tensor]:
        return self.leaves.means(self.totals, self.examples)
