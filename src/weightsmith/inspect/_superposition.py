"""A small model of superposition: many rare features written into few dimensions and read back.

Where every feature has a vector of length near 1 (strong superposition) the loss comes from their overlaps
and falls as 1 / width. Where only the most frequent ones have one (weak superposition) the loss comes from the
rest, and how it falls is up to their frequencies. Decay of the weights sets which of the two it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._overlaps import overlaps
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Line, Plot, Report

_TESTED = 32  # batches that the final loss is the mean of


@dataclass(frozen=True)
class Superposition:
    """A trained toy model ``y = relu(x W W' + b)``."""

    matrix: Tensor = field(repr=False)
    """``W`` ``[features, width]``: a row a feature."""
    bias: Tensor = field(repr=False)
    frequencies: Tensor = field(repr=False)
    """``[features]``: how often each is active."""
    loss: float
    """Mean squared error over all features and fresh examples."""
    curve: tuple[float, ...] = field(repr=False)
    """Loss along training, at about a hundred steps."""

    @property
    def represented(self) -> float:
        """The share of features whose vector is longer than 1/2."""
        return float((self.matrix.norm(dim=1) > 0.5).double().mean())

    def rows(self) -> list[dict[str, Any]]:
        """One record a feature."""
        lengths = self.matrix.norm(dim=1).tolist()
        pairs = zip(self.frequencies.tolist(), lengths, self.bias.tolist(), strict=True)
        return [{"feature": i, "frequency": p, "length": length, "bias": b} for i, (p, length, b) in enumerate(pairs)]

    def to_json(self) -> dict[str, Any]:
        """All of it but the matrix, as plain data."""
        return plain({"loss": self.loss, "represented": self.represented, "curve": self.curve, "features": self.rows()})

    def report(self) -> Report:
        """Loss, overlaps and lengths as a report."""
        found = overlaps(self.matrix)
        rows = self.rows()
        steps = list(range(len(self.curve)))
        lengths = Line("length", [row["feature"] + 1 for row in rows], [row["length"] for row in rows], style="points")
        return Report(
            "A model of superposition",
            figures={
                "features": len(rows),
                "width": self.matrix.shape[1],
                "loss": self.loss,
                "represented": self.represented,
                **{key: found[key] for key in ("mean squared cosine", "times 1/m", "bound")},
            },
            table=rows,
            plots=[
                Plot("Loss", "training, percent", "mean squared error", [Line("loss", steps, self.curve)], log="y"),
                Plot("Lengths", "feature, from the most frequent on", "length of its vector", [lengths], log="x"),
            ],
        )


@card(
    paper="Liu, Liu, Gore 2025, 'Superposition Yields Robust Neural Scaling' (the toy model and its decay); "
    "after Elhage et al. 2022, 'Toy Models of Superposition'",
    covers=("superposition-yields-robust-neural",),
    unit="model",
    claim="under strong superposition its loss falls as 1 / width, whatever the frequencies",
    departs="a tenth of the warm-up and fewer steps and features by default, so that it takes seconds",
)
def superposition(
    width: int,
    *,
    features: int = 256,
    exponent: float = 1.0,
    decay: float = -1.0,
    active: float = 1.0,
    steps: int = 1000,
    batch: int = 512,
    rate: float = 1e-2,
    seed: int = 0,
) -> Superposition:
    r"""Train the toy model of superposition.

    .. math:: y = \mathrm{relu}(W W^\top x + b), \qquad x_i = u_i v_i, \quad
              u_i \sim \mathrm{Bernoulli}(p_i), \quad v_i \sim U(0, 2), \quad p_i \propto i^{-\text{exponent}}

    with AdamW on the mean squared error. A positive decay pulls the rows of :math:`W` to zero; a negative one takes
    each to length 1, so that all features are represented:

    .. math:: w_i \leftarrow w_i + \eta\,\text{decay}\,(1 - 1 / \lVert w_i \rVert)\,w_i

    Args:
        width: m, dimensions that the features share.
        features: n, how many there are.
        exponent: of the frequencies; 0 for even ones.
        decay: positive for weak superposition, negative for strong.
        active: features that are active in an example, on average.
        steps, batch, rate: of training; the rate warms up over a twentieth of the steps and falls along a cosine.
        seed: of start and data.

    Returns:
        Superposition: the trained matrix, and the loss on fresh examples.

    Raises:
        ValueError: fewer than one dimension, feature, step or example, or features that are active more than always.

    >>> superposition(4, features=8, steps=20, batch=16).matrix.shape
    torch.Size([8, 4])
    """
    if min(width, features, steps, batch) < 1 or active <= 0:
        raise Error(
            f"superposition needs counts of 1 or more, got {width=}, {features=}, {steps=}, {batch=}, {active=}"
        )
    generator = torch.Generator().manual_seed(seed)
    powers = torch.arange(1, features + 1, dtype=torch.float64) ** -exponent
    frequencies = (active * powers / powers.sum()).float()
    if float(frequencies[0]) > 1:
        raise Error(f"the first feature would be active {float(frequencies[0]):.3g} times an example; lower active=")
    matrix = (torch.randn(features, width, generator=generator) / math.sqrt(width)).requires_grad_()
    bias = torch.zeros(features, requires_grad=True)
    optimizer = torch.optim.AdamW([matrix, bias], lr=rate, weight_decay=0.0)
    curve = []
    for step in range(steps):
        now = rate * _schedule(step / steps)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = _loss(matrix, bias, _examples(frequencies, batch, generator))
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            if decay >= 0:
                matrix.mul_(1 - now * decay)
            else:
                matrix.add_(matrix * (1 - 1 / matrix.norm(dim=1, keepdim=True).clamp(min=1e-8)), alpha=now * decay)
        optimizer.step()
        if step % max(steps // 100, 1) == 0:
            curve.append(float(loss.detach()))
    with torch.no_grad():
        tested = [float(_loss(matrix, bias, _examples(frequencies, batch, generator))) for _ in range(_TESTED)]
    return Superposition(matrix.detach(), bias.detach(), frequencies, sum(tested) / len(tested), tuple(curve))


def _examples(frequencies: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``[count, features]``. One uniform number serves twice: below p it is uniform there again."""
    uniform = torch.rand(count, len(frequencies), generator=generator)
    return torch.where(uniform < frequencies, 2 * uniform / frequencies, 0.0)


def _loss(matrix: Tensor, bias: Tensor, examples: Tensor) -> Tensor:
    return (torch.relu(examples @ matrix @ matrix.T + bias) - examples).square().mean()


def _schedule(progress: float) -> float:
    warm = 0.05
    return min(progress / warm + 1e-3, 1.0) if progress < warm else 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
