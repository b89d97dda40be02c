"""How large the numbers are that go into a layer, or come out of it, channel by channel.

A weight on an input that is almost always zero does little, however large it is. A row of numbers a layer says so:
much less than a Gram matrix, and enough for scores and scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats._taps import Part, Taps, layers_of
from weightsmith.stats.room import Access, Batch, Forward, collect
from weightsmith.weights import Pattern, Weights

What = Literal["norm", "mean", "mean_absolute", "maximum", "second_moment"]
Of = Literal["inputs", "outputs"]


def activations(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    what: What = "norm",
    of: Of = "inputs",
    pattern: Pattern = "*",
    forward: Forward | None = None,
) -> Weights:
    r"""A number for each input (or output) of linear and convolution layers: its size, over all rows.

    .. math:: \text{norm}_j = \sqrt{\sum_i x_{ij}^2}, \quad \text{mean}_j = \frac1r \sum_i x_{ij}, \quad
        \text{maximum}_j = \max_i |x_{ij}|, \quad \text{second moment}_j = \frac1r \sum_i x_{ij}^2

    with :math:`x` ``[r, in]`` the features that a layer multiplies its flattened weight with, as in `gram`: the norm
    is the root of the diagonal of the Gram matrix. ``"mean_absolute"`` is the mean of :math:`|x_{ij}|`. The variance is
    that of two of them, ``second_moment - mean * mean``, gathered in one pass with `collect` (rounding leaves little of
    it where the mean is hundreds of standard deviations).

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; padded tokens (``attention_mask`` 0) do not count.
        what: ``"norm"``, ``"mean"``, ``"mean_absolute"``, ``"maximum"`` (of absolute values) or ``"second_moment"``.
        of: ``"inputs"`` or ``"outputs"`` (bias included, before any activation function).
        pattern: names of the weights.
        forward: ``(model, batch) -> logits``, where the default does not fit.

    Returns:
        Weights: float32 under the name of each weight, calls summed in float64: ``[in]``, of a convolution one number
        for each channel and place of the kernel; or ``[out]``. The layers are those of `gram`.

    Raises:
        ValueError: another ``what`` or ``of``, no batch, no layer that fits, or activations that are not finite.

    >>> layer, data = torch.nn.Linear(2, 1), [torch.tensor([[3.0, 1.0], [4.0, -5.0]])]
    >>> activations(layer, data)["weight"], activations(layer, data, what="maximum")["weight"]
    (tensor([5.0000, 5.0990]), tensor([4., 5.]))
    """
    return collect(model, batches, {"activations": Activations(what, of, pattern)}, forward=forward)["activations"]


@dataclass(frozen=True)
class Activations:
    """The settings of `activations`, for `collect`."""

    what: What = "norm"
    of: Of = "inputs"
    pattern: Pattern = "*"

    def __post_init__(self) -> None:
        for option, known in (("what", What), ("of", Of)):
            if getattr(self, option) not in get_args(known):
                raise Error(f"{option} is one of {', '.join(get_args(known))}; got {getattr(self, option)!r}")

    @property
    def kind(self) -> str:
        return f"activations {self.what} of {self.of}"

    def counter(self, access: Access) -> Taps:
        return Taps(layers_of(access.model, self.pattern), _Sizes(self.what), of=self.of)


@dataclass
class _Sizes:
    """The measure: one number a column."""

    what: What
    sums: torch.dtype = torch.float64

    def form(self, name: str) -> object:
        return None

    def of(self, name: str, parts: Iterable[Part]) -> Tensor:
        total: Tensor | None = None
        for part in parts:
            one = self._of(part.rows)
            if total is None:
                total = one
            else:
                self.into(total, one)
        assert total is not None, "there is at least one part"
        return total

    def _of(self, rows: Tensor) -> Tensor:
        if self.what == "maximum":
            return rows.abs().amax(dim=0) if len(rows) else rows.new_zeros(rows.shape[1])
        values = {"mean": rows, "mean_absolute": rows.abs()}.get(self.what)
        return (rows.square() if values is None else values).sum(dim=0)

    def into(self, total: Tensor, found: Tensor) -> None:
        if self.what == "maximum":
            torch.maximum(total, found.to(total.dtype), out=total)
        else:
            total += found

    def sound(self, found: Tensor) -> Tensor:
        return found.isfinite().all()

    def result(self, total: Tensor, rows: float) -> Tensor:
        if self.what == "norm":
            total = total.sqrt()
        elif self.what != "maximum":
            total = total / rows
        return total.float()
