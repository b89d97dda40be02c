"""What every grid can do, and the steps that grids share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.weights import dtype_name

Params = Mapping[str, Tensor]
"""What turns codes back into values: ``scale [...]``, ``zero_point [...]``, ``levels [..., points]``."""


@dataclass(frozen=True)
class Stored:
    """One parameter of a grid as it is written: ``[out, groups, *tail]``, or ``[*tail]`` where the tensor shares it.

    A size of the tail may be ``"inputs"``: as many as a row has.
    """

    tail: tuple[int | str, ...]
    dtype: torch.dtype
    shared: bool = False


@runtime_checkable
class Grid(Protocol):
    """The points that the weights of one group may take; a frozen dataclass of settings.

    All work on ``values [..., n]``, float32 or float64: the last axis are the inputs of a group, those before it are
    whatever there is.
    """

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def group(self) -> int | None:
        """Inputs that share parameters; None for whole rows."""
        ...

    def stored(self) -> Mapping[str, Stored]:
        """What is written beside the codes."""
        ...

    def shared(self, weight: Tensor) -> Params:
        """What the whole tensor shares, ``{name: [*tail]}``; ``{}`` for most."""
        ...

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``{name: [..., *tail]}`` for values ``[..., n]``, rounded as they are stored.

        ``shrink`` (a number, or ``[...]``) narrows the range; ``importance`` broadcasts to the values. Grids whose
        range follows from the largest value alone take no heed of it.
        """
        ...

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The code of the nearest point, uint8. ``params`` hold what was fitted and what is shared."""
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, float32 or wider."""
        ...


@runtime_checkable
class Packing(Protocol):
    """What a grid has whose codes lie otherwise in files than as so many bits each, one after another."""

    def words(self, inputs: int) -> int:
        """int32 words of a row."""
        ...

    def packed(self, codes: Tensor, params: Params) -> Tensor:
        """int32 ``[out, words]`` of codes ``[out, in]``."""
        ...

    def unpacked(self, packed: Tensor, inputs: int, params: Params) -> Tensor:
        """Its inverse: uint8 ``[out, in]``. What files say is not trusted."""
        ...


def check_bits(bits: int, least: int = 1, most: int = 8) -> None:
    """An error for codes of a width that there is not."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not least <= bits <= most:
        raise Error(f"bits must be a whole number from {least} to {most}, got {bits!r}")


def check_group(group: int | None) -> None:
    """An error for groups of no inputs."""
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise Error(f"group must be 1 or more inputs, or None for whole rows, got {group!r}")


def check_values(values: Tensor) -> None:
    """An error for values that no grid holds, or in which steps would be too coarse."""
    if values.dtype not in (torch.float32, torch.float64):
        raise Error(f"grids are fitted to float32 or float64, got {dtype_name(values.dtype)}: give them values.float()")
    if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        raise Error("there are values that are not finite, which no grid holds")


def check_scale_dtype(dtype: torch.dtype) -> None:
    """An error for a dtype that is no float."""
    if not dtype.is_floating_point:
        raise Error(f"scales are floats; they cannot be stored as {dtype_name(dtype)}")


def stepped(step: Tensor, dtype: torch.dtype) -> Tensor:
    """A step as it will be stored, in its own dtype; 1 where there is nothing to step over.

    Raises:
        Error: the dtype cannot hold the step.
    """
    return safe_step(held(step, dtype, "a scale"))


def held(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Values as they will be stored, in their own dtype.

    Raises:
        Error: the dtype cannot hold them.
    """
    made = values.to(dtype).to(values.dtype)
    if not made.isfinite().all():
        raise Error(f"there are values that are not finite, or too large for {what} in {dtype_name(dtype)}")
    return made


def needed(shared: Params | None, name: str, grid: str) -> Tensor:
    """What the whole tensor shares, which one group does not know."""
    if not shared or name not in shared:
        raise Error(f"{grid} needs the {name} of the whole tensor: give fit what shared(weight) returns")
    return shared[name]


def largest(values: Tensor) -> Tensor:
    """The largest magnitude of each group, 0 of an empty one: ``[...]`` of ``[..., n]``."""
    return values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def weighted(values: Tensor, importance: Tensor | None) -> Tensor:
    """The importance of each value, checked; ones where all of a group are zero or none is given."""
    if importance is None:
        return torch.ones_like(values)
    if importance.numel() and not (importance.isfinite().all() and importance.min() >= 0):
        raise Error("importance is 0 or more, and finite")
    importance = importance.to(values.dtype).expand_as(values)
    return torch.where((importance > 0).any(-1, keepdim=True), importance, torch.ones_like(importance))


def safe_step(step: Tensor) -> Tensor:
    """The step, or 1 where it is zero: every code then stands for zero."""
    return torch.where(step != 0, step, torch.ones_like(step))


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of sorted levels, uint8; the lower one of two as near.

    Args:
        values: ``[..., n]``.
        levels: ``[points]`` for all, or ``[..., points]`` of each group, from low to high.

    >>> nearest(torch.tensor([[-3.0, 0.4, 0.5]]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([[0, 1, 1]], dtype=torch.uint8)
    """
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    values = values.contiguous()
    if middles.dim() > 1:
        middles = middles.expand(*values.shape[:-1], middles.shape[-1]).contiguous()
    return torch.searchsorted(middles.to(values.dtype), values).to(torch.uint8)


def looked_up(codes: Tensor, levels: Tensor) -> Tensor:
    """The level of each code: ``levels [points]`` for all, or ``[..., points]`` of each group, codes ``[..., n]``.

    >>> looked_up(torch.tensor([[2, 0]], dtype=torch.uint8), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([[ 1., -1.]])
    """
    if levels.dim() == 1:
        return levels[codes.long()]
    return levels.expand(*codes.shape[:-1], levels.shape[-1]).gather(-1, codes.long())


def settings(grid: Any) -> dict[str, Any]:
    """The fields of a grid as plain values, dtypes by name; those at their default are left out."""
    from dataclasses import fields

    said = {}
    for field in fields(grid):
        value = getattr(grid, field.name)
        if value != field.default:
            said[field.name] = dtype_name(value) if isinstance(value, torch.dtype) else value
    return said
