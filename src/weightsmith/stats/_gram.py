"""How much the inputs of a layer lie in each direction.

The squared change of a layer's outputs under a change ``D`` of its weight is ``tr(D G D')`` with
``G = X'X`` the inner products of its input features. So ``G`` is all that merging, pruning and
quantizing need to know of the data to keep the outputs, and it does not grow with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats._taps import Part, Store, Taps, Tokens, features, inputs_of, layers_of
from weightsmith.stats.room import Access, Batch, Forward, collect
from weightsmith.weights import Pattern, PerTensor, Weights, resolve

__all__ = ["Gram", "features", "gram"]


def gram(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    form: PerTensor[str | int] = "full",
    tokens: Tokens | None = None,
    pattern: Pattern = "*",
    sums: torch.dtype = torch.float64,
    store: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    forward: Forward | None = None,
) -> Weights:
    r"""Gram matrices of the inputs of linear and convolution layers.

    .. math:: G = X^\top \operatorname{diag}(w)\, X

    with :math:`X` ``[rows, in]`` what a layer multiplies its flattened weight ``[out, in]`` with:
    every position of every example, for a convolution every patch; and :math:`w` how much each counts, usually one.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; padded tokens (``attention_mask`` 0) do not count, where
            a layer's input is ``[n, t, in]`` or ``[n t, in]``.
        form: ``"full"``, ``"diagonal"`` (of each input its sum of squares), or the size b of blocks along the
            diagonal, which must divide the inputs. May differ by tensor.
        tokens: ``batch -> [n, t]`` or ``[n]``: how much each token, or all of an example, counts.
        pattern: names of the weights.
        sums: the dtype of sums over batches; products are float32, under autocast and of narrow floats as well (how
            exact, ``torch.set_float32_matmul_precision`` says). float32 sums need half the memory: after 512
            batches their entries were off by up to 1e-6 of the mean diagonal, those of float64 sums by 6e-8, which is
            the rounding at the end. float64 sums took a sixth more time on a CPU, for 1536 inputs and batches of 512
            rows.
        store: a folder for files that hold the sums for which ``memory`` is not enough (default: the folder for
            temporary files). They vanish with the result; `save` it to keep it.
        memory: bytes of sums in memory, such as ``"4GB"``; default: any number, or none where ``store`` is given.
        forward: ``(model, batch) -> logits``, where the default does not fit.

    Returns:
        Weights: ``[in, in]``, ``[in / b, b, b]`` or ``[in]`` float32 under the name of each weight, exactly symmetric.
        Layers that share their input (query, key, value) share one matrix. While it runs, memory holds the sums, one
        product and one input. Without a matrix are: grouped and transposed convolutions, embeddings, weights that
        something other than one such layer also uses (tied embeddings), weights that lie ``[in, out]`` (as in GPT-2's
        own layers: a matrix for a square one would fit the wrong side, unnoticed), experts fused into one tensor, and
        layers that were never given a row that counts.

    Raises:
        ValueError: no batch, no layer that fits, blocks that do not divide the inputs, inputs that are not finite,
            token weights that are negative or of another shape.

    >>> gram(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 2.0], [0.0, 1.0]])])["weight"]
    tensor([[1., 2.],
            [2., 5.]])
    >>> gram(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 2.0], [0.0, 1.0]])], form="diagonal")["weight"]
    tensor([1., 5.])
    """
    statistic = Gram(pattern, form, tokens, sums, store, memory)
    return collect(model, batches, {"gram": statistic}, forward=forward)["gram"]


@dataclass(frozen=True)
class Gram:
    """The settings of `gram`, for `collect`."""

    pattern: Pattern = "*"
    form: PerTensor[str | int] = "full"
    tokens: Tokens | None = None
    sums: torch.dtype = torch.float64
    store: str | os.PathLike[str] | None = None
    memory: int | str | None = None
    kind = "gram"

    def __post_init__(self) -> None:
        check_sums(self.sums)
        Store.of(self.store, self.memory)

    def counter(self, access: Access) -> Taps:
        layers = layers_of(access.model, self.pattern)
        forms = resolve(self.form, layers, "form")
        for name, form in forms.items():
            check_form(name, form, inputs_of(layers[name]))
        store = Store.of(self.store, self.memory)
        return Taps(layers, _Products(forms, self.sums, store), self.tokens, store)


def check_sums(sums: torch.dtype) -> None:
    """An error unless sums can be of this dtype."""
    if sums not in (torch.float32, torch.float64):
        raise Error(f"sums is torch.float32 or torch.float64, got {sums}")


def check_form(name: str, form: Any, inputs: int) -> None:
    """An error unless ``form`` is a form of a Gram matrix of so many inputs."""
    if form in ("full", "diagonal"):
        return
    if not isinstance(form, int) or isinstance(form, bool) or form < 1:
        raise Error(f"form of {name} is 'full', 'diagonal' or the size of blocks, got {form!r}")
    if inputs % form:
        raise Error(f"{name}: its {inputs} inputs cannot be cut into blocks of {form}; choose a divisor")


@dataclass
class _Products:
    """The measure: products of features, summed. Of a full matrix what lies above the diagonal is filled in last."""

    forms: Mapping[str, Any]
    sums: torch.dtype
    store: Store

    def form(self, name: str) -> object:
        return self.forms[name]

    def of(self, name: str, parts: Iterable[Part]) -> Tensor:
        total: Tensor | None = None
        for part in parts:
            rows = part.rows if part.weights is None else part.rows * part.weights.sqrt()[:, None]
            total = rows.new_zeros(_shape(self.forms[name], rows.shape[1])) if total is None else total
            add_product(total, rows)
        assert total is not None, "there is at least one part"
        return total

    def into(self, total: Tensor, found: Tensor) -> None:
        add_into(total, found)

    def sound(self, found: Tensor) -> Tensor:
        return finite(found)

    def result(self, total: Tensor, rows: float) -> Tensor:
        if total.dtype != torch.float32:
            total = self.store.copy(total, torch.float32)
        mirror(total)
        return total


def _shape(form: Any, inputs: int) -> tuple[int, ...]:
    if form == "diagonal":
        return (inputs,)
    return (inputs, inputs) if form == "full" else (inputs // form, form, form)


def finite(found: Tensor) -> Tensor:
    """Whether the sums of squares are, as float32: where an input is not finite, they are not. One boolean."""
    energy = found if found.dim() == 1 else found.diagonal(dim1=-2, dim2=-1)
    return energy.float().isfinite().all()


def add_product(total: Tensor, rows: Tensor) -> None:
    """Add ``rows' rows`` to a total ``[in, in]``, of which the lower half is enough, ``[in / b, b, b]`` or ``[in]``."""
    if total.dim() == 1:
        total += rows.square().sum(dim=0)
    elif total.dim() == 3:
        blocks = rows.unflatten(1, total.shape[:2])
        total.baddbmm_(blocks.permute(1, 2, 0), blocks.permute(1, 0, 2))
    elif total.device.type != "cpu" or len(total) <= PANEL:
        total.addmm_(rows.T, rows)
    else:
        # Half of the products is enough. Measured on a CPU: 0.70 to 0.74 of the time, for 576 to 3072 inputs.
        for start in range(0, len(total), PANEL):
            stop = start + PANEL
            total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def add_into(total: Tensor, found: Tensor) -> None:
    """``total += found`` some rows at a time, of a matrix ``[in, in]`` the lower half.

    Torch makes a copy of what it adds in another dtype.
    """
    for start in range(0, len(total), PANEL):
        stop = start + PANEL
        place = (slice(start, stop), slice(stop)) if total.dim() == 2 else slice(start, stop)
        total[place] += found[place]


PANEL = 256
"""Rows of a matrix that are taken together."""


def mirror(total: Tensor) -> None:
    """What lies below the diagonal, above it as well, in place: ``[..., d, d]``; a diagonal ``[d]`` stays."""
    if total.dim() == 1:
        return
    for start in range(0, total.shape[-1], PANEL):
        stop = start + PANEL
        total[..., :start, start:stop] = total[..., start:stop, :start].mT
        corner = total[..., start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
