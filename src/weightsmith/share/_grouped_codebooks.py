"""One small codebook for every group of alike rows: nothing but an index a weight is kept.

Rows (output neurons) whose weights are distributed alike share a codebook of ``2^bits`` values, so several codebooks
cost no more than one: a byte a row says which is whose. Indices and codebooks are then learnt together, so that the
layer's *outputs* stay as they were on data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, FormatError
from weightsmith.solve import steadied

ENDINGS = ("_codes", "_codebooks", "_rows", "_shape")
"""The tensors that stand for one."""

_QUANTILES = 32
_LLOYD = 25
_TURN = 10
"""Moves of indices between two fits of the codebooks."""

Parts = tuple[Tensor, Tensor, Tensor]


@card(
    paper="Yvinec, Dapogny, Bailly 2024, 'Network Memory Footprint Compression Through Jointly Learnable Codebooks and "
    "Mappings' (JLCM)",
    covers=("network-memory-footprint-compression",),
    unit="tensor",
    claim="codebooks that are learnt together with the indices, on data, keep what a model says better than codebooks "
    "that are learnt alone",
    departs="the paper's text beyond its abstract was not at hand, so these are ours: rows are grouped by the distance "
    "between their sorted weights; they stay where they are, with a byte each for their group, in place of an order "
    "that the next layer takes up; codebooks are least squares, not steps of a gradient; an index moves to a "
    "neighbouring value alone, by a gradient that is divided by the distance of the two values and by the curvature "
    "(Adam); sweeps of exact moves end it, which lower the error about as much again; each layer by itself, on its "
    "Gram matrix",
)
def grouped_codebooks(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    bits: int = 4,
    groups: int = 8,
    steps: int = 100,
    rate: float = 0.003,
    sweeps: int = 2,
    damp: float = 0.01,
) -> Parts:
    r"""Indices, codebooks and the group of each row.

    .. math:: \min_{I, C} \operatorname{tr}\big((Q - W) H (Q - W)^\top\big), \qquad Q_{rk} = C_{g(r),\, I_{rk}}

    where an index is a real number :math:`z`, rounded, that follows the straight-through gradient
    :math:`z \leftarrow z - \eta\, [(Q - W) H]_{rk} / (H_{kk}\, |c_i - c_j|)`
    with :math:`c_j` the neighbour it leads to:
    the nearer two values are, the sooner an index moves between them.

    Args:
        weight: ``[out, ...]``; the axes after the first are the inputs of a row.
        gram: the sum of ``X'X`` over the inputs: ``[in, in]``, blocks ``[in / b, b, b]`` or the diagonal ``[in]``.
            None for errors of the weights themselves.
        bits: of an index, from 1 to 8.
        groups: codebooks, from 1 to 256; never more than rows.
        steps: moves of all indices at once; the best state of every group on the way is kept.
        rate: of those moves at the start, in indices; it falls to 0.
        sweeps: then so often every index goes, column by column, to the best value for it while all others stay. 0
            ``steps`` and 0 ``sweeps`` learn the codebooks alone.
        damp: share of the mean of the Gram matrix's diagonal that is added to it.

    Returns:
        codes ``[out, in]`` uint8, codebooks ``[groups, 2^bits]`` float32, ascending, and groups of rows ``[out]``.
        Values are ``codebooks[rows[:, None], codes.long()]``. In a layer that was never called, as without ``gram``.

    Raises:
        ValueError: options out of their range, weights or a Gram matrix that are not finite or do not fit together.

    >>> codes, books, rows = grouped_codebooks(torch.tensor([[0.0, 1.0, 0.0], [5.0, 9.0, 5.0]]), bits=1, groups=2)
    >>> books[rows.int()[:, None], codes.int()]
    tensor([[0., 1., 0.],
            [5., 9., 5.]])
    """
    matrix, weight = _posed(weight, gram, bits, groups, steps, rate, sweeps, damp)
    scale = matrix.diagonal() if matrix.dim() == 2 else matrix
    rows = alike(weight, min(groups, len(weight)))
    books = torch.stack([
        _codebook(weight[rows == group], scale, 2**bits) for group in range(min(groups, len(weight)))
    ])  # fmt: skip
    state = _State(weight, matrix, rows, nearest(weight, books, rows), books)
    if matrix.dim() == 2:
        state.fit()
        best = state.copy()
        _move(state, best, steps, rate)
        state = best.copy()
        for _ in range(sweeps):
            _sweep(state)
            state.fit()
            best.take(state)
        state = best
    return state.codes.to(torch.uint8), state.books.float(), rows.to(torch.uint8)


def _posed(
    weight: Tensor, gram: Tensor | None, bits: int, groups: int, steps: int, rate: float, sweeps: int, damp: float
) -> tuple[Tensor, Tensor]:
    """The matrix ``H`` (its diagonal alone where there is no more) and the weight ``[out, in]``, both float32."""
    for name, value, least, most in (("bits", bits, 1, 8), ("groups", groups, 1, 256)):
        if not isinstance(value, int) or not least <= value <= most:
            raise Error(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    if steps < 0 or sweeps < 0 or not rate > 0:
        raise Error(f"steps and sweeps must be 0 or more and rate above 0, got {steps}, {sweeps} and {rate}")
    if weight.dim() < 2 or not weight.numel():
        raise Error(f"codebooks are shared in matrices [out, in], got {list(weight.shape)}")
    own = weight.detach().flatten(1).float()
    if not own.isfinite().all():
        raise Error("codebooks hold no NaN or infinity, and there are some among the weights")
    inputs = own.shape[1]
    if gram is None:
        return own.new_ones(inputs), own
    gram = gram.to(own.device)
    if gram.shape == (inputs,):
        return steadied(gram.diag_embed(), damp=damp).diagonal().float(), own
    full = torch.block_diag(*gram) if gram.dim() == 3 else gram
    if full.shape != (inputs, inputs):
        raise Error(f"a Gram matrix of {inputs} inputs is {[inputs, inputs]}, got {list(gram.shape)}")
    return steadied(full, damp=damp).float(), own


def alike(weight: Tensor, groups: int) -> Tensor:
    """Rows whose sorted weights are near each other: their group, ``[out]`` int64.

    The mean square between two rows' sorted weights is the squared Wasserstein distance of their distributions; it is
    taken at 32 quantiles, and groups are those of k-means.

    >>> alike(torch.tensor([[1.0, -1.0], [9.0, 8.0], [-1.0, 1.1]]), 2).tolist()
    [0, 1, 0]
    """
    inputs = weight.shape[1]
    count = min(_QUANTILES, inputs)
    places = ((torch.arange(count, device=weight.device) + 0.5) * (inputs / count)).long()
    marks = weight.sort(dim=1).values[:, places]
    order = marks.norm(dim=1).argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device) * groups // len(order)
    centres = marks.new_zeros(groups, count)
    for _ in range(_LLOYD):
        size = torch.bincount(rows, minlength=groups)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, rows, marks)
        centres = torch.where(size > 0, sums / size.clamp(min=1), centres)
        before, rows = rows, torch.cdist(marks, centres).argmin(dim=1)
        if torch.equal(before, rows):
            break
    return rows


def _codebook(weight: Tensor, scale: Tensor, count: int) -> Tensor:
    """The ``count`` values ``[count]``, ascending, that are nearest to weights ``[rows, in]`` whose columns count so
    much: weighted Lloyd, from midway between equal shares and equal steps. Zeros where there are no rows."""
    if not len(weight):
        return weight.new_zeros(count)
    values, shares = weight.reshape(-1), scale.expand_as(weight).reshape(-1)
    ordered = values.sort().values
    places = ((torch.arange(count, device=weight.device) + 0.5) * (len(ordered) / count)).long()
    book = torch.lerp(ordered[places], _steps(ordered[0], ordered[-1], count), 0.5)
    for _ in range(_LLOYD):
        index = torch.bucketize(values, (book[1:] + book[:-1]) / 2)
        size = torch.zeros_like(book).index_add_(0, index, shares)
        sums = torch.zeros_like(book).index_add_(0, index, shares * values)
        book = torch.where(size > 0, sums / size.clamp(min=torch.finfo(size.dtype).tiny), book).sort().values
    return book


def _steps(low: Tensor, high: Tensor, count: int) -> Tensor:
    return low + (high - low) * torch.arange(count, device=low.device) / max(count - 1, 1)


def nearest(values: Tensor, books: Tensor, rows: Tensor) -> Tensor:
    """Indices ``[out, in]`` of the nearest values of each row's codebook (ascending)."""
    middles = (books[:, 1:] + books[:, :-1]) / 2
    return torch.searchsorted(middles[rows].contiguous(), values.contiguous())


class _State:
    """Codes and codebooks under way, with what their outputs miss."""

    def __init__(self, weight: Tensor, matrix: Tensor, rows: Tensor, codes: Tensor, books: Tensor):
        self.weight, self.matrix, self.rows, self.codes, self.books = weight, matrix, rows, codes, books

    def values(self) -> Tensor:
        """``[out, in]``."""
        return self.books[self.rows[:, None], self.codes]

    def lacks(self) -> tuple[Tensor, Tensor]:
        """Half the gradient ``(Q - W) H [out, in]``, and the error of each group."""
        missed = self.values() - self.weight
        gradient = missed @ self.matrix
        return gradient, self.of_groups((gradient * missed).sum(dim=1))

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient of each index: the nearer the value that it would move to, and the flatter, the stronger."""
        last = self.books.shape[1] - 1
        lower = (self.codes - (gradient > 0).long()).clamp(0, last - 1)  # of the two values that it would lie between
        gaps = (self.books[:, 1:] - self.books[:, :-1]).clamp(min=torch.finfo(self.books.dtype).tiny)
        pull = gradient / (self.matrix.diagonal() * gaps[self.rows[:, None], lower])
        return pull.nan_to_num_(0.0, 0.0, 0.0)  # between two values that are one

    def of_groups(self, of_rows: Tensor) -> Tensor:
        """Sums over the rows of each group, float64."""
        return torch.zeros(len(self.books), dtype=torch.float64, device=of_rows.device).index_add_(
            0, self.rows, of_rows.double()
        )

    def fit(self) -> None:
        """Codebooks with the least error for these codes; those of unused values stay. Ascending, codes following."""
        groups, count = self.books.shape
        places = (self.rows[:, None] * count + self.codes).reshape(-1)

        def summed(values: Tensor) -> Tensor:
            made = torch.zeros(groups * count, dtype=torch.float64, device=values.device)
            return made.index_add_(0, places, values.reshape(-1).double()).view(groups, count)

        normal = torch.stack(
            [summed((self.codes == one).to(self.matrix.dtype) @ self.matrix) for one in range(count)], 1
        )
        wanted = summed(self.weight @ self.matrix)
        slight = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
        normal.diagonal(dim1=1, dim2=2).add_(slight)
        made = torch.linalg.solve(normal, (wanted + slight * self.books)[..., None])[..., 0]
        self.books, order = made.to(self.books.dtype).sort(dim=1)
        self.codes = order.argsort(dim=1)[self.rows[:, None], self.codes]

    def copy(self) -> _State:
        """Another state, at the same place."""
        return _State(self.weight, self.matrix, self.rows, self.codes.clone(), self.books.clone())

    def take(self, other: _State, error: Tensor | None = None, least: Tensor | None = None) -> Tensor:
        """Take over the groups in which another state has the lower error; the lower errors."""
        least = self.lacks()[1] if least is None else least
        error = other.lacks()[1] if error is None else error
        better = error < least
        self.codes = torch.where(better[self.rows][:, None], other.codes, self.codes)
        self.books = torch.where(better[:, None], other.books, self.books)
        return torch.where(better, error, least)


def _move(state: _State, best: _State, steps: int, rate: float) -> None:
    """Indices as real numbers that follow the straight-through gradient between neighbouring values."""
    last = state.books.shape[1] - 1
    # The place of each weight between its two nearest values, so that those that lie midway move first.
    below = (torch.searchsorted(state.books[state.rows].contiguous(), state.weight, right=True) - 1).clamp(0, last - 1)
    low, high = (state.books[state.rows[:, None], below + one] for one in (0, 1))
    between = (state.weight - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    index = (below + between).clamp(min=state.codes - 0.49).clamp(max=state.codes + 0.49)
    mean, square = torch.zeros_like(index), torch.zeros_like(index)
    least = None
    for step in range(steps):
        state.codes = index.round().long().clamp(0, last)
        if step and step % _TURN == 0:
            codes = state.codes
            state.fit()
            index += state.codes - codes
        gradient, error = state.lacks()
        least = best.take(state, error, least)
        pull = state.pull(gradient)
        mean.lerp_(pull, 0.1)
        square.lerp_(pull.square(), 0.05)
        root = (square / (1 - 0.95 ** (step + 1))).sqrt_().add_(torch.finfo(square.dtype).tiny)
        index -= rate * (1 - step / steps) / (1 - 0.9 ** (step + 1)) * mean / root
        index.clamp_(0, last)
    if steps:
        state.codes = index.round().long()
        best.take(state, None, least)


def _sweep(state: _State, block: int = 128) -> None:
    """Every index once, column by column, to the value that is best for it as all others are."""
    matrix, scale = state.matrix, state.matrix.diagonal()
    gradient = state.lacks()[0]
    for first in range(0, len(matrix), block):
        here = slice(first, min(first + block, len(matrix)))
        own = matrix[here, here]
        moved = torch.zeros_like(gradient[:, here])
        for column in range(first, here.stop):
            now = gradient[:, column] + moved @ own[:, column - first] if column > first else gradient[:, column]
            value = state.books[state.rows, state.codes[:, column]]
            wanted = value - now / scale[column]
            codes = nearest(wanted[:, None], state.books, state.rows)[:, 0]
            moved[:, column - first] = state.books[state.rows, codes] - value
            state.codes[:, column] = codes
        gradient += moved @ matrix[here]


# Codes as bytes


def packed_width(inputs: int, bits: int) -> int:
    """Bytes of a row of indices."""
    return -(-inputs * bits // 8)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Indices ``[rows, in]`` uint8 as ``[rows, bytes]`` uint8, lowest bits first, without gaps in a row.

    >>> packed(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist()     # 001, 010, 011 from the right
    [[209, 0]]
    """
    places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    each = (codes[..., None] >> places & 1).flatten(1)
    each = torch.nn.functional.pad(each, (0, -each.shape[1] % 8)).unflatten(1, (-1, 8))
    return (each << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def unpacked(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `packed`: ``[rows, inputs]`` uint8."""
    each = (words[..., None] >> torch.arange(8, device=words.device, dtype=torch.uint8) & 1).flatten(1)
    each = each[:, : inputs * bits].unflatten(1, (inputs, bits))
    return (each << torch.arange(bits, device=words.device, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def packed_parts(
    kernel: Callable[..., Parts], options: tuple[tuple[str, Any], ...], weight: Tensor, gram: Tensor | None = None
) -> dict[str, Tensor]:
    """What is stored of a tensor."""
    given = dict(options)
    codes, books, rows = kernel(weight, gram, **given)
    return {"_codes": packed(codes, given["bits"]), "_codebooks": books, "_rows": rows}


def unpacked_values(words: Tensor, rows: Tensor, books: Tensor, *, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Values of some rows, ``[rows, *shape[1:]]``, from what is stored.

    Raises:
        FormatError: a row names a codebook that is not there; the file is damaged.
    """
    if rows.numel() and int(rows.max()) >= len(books):
        raise FormatError(f"a row names codebook {int(rows.max())} of {len(books)}; the file is damaged")
    codes = unpacked(words, bits, torch.Size(shape[1:]).numel())
    return books[rows.int()[:, None], codes.int()].reshape(len(rows), *shape[1:])
