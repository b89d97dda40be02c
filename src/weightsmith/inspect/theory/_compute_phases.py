"""How the best size of a model grows with compute, from two numbers about the data, in a model that can be solved.

Inputs have variances that fall as a power of their index, so do the target's coefficients, and a model sees random
mixtures of them. The loss along one-pass training is then a sum of four powers of size and time; which of them meet
where compute is spent best decides how to spend it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report

Power = tuple[float, float]
"""Exponents of the model's size d and of the steps t."""


def loss_parts(alpha: float, beta: float) -> dict[str, Power]:
    r"""The loss's parts as powers :math:`d^a t^b`, with the largest stable learning rate.

    With :math:`s = \gamma t` and :math:`\gamma = d^{\min(0, 2\alpha - 1)}`:

    .. math:: F_0 = d^{-2\alpha + \max(0, 1 - 2\beta)}, \quad F_{pp} = s^{-(2\alpha + 2\beta - 1)/(2\alpha)}, \quad
        F_{ac} = d^{-1} s^{-1 + 1/(2\alpha)}, \quad K_{pp} = \gamma\, s^{-2 + 1/(2\alpha)}

    Returns:
        ``F0``, ``Fpp``; ``Fac`` where both alpha and beta are above 1/2; ``Kpp`` where alpha is above 1/4 and beta
        above 1/2: elsewhere they are never the largest.

    >>> loss_parts(1.0, 0.25)
    {'F0': (-1.5, 0.0), 'Fpp': (0.0, -0.75)}
    """
    if not alpha > 0 or not math.isfinite(beta) or not 2 * (alpha + beta) > 1:
        raise Error(f"needs alpha above 0 and 2 (alpha + beta) above 1, or nothing can be learnt; got {alpha}, {beta}")
    rate = min(0.0, 2 * alpha - 1)

    def of(size: float, time: float) -> Power:
        return size + rate * time, time

    parts = {
        "F0": (-2 * alpha + max(0.0, 1 - 2 * beta), 0.0),
        "Fpp": of(0.0, -(2 * alpha + 2 * beta - 1) / (2 * alpha)),
    }
    if alpha > 0.5 and beta > 0.5:
        parts["Fac"] = of(-1.0, -1 + 1 / (2 * alpha))
    if alpha > 0.25 and beta > 0.5:
        parts["Kpp"] = of(rate, -2 + 1 / (2 * alpha))
    return parts


def phase(alpha: float, beta: float) -> str:
    r"""The phase of a pair: ``Ia``, ``Ib``, ``Ic``, ``II``, ``III``, ``IVa`` or ``IVb``.

    The lines between them are :math:`\alpha = 1/2` (inputs of bounded size), :math:`\beta = 1/2`,
    :math:`\alpha = \beta`, :math:`\alpha = 1/4` and :math:`\alpha = 1 - 1/\sqrt2`.

    >>> [phase(*pair) for pair in ((1, 0.3), (0.4, 0.3), (0.2, 0.8), (1, 0.7), (0.7, 1), (0.4, 0.8), (0.27, 0.8))]
    ['Ia', 'Ib', 'Ic', 'II', 'III', 'IVa', 'IVb']
    """
    loss_parts(alpha, beta)
    if beta <= 0.5:
        return "Ia" if alpha > 0.5 else "Ib"
    if alpha > 0.5:
        return "II" if beta < alpha else "III"
    if alpha <= 0.25:
        return "Ic"
    return "IVa" if alpha > 1 - math.sqrt(0.5) else "IVb"


@card(
    paper="Paquette, Paquette, Xiao, Pennington 2024, '4+3 Phases of Compute-Optimal Neural Scaling Laws'",
    covers=("4-plus3-phases-compute-optimal-neural",),
    unit="model",
    claim="gives the exponents that the exact loss curves of the model show",
    departs="exponents come from minimising the largest part, for all phases alike; the paper's formulas follow",
)
def compute_phase(alpha: float, beta: float) -> Report:
    r"""The phase of a pair of exponents, and how loss and best size go with compute there.

    .. math:: d^* \propto f^{\xi}, \quad L^* \propto f^{-\eta}, \qquad
        -\eta = \min_\xi \max_{\text{parts}} \bigl( a\,\xi + b\,(1 - \xi) \bigr)

    for parts :math:`d^a t^b` and compute :math:`f = d\,t`.

    Args:
        alpha: inputs' standard deviations fall as :math:`j^{-\alpha}`.
        beta: the target's coefficients fall as :math:`j^{-\beta}`.

    Returns:
        Report: ``phase``, ``size exponent`` :math:`\xi`, ``loss exponent`` :math:`\eta`, ``balance`` (the parts that
        meet at the best), and a row for every part.

    Raises:
        Error: alpha of 0 or less, or 2 (alpha + beta) <= 1.

    >>> found = compute_phase(1.0, 0.25)                        # Ia: sizes as f^(1 / (2 alpha + 1))
    >>> found["phase"], round(found["size exponent"], 6), round(found["loss exponent"], 6), found["balance"]
    ('Ia', 0.333333, 0.5, 'F0 + Fpp')
    """
    parts = loss_parts(alpha, beta)
    slopes = {name: (a - b, b) for name, (a, b) in parts.items()}  # a x + b (1 - x)
    names = list(slopes)
    crossings = [0.0, 1.0]
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            (steep, start), (steep2, start2) = slopes[one], slopes[other]
            if steep != steep2:
                crossings.append((start2 - start) / (steep - steep2))
    tried = [(max(steep * x + start for steep, start in slopes.values()), x) for x in crossings if 0 <= x <= 1]
    height, best = min(tried)
    meeting = [name for name, (steep, start) in slopes.items() if abs(steep * best + start - height) < 1e-9]
    rows = [{"part": name, "power of size": a, "power of steps": b} for name, (a, b) in parts.items()]
    figures = {"alpha": alpha, "beta": beta, "phase": phase(alpha, beta), "size exponent": best,
               "loss exponent": -height, "balance": " + ".join(meeting)}  # fmt: skip
    return Report(f"Compute-optimal scaling at alpha {alpha:g}, beta {beta:g}", figures, rows)


@dataclass(frozen=True)
class RandomFeatures:
    """One draw of the model, in the coordinates in which its training is solved."""

    eigenvalues: Tensor
    """``[d]``, of the features' covariance, float64."""
    start: Tensor
    """``[d]``: the squared error along each eigenvector before training."""
    rest: float
    """The error that no weights of this size take away."""

    @property
    def largest_rate(self) -> float:
        """Below this learning rate (for one example a step) the expected loss falls."""
        low, high = 0.0, float(1 / self.eigenvalues.max())
        for _ in range(60):
            middle = (low + high) / 2
            noise = (middle * self.eigenvalues / (2 - 2 * middle * self.eigenvalues)).sum()
            low, high = (middle, high) if float(noise) < 1 else (low, middle)
        return low

    def losses(self, steps: Tensor, rate: float, batch: int = 1) -> Tensor:
        r"""The expected loss of one-pass stochastic gradient descent after some steps, exactly.

        The squared errors :math:`p_j` along eigenvectors, and the loss :math:`L = \sum_j p_j + p_0`, obey

        .. math:: p_j \leftarrow \bigl(1 - 2\gamma B\lambda_j + \gamma^2 B (B + 1) \lambda_j^2\bigr) p_j
            + \gamma^2 B \lambda_j^2 L

        for Gaussian inputs: a linear map that is symmetric once each :math:`p_j` is divided by
        :math:`\lambda_j`, so its powers are taken all at once.

        Args:
            steps: ``[m]`` whole numbers from 0.
            rate: :math:`\gamma`; gradients are summed over the batch.
            batch: B examples a step.

        Returns:
            ``[m]`` in float64; infinite where it diverges beyond float64.

        Raises:
            Error: steps below 0 or broken ones, a rate or a batch that is not above 0.
        """
        if not rate > 0 or batch < 1 or bool((steps.double() != steps.double().round().clamp(min=0)).any()):
            raise Error(f"needs whole steps from 0, a rate above 0 and a batch of at least 1, got {rate} and {batch}")
        value = self.eigenvalues
        decay = 1 - 2 * rate * batch * value + rate**2 * batch * (batch + 1) * value.square()
        noise = rate**2 * batch
        step = torch.diag(decay) + noise * torch.outer(value, value)
        factors, vectors = torch.linalg.eigh(step)
        # q = p / lambda: q <- step q + noise lambda rest, whose fixed point is taken off.
        source = vectors.T @ (noise * value * self.rest)
        fixed = source / (1 - factors)
        start = vectors.T @ (self.start / value) - fixed
        reading = vectors.T @ value
        powers = factors ** steps.double()[:, None]
        found = powers @ (start * reading) + fixed @ reading + self.rest
        return torch.where(found.isfinite(), found, torch.inf)


@card(
    paper="Paquette, Paquette, Xiao, Pennington 2024, '4+3 Phases of Compute-Optimal Neural Scaling Laws'",
    covers=("4-plus3-phases-compute-optimal-neural",),
    unit="model",
    claim="its expected losses are those of averaged stochastic gradient descent",
    departs="the expectation for one draw of the features, exact at any size; the paper goes on to its limit",
)
def random_features(
    alpha: float, beta: float, size: int, *, inputs: int | None = None, seed: int = 0
) -> RandomFeatures:
    r"""Power-law random features: a linear model of d mixtures of v inputs.

    .. math:: x_j = j^{-\alpha} z_j, \quad y = \sum_j j^{-\beta} x_j, \quad
        \hat y = \theta^\top W^\top x, \quad W_{jk} \sim N(0, 1/d)

    Args:
        alpha, beta: exponents of inputs and target.
        size: d.
        inputs: v; by default 4 d.
        seed: of W.

    Returns:
        RandomFeatures: with ``losses(steps, rate, batch)``.

    Raises:
        Error: exponents as in `compute_phase`; a size that is not between 1 and the number of inputs.

    >>> drawn = random_features(1.0, 0.5, 20)
    >>> losses = drawn.losses(torch.tensor([0, 10, 1000]), rate=drawn.largest_rate / 2)
    >>> bool(losses[0] > losses[1] > losses[2] > drawn.rest)
    True
    """
    loss_parts(alpha, beta)
    total = 4 * size if inputs is None else inputs
    if not 1 <= size <= total:
        raise Error(f"needs a size between 1 and the number of inputs, got {size} of {total}")
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(1, total + 1, dtype=torch.float64)
    mixed = torch.randn(total, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
    mixed.mul_(index.pow(-alpha)[:, None])
    goal = index.pow(-alpha - beta)
    left, singular, _ = torch.linalg.svd(mixed, full_matrices=False)
    start = (left.T @ goal).square()
    return RandomFeatures(singular.square(), start, max(float(goal.square().sum() - start.sum()), 0.0))


@card(
    paper="Paquette, Paquette, Xiao, Pennington 2024, '4+3 Phases of Compute-Optimal Neural Scaling Laws'",
    covers=("4-plus3-phases-compute-optimal-neural",),
    unit="model",
    claim="the slope of its lower envelope is the predicted exponent",
)
def compute_optimal(
    alpha: float,
    beta: float,
    sizes: Sequence[int],
    *,
    inputs: int | None = None,
    rate: float = 0.5,
    compute: tuple[float, float] | None = None,
    seed: int = 0,
) -> Report:
    r"""Exact loss curves of several sizes, the best size for every compute, and the slopes beside the predicted ones.

    Args:
        alpha, beta: exponents of inputs and target.
        sizes: d, at least three.
        inputs: v of each; by default 4 d.
        rate: learning rate, as a share of the largest stable one.
        compute: from where to where slopes are fitted, in d times steps; by default the later half, by
            logarithm, of where the best size is neither the smallest nor the largest.
        seed: of the features.

    Returns:
        Report: a row for each compute with the ``best size`` and the ``loss``; measured and predicted exponents.

    Raises:
        Error: fewer than three sizes, or a range of compute in which the best size never is an inner one.

    >>> found = compute_optimal(1.0, 0.3, [4, 8, 16, 32, 64])
    >>> abs(found["loss exponent, measured"] - found["loss exponent"]) < 0.2
    True
    """
    if len(set(sizes)) < 3 or not 0 < rate < 1:
        raise Error(f"needs at least 3 sizes and a rate between 0 and 1, got {list(sizes)} and {rate}")
    sizes = sorted(set(sizes))
    theory = compute_phase(alpha, beta)
    drawn = [random_features(alpha, beta, size, inputs=inputs, seed=seed) for size in sizes]
    rates = [rate * one.largest_rate for one in drawn]
    budgets = torch.logspace(math.log10(sizes[-1]) + 0.5, math.log10(sizes[-1]) + 9, 120, dtype=torch.float64)
    curves = torch.stack([
        one.losses((budgets / size).round(), speed) for one, size, speed in zip(drawn, sizes, rates, strict=True)
    ])  # fmt: skip
    losses, best = curves.min(dim=0)
    inner = (best > 0) & (best < len(sizes) - 1)
    if bool(inner.any()):  # its later half, counted in powers of compute: powers are met with time
        inner &= budgets >= (budgets[inner].min() * budgets[inner].max()).sqrt()
    if compute is not None:
        inner = (budgets >= compute[0]) & (budgets <= compute[1])
    if int(inner.sum()) < 3:
        raise Error("the best size is an inner one at fewer than 3 amounts of compute; give more sizes, wider apart")
    slope = _slope(budgets[inner], losses[inner])
    # A size is best around the middle of its reach; single points would weigh the steps between sizes.
    reached = [index for index in range(1, len(sizes) - 1) if bool((best == index).any())]
    middles = [float(budgets[best == index].log().mean().exp()) for index in reached]
    growth = (
        _slope(torch.tensor(middles), torch.tensor([float(sizes[index]) for index in reached]))
        if len(reached) > 1 else None
    )  # fmt: skip
    rows = [
        {"compute": float(budget), "best size": sizes[int(index)], "loss": float(loss)}
        for budget, index, loss in zip(budgets, best, losses, strict=True)
    ]
    lines = [Line(f"size {size}", budgets.tolist(), curve.tolist()) for size, curve in zip(sizes, curves, strict=True)]
    figures = dict(theory.figures) | {
        "loss exponent, measured": -slope,
        "size exponent, measured": growth,
    }
    plots = (Plot("Loss over compute", "size x steps", "expected loss", lines, log="xy"),)
    notes = ("Sizes are finite: measured exponents bend towards the predicted ones only slowly near phase boundaries.",)
    return Report(f"Compute-optimal sizes at alpha {alpha:g}, beta {beta:g}", figures, rows, plots, notes)


def _slope(x: Tensor, y: Tensor) -> float:
    x, y = x.double().log(), y.double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
