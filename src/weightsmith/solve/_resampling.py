"""Drawing with replacement from examples, or from whole groups of them, many times at once.

A mean over a resample is a ratio of two sums over groups, so the resamples of many rows (models, systems)
are two gathers and no loop over examples. All rows see the same resamples, which keeps them paired.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from weightsmith.errors import Error

AT_ONCE = 1 << 22  # elements of a chunk of resamples: 32 MiB of indices


def grouped(groups: object, count: int) -> tuple[Tensor, int]:
    """The group of every example as an index ``[n]`` on the CPU, and how many groups there are; None: each its own.

    Raises:
        Error: not one group per example.

    >>> grouped(torch.tensor([7, 3, 7]), 3)
    (tensor([1, 0, 1]), 2)
    """
    if groups is None:
        return torch.arange(count), count
    if isinstance(groups, Tensor):
        number = torch.unique(groups.detach().cpu(), return_inverse=True)[1]
    else:
        places: dict[object, int] = {}
        number = torch.tensor([places.setdefault(group, len(places)) for group in list(groups)])  # type: ignore[call-overload]
    if number.shape != (count,):
        raise Error(f"groups {list(number.shape)} do not fit {count} examples")
    return number, int(number.max()) + 1 if count else 0


def draws(count: int, samples: int, seed: int, width: int = 1) -> Iterator[Tensor]:
    """Chunks ``[b, count]`` of indices drawn with replacement, ``samples`` rows in all.

    The rows do not depend on how large a chunk is: each chunk goes on where the generator stands.

    >>> torch.equal(torch.cat(list(draws(5, 7, seed=1))), torch.cat(list(draws(5, 7, seed=1, width=1 << 21))))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(AT_ONCE // max(count * width, 1), 1)
    for start in range(0, samples, rows):
        # Uniform numbers rather than randint, whose stream depends on the range on some builds.
        uniform = torch.rand(min(rows, samples - start), count, generator=generator, dtype=torch.float64)
        yield (uniform * count).long().clamp_(max=count - 1)


def resampled_means(
    values: Tensor,
    samples: int,
    seed: int,
    groups: object = None,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Means of every row over resamples of the examples, the same resamples for all rows.

    .. math:: \bar x_{b} = \sum_i m_{bi} w_i x_i \Big/ \sum_i m_{bi} w_i

    with :math:`m_{bi}` how often example i (all its group) was drawn.

    Args:
        values: ``[k, n]``.
        samples: how many resamples, b.
        groups: ``[n]``: what is drawn together; None draws examples.
        weight: ``[n]``: how much an example counts, such as its tokens.

    Returns:
        ``[b, k]`` in float64; NaN for a resample of no weight. Memory is bounded by `AT_ONCE` elements at a time.

    >>> resampled_means(torch.ones(2, 5), 3, seed=0).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    values = values.double()
    count = values.shape[1]
    number, total = grouped(groups, count)
    number = number.to(values.device)
    weight = values.new_ones(count) if weight is None else weight.to(values)
    sums = values.new_zeros(len(values), total).index_add_(1, number, values * weight)
    sizes = values.new_zeros(total).index_add_(0, number, weight)
    # Counts and a product of matrices, where there are many rows; a plain gather where there are few.
    found = []
    for chunk in draws(total, samples, seed):
        chunk = chunk.to(values.device)
        if len(values) < 4:
            found.append(torch.stack([row[chunk].sum(1) for row in sums], 1) / sizes[chunk].sum(1)[:, None])
            continue
        counts = values.new_zeros(chunk.shape).scatter_add_(1, chunk, torch.ones_like(chunk, dtype=values.dtype))
        found.append(counts @ sums.T / (counts @ sizes)[:, None])
    return torch.cat(found) if found else values.new_zeros(0, len(values))
