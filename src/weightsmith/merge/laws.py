"""Properties that hold for methods of merging; a user can run them on a method of their own.

Each takes a kernel and ``models [k, *shape]``, ``base [*shape]`` (float32) and raises
`AssertionError` where the property does not hold. A card names those that hold for its method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.card import card_of
from weightsmith.merge.room import example_statistics

Kernel = Callable[..., Tensor]


def _called(kernel: Kernel, models: Tensor, base: Tensor, flipped: bool = False) -> Tensor:
    """The kernel on these inputs, with a base and statistics if it needs them.

    ``flipped`` says that the models come in the opposite order, and so do their statistics.
    """
    names = inspect.signature(kernel).parameters
    needs_base = "base" in names and names["base"].default is inspect.Parameter.empty
    arguments = [models, base] if needs_base else [models]
    if "stats" in names:
        statistic = next(need for need in card_of(kernel).needs if need.startswith("stats."))
        made = example_statistics(statistic, len(models) + needs_base, tuple(models.shape[1:]))
        if made is not None and flipped:
            made = torch.cat([made[: len(models)].flip(0), made[len(models) :]])
        return kernel(*arguments, made)
    return kernel(*arguments)


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Equal up to the rounding of float32 at the size of the inputs."""
    size = float(scale.abs().max()) if scale.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(size, 1e-30))


def model_order(kernel: Kernel, models: Tensor, base: Tensor) -> None:
    """The order of the models does not matter."""
    _close(_called(kernel, models.flip(0), base, flipped=True), _called(kernel, models, base), models)


def agreement(kernel: Kernel, models: Tensor, base: Tensor) -> None:
    """Models that are all the same give that model."""
    same = models[:1].expand_as(models).clone()
    _close(_called(kernel, same, base), models[0], models)


def translation(kernel: Kernel, models: Tensor, base: Tensor) -> None:
    """Moving the base and all models moves the result as much."""
    move = 0.5 * base.flip(0) if base.dim() else base * 0.5
    _close(_called(kernel, models + move, base + move), _called(kernel, models, base) + move, models)


def scale(kernel: Kernel, models: Tensor, base: Tensor) -> None:
    """Scaling the base and all models scales the result as much."""
    _close(_called(kernel, models * 4, base * 4), _called(kernel, models, base) * 4, models * 4)


def rotation(kernel: Kernel, models: Tensor, base: Tensor) -> None:
    """An orthogonal change of basis changes the result in the same way."""
    generator = torch.Generator().manual_seed(0)
    size = base.numel()
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    turned = _called(kernel, models.flatten(1) @ turn, base.flatten() @ turn)
    _close(turned, _called(kernel, models.flatten(1), base.flatten()) @ turn, models)
