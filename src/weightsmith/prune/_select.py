"""Which elements of a score are kept where a pattern says it: so many of every few, or whole blocks.

Hardware that skips zeros wants them evenly spread (``"2:4"``) or in one piece (``"16x16"``). Among equal scores the
first ones are kept.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.solve import keys
from weightsmith.weights import Lazy, Spec, apply


def kept_of_groups(score: Tensor, *, keep: int, group: int) -> Tensor:
    """N:M: in every run of ``group`` inputs of a row, the ``keep`` highest; the first of equal ones.

    Args:
        score: ``[rows, ...]``; the axes after the first are one run of inputs.
        keep: how many of a run, from 0 to ``group``.
        group: the length of a run; a row is a whole number of them.

    Returns:
        ``[rows, ...]``, true where a score is among the highest. NaN counts as higher than all numbers.
    """
    if not score.numel() or not 0 < keep < group:
        return torch.full(score.shape, keep > 0, dtype=torch.bool, device=score.device)
    runs = keys(score).reshape(-1, group)
    mask = runs >= _nth_highest(runs, keep)
    if int(mask.count_nonzero()) > keep * len(runs):  # ties at the threshold: their places decide
        runs = runs.long() * group - torch.arange(group, device=score.device)
        mask = runs >= _nth_highest(runs, keep)
    return mask.reshape(score.shape)


def _nth_highest(runs: Tensor, place: int) -> Tensor:
    """The value at a place from the top of each run, ``[runs, 1]``, counted from 1."""
    if runs.is_cpu:  # numpy selects where torch sorts: ten to thirty times as fast
        at = runs.shape[-1] - place
        return torch.from_numpy(np.partition(runs.numpy(), at, axis=-1)[:, at : at + 1])
    return runs.sort(dim=-1, descending=True).values[:, place - 1 : place]


def pattern_of(sparsity: str, option: str = "sparsity") -> tuple[int, int]:
    """``"2:4"`` -> (2, 4): two of four are kept.

    >>> pattern_of("2:4")
    (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", sparsity.strip())
    if not found or not 0 <= int(found[1]) <= int(found[2]) or int(found[2]) == 0:
        raise Error(f'{option}: {sparsity!r} is no pattern; write "2:4" to keep two of every four')
    return int(found[1]), int(found[2])


def whole_of(structure: str, name: str = "structure") -> tuple[int, int]:
    """What goes as one, as rows x columns; 0 for all of them.

    >>> whole_of("16x4"), whole_of("row"), whole_of("column"), whole_of("element")
    ((16, 4), (1, 0), (0, 1), (1, 1))
    """
    words = {"element": (1, 1), "row": (1, 0), "column": (0, 1)}
    if structure in words:
        return words[structure]
    found = re.fullmatch(r"(\d+)x(\d+)", str(structure).strip())
    if not found or not int(found[1]) or not int(found[2]):
        raise Error(f'{name}: structure is element, row, column or a block such as "16x16"; got {structure!r}')
    return int(found[1]), int(found[2])


def pooled(score: Lazy, whole: tuple[int, int], name: str) -> Lazy:
    """The mean score of each block, ``[rows, columns]`` of blocks; the score itself for elements."""
    if whole == (1, 1):
        return score
    rows, columns, height, width = _grid(score.spec.shape, whole, name)
    if not rows or not columns:
        return score
    spec = Spec((rows // height, columns // width), torch.float32)
    return apply(block_means, score, unit="tensor", spec=spec, options={"height": height, "width": width})


def spread(mask: Lazy, whole: tuple[int, int], shape: tuple[int, ...]) -> Any:
    """A mask of blocks as one of elements, ``[*shape]``."""
    if whole == (1, 1) or (mask.spec.shape == shape and not mask.spec.numel):
        return mask
    _, _, height, width = _grid(shape, whole, "")
    options = {"height": height, "width": width, "shape": shape}
    return apply(of_blocks, mask, unit="tensor", spec=Spec(shape, torch.bool), options=options)


def _grid(shape: tuple[int, ...], whole: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    """Rows and columns of a tensor, and of its blocks."""
    if len(shape) < 2:
        raise Error(f"{name}: a tensor {list(shape)} has no rows and columns; use structure='element' for it")
    rows, columns = shape[0], math.prod(shape[1:])
    height, width = whole[0] or rows, whole[1] or columns
    if rows and columns and (rows % height or columns % width):
        raise Error(
            f"{name}: its {rows} rows of {columns} inputs cannot be cut into blocks of {height}x{width}; leave it out "
            "with pattern=, or give it another structure, such as structure={'" + name + "': 'element', '*': ...}"
        )
    return rows, columns, height, width


def block_means(score: Tensor, *, height: int, width: int) -> Tensor:
    """``[rows, ...]`` to the mean of each block of ``height`` rows and ``width`` inputs."""
    score = score.float().reshape(len(score), -1)
    rows, columns = score.shape
    return score.reshape(rows // height, height, columns // width, width).mean(dim=(1, 3))


def of_blocks(mask: Tensor, *, height: int, width: int, shape: tuple[int, ...]) -> Tensor:
    """``[rows, columns]`` of blocks to elements ``[*shape]``."""
    return mask.repeat_interleave(height, 0).repeat_interleave(width, 1).reshape(shape)
