"""Tests of no difference: by enumeration, by textbook formulas, and by how often they reject equals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import (
    adjusted,
    cochran_q,
    five_by_two,
    mcnemar,
    paired_t,
    permutation,
    resampled_t,
    wilcoxon,
)


def right(b: int, c: int, both: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.tensor([1] * b + [0] * c + [1] * both + [0] * both)
    second = torch.tensor([0] * b + [1] * c + [1] * both + [0] * both)
    return first, second


def test_mcnemar():
    for b, c in ((1, 6), (6, 1), (4, 4), (0, 3), (10, 3)):
        n = b + c
        tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
        found = mcnemar(*right(b, c))
        assert found.p_value == pytest.approx(min(1, 2 * tail))
        assert (found.statistic, found.count) == (b - c, n)
        mid = min(1, 2 * tail - math.comb(n, min(b, c)) / 2**n)
        assert mcnemar(*right(b, c), method="mid").p_value == pytest.approx(mid)
        plain = mcnemar(*right(b, c), method="chi2 plain")
        assert plain.statistic == pytest.approx((b - c) ** 2 / n)
        assert plain.p_value == pytest.approx(math.erfc(math.sqrt(plain.statistic / 2)))
        if b != c:
            assert mcnemar(*right(b, c), method="chi2").statistic == pytest.approx((abs(b - c) - 1) ** 2 / n)
    assert mcnemar(*right(4, 4), method="chi2").statistic == 0
    assert mcnemar(*right(0, 0)).p_value == 1
    assert mcnemar(*right(600, 700)).p_value == pytest.approx(0.006, abs=5e-4)
    with pytest.raises(Error, match="right"):
        mcnemar([0.5], [1.0])
    with pytest.raises(Error, match="chi2"):
        mcnemar([1], [1], method="chi")


def test_cochran_q_of_two_is_mcnemar():
    first, second = right(9, 2)
    found = cochran_q(torch.stack([first, second]))
    plain = mcnemar(first, second, method="chi2 plain")
    assert found.statistic == pytest.approx(plain.statistic)
    assert found.p_value == pytest.approx(plain.p_value)
    assert cochran_q(torch.stack([first] * 3)).p_value == 1
    with pytest.raises(Error, match="2 models"):
        cochran_q(first[None])


def test_permutation_against_all_signs():
    d = torch.tensor([0.3, -1.0, 2.5, 0.7, 0.7, -0.1, 0.0], dtype=torch.float64)
    sums = [abs(sum(s * x for s, x in zip(signs, d.tolist(), strict=True)))
            for signs in itertools.product((1, -1), repeat=7)]  # fmt: skip
    expected = sum(one >= abs(float(d.sum())) - 1e-9 for one in sums) / len(sums)
    assert permutation(d, torch.zeros(7)).p_value == pytest.approx(expected)
    many = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 0.15
    sampled, student = permutation(many, torch.zeros(200)), paired_t(many, torch.zeros(200))
    assert sampled.p_value == pytest.approx(student.p_value, abs=0.01)
    assert permutation(torch.ones(30), torch.zeros(30)).p_value == pytest.approx(1 / 10001)
    assert permutation([1.0], [1.0]).p_value == 1
    with pytest.raises(Error, match="1 sample"):
        permutation([1.0], [1.0], samples=0)
    with pytest.raises(Error, match="needs"):
        cochran_q(torch.zeros(2, 0))
    groups = torch.arange(200) // 20
    summed = permutation(many.view(10, 20).sum(1), torch.zeros(10))
    assert permutation(many, torch.zeros(200), groups=groups).p_value == pytest.approx(summed.p_value)


def test_wilcoxon_against_all_signs():
    d = torch.tensor([0.3, -1.0, 2.5, 0.7, 0.8, -0.1])
    ranks = [2, 5, 6, 3, 4, 1]
    low = sum(r for r, x in zip(ranks, d.tolist(), strict=True) if x < 0)
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=6)]
    expected = 2 * sum(one <= low for one in sums) / 64
    found = wilcoxon(d, torch.zeros(6))
    assert (found.statistic, found.p_value) == pytest.approx((low, expected))
    assert wilcoxon(-d, torch.zeros(6)).p_value == found.p_value
    assert wilcoxon([1.0, 1.0], [1.0, 1.0]).p_value == 1
    assert wilcoxon(torch.ones(9), torch.zeros(9)).p_value < 0.01  # ties: the approximation


def test_paired_t_by_hand():
    found = paired_t([1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0])
    assert found.statistic == pytest.approx(3 / (math.sqrt(14 / 3) / 2))
    assert found.freedom == (3.0,)
    assert paired_t([1.0, 1.0], [0.0, 0.0]).p_value == 0
    assert paired_t([1.0, 1.0], [1.0, 1.0]).p_value == 1
    with pytest.raises(Error, match="2 differences"):
        paired_t([1.0], [0.0])


def test_five_by_two_by_hand():
    p = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spread = sum(float(((row - row.mean()) ** 2).sum()) for row in p)
    assert five_by_two(p).statistic == pytest.approx(float((p**2).sum()) / (2 * spread))
    assert five_by_two(p, statistic="t").statistic == pytest.approx(float(p[0, 0]) / math.sqrt(spread / 5))
    assert five_by_two(torch.zeros(5, 2)).p_value == 1
    assert five_by_two(torch.ones(5, 2)).p_value == 0
    with pytest.raises(Error, match=r"\[5, 2\]"):
        five_by_two(torch.zeros(2, 5))


def test_levels_where_nothing_differs():
    generator = torch.Generator().manual_seed(0)
    rejected = {"permutation": 0, "t": 0, "wilcoxon": 0, "mcnemar": 0, "F": 0, "5x2 t": 0}
    for _ in range(400):
        a, b = torch.randn(2, 20, generator=generator)
        rejected["permutation"] += permutation(a, b, samples=300).p_value < 0.05
        rejected["t"] += paired_t(a, b).p_value < 0.05
        rejected["wilcoxon"] += wilcoxon(a, b).p_value < 0.05
        rejected["mcnemar"] += mcnemar(a > 0, b > 0).p_value < 0.05
        p = torch.randn(5, 2, generator=generator)
        rejected["F"] += five_by_two(p).p_value < 0.05
        rejected["5x2 t"] += five_by_two(p, statistic="t").p_value < 0.05
    assert all(count / 400 <= 0.08 for count in rejected.values()), rejected
    assert all(rejected[name] / 400 >= 0.02 for name in ("permutation", "t", "wilcoxon")), rejected


def test_resampled_t():
    d = [0.1, 0.3, 0.2, 0.4]
    naive, corrected = resampled_t(d, test_ratio=0.0), resampled_t(d, test_ratio=0.25)
    assert naive.statistic == pytest.approx(paired_t(d, [0.0] * 4).statistic)
    assert corrected.statistic == pytest.approx(naive.statistic * math.sqrt(0.25 / 0.5))
    with pytest.raises(Error, match="test_ratio"):
        resampled_t(d, test_ratio=-1)


def test_adjusted():
    p = [0.01, 0.04, 0.03, 0.005]
    assert adjusted(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted(p, "bonferroni") == pytest.approx([0.04, 0.16, 0.12, 0.02])
    assert adjusted(p, "none") == p
    assert adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert adjusted([]) == []
    with pytest.raises(Error, match="between 0 and 1"):
        adjusted([1.5])
