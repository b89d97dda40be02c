"""How many networks must be averaged until they have learnt a permutation from almost nothing.

Trained on the k inputs that have a single one, a very wide network with a hidden layer gives, for any other input of
zeros and ones, Gaussian outputs over its starts: their mean has the right sign for every bit, so an average of enough
networks is right. Mean and variance depend only on how many ones there are, so all 2^k - 1 inputs are judged at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report


@card(
    paper="Jacot, Gabriel, Hongler 2018, 'Neural Tangent Kernel'; Cho, Saul 2009, 'Kernel Methods for Deep Learning'",
    covers=("exact-learning-permutations-nonzero",),
    needs=("data",),
    unit="model",
    claim="the tangent kernel of a wide two-layer ReLU network, in closed form",
)
def relu_kernels(inputs: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    r"""Kernels of an infinitely wide ReLU network with one hidden layer and no biases: at the start, and of training.

    .. math:: \Sigma = |x||x'|\,\frac{\sin\theta + (\pi - \theta)\cos\theta}{\pi}, \qquad
        \Theta = \Sigma + |x||x'|\,\cos\theta\,\frac{\pi - \theta}{\pi}

    for :math:`f(x) = \sqrt{2/m}\; V\,\mathrm{relu}(U x)` with entries of U and V standard Gaussian, both trained.

    Args:
        inputs: ``[n, features]``.
        others: ``[m, features]``.

    Returns:
        ``(start, training)``, ``[n, m]`` each, in float64.

    >>> [one.tolist() for one in relu_kernels(torch.ones(1, 1), torch.ones(1, 1))]
    [[[1.0]], [[2.0]]]
    """
    one, other = inputs.double(), others.double()
    product = one @ other.T
    lengths = one.norm(dim=1)[:, None] * other.norm(dim=1)
    cosine = torch.where(lengths > 0, product / lengths.clamp(min=1e-300), 0.0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    start = lengths * (torch.sin(angle) + (torch.pi - angle) * cosine) / torch.pi
    return start, start + product * (torch.pi - angle) / torch.pi


def trained_outputs(inputs: Tensor, targets: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance over starts of what infinitely wide two-layer ReLU networks say once they are trained.

    .. math:: \mu = \Theta_{*X}\Theta_{XX}^{-1} Y, \qquad
        \sigma^2 = \Sigma_{**} - 2\,\Theta_{*X}\Theta_{XX}^{-1}\Sigma_{X*}
        + \Theta_{*X}\Theta_{XX}^{-1}\Sigma_{XX}\Theta_{XX}^{-1}\Theta_{X*}

    Args:
        inputs: ``[n, features]`` to train on, by gradient descent on squared errors to the end.
        targets: ``[n, out]``.
        asked: ``[m, features]``.

    Returns:
        ``[m, out]`` and ``[m]``, in float64.

    >>> mean, variance = trained_outputs(torch.eye(2), torch.eye(2), torch.eye(2))
    >>> mean.round(decimals=9).abs().tolist(), bool((variance.abs() < 1e-12).all())
    ([[1.0, 0.0], [0.0, 1.0]], True)
    """
    start, training = relu_kernels(inputs, inputs)
    start_across, across = relu_kernels(asked, inputs)
    solved = torch.linalg.solve(training, across.T).T
    own = asked.double().square().sum(dim=1)  # the start's kernel of an input with itself
    variance = own - 2 * (solved * start_across).sum(dim=1) + ((solved @ start) * solved).sum(dim=1)
    return solved @ targets.double(), variance.clamp(min=0)


@card(
    paper="Giapitzakis, Back de Luca, Fountoulakis 2025, 'Exact Learning of Permutations for Nonzero Binary Inputs "
    "with Logarithmic Training Size and Quadratic Ensemble Complexity'",
    covers=("exact-learning-permutations-nonzero",),
    unit="model",
    claim="the models needed for one input grow nearly linearly, for all inputs about quadratically, in the length",
    departs="no bound by concentration: the Gaussian outputs' chances themselves, added up over bits and inputs",
)
def ensemble_complexity(lengths: Sequence[int], chance: float = 0.05) -> Report:
    r"""The number of averaged networks that learn a permutation of k bits, by k.

    .. math:: M = \min \Bigl\{ M : \sum_{\text{inputs, bits}} \Phi\bigl(-\sqrt M\, |\mu| / \sigma\bigr) \le p \Bigr\}

    Args:
        lengths: the k to try, each 2 or more.
        chance: p, of any error.

    Returns:
        Report: a row for every k: networks ``for one input`` (the hardest) and ``for all inputs``, whether the mean
        itself ``is right`` everywhere, and ``hardest ones``, the number of ones in the hardest input.
        ``growth`` figures are slopes of the logarithms.

    Raises:
        Error: lengths below 2, none, or a chance outside of (0, 1).

    >>> found = ensemble_complexity([4, 8, 16])
    >>> all(found["is right"]), found["for all inputs"][0] < found["for all inputs"][2]
    (True, True)
    """
    if not lengths or min(lengths) < 2 or not 0 < chance < 1:
        raise Error(f"needs lengths of at least 2 and a chance between 0 and 1, got {list(lengths)}, {chance}")
    rows = []
    for length in sorted(lengths):
        ratio, right = _ratios(length)
        ones = torch.arange(1, length + 1, dtype=torch.float64)
        bits = torch.stack([length - ones, ones], dim=1)  # how many zeros and ones the answer has
        ways = math.lgamma(length + 1) - torch.lgamma(ones + 1) - torch.lgamma(length - ones + 1)
        single = [_models(ratio[i : i + 1], bits[i : i + 1].log(), chance) for i in range(length)]
        rows.append({
            "length": length,
            "for one input": max(single),
            "for all inputs": _models(ratio, bits.log() + ways[:, None], chance),
            "is right": right,
            "hardest ones": 1 + single.index(max(single)),
        })  # fmt: skip
    sizes = [row["length"] for row in rows]
    figures = {f"growth {what}": _growth(sizes, [row[what] for row in rows])
               for what in ("for one input", "for all inputs")}  # fmt: skip
    lines = [Line(what, sizes, [row[what] for row in rows]) for what in ("for one input", "for all inputs")]
    plots = (Plot("Networks needed", "length of the permutation", "networks", lines, log="xy"),)
    notes = (f"In the limit of infinite width; errors anywhere with a chance of at most {chance:g}.",)
    return Report("Networks to learn a permutation", figures, rows, plots, notes)


def _ratios(length: int) -> tuple[Tensor, bool]:
    """Mean over standard deviation ``[length, 2]`` by the number of ones, for a zero and a one of the answer."""
    asked = torch.ones(length, length, dtype=torch.float64).tril()
    unit = torch.eye(length, dtype=torch.float64)
    mean, variance = trained_outputs(unit, unit, asked)
    known = torch.arange(length) == 0  # what was trained on is known: no variance
    zero = torch.cat([mean[:-1].diagonal(1), torch.full((1,), -torch.inf, dtype=torch.float64)])
    one = mean.diagonal(0)
    right = bool((zero[1:] < 0).all() and (one > 0).all())
    deviation = variance.sqrt().masked_fill(known, 0.0)[:, None]
    size = torch.stack([-zero, one], dim=1)
    return torch.where(deviation > 0, size / deviation.clamp(min=1e-300), torch.inf), right


def _models(ratio: Tensor, log_counts: Tensor, chance: float) -> int:
    """The least number for which the chances of an error add up to no more than ``chance``."""
    if bool((ratio <= 0).any()):
        return -1

    def failing(models: int) -> bool:
        chances = torch.special.log_ndtr(-math.sqrt(models) * ratio) + log_counts
        return float(torch.logsumexp(chances.flatten(), 0)) > math.log(chance)

    high = 1
    while failing(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if failing(middle) else (low, middle)
    return high


def _growth(sizes: Sequence[int], counts: Sequence[int]) -> float | None:
    if len(sizes) < 2 or min(counts) < 1:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, counts))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@card(
    paper="Giapitzakis, Back de Luca, Fountoulakis 2025, 'Exact Learning of Permutations for Nonzero Binary Inputs "
    "with Logarithmic Training Size and Quadratic Ensemble Complexity'",
    covers=("exact-learning-permutations-nonzero",),
    unit="model",
    claim="the averaged outputs of real networks match the closed form, and their bit errors fall to none",
)
def permutation_ensemble(
    permutation: Sequence[int], *, models: int = 100, width: int = 1024, steps: int = 400, seed: int = 0
) -> Tensor:
    r"""Outputs of real two-layer networks that were trained on the inputs with a single one.

    Args:
        permutation: bit i of the input is bit ``permutation[i]`` of the answer; k of them, at most 12.
        models: networks, trained together by plain gradient descent on squared errors.
        width: of the hidden layer.
        steps: of descent, of the largest size that is stable in the limit of infinite width.
        seed: of all starts.

    Returns:
        ``[models, 2^k - 1, k]``: for all inputs, in the order of their binary value, the first bit the highest.
        Averaged over models, an output above 0 says 1.

    Raises:
        Error: not a permutation, or one of more than 12 bits.

    >>> permutation_ensemble([1, 0], models=2, width=64, steps=10).shape
    torch.Size([2, 3, 2])
    """
    length = len(permutation)
    if sorted(permutation) != list(range(length)) or not 2 <= length <= 12:
        raise Error(f"needs a permutation of 2 to 12 places, got {list(permutation)}")
    if min(models, width, steps) < 1:
        raise Error(f"models, width and steps are at least 1, got {models}, {width}, {steps}")
    generator = torch.Generator().manual_seed(seed)
    target = torch.eye(length)[list(permutation)]
    # Two thirds of the limit of stability: networks of finite width have somewhat larger eigenvalues.
    largest = float(torch.linalg.eigvalsh(relu_kernels(torch.eye(length), torch.eye(length))[1])[-1])
    rate, scale = 4 / 3 / largest, math.sqrt(2 / width)
    asked = all_inputs(length)
    found = []
    together = max((1 << 22) // (width * length), 1)
    for first in range(0, models, together):
        count = min(together, models - first)
        inner = torch.randn(count, length, width, generator=generator)  # the inputs are the unit vectors: U x is a row
        outer = torch.randn(count, width, length, generator=generator)
        for _ in range(steps):
            hidden = inner.relu()
            error = scale * hidden @ outer - target
            step_outer = scale * hidden.mT @ error
            step_inner = scale * (error @ outer.mT) * (inner > 0)
            outer, inner = outer - rate * step_outer, inner - rate * step_inner
        found.append(scale * (asked @ inner).relu() @ outer)
    return torch.cat(found)


def all_inputs(length: int) -> Tensor:
    """All ``2^length - 1`` rows of zeros and ones that are not all zero.

    >>> all_inputs(2).tolist()
    [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    numbers = torch.arange(1, 2**length)
    return (numbers[:, None] >> torch.arange(length - 1, -1, -1) & 1).float()
