"""How much the inputs of a layer lie in each direction, where the loss hangs on the layer's outputs.

A Gram matrix takes every row for as important as the next. Rows whose outputs the loss does not feel may be changed
freely; weighted with the squared gradient of the loss at the outputs, the matrix says how much a change of weights
costs in the end, to second order, as Fisher information would: it is its block for the weights of one output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats._gram import add_into, add_product, finite, mirror
from weightsmith.stats._taps import (
    Counted,
    Layer,
    Store,
    apart,
    by_row,
    features,
    layers_of,
    not_finite,
    outputs,
    runs,
    version,
)
from weightsmith.stats.room import Access, Batch, Loss, collect
from weightsmith.weights import Pattern, PerTensor, Weights, resolve, working


def guided_gram(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    groups: PerTensor[int] = 1,
    pattern: Pattern = "*",
    loss: Loss | None = None,
) -> Weights:
    r"""Gram matrices whose rows count as much as the loss hangs on the outputs that they make.

    .. math:: H_k = X^\top \operatorname{diag}\Bigl( \frac{1}{|J_k|} \sum_{j \in J_k}
        \Bigl( \frac{\partial \ell}{\partial z_j} \Bigr)^{\!2} \Bigr)\, X

    with :math:`X` ``[rows, in]`` the features of a layer, :math:`z` ``[rows, out]`` its outputs, and :math:`J_k` the
    k-th run of its outputs. With as many groups as outputs, each matrix is n times the block of the empirical Fisher
    information for the weights of one output (exactly, where every example is one row).

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``(inputs, labels)`` or mappings; padded tokens (``attention_mask`` 0) do not count.
        groups: of outputs, consecutive and of one size, which must divide the outputs; may differ by tensor.
        pattern: names of the weights. The inputs of these layers are held during one pass; a few at a time need less.
        loss: ``(model, batch) -> number``, the sum of the examples' losses, so that a row's gradient is of its own
            example's loss alone; the default is cross-entropy. Its scale is squared in the matrices.

    Returns:
        Weights: ``[in, in]`` float32 for one group, ``[groups, in, in]`` for more, under the name of each weight. One
        backward pass a batch, products in float32, sums in float64. Layers as for `gram`; those whose outputs the loss
        does not depend on have none.

    Raises:
        ValueError: no batch, no layer that fits, groups that do not divide the outputs, no labels, a loss of several
            numbers or one that depends on none of these layers, inputs or gradients that are not finite.

    The matrices of Kim and others 2025, 'GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance', which averages over groups as well.

    >>> layer, double = torch.nn.Linear(2, 1), lambda model, batch: 2 * model(batch).sum()   # gradients of 2
    >>> guided_gram(layer, [torch.tensor([[1.0, 2.0], [0.0, 1.0]])], loss=double)["weight"]
    tensor([[ 4.,  8.],
            [ 8., 20.]])
    """
    return collect(model, batches, {"guided": GuidedGram(groups, pattern)}, loss=loss)["guided"]


@dataclass(frozen=True)
class GuidedGram:
    """The settings of `guided_gram`, for `collect`."""

    groups: PerTensor[int] = 1
    pattern: Pattern = "*"
    kind = "guided gram"

    def counter(self, access: Access) -> _Counter:
        layers = layers_of(access.model, self.pattern)
        groups = resolve(self.groups, layers, "groups")
        for name, count in groups.items():
            made = layers[name].weight.shape[0]
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise Error(f"groups of {name} is a whole number from 1, got {count!r}")
            if made % count:
                raise Error(f"{name}: its {made} outputs cannot be cut into {count} groups of one size")
        return _Counter(access, layers, groups)


@dataclass
class _Counter:
    access: Access
    layers: Mapping[str, Layer]
    groups: Mapping[str, int]
    store: Store = field(default_factory=Store)
    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    batches: int = 0

    def watching(self, batch: Batch) -> None:
        """No hooks for a plain pass: it makes one of its own, with a graph."""

    def see(self, batch: Batch) -> None:
        self.batches += 1
        counted, handles = Counted.of(batch), []
        with torch.enable_grad(), _frozen(self.access.model):
            try:
                for name, layer in self.layers.items():
                    handles.append(layer.register_forward_hook(self._hook(name, counted), with_kwargs=True))
                loss = self.access.loss(self.access.model, batch)
            finally:
                for handle in handles:
                    handle.remove()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise Error(f"loss= must return one number, got {shape}")
            if not loss.requires_grad:
                raise Error("the loss depends on the outputs of none of these layers; was it computed with a graph?")
            loss.sum().backward()

    def _hook(self, name: str, counted: Counted) -> Any:
        def see(layer: Layer, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor:
            value = (arguments[0] if arguments else keywords["input"]).detach()
            before = version(value)

            def add(gradient: Tensor) -> None:
                if version(value) != before:
                    raise Error(
                        f"{name}: its input is overwritten after it was used, and gone when the gradient comes (the "
                        "model could not be trained either); leave this layer out with pattern="
                    )
                self._add(name, value, gradient.detach(), counted)

            if not output.requires_grad:
                # With its weights frozen a model has no graph before the first layer that is looked at. Not the leaf
                # itself is handed on: the model may write to it.
                output = output.detach().requires_grad_().clone()
            output.register_hook(add)  # the graph keeps the input until it has been walked past it
            return output

        return see

    def _add(self, name: str, given: Tensor, gradient: Tensor, counted: Counted) -> None:
        layer, count, rows = self.layers[name], self.groups[name], 0
        with apart(gradient):
            found: Tensor | None = None
            keep = counted.rows(name, layer, given)
            for value, slopes, kept in runs(layer, given, by_row(layer, gradient), keep):
                inputs = features(layer, value if kept is None else value[kept])
                slopes = outputs(layer, working(slopes if kept is None else slopes[kept]))
                weights = slopes.unflatten(1, (count, -1)).square().mean(dim=2).sqrt()
                if found is None:
                    found = inputs.new_zeros(count, inputs.shape[1], inputs.shape[1])
                for matrix, weight in zip(found, weights.unbind(dim=1), strict=True):
                    add_product(matrix, inputs * weight[:, None])
                rows += len(inputs)
            assert found is not None, "there is at least one run"
            if not finite(found):
                raise not_finite("inputs, or the gradients of its outputs,", [name], self.batches)
            if name not in self.totals:
                self.totals[name] = self.store.zeros(found, torch.float64)
            for total, matrix in zip(self.totals[name], found, strict=True):
                add_into(total, matrix)
            self.counts[name] = self.counts.get(name, 0) + rows

    def rows(self) -> dict[str, float]:
        return {name: float(self.counts.get(name, 0)) for name in self.layers}

    def result(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.layers:
            if self.counts.get(name, 0):
                total = self.totals.pop(name).float()
                mirror(total)
                found[name] = total if len(total) > 1 else total[0]
        return found


def output_gradients(
    model: nn.Module, batches: Iterable[Batch], *, pattern: Pattern = "*", loss: Loss | None = None
) -> Weights:
    r"""How strongly the loss hangs on each output of a layer.

    .. math:: s_j = \sum_n \Bigl( \frac{\partial \ell}{\partial z_{nj}} \Bigr)^{\!2}

    with :math:`z` ``[rows, out]`` the outputs of a layer. Times the squared change of an output this is, to second
    order and as the empirical Fisher information has it, what the loss loses.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``(inputs, labels)`` or mappings; padded tokens (``attention_mask`` 0) do not count.
        pattern: names of the weights. The inputs of these layers are held during one pass.
        loss: ``(model, batch) -> number``, the sum of the examples' losses; the default is cross-entropy.

    Returns:
        Weights: ``[out]`` float32 under the name of each weight. One backward pass a batch, sums in float64.

    Raises:
        ValueError: as for `guided_gram`.

    >>> layer, double = torch.nn.Linear(2, 1), lambda model, batch: 2 * model(batch).sum()   # gradients of 2
    >>> output_gradients(layer, [torch.ones(3, 2)], loss=double)["weight"]
    tensor([12.])
    """
    return collect(model, batches, {"own": OutputGradients(pattern)}, loss=loss)["own"]


@dataclass(frozen=True)
class OutputGradients:
    """The settings of `output_gradients`, for `collect`."""

    pattern: Pattern = "*"
    kind = "output gradients"

    def counter(self, access: Access) -> _Squares:
        layers = layers_of(access.model, self.pattern)
        return _Squares(access, layers, dict.fromkeys(layers, 1))


class _Squares(_Counter):
    """The squares of the gradients alone."""

    def _add(self, name: str, given: Tensor, gradient: Tensor, counted: Counted) -> None:
        layer = self.layers[name]
        with apart(gradient):
            keep = counted.rows(name, layer, given)
            for _, slopes, kept in runs(layer, given, by_row(layer, gradient), keep):
                slopes = outputs(layer, working(slopes if kept is None else slopes[kept]))
                found = slopes.double().square().sum(dim=0)
                if not finite(found):
                    raise not_finite("the gradients of its outputs", [name], self.batches)
                self.totals[name] = self.totals[name] + found if name in self.totals else found
                self.counts[name] = self.counts.get(name, 0) + len(slopes)

    def result(self) -> dict[str, Tensor]:
        return {name: self.totals[name].float() for name in self.layers if self.counts.get(name, 0)}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside, which cost as much as those of activations and would be kept."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
