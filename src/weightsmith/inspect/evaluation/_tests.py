"""Do models differ, or is it chance: tests of no difference on the examples that both saw.

Each asks how often a difference as large as the one seen would come about if the models' roles were
exchanged at random. They differ in what they are given: right or wrong answers, numbers per example, or
scores of models that were trained again and again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect.evaluation._parts import (
    Test,
    alike,
    chi_square_tail,
    f_tail,
    normal_tail,
    numbers,
    student_tail,
)
from weightsmith.solve import grouped

ADJUSTMENTS = ("holm", "bonferroni", "none")
AT_ONCE = 1 << 22  # signs of a chunk of permutations
EXACT = 14  # differences whose 2 ** n signs are all tried
RANKED = 50  # differences whose rank sums are all counted, if no two are equal


def _right(values: Any, what: str, dimensions: int) -> Tensor:
    found = numbers(values, what, dimensions=dimensions)
    if not bool(((found == 0) | (found == 1)).all()):
        raise Error(f"{what}: says for each example whether it was right, as 0 and 1 or False and True")
    return found.bool()


@card(
    paper="McNemar 1947, 'Note on the sampling error of the difference between correlated proportions or percentages'; "
    "Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="rejects equal models no more often than its level says",
)
def mcnemar(first: Any, second: Any, *, method: str = "exact") -> Test:
    r"""Whether two classifiers are right equally often, from the examples that only one gets right.

    .. math:: p = \min(1, 2 P(B_{b+c} \le \min(b, c))), \qquad \chi^2 = \frac{(|b - c| - 1)^2}{b + c}

    with b and c how often only the first, only the second is right, and :math:`B_n` the heads of n fair coins.

    Args:
        first, second: ``[n]`` booleans: whether each model was right.
        method: ``exact``; ``mid``, which counts half of the outcome itself and is less cautious; ``chi2``, with the
            continuity correction; ``chi2 plain`` without.

    Returns:
        Test: the statistic is b - c for the exact ones.

    Raises:
        Error: different lengths, or values that are no answers of right and wrong.

    >>> right = torch.tensor([True] * 9 + [False])
    >>> round(mcnemar(right, ~right).p_value, 6), 2 * (1 + 10) / 2**10
    (0.021484, 0.021484375)
    """
    methods = ("exact", "mid", "chi2", "chi2 plain")
    if method not in methods:
        raise Error(f"mcnemar knows {', '.join(methods)}, not {method!r}{did_you_mean(method, methods)}")
    one, other = _right(first, "mcnemar: first", 1), _right(second, "mcnemar: second", 1)
    alike(one, other, "mcnemar")
    b, c = int((one & ~other).sum()), int((~one & other).sum())
    if b + c == 0:
        return Test(f"McNemar ({method})", 0.0, 1.0, (), 0)
    if method.startswith("chi2"):
        correction = 1 if method == "chi2" and b != c else 0
        statistic = (abs(b - c) - correction) ** 2 / (b + c)
        return Test(f"McNemar ({method})", statistic, chi_square_tail(statistic, 1), (1.0,), b + c)
    chances = _coins(b + c)[: min(b, c) + 1]
    tail = 2 * float(chances.sum()) - (float(chances[-1]) if method == "mid" else 0.0)
    return Test(f"McNemar ({method})", float(b - c), min(tail, 1.0), (), b + c)


def _coins(count: int) -> Tensor:
    """The probabilities of 0 to ``count`` heads."""
    heads = torch.arange(count + 1, dtype=torch.float64)
    total = torch.tensor(count + 1.0, dtype=torch.float64)
    ways = torch.lgamma(total) - torch.lgamma(heads + 1) - torch.lgamma(total - heads)
    return (ways - count * math.log(2)).exp()


@card(
    paper="Cochran 1950, 'The comparison of percentages in matched samples'; "
    "Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
)
def cochran_q(right: Any) -> Test:
    r"""Whether several classifiers are right equally often: McNemar's test for more than two.

    .. math:: Q = (k - 1) \frac{k \sum_j G_j^2 - T^2}{k T - \sum_i L_i^2}

    with :math:`G_j` the right answers of model j, :math:`L_i` those for example i, :math:`T` all of them.

    Args:
        right: ``[k, n]`` booleans, k >= 2.

    Returns:
        Test: by the chi-square approximation; ``count`` is how many examples some but not all got right.

    Raises:
        Error: one model only, or values that are no answers of right and wrong.

    >>> cochran_q(torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]])).statistic
    3.0
    """
    found = _right(right, "cochran_q", 2).double()
    models = len(found)
    if models < 2:
        raise Error(f"cochran_q needs 2 models or more, got {models}")
    total = float(found.sum())
    each = float(found.sum(1).square().sum())
    spread = models * total - float(found.sum(0).square().sum())
    split = int(((found.sum(0) > 0) & (found.sum(0) < models)).sum())
    statistic = (models - 1) * (models * each - total**2) / spread if spread else 0.0
    return Test("Cochran's Q", statistic, chi_square_tail(statistic, models - 1), (models - 1.0,), split)


def _differences(first: Any, second: Any, groups: Any, what: str) -> Tensor:
    """Paired differences, summed within groups."""
    one, other = numbers(first, f"{what}: first"), numbers(second, f"{what}: second")
    alike(one, other, what)
    if groups is None:
        return one - other
    number, total = grouped(groups, len(one))
    return one.new_zeros(total).index_add_(0, number.to(one.device), one - other)


@card(paper="Student 1908, 'The probable error of a mean'", covers=("model-evaluation-model-selection",), unit="model")
def paired_t(first: Any, second: Any, *, groups: Any = None) -> Test:
    r"""Whether two models' numbers per example have one mean, if their differences are about normal.

    .. math:: t = \bar d \sqrt n / s

    Args:
        first, second: ``[n]``, n >= 2.
        groups: ``[n]``: differences are summed within groups first.

    Returns:
        Test: two-sided.

    Raises:
        Error: different lengths, values that are not finite, or one difference only.
        MissingPackage: scipy is not installed.

    >>> paired_t([3.0, 4.0, 5.0], [1.0, 2.0, 4.0]).statistic.__round__(3)
    5.0
    """
    differences = _differences(first, second, groups, "paired_t")
    count = len(differences)
    if count < 2:
        raise Error(f"paired_t needs 2 differences or more, got {count}")
    return _student(
        float(differences.mean()), float(differences.std()) / math.sqrt(count), count - 1, "paired t", count
    )


def _student(mean: float, error: float, freedom: int, name: str, count: int) -> Test:
    statistic = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    p_value = student_tail(statistic, freedom, name) if math.isfinite(statistic) else 0.0
    return Test(name, statistic, p_value, (float(freedom),), count)


@card(
    paper="Fisher 1935, 'The Design of Experiments'",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="exact whatever the distribution of the numbers",
)
def permutation(first: Any, second: Any, *, groups: Any = None, samples: int = 10000, seed: int = 0) -> Test:
    r"""Whether two models' numbers per example have one mean: each pair is swapped at random.

    .. math:: p = \frac{1 + \#\{b : |\sum_i s_{bi} d_i| \ge |\sum_i d_i|\}}{1 + samples}

    with random signs :math:`s`; all of them, and no 1, for 14 differences or fewer that are not 0.

    Args:
        first, second: ``[n]``.
        groups: ``[n]``: groups are swapped as a whole.
        samples, seed: of random signs.

    Returns:
        Test: the statistic is the sum of the differences.

    Raises:
        Error: different lengths, values that are not finite, or no sample.

    >>> permutation([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p_value
    0.25
    """
    if samples < 1:
        raise Error(f"permutation needs 1 sample or more, got {samples}")
    differences = _differences(first, second, groups, "permutation")
    differences = differences[differences != 0].cpu()
    seen, count = float(differences.sum().abs()), len(differences)
    # Sums in another order may differ in their last bits.
    least = seen - 1e-12 * float(differences.abs().sum())
    if count <= EXACT:
        codes = torch.arange(2**count)
        signs = 1 - 2 * (codes[:, None] >> torch.arange(count) & 1).double()
        p_value = float(((signs @ differences).abs() >= least).double().mean()) if count else 1.0
        return Test("permutation (exact)", float(differences.sum()), p_value, (), count)
    generator = torch.Generator().manual_seed(seed)
    rows, extreme = max(AT_ONCE // count, 1), 0
    for start in range(0, samples, rows):
        signs = torch.randint(2, (min(rows, samples - start), count), generator=generator, dtype=torch.int8)
        extreme += int((((2 * signs - 1).double() @ differences).abs() >= least).sum())
    return Test("permutation", float(differences.sum()), (1 + extreme) / (1 + samples), (), count)


@card(
    paper="Wilcoxon 1945, 'Individual comparisons by ranking methods'; "
    "Demšar 2006, 'Statistical Comparisons of Classifiers over Multiple Data Sets'",
    covers=("model-evaluation-model-selection",),
    unit="model",
)
def wilcoxon(first: Any, second: Any, *, groups: Any = None) -> Test:
    r"""Whether differences lie evenly about 0, by the ranks of their sizes.

    .. math:: W = \min\Big(\sum_{d_i > 0} r_i, \sum_{d_i < 0} r_i\Big)

    Differences of 0 say nothing and are left out. Exact for 50 differences or fewer of different sizes; else by the
    normal approximation, with ties corrected for.

    Args:
        first, second: ``[n]``.
        groups: ``[n]``: differences are summed within groups first.

    Returns:
        Test: two-sided.

    Raises:
        Error: different lengths, or values that are not finite.

    >>> wilcoxon([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p_value
    0.25
    """
    differences = _differences(first, second, groups, "wilcoxon")
    differences = differences[differences != 0].cpu()
    count = len(differences)
    if not count:
        return Test("Wilcoxon", 0.0, 1.0, (), 0)
    _, place, sizes = torch.unique(differences.abs(), return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    ranks = (last - (sizes.double() - 1) / 2)[place]
    rising, total = float(ranks[differences > 0].sum()), count * (count + 1) / 2
    least = min(rising, total - rising)
    if count <= RANKED and len(sizes) == count:
        chances = _rank_sums(count)[: int(least) + 1]
        return Test("Wilcoxon (exact)", least, min(1.0, 2 * float(chances.sum())), (), count)
    ties = sizes.double()
    variance = count * (count + 1) * (2 * count + 1) / 24 - float((ties**3 - ties).sum()) / 48
    p_value = 2 * normal_tail((total / 2 - least) / math.sqrt(variance)) if variance else 1.0
    return Test("Wilcoxon", least, min(1.0, p_value), (), count)


def _rank_sums(count: int) -> Tensor:
    """The probability of every sum of a random half of the ranks 1 to ``count``."""
    chances = torch.zeros(count * (count + 1) // 2 + 1, dtype=torch.float64)
    chances[0] = 1
    for rank in range(1, count + 1):
        moved = torch.zeros_like(chances)
        moved[rank:] = chances[:-rank]
        chances = (chances + moved) / 2
    return chances


@card(
    paper="Dietterich 1998, 'Approximate Statistical Tests for Comparing Supervised Classification Learning Algorithms'"
    " (t); Alpaydin 1999, 'Combined 5x2 cv F Test for Comparing Supervised Classification Learning Algorithms' (F)",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="rejects equal training procedures no more often than its level says, where a t test over resplits does",
)
def five_by_two(differences: Any, *, statistic: str = "F") -> Test:
    r"""Whether two ways of training differ, from five times two-fold cross-validation.

    .. math:: F = \frac{\sum_{ij} p_{ij}^2}{2 \sum_i s_i^2} \sim F_{10, 5}, \qquad
        t = \frac{p_{11}}{\sqrt{\sum_i s_i^2 / 5}} \sim t_5, \qquad s_i^2 = \sum_j (p_{ij} - \bar p_i)^2

    Args:
        differences: ``[5, 2]``: scores of the first way minus those of the second, by round and half; see `folds`.
        statistic: ``F``, of more power, or ``t``.

    Returns:
        Test: of the F statistic, or two-sided of t.

    Raises:
        Error: another shape or word, or values that are not finite.
        MissingPackage: scipy is not installed.

    >>> five_by_two([[0.1, 0.2]] * 5).statistic.__round__(6)
    5.0
    """
    found = numbers(differences, "five_by_two", dimensions=2)
    if found.shape != (5, 2) or statistic not in ("F", "t"):
        raise Error(
            f"five_by_two needs differences [5, 2] and statistic F or t, got {list(found.shape)}, {statistic!r}"
        )
    spread = float((found - found.mean(1, keepdim=True)).square().sum())
    if statistic == "t":
        return _student(float(found[0, 0]), math.sqrt(spread / 5), 5, "5x2cv paired t", 10)
    squares = float(found.square().sum())
    value = squares / (2 * spread) if spread else math.inf if squares else 0.0
    p_value = f_tail(value, 10, 5, "5x2cv F") if math.isfinite(value) else 0.0
    return Test("5x2cv F", value, p_value, (10.0, 5.0), 10)


@card(
    paper="Nadeau, Bengio 2003, 'Inference for the Generalization Error'",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="rejects equal training procedures far less often than the t test that takes resplits for independent",
)
def resampled_t(differences: Any, *, test_ratio: float) -> Test:
    r"""Whether two ways of training differ, from scores over random resplits or folds of one data set.

    .. math:: t = \bar d \Big/ \sqrt{\big(\tfrac1m + \rho\big) s^2}

    Args:
        differences: ``[m]``, one per split, m >= 2.
        test_ratio: :math:`\rho`, examples tested on over those trained on; 0 is the naive test, which overlapping
            training sets make far too sure.

    Returns:
        Test: two-sided.

    Raises:
        Error: one difference only, or a ratio below 0.
        MissingPackage: scipy is not installed.

    >>> resampled_t([1.0, 2.0, 3.0], test_ratio=0.0).statistic.__round__(3)
    3.464
    """
    found = numbers(differences, "resampled_t", least=2)
    if not (math.isfinite(test_ratio) and test_ratio >= 0):
        raise Error(f"resampled_t: test_ratio is 0 or more, got {test_ratio:g}")
    count = len(found)
    error = math.sqrt(1 / count + test_ratio) * float(found.std())
    return _student(float(found.mean()), error, count - 1, "resampled t", count)


@card(
    paper="Holm 1979, 'A simple sequentially rejective multiple test procedure'; "
    "Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
)
def adjusted(p_values: Sequence[float], method: str = "holm") -> list[float]:
    r"""P values of several tests, raised so that the chance of even one false alarm stays below the level.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)}) \text{ (Holm)}, \qquad
        \tilde p_i = \min(1, m p_i) \text{ (Bonferroni)}

    Args:
        p_values: of m tests, in any order.
        method: ``holm``, never worse; ``bonferroni``; ``none``.

    Returns:
        In the order given.

    Raises:
        Error: an unknown method, or a p value outside of [0, 1].

    >>> adjusted([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if method not in ADJUSTMENTS:
        raise Error(f"adjusted knows {', '.join(ADJUSTMENTS)}, not {method!r}{did_you_mean(method, ADJUSTMENTS)}")
    if any(not 0 <= one <= 1 for one in p_values):
        raise Error(f"adjusted: p values lie between 0 and 1, got {list(p_values)}")
    count = len(p_values)
    if method != "holm":
        return [min(1.0, one * (count if method == "bonferroni" else 1)) for one in p_values]
    found, highest = [0.0] * count, 0.0
    for step, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (count - step) * p_values[index]))
        found[index] = highest
    return found
