"""Which elements of a score are kept where a pattern says it: so many of every few, as in ``"2:4"``.

Hardware that skips zeros wants them evenly spread. Among equal scores the first ones are kept.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.solve import keys


def kept_of_groups(score: Tensor, *, keep: int, group: int) -> Tensor:
    """N:M: in every run of ``group`` inputs of a row, the ``keep`` highest; the first of equal ones.

    Args:
        score: ``[rows, ...]``; the axes after the first are one run of inputs.
    """
    runs = score.reshape(len(score), -1, group)
    order = keys(runs).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros(runs.shape, dtype=torch.bool)
    mask.scatter_(-1, order[..., :keep], True)
    return mask.reshape(score.shape)


def pattern_of(sparsity: str, option: str = "sparsity") -> tuple[int, int]:
    """``"2:4"`` -> (2, 4): two of four are kept.

    >>> pattern_of("2:4")
    (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", sparsity.strip())
    if not found or not 0 <= int(found[1]) <= int(found[2]) or int(found[2]) == 0:
        raise Error(f'{option}: {sparsity!r} is no pattern; write "2:4" to keep two of every four')
    return int(found[1]), int(found[2])
