"""Attention as a support vector machine: optimality conditions, brute force, and trained layers."""

from __future__ import annotations

import numpy
import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import attention_margin, attention_svm
from weightsmith.inspect.theory._attention_svm import effective_rank, token_differences


def problem(seed: int = 0, n: int = 4, t: int = 5, d: int = 8):
    generator = torch.Generator().manual_seed(seed)
    tokens, queries = torch.randn(n, t, d, generator=generator), torch.randn(n, d, generator=generator)
    return tokens, queries, torch.randint(0, t, (n,), generator=generator)


def test_differences_by_hand():
    tokens, queries, chosen = problem()
    found = token_differences(tokens, queries, chosen)
    weight = torch.randn(8, 8, dtype=torch.float64)
    for i in range(4):
        for t in range(5):
            by_hand = (tokens[i, chosen[i]].double() - tokens[i, t].double()) @ weight @ queries[i].double()
            assert float(found[i, t] @ weight.flatten()) == pytest.approx(float(by_hand), abs=1e-9)


def test_frobenius_meets_its_conditions():
    tokens, queries, chosen = problem(1)
    found = attention_svm(tokens, queries, chosen)
    differences = token_differences(tokens, queries, chosen)
    margins = differences @ found.weight.flatten()
    others = torch.arange(5) != chosen[:, None]
    assert float(margins[others].min()) == pytest.approx(1, abs=1e-9)
    assert bool((found.multipliers >= 0).all())
    torch.testing.assert_close(torch.einsum("nt,ntd->d", found.multipliers, differences), found.weight.flatten())
    assert float((found.multipliers * (margins - 1))[others].abs().max()) < 1e-9  # complementary
    assert float(found.multipliers.sum()) == pytest.approx(found.value**2)


def test_nuclear_is_no_larger_and_proved():
    tokens, queries, chosen = problem(2)
    small, plain = attention_svm(tokens, queries, chosen, norm="nuclear"), attention_svm(tokens, queries, chosen)
    assert small.gap < 1e-3
    assert small.value <= float(torch.linalg.svdvals(plain.weight).sum()) + 1e-9
    assert small.value == pytest.approx(float(torch.linalg.svdvals(small.weight).sum()))
    margins = token_differences(tokens, queries, chosen) @ small.weight.flatten()
    assert float(margins[torch.arange(5) != chosen[:, None]].min()) > 1 - 1e-7
    combined = torch.einsum("nt,ntd->d", small.multipliers, token_differences(tokens, queries, chosen)).reshape(8, 8)
    assert float(torch.linalg.svdvals(combined)[0]) <= 1 + 1e-9
    assert float(small.multipliers.sum()) == pytest.approx(small.value, rel=2e-3)


def test_a_single_constraint_in_both_norms():
    # The least of <A, W> >= 1 is A / |A|^2 in Frobenius norm; A is of rank one, so its nuclear norm is the same.
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    queries = torch.tensor([[1.0, 1.0]])
    for norm in ("frobenius", "nuclear"):
        found = attention_svm(tokens, queries, torch.tensor([0]), norm=norm)
        assert found.value == pytest.approx(1 / (5 * 2**0.5), rel=1e-3)
    assert found.report()["rank"] == 1
    assert found.to_json()["norm"] == "nuclear"


def test_margin_report_and_pairs():
    tokens, queries, chosen = problem(3)
    solved = attention_svm(tokens, queries, chosen)
    found = attention_margin(5 * solved.weight, tokens, queries, chosen, nuclear=True)
    assert found["correlation"] == pytest.approx(1)
    assert found["largest margin"] == pytest.approx(1 / solved.value)
    # margins are in units of the weight's norm
    assert min(found.rows(), key=lambda row: row["margin"])["margin"] == pytest.approx(1 / solved.value)
    assert found["least nuclear norm a margin"] <= found["nuclear norm a margin"] + 1e-9
    key, query = torch.randn(3, 8), torch.randn(3, 8)
    pair, whole = (attention_margin(w, tokens, queries) for w in ((key, query), key.double().T @ query.double()))
    assert dict(pair.figures) == dict(whole.figures)
    assert pair["chosen above all others"] == 1
    against = attention_margin(-solved.weight, tokens, queries, chosen)
    assert against["correlation"] == pytest.approx(-1)
    assert against["nuclear norm a margin"] is None


def test_effective_rank():
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)


def test_refusals():
    tokens, queries, chosen = problem()
    with pytest.raises(Error, match="needs tokens"):
        attention_svm(tokens, queries[:2], chosen)
    with pytest.raises(Error, match="places"):
        attention_svm(tokens, queries, chosen + 9)
    with pytest.raises(Error, match="norm="):
        attention_svm(tokens, queries, chosen, norm="max")
    with pytest.raises(Error, match="nothing is asked"):
        attention_svm(tokens[:, :1].expand(-1, 5, -1), queries, chosen)
    with pytest.raises(Error, match="all 0"):
        attention_margin(torch.zeros(8, 8), tokens, queries)
    with pytest.raises(Error, match="not all finite"):
        attention_margin(torch.full((8, 8), torch.nan), tokens, queries)
    with pytest.raises(Error, match="not all finite"):
        attention_svm(tokens * torch.nan, queries, chosen)
    inside = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    with pytest.raises(Error, match="no point"):
        attention_svm(inside, torch.ones(1, 2), torch.tensor([0]))
    assert numpy.isfinite(attention_svm(tokens.bfloat16(), queries.bfloat16(), chosen).value)


def test_margin_by_hand_of_any_weights():
    tokens, queries, chosen = problem(5)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(6)).double()
    found = attention_margin(weight, tokens, queries, chosen)
    for i, row in enumerate(found.rows()):
        scores = tokens[i].double() @ weight @ queries[i].double()
        gaps = [float(scores[chosen[i]] - score) for t, score in enumerate(scores) if t != chosen[i]]
        assert row["margin"] == pytest.approx(min(gaps) / float(weight.norm()))
        assert row["attention"] == pytest.approx(float(scores.softmax(0)[chosen[i]]))
    assert found["margin"] == pytest.approx(min(found["margin"] for found in found.rows()))
    solved = attention_svm(tokens, queries, chosen).weight
    cosine = float((weight * solved).sum() / weight.norm() / solved.norm())
    assert found["correlation"] == pytest.approx(cosine)
    assert found["nuclear norm"] == pytest.approx(float(torch.linalg.svdvals(weight).sum()))
